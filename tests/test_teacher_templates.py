"""Conversations are rendered for the teacher by its own template, with the tools and the thoughts of the student's."""

import pytest
from alone import Sample, ids_of, logprobs_alone, loss_alone, make_rows, train_one_step
from datasets import Dataset
from steps import assert_same_gradient, build, gradient_of, student
from test_trainer_inputs import CALL, TOOL_VOCAB, Calculator, script, tool_tokenizer
from test_views import BLOCKS, PAIRS, TEACHER_TEMPLATE, template_ending_in
from tiny import make_model, make_tokenizer

QUESTIONS = ("hi", "who", "abc", "x y z")
USER = [[{"role": "user", "content": content}] for content in QUESTIONS]
PRIVILEGED = [
    [{"role": "system", "content": "be concise"}, USER[0][0]],
    [{"role": "user", "content": "the answer is 42. who"}],
    USER[2],
    None,
]


def qwen():
    return make_model(hidden_size=24, seed=1).double()


def conversations(teacher_prompts=None):
    columns = {} if teacher_prompts is None else {"teacher_prompt": teacher_prompts * 2}
    return Dataset.from_dict({"prompt": USER * 2, **columns})


def chat(messages, end=""):
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in messages)
    return f"{turns}<|im_start|>assistant\n{end}"


def lines(messages, hurry=False):
    """As `TEACHER_TEMPLATE` writes it."""
    turns = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
    return f"{turns}{'be quick' if hurry else ''}{chr(10) if hurry else ''}assistant: "


def other_tokenizer(template=TEACHER_TEMPLATE):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def check(step, ours, theirs):
    """The loss and gradient are those of each sample alone, with these texts as prompts of student and teacher."""
    belonging = {tuple(ids_of(a)): ids_of(b) for a, b in zip(ours, theirs, strict=True)}
    rows = []
    for inputs in step.batches:
        for i in range(len(inputs["prompt_ids"])):
            prompt, completion = (
                inputs[f"{name}_ids"][i][inputs[f"{name}_mask"][i].bool()].tolist()
                for name in ("prompt", "completion")
            )
            rows.append(Sample(prompt, belonging[tuple(prompt)], completion))
    model, teacher = student(), qwen()
    loss = loss_alone(model, lambda prompt, completion: logprobs_alone(teacher, prompt, completion), rows)
    assert step.loss.item() == pytest.approx(loss.item(), rel=2e-6, abs=2e-7)
    assert_same_gradient(step.gradient, gradient_of(model, loss), tolerance=2e-6)


def theirs_of(prompts):
    return [ours if prompt is None else prompt for ours, prompt in zip(USER, prompts, strict=True)]


def test_conversational_prompts_of_the_teacher(tmp_path):
    step = train_one_step(tmp_path, teacher=qwen(), rows=conversations(PRIVILEGED))
    check(step, [chat(m) for m in USER], [chat(m) for m in theirs_of(PRIVILEGED)])


def test_texts_for_the_teacher_beside_conversations_of_the_student(tmp_path):
    texts = ["hi", "the answer is 42. who", None, "user: x y z"]
    step = train_one_step(tmp_path, teacher=qwen(), rows=conversations(texts))
    theirs = [chat(m) if text is None else text for m, text in zip(USER, texts, strict=True)]
    check(step, [chat(m) for m in USER], theirs)


@pytest.mark.parametrize("arguments", [{}, {"chat_template_kwargs": {"no_think": True}}], ids=["plain", "no think"])
def test_the_same_conversations_are_bit_equal_to_no_column(tmp_path, arguments):
    steps = [
        train_one_step(tmp_path / str(i), teacher=qwen(), rows=conversations(column), **arguments)
        for i, column in enumerate((USER, None))
    ]
    assert not any("teacher_prompt_ids" in inputs for inputs in steps[0].batches)
    assert [loss.item() for loss in steps[0].losses] == [loss.item() for loss in steps[1].losses]


KNOWN = {
    "the teacher's own": ({}, False),
    "on demand the student's": ({"teacher_chat_template": "student"}, None),
    "with arguments": ({"chat_template_kwargs": {"hurry": True}}, True),
    "with its own arguments": ({"teacher_chat_template_kwargs": {"hurry": True}}, True),
}


@pytest.mark.parametrize("where", ["argument", "path"])
@pytest.mark.parametrize("column", [None, PRIVILEGED], ids=["prompt", "teacher_prompt"])
@pytest.mark.parametrize(("fields", "hurry"), KNOWN.values(), ids=KNOWN.keys())
def test_which_template_renders(tmp_path, where, column, fields, hurry):
    arguments, teacher = {}, qwen()
    if where == "argument":
        arguments["teacher_processing_class"] = other_tokenizer()
    else:
        teacher = str(tmp_path / "teacher")
        qwen().save_pretrained(teacher)
        other_tokenizer().save_pretrained(teacher)
    step = train_one_step(tmp_path, teacher=teacher, rows=conversations(column), arguments=arguments, **fields)
    messages = USER if column is None else theirs_of(column)
    theirs = [chat(m) for m in messages] if hurry is None else [lines(m, hurry) for m in messages]
    check(step, [chat(m) for m in USER], theirs)


def test_texts_are_not_rendered_by_any_template(tmp_path):
    arguments = {"teacher_processing_class": other_tokenizer()}
    step = train_one_step(tmp_path, teacher=qwen(), rows=make_rows(None), arguments=arguments)
    assert not any("teacher_prompt_ids" in inputs for inputs in step.batches)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[f"student {a}, teacher {b}" for a, b in PAIRS])
def test_the_completion_continues_the_same_block_of_thoughts(tmp_path, ours, theirs):
    student_tokenizer = other_tokenizer(template_ending_in(BLOCKS[ours]))
    step = train_one_step(
        tmp_path,
        teacher=qwen(),
        rows=conversations(PRIVILEGED),
        arguments={
            "processing_class": student_tokenizer,
            "teacher_processing_class": other_tokenizer(template_ending_in(BLOCKS[theirs])),
        },
    )

    def text(messages):
        return chat(messages, BLOCKS[ours]).replace("<|im_end|>", "<|im_end|>\n")

    check(step, [text(m) for m in USER], [text(m) for m in theirs_of(PRIVILEGED)])


def tool_trainer(tmp_path, **arguments):
    """A student with Qwen3's template, which names the tools; the teacher has the same and prompts of its own."""
    rows = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"what is {i} + 4?"}] for i in range(4)],
            "teacher_prompt": [[{"role": "user", "content": f"It is {i + 4}. What is {i} + 4?"}] for i in range(4)],
        }
    )
    trainer = build(
        tmp_path,
        model=student(vocab_size=TOOL_VOCAB),
        teacher=make_model(hidden_size=24, seed=1, vocab_size=TOOL_VOCAB).double(),
        max_completion_length=256,
        arguments={"train_dataset": rows, "processing_class": tool_tokenizer(), **arguments},
    )
    script(trainer, CALL)
    return trainer


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        The sum.
    """
    return a + b


@pytest.mark.parametrize("source", ["tools", "environment"])
def test_the_teachers_prompt_names_the_students_tools(tmp_path, source):
    arguments = {"tools": [add]} if source == "tools" else {"environment_factory": Calculator}
    trainer = tool_trainer(tmp_path, **arguments)
    batches, compute_loss = [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: batches.append(inputs) or compute_loss(model, inputs)
    trainer.train()
    (inputs,) = batches
    tokenizer = tool_tokenizer()
    for i in range(4):
        ours, theirs = (
            tokenizer.decode(inputs[f"{name}_ids"][i][inputs[f"{name}_mask"][i].bool()])
            for name in ("prompt", "teacher_prompt")
        )
        (tools, question), (their_tools, their_question) = (
            text.split("<|im_start|>user\n") for text in (ours, theirs)
        )
        number = int(question.split()[2])
        assert '"name": "add"' in tools
        assert their_tools == tools
        assert their_question.startswith(f"It is {number + 4}. What is {number} + 4?")
        assert their_question.endswith("<|im_end|>\n<|im_start|>assistant\n")
