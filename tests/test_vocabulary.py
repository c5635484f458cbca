"""Which head entries of two models can be compared, and when they cannot be at all."""

import pytest
from tiny import CHARACTERS, make_tokenizer

from trl_opd.vocabulary import check_tokenizers, shared_vocab_size


def with_more(*tokens):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def test_equal_tokenizers_share_all_ids():
    assert check_tokenizers(make_tokenizer(), make_tokenizer()) == 51


def test_a_tokenizer_with_more_tokens_at_its_end_shares_the_others():
    assert check_tokenizers(make_tokenizer(), with_more("<tool>", "<image>")) == 51
    assert check_tokenizers(with_more("<tool>", "<image>"), make_tokenizer()) == 51


@pytest.mark.parametrize(
    "other",
    [make_tokenizer(CHARACTERS[::-1]), make_tokenizer(CHARACTERS[1:]), with_more("<tool>")],
    ids=["reordered", "shifted", "another added token"],
)
def test_an_id_of_two_meanings_is_refused_with_both_names(other):
    ours = with_more("<image>")
    ours.name_or_path, other.name_or_path = "org/student", "org/teacher"
    with pytest.raises(ValueError) as error:
        check_tokenizers(ours, other)
    message = str(error.value)
    assert f"org/student ({len(ours)} tokens)" in message
    assert f"org/teacher ({len(other)} tokens)" in message
    i = next(i for i in range(60) if ours.convert_ids_to_tokens(i) != other.convert_ids_to_tokens(i))
    mine, theirs = ours.convert_ids_to_tokens(i), other.convert_ids_to_tokens(i)
    assert f"id {i} is {mine!r} to the student and {theirs!r} to the teacher" in message


def test_an_id_that_only_one_tokenizer_names_is_no_contradiction():
    ours, gap = make_tokenizer(), make_tokenizer()
    vocabulary = {token: i for token, i in ours.get_vocab().items() if i != 40}
    gap.get_vocab = lambda: vocabulary
    assert check_tokenizers(ours, gap) == 51


@pytest.mark.parametrize(
    ("student_size", "teacher_size", "shared"),
    [(51, 51, 51), (64, 64, 64), (51, 64, 51), (64, 51, 51), (64, 80, 51), (80, 64, 51), (51, 100000, 51)],
)
def test_with_both_tokenizers_the_real_tokens_are_shared(student_size, teacher_size, shared):
    assert shared_vocab_size(student_size, teacher_size, make_tokenizer(), make_tokenizer()) == shared


def test_tokens_that_only_one_model_has_are_left_out():
    assert shared_vocab_size(56, 64, with_more("<a>", "<b>"), make_tokenizer()) == 51
    assert shared_vocab_size(64, 56, make_tokenizer(), with_more("<a>", "<b>")) == 51


def test_heads_of_one_size_are_compared_whole_without_tokenizers():
    assert shared_vocab_size(64, 64, None, None) == 64
    assert shared_vocab_size(64, 64, make_tokenizer(), None) == 64


@pytest.mark.parametrize("sizes", [(64, 80), (80, 64), (51, 51 + 2048)])
def test_one_tokenizer_explains_a_difference_of_padding(sizes):
    assert shared_vocab_size(*sizes, make_tokenizer(), None) == 51
    assert shared_vocab_size(*sizes, None, make_tokenizer()) == 51


@pytest.mark.parametrize("sizes", [(64, 40), (40, 64), (51, 51 + 2049), (64, 32000)])
def test_a_difference_that_no_padding_explains_is_refused_with_both_sizes(sizes):
    with pytest.raises(ValueError) as error:
        shared_vocab_size(*sizes, make_tokenizer(), None)
    assert f"vocab_size {sizes[0]} and the teacher {sizes[1]}" in str(error.value)
    assert "teacher_processing_class=" in str(error.value)


def test_different_sizes_without_any_tokenizer_are_refused():
    with pytest.raises(ValueError, match="vocab_size 64 and the teacher 80"):
        shared_vocab_size(64, 80, None, None)
