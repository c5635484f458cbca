# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Whether two models speak the same tokens, and which entries of their heads can be compared."""

from transformers import PreTrainedTokenizerBase, ProcessorMixin

# Padding rounds a vocabulary up to a multiple of 64 to 1024 per tensor-parallel rank; more than this is another one
_MAX_PADDING = 2048


def as_tokenizer(processing_class: object) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a tokenizer or processor."""
    if isinstance(processing_class, ProcessorMixin):
        return processing_class.tokenizer
    return processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{tokenizer.name_or_path or type(tokenizer).__name__} ({len(tokenizer)} tokens)"


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> int:
    """
    Compare two tokenizers id by id.

    One may have more tokens than the other, if all that both number are the same tokens.

    Returns:
        `int`: How many ids (from 0) mean the same to both.

    Raises:
        ValueError: If an id means different tokens, naming both tokenizers and the first such id.
    """
    student_tokens = {i: token for token, i in student.get_vocab().items()}
    teacher_tokens = {i: token for token, i in teacher.get_vocab().items()}
    shared = min(max(student_tokens), max(teacher_tokens)) + 1
    for i in range(shared):
        ours, theirs = student_tokens.get(i), teacher_tokens.get(i)
        if ours != theirs and ours is not None and theirs is not None:
            raise ValueError(
                f"The teacher must share the student's tokenizer, but {_name(student)} and {_name(teacher)} disagree: "
                f"id {i} is {ours!r} to the student and {theirs!r} to the teacher. The teacher would score other text "
                "than the student wrote. Use a teacher of the same tokenizer family, or TRL's GOLDTrainer, which "
                "distils across tokenizers."
            )
    return shared


def shared_vocab_size(
    student_size: int,
    teacher_size: int,
    student: PreTrainedTokenizerBase | None,
    teacher: PreTrainedTokenizerBase | None,
) -> int:
    """
    Number of leading head entries to compare.

    Heads of equal size are compared whole. Otherwise one of them is padded (or has extra tokens at its end), and the
    real tokens that both have are compared.

    Args:
        student_size (`int`), teacher_size (`int`): Rows of the two heads.
        student, teacher ([`~transformers.PreTrainedTokenizerBase`], *optional*): The tokenizers, where known.

    Raises:
        ValueError: If the vocabularies are different ones, naming both sizes.
    """
    shared = min(student_size, teacher_size)
    if student is not None and teacher is not None:
        shared = min(shared, check_tokenizers(student, teacher))
        return student_size if student_size == teacher_size else shared
    if student_size == teacher_size:
        return student_size
    known = student if student is not None else teacher
    real = shared + 1 if known is None else max(known.get_vocab().values()) + 1
    if real > shared or abs(student_size - teacher_size) > _MAX_PADDING:
        raise ValueError(
            f"The student has vocab_size {student_size} and the teacher {teacher_size}, and no tokenizer of the "
            "teacher is known to show that this is padding. Comparing different vocabularies trains on noise. Pass "
            "teacher_processing_class=, or a teacher of the same tokenizer family."
        )
    return real
