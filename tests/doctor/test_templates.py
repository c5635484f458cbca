"""Faults of chat templates and of thoughts, and that prompts are read as training reads them."""

from importlib import resources

import pytest
from alone import train_one_step
from datasets import Dataset
from run_facts import CHAT, IM_END, chats, facts_of, found, infos, model_of, problems, texts, the, tokenizer_of
from test_views import TEACHER_TEMPLATE
from tiny import CHAT_TEMPLATE, make_model

from trl_opd.doctor import check_facts
from trl_opd.doctor.templates import first_difference, side_by_side

SPACE = CHAT_TEMPLATE.replace("assistant\n", "assistant\n{{ ' ' }}")
SYSTEM = "<|im_start|>system\nbe kind<|im_end|>" + CHAT_TEMPLATE
THINKS = CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
PLAIN = CHAT_TEMPLATE[: CHAT_TEMPLATE.index("{% if no_think")] + "{% endif %}"
SWITCH = PLAIN.replace(
    "assistant\n",
    "assistant\n{% if enable_thinking is defined and enable_thinking == false %}<think></think>{% endif %}",
)


def template(text):
    return tokenizer_of(chat_template=text)


@pytest.mark.parametrize(
    ("theirs", "position", "student_reads", "teacher_reads"),
    [(SPACE, 20, "nothing more", "' '"), (SYSTEM, 1, "'u s e r", "'s y s t e m")],
    ids=["a space at the end", "a system prompt"],
)
def test_templates_that_differ(theirs, position, student_reads, teacher_reads):
    findings = found(teacher_tokenizer=template(theirs))
    assert problems(findings) == [("chat_template", "warning")]
    finding = the(findings, "chat_template")
    assert finding.seen.startswith(f"prompt 0 differs at token {position}: after '")
    assert f"the student reads {student_reads}" in finding.seen and f"the teacher {teacher_reads}" in finding.seen
    assert "teacher_chat_template='student'" in finding.do


def test_the_same_template_in_other_words_is_no_difference():
    findings = found(teacher_tokenizer=template("{# written elsewhere #}" + CHAT_TEMPLATE))
    assert problems(findings) == [] and infos(findings) == []


@pytest.mark.parametrize("given", [{"teacher_chat_template": "own"}, {"teacher_chat_template_kwargs": {}}])
def test_a_difference_that_is_meant_is_worth_knowing(given):
    findings = found(teacher_tokenizer=template(SYSTEM), **given)
    assert problems(findings) == []
    assert infos(findings) == ["chat_template"]
    assert the(findings, "chat_template").seen.endswith(f"as {next(iter(given))} says")


def test_the_students_template_for_both_is_no_difference():
    findings = found(teacher_tokenizer=template(SYSTEM), teacher_chat_template="student")
    assert problems(findings) == [] and infos(findings) == []


def test_prompts_of_the_teachers_own_are_no_difference():
    own = chats(teacher_prompt=[[{"role": "user", "content": "the answer is 42"}]] * 8)
    assert problems(found(dataset=own)) == []
    assert problems(found(teacher_view=lambda *args: "x")) == []


def test_a_student_without_a_template():
    findings = found(tokenizer=template(None))
    assert problems(findings) == [("chat_template", "error")]
    assert "processing_class" in the(findings, "chat_template").do


def test_a_teacher_without_a_template():
    findings = found(teacher_tokenizer=template(None))
    assert problems(findings) == [("chat_template", "warning")]
    assert "no chat template" in the(findings, "chat_template").seen
    assert problems(found(teacher_tokenizer=template(None), teacher_chat_template="student")) == []


def test_a_template_that_refuses_the_prompts():
    findings = found(tokenizer=template(CHAT_TEMPLATE + "{{ raise_exception('roles must alternate') }}"))
    assert ("chat_template", "error") in problems(findings)
    assert "roles must alternate" in the(findings, "chat_template").seen


def test_text_for_a_model_with_a_template_is_worth_knowing():
    findings = found(dataset=texts())
    assert problems(findings) == [] and infos(findings) == ["chat_template"]
    rendered = [f"<|im_start|>user\n{text}<|im_end|><|im_start|>assistant\n" for text in "abcdefgh"]
    assert infos(found(dataset=chats(rendered))) == []


# Thoughts


@pytest.mark.parametrize(("student", "teacher"), [(PLAIN, SWITCH), (SWITCH, PLAIN)])
def test_one_that_thinks_and_one_that_does_not(student, teacher):
    findings = found(tokenizer=template(student), teacher_tokenizer=template(teacher))
    assert problems(findings) == [("think_boundary", "warning")]
    who = "the teacher" if teacher == SWITCH else "the student"
    assert f"the chat template of {who} has thoughts" in the(findings, "think_boundary").seen
    for both in (student, teacher):
        assert problems(found(tokenizer=template(both), teacher_tokenizer=template(both))) == []


def test_a_student_that_opens_thoughts_and_a_teacher_without():
    findings = found(tokenizer=template(THINKS), teacher_tokenizer=template(PLAIN))
    assert ("think_boundary", "warning") in problems(findings)
    assert "ends in '<think>'" in the(findings, "think_boundary").seen
    assert problems(found(tokenizer=template(THINKS), teacher_tokenizer=template(THINKS))) == []


@pytest.mark.parametrize(
    "kwargs",
    [
        {"teacher_chat_template_kwargs": {"enable_thinking": False}},
        {"teacher_chat_template_kwargs": {}, "chat_template_kwargs": {"enable_thinking": False}},
    ],
    ids=["teacher", "student"],
)
def test_thinking_that_is_set_for_one_only(kwargs):
    findings = found(tokenizer=template(SWITCH), teacher_tokenizer=template(SWITCH), **kwargs)
    assert problems(findings) == [("think_boundary", "warning")]
    assert "enable_thinking" in the(findings, "think_boundary").seen


def test_thinking_that_is_set_for_both():
    clean = {"tokenizer": template(SWITCH), "teacher_tokenizer": template(SWITCH)}
    assert problems(found(**clean, chat_template_kwargs={"enable_thinking": False})) == []


@pytest.mark.parametrize(
    "ends", [("abc<think>", "abc"), ("abc", "abc<think></think>"), ("a<think>", "a<think></think>")]
)
def test_texts_that_end_on_other_sides_of_a_thought(ends):
    ours, theirs = ends
    findings = found(dataset=chats([ours] * 8, teacher_prompt=[theirs] * 8))
    assert problems(findings) == [("think_boundary", "warning")]
    assert problems(found(dataset=chats([ours] * 8, teacher_prompt=[f"know this. {ours}"] * 8))) == []


# Templates of published models, as TRL keeps them


def published(name):
    text = (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    return tokenizer_of(chat_template=text)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("qwen3", "qwen3", []),
        ("qwen3", "qwen3_training", []),  # other words, the same prompts
        ("qwen3_vl", "qwen3_instruct_2507", []),
        ("qwen3", "qwen3_instruct_2507", ["think_boundary"]),
        ("qwen2_5", "qwen3_instruct_2507", ["chat_template"]),  # a system prompt of its own
        ("qwen2_5", "qwen3", ["chat_template", "think_boundary"]),
        ("qwen3_5_think", "qwen3_5_think_training", []),
        ("qwen3_5_think", "qwen3_instruct_2507", ["think_boundary"]),
    ],
)
def test_templates_of_published_models(student, teacher, expected):
    findings = found(tokenizer=published(student), teacher_tokenizer=published(teacher))
    assert problems(findings) == [(name, "warning") for name in expected]


# As training reads them


@pytest.mark.parametrize(
    ("theirs", "prompts", "kwargs"),
    [
        (TEACHER_TEMPLATE, None, {}),
        (TEACHER_TEMPLATE, None, {"teacher_chat_template": "student"}),
        (CHAT_TEMPLATE, [[{"role": "user", "content": "the answer"}], None], {}),
        (CHAT_TEMPLATE, ["some text", None], {"chat_template_kwargs": {"no_think": True}}),
        (SYSTEM, None, {"chat_template_kwargs": {"no_think": True}}),
    ],
)
def test_prompts_are_read_as_in_training(tmp_path, theirs, prompts, kwargs):
    rows = [CHAT[0], CHAT[1]]
    given = {} if prompts is None else {"teacher_prompt": prompts * 4}
    dataset = Dataset.from_dict({"prompt": rows * 4, **given})
    tokenizer = template(theirs)
    step = train_one_step(
        tmp_path,
        teacher=make_model(hidden_size=24, seed=1).double(),
        rows=dataset,
        arguments={"teacher_processing_class": tokenizer},
        **kwargs,
    )
    read = set()
    for inputs in step.batches:
        names = "teacher_prompt" if "teacher_prompt_ids" in inputs else "prompt"
        for i in range(len(inputs["prompt_ids"])):
            pair = (inputs[f"{n}_ids"][i][inputs[f"{n}_mask"][i].bool()].tolist() for n in ("prompt", names))
            read.add(tuple(tuple(ids) for ids in pair))
    facts = facts_of(
        dataset=dataset, tokenizer=template(CHAT_TEMPLATE), teacher_tokenizer=tokenizer, teacher=model_of(1), **kwargs
    )
    known = {(tuple(r.student_ids), tuple(r.teacher_ids)) for r in facts.readings(facts.teachers[0])}
    assert known == read


def test_each_of_several_teachers_reads_its_own_samples():
    teachers = {"math": model_of(1), "code": model_of(2)}
    dataset = chats(teacher=["math", "code"] * 4)
    facts = facts_of(
        dataset=dataset,
        teacher=teachers,
        teacher_tokenizer={"math": template(CHAT_TEMPLATE), "code": template(SYSTEM)},
    )
    assert [[r.index for r in facts.readings(t)] for t in facts.teachers] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    findings = check_facts(facts, memory=False)
    assert problems(findings) == [("chat_template", "warning")]
    assert "the teacher 'code'" in the(findings, "chat_template").seen
    assert "prompt 1 differs" in the(findings, "chat_template").seen


# Side by side


def test_side_by_side():
    facts = facts_of(teacher_tokenizer=template(SPACE))
    pairs = side_by_side(facts, [(t, facts.readings(t)) for t in facts.teachers])
    assert len(pairs) == 8
    assert (pairs[0]["differs_at"], pairs[0]["student_token"], pairs[0]["teacher_token"]) == (20, None, " ")
    same = facts_of()
    assert [p["differs_at"] for p in side_by_side(same, [(t, same.readings(t)) for t in same.teachers])] == [None] * 8


def test_the_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [IM_END]) == 0
