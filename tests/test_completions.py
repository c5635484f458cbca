"""Completions of a dataset, tokenized as the student writes."""

import pytest
from rollout_fakes import EOS, TOKENIZER, ids_of, make_trainer

from trl_opd.completions import dataset_completion
from trl_opd.teachers.answers import TeacherScoreError


def make_row(completion=None, prompt="ab", **columns):
    return {"prompt": prompt, "completion": completion, **columns}


@pytest.mark.parametrize(
    "row, member, expected",
    [
        (make_row("cd"), 0, [*ids_of("cd"), EOS]),
        (make_row("cd<eos>ef"), 0, [*ids_of("cd"), EOS]),
        (make_row(""), 0, [EOS]),
        (make_row("abcdefgh"), 0, ids_of("abcdefgh")),  # 8 tokens: the end does not fit
        (make_row("abcdefghi"), 0, ids_of("abcdefgh")),
        (make_row("abcdefg"), 0, [*ids_of("abcdefg"), EOS]),
        (make_row(["c", "d", "e"]), 1, [*ids_of("d"), EOS]),
        (make_row(["c", "d", "e"]), 5, [*ids_of("e"), EOS]),
        (make_row("cd", completion_ids=[7, 8]), 3, [7, 8]),
        (make_row(completion_ids=[[7, 8], [9]]), 1, [9]),
        (make_row(completion_ids=list(range(20))), 0, list(range(8))),
    ],
)
def test_completions_of_a_dataset_are_written_as_the_student_writes(row, member, expected):
    assert dataset_completion(make_trainer(), row, ids_of("ab"), member) == expected


def test_messages_continue_the_prompt_by_the_chat_template():
    trainer = make_trainer()
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    trainer.eos_token_ids = [EOS, end]
    prompt, message = [{"role": "user", "content": "ab"}], {"role": "assistant", "content": "cd"}
    prompt_ids = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    whole = TOKENIZER.apply_chat_template([*prompt, message])["input_ids"]
    expected = whole[len(prompt_ids) :]
    assert expected == [*ids_of("cd"), end]
    for completion in ([message], "cd", [[message], [message]]):
        assert dataset_completion(trainer, make_row(completion, prompt), prompt_ids) == expected
    trainer.chat_template_kwargs = {"no_think": True}  # the prompt ends in an empty block, the rendered turn has none
    assert dataset_completion(trainer, make_row([message], prompt), prompt_ids) == [*ids_of("cd"), EOS]


@pytest.mark.parametrize(
    "row, message",
    [
        (make_row(None), "the prompt 'ab' has none there"),
        (make_row([]), "has none there"),
        (make_row(completion_ids=[[], [3]]), "at least one id"),
        (make_row([{"role": "assistant", "content": "c"}]), "text beside a prompt that is text"),
        (
            make_row([{"role": "user", "content": "c"}], [{"role": "user", "content": "a"}]),
            "one message of the assist",
        ),
    ],
)
def test_a_row_without_a_completion_is_named(row, message):
    with pytest.raises(TeacherScoreError, match=message):
        dataset_completion(make_trainer(), row, ids_of("ab"))


def test_a_token_over_the_end_of_the_prompt_is_not_torn(monkeypatch):
    """Where a tokenizer would merge both sides, the prompt keeps its ids."""
    trainer = make_trainer()

    class Merging:
        eos_token_id = EOS

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [99] if text == "ab" else ids_of(text)}

    trainer._tokenizer = Merging()
    assert dataset_completion(trainer, make_row("b", prompt="a"), ids_of("a")) == [*ids_of("b"), EOS]
