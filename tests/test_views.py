"""The teacher's prompt is rendered by its own template and ends where the student's ends."""

import itertools
from types import SimpleNamespace

import pytest
from tiny import CHARACTERS, make_tokenizer
from tokenizers import decoders

from trl_opd import views
from trl_opd.views import PromptRenderer, make_groups, make_renderer, renders_alike

USER = [{"role": "user", "content": "what is it"}]
HINTED = [{"role": "system", "content": "the answer is 42"}, *USER]
TEACHER_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if tools %}tools: {% for t in tools %}{{ t['function']['name'] }} {% endfor %}{% endif %}"
    "{% if hurry is defined and hurry %}be quick\n{% endif %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer_with(template=None, fused=True, **kwargs):
    tokenizer = make_tokenizer(**kwargs)
    if fused:
        tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # as real ones; without it, spaces between the tokens
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def ids_of(text):
    """Token by token, from the vocabulary alone."""
    vocabulary, ids = make_tokenizer().get_vocab(), []
    while text:
        token = next((t for t in vocabulary if len(t) > 1 and text.startswith(t)), text[0])
        ids.append(vocabulary[token])
        text = text[len(token) :]
    return ids


def renderer(template=None, student=None, kwargs=None):
    student = tokenizer_with() if student is None else student
    return PromptRenderer(tokenizer_with(template), None, kwargs or {}, student)


def test_messages_go_through_the_template_of_the_teacher():
    ids = renderer(TEACHER_TEMPLATE).render(HINTED, ids_of("anything"))
    assert ids == ids_of("system: the answer is 42\nuser: what is it\nassistant: ")


def test_a_given_template_stands_in_the_place_of_the_tokenizers():
    tokenizer = tokenizer_with()
    ids = PromptRenderer(tokenizer, TEACHER_TEMPLATE, {}, tokenizer).render(USER, ids_of("x"))
    assert ids == ids_of("user: what is it\nassistant: ")


def test_arguments_and_tools_reach_the_template():
    def add(a: int) -> int:
        """
        Add.

        Args:
            a: A number.
        """
        return a

    ids = renderer(TEACHER_TEMPLATE, kwargs={"hurry": True}).render(USER, ids_of("x"), tools=[add])
    assert ids == ids_of("user: what is it\ntools: add be quick\nassistant: ")


def test_text_is_encoded_as_it_is():
    assert renderer(TEACHER_TEMPLATE).render("the answer is 42. what", ids_of("what")) == ids_of(
        "the answer is 42. what"
    )


BLOCKS = {"nothing": "", "open": "<think>\n", "closed": "<think>\n\n</think>\n\n"}
PAIRS = list(itertools.product(BLOCKS, BLOCKS))


def template_ending_in(block):
    escaped = block.replace("\n", "\\n")
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n" + escaped + "' }}{% endif %}"
    )


@pytest.mark.parametrize("fused", [True, False], ids=["plain decoder", "decoder that adds spaces"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[f"student {a}, teacher {b}" for a, b in PAIRS])
def test_the_teachers_prompt_ends_in_the_students_block_of_thoughts(ours, theirs, fused):
    student = tokenizer_with(template_ending_in(BLOCKS[ours]), fused)
    student_ids = student.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    assert student_ids == ids_of(f"<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\n{BLOCKS[ours]}")
    ids = renderer(template_ending_in(BLOCKS[theirs]), student).render(HINTED, student_ids)
    hint = "<|im_start|>system\nthe answer is 42<|im_end|>\n<|im_start|>user\nwhat is it<|im_end|>\n"
    assert ids == ids_of(f"{hint}<|im_start|>assistant\n{BLOCKS[ours]}")


def test_thoughts_within_a_conversation_are_left_alone():
    earlier = [*USER, {"role": "assistant", "content": "<think>hm</think>42"}, {"role": "user", "content": "why"}]
    ids = renderer(template_ending_in("<think>\n")).render(earlier, ids_of("<|im_start|>assistant\n"))
    assert ids == ids_of(
        "<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\n<think>hm</think>42<|im_end|>\n"
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_block_that_begins_within_a_token_is_kept():
    """A vocabulary in which the newline before the block belongs to its first token."""
    student = tokenizer_with()
    student.add_tokens(["\n<think>"])
    student_ids = student("hi\n<think>\n")["input_ids"]
    assert len(student_ids) == 4
    ids = renderer(template_ending_in(""), student).render(USER, student_ids)
    assert ids == ids_of("<|im_start|>user\nwhat is it<|im_end|>\n<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[f"student {a}, teacher {b}" for a, b in PAIRS])
def test_texts_that_disagree_about_thoughts_warn_once(ours, theirs, monkeypatch):
    warnings = []
    monkeypatch.setattr(views.logger, "warning", warnings.append)
    shared = renderer()
    for question in ("hi", "who"):
        text = f"{question}\n{BLOCKS[theirs]}"
        assert shared.render(text, ids_of(f"{question}\n{BLOCKS[ours]}")) == ids_of(text)
    assert len(warnings) == (ours != theirs)
    assert all("End teacher_prompt like prompt" in warning for warning in warnings)


def test_the_first_tokens_of_text_are_those_of_the_tokenizer():
    """A tokenizer that begins texts with a token does so for the teacher, once, and not after a template."""
    from tokenizers.processors import TemplateProcessing

    begins = tokenizer_with(TEACHER_TEMPLATE)
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    render = PromptRenderer(begins, None, {}, tokenizer_with()).render
    assert render("what", ids_of("what")) == ids_of("<eos>what")
    assert render(USER, ids_of("what")) == ids_of("user: what is it\nassistant: ")


BAD = {
    "a number": (42, "must be text or a list of messages"),
    "a list of texts": (["what"], "must be text or a list of messages"),
    "no messages": ([], "must be text or a list of messages"),
    "an image": (
        [{"role": "user", "content": [{"type": "image", "image": None}]}],
        r"must hold text, got content of type \['image'\]",
    ),
    "empty text": ("", "must have a token, got ''"),
}


@pytest.mark.parametrize(("prompt", "match"), BAD.values(), ids=BAD.keys())
def test_what_is_no_prompt_is_refused(prompt, match):
    with pytest.raises(ValueError, match=f"teacher_prompt {match}"):
        renderer().render(prompt, ids_of("x"))


def run_with(template=None, chat_template=None, chat_template_kwargs=None, **args):
    """The part of a trainer that decides how prompts are rendered."""
    defaults = {"teacher_chat_template": "own", "teacher_chat_template_kwargs": None}
    return SimpleNamespace(
        args=SimpleNamespace(**{**defaults, **args}),
        chat_template_kwargs=chat_template_kwargs or {},
        chat_template=chat_template,
        _tokenizer=tokenizer_with(template),
    )


CONVERSATION = "<|im_start|>user\nwhat is it<|im_end|><|im_start|>assistant\n"
CHOICES = {
    "the teacher's own": ({}, TEACHER_TEMPLATE, "user: what is it\nassistant: "),
    "the student's, on demand": ({"teacher_chat_template": "student"}, TEACHER_TEMPLATE, CONVERSATION),
    "the student's, where the teacher has none": ({}, "", CONVERSATION),
    "the student's, where no tokenizer is known": ({}, None, CONVERSATION),
    "the run's": (
        {"teacher_chat_template": "student", "chat_template": TEACHER_TEMPLATE},
        "",
        "user: what is it\nassistant: ",
    ),
    "with the student's arguments": (
        {"chat_template_kwargs": {"hurry": True}},
        TEACHER_TEMPLATE,
        "user: what is it\nbe quick\nassistant: ",
    ),
    "with its own arguments": (
        {"chat_template_kwargs": {"hurry": True}, "teacher_chat_template_kwargs": {"calm": True}},
        TEACHER_TEMPLATE,
        "user: what is it\nassistant: ",
    ),
}


@pytest.mark.parametrize(("fields", "template", "expected"), CHOICES.values(), ids=CHOICES.keys())
def test_which_template_renders(fields, template, expected):
    teacher = None if template is None else tokenizer_with(template)
    assert make_renderer(run_with(**fields), teacher).render(USER, ids_of("x")) == ids_of(expected)


def test_the_teachers_tokenizer_knows_its_own_tokens():
    longer = tokenizer_with("{{ messages[0]['content'] }}é", characters=CHARACTERS + "é")
    ids = make_renderer(run_with(), longer).render(USER, ids_of("x"))
    assert ids == [*ids_of("what is it"), len(make_tokenizer())]


def test_which_renderers_give_the_students_own_prompts():
    run = run_with(chat_template_kwargs={"hurry": True})
    assert renders_alike(make_renderer(run, None), run)
    assert renders_alike(make_renderer(run, tokenizer_with()), run)
    assert not renders_alike(make_renderer(run, tokenizer_with(TEACHER_TEMPLATE)), run)
    run.args.teacher_chat_template_kwargs = {"hurry": False}
    assert not renders_alike(make_renderer(run, None), run)
    patched = run_with(chat_template=TEACHER_TEMPLATE)  # TRL's template for training, in the place of the tokenizer's
    assert renders_alike(make_renderer(patched, None), patched)
    assert not renders_alike(make_renderer(patched, tokenizer_with()), patched)


def test_groups_are_the_other_completions_of_a_prompt():
    groups = make_groups(["a", "b", "c", "d"], [0.0, 1.0, None, 3.0], 2)
    assert groups == [
        [{"completion": "b", "reward": 1.0}],
        [{"completion": "a", "reward": 0.0}],
        [{"completion": "d", "reward": 3.0}],
        [{"completion": "c", "reward": None}],
    ]
    assert make_groups(["a", "b"], [None, None], 1) == [[], []]
