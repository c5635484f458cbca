"""Faults of tokens, each planted in a clean pair: the check that is meant for it, and no other, sees a problem."""

import pytest
import torch
from run_facts import (
    CHAT,
    EOS,
    IM_END,
    chats,
    facts_of,
    found,
    infos,
    large_config,
    make_run,
    model_of,
    problems,
    save_model,
    texts,
    the,
    tokenizer_of,
)
from tiny import CHAT_TEMPLATE, VOCAB_SIZE, make_tokenizer, trainer_config
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer
from trl_opd.doctor import check_facts, gather
from trl_opd.doctor.tokens import turn_end

CHECKS = {
    "eos", "pad", "bos", "special_tokens", "vocabulary", "retokenization", "chat_template", "think_boundary",
    "dataset", "prompt_length", "generation_config", "learning_rate", "loss_type",
}  # fmt: skip


@pytest.mark.parametrize("dataset", [chats(), texts()], ids=["messages", "text"])
def test_a_clean_pair_has_no_problem(dataset):
    findings = found(dataset=dataset)
    assert problems(findings) == []
    assert {finding.check for finding in findings} == CHECKS


def test_a_clean_pair_on_disk_has_no_problem(tmp_path):
    student, teacher = save_model(tmp_path / "a"), save_model(tmp_path / "b", seed=1, hidden_size=24)
    findings = found(student=student, teacher=teacher)
    assert problems(findings) == []
    assert {finding.check for finding in findings} == CHECKS


# End of sequence


def test_a_teacher_that_ends_where_the_student_does_not_stop():
    student, tokenizer = model_of(eos=(EOS,)), tokenizer_of(eos_token="<eos>")
    findings = found(student=student, tokenizer=tokenizer)
    assert problems(findings) == [("eos", "error")]
    finding = the(findings, "eos")
    assert "'<|im_end|>' (id 3)" in finding.seen and "stops at '<eos>' (id 1)" in finding.seen
    assert "eos_token_id to [3, 1]" in finding.do and "generation_config.json" in finding.do
    # What it says to set mends it
    student.generation_config.eos_token_id = [3, 1]
    assert problems(found(student=student, tokenizer=tokenizer)) == []


def test_it_is_a_warning_where_prompts_are_text():
    findings = found(dataset=texts(), student=model_of(eos=(EOS,)), tokenizer=tokenizer_of(eos_token="<eos>"))
    assert problems(findings) == [("eos", "warning")]


def test_a_student_that_ends_where_the_teacher_does_not():
    student = model_of(eos=(IM_END, EOS))
    base = {"teacher": model_of(eos=(EOS,)), "tokenizer": tokenizer_of()}
    other = CHAT_TEMPLATE.replace("<|im_end|>", "<eos>")
    findings = found(
        **base,
        student=student,
        teacher_tokenizer=tokenizer_of(eos_token="<eos>", chat_template=other),
        teacher_chat_template="student",
    )
    assert problems(findings) == [("eos", "warning")]
    assert "unlearns to stop" in the(findings, "eos").why
    assert "'<eos>'" in the(findings, "eos").do


def test_a_teacher_whose_template_closes_with_the_students_end_knows_it():
    teacher = {"teacher": model_of(eos=(EOS,)), "teacher_tokenizer": tokenizer_of(eos_token="<eos>")}
    assert problems(found(student=model_of(eos=(IM_END, EOS)), **teacher)) == []


def test_the_generation_config_of_a_folder_is_read(tmp_path):
    student = save_model(tmp_path / "a", eos=(EOS,), tokenizer=tokenizer_of(eos_token="<eos>"))
    teacher = save_model(tmp_path / "b", seed=1, eos=(EOS, IM_END), tokenizer=tokenizer_of())
    run = {"tokenizer": tokenizer_of(eos_token="<eos>"), "teacher": teacher}
    assert problems(found(student=student, **run)) == [("eos", "error")]
    mended = save_model(tmp_path / "c", eos=(EOS, IM_END), tokenizer=tokenizer_of(eos_token="<eos>"))
    assert problems(found(student=mended, **run)) == []


def test_no_end_at_all():
    findings = found(
        student=model_of(eos=None),
        tokenizer=tokenizer_of(eos_token=None),
        teacher=model_of(eos=(EOS,)),
        dataset=texts(),
    )
    assert problems(findings) == [("eos", "error")]


def test_a_template_that_closes_with_what_nobody_stops_at():
    plain = {"student": model_of(eos=(EOS,)), "teacher": model_of(eos=(EOS,))}
    findings = found(**plain, tokenizer=make_tokenizer(), teacher_tokenizer=make_tokenizer())
    assert problems(findings) == []
    assert infos(findings) == ["eos"]
    assert "closes an answer with '<|im_end|>' (id 3)" in next(f for f in findings if f.severity == "info").seen


def test_a_masked_end_is_worth_knowing():
    findings = found(special_token_masking=["<|im_end|>"])
    assert problems(findings) == []
    assert infos(findings) == ["eos"]


@pytest.mark.parametrize("declared", [None, (EOS,), (EOS, IM_END), (5,)])
def test_the_stop_ids_are_those_of_the_trainer(tmp_path, declared):
    student, tokenizer = model_of(eos=declared), tokenizer_of()
    facts = facts_of(student=student, tokenizer=tokenizer)
    args = OnPolicyDistillConfig(**trainer_config(tmp_path))
    trainer = OnPolicyDistillTrainer(student, "self", args=args, train_dataset=texts(), processing_class=tokenizer)
    assert set(facts.student.stop_ids) == set(trainer.eos_token_ids)


def test_the_end_of_a_turn():
    assert turn_end(tokenizer_of()) == IM_END
    assert turn_end(tokenizer_of(chat_template="{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}")) == EOS
    assert turn_end(tokenizer_of(chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}")) is None
    assert turn_end(tokenizer_of(chat_template=None)) is None
    assert turn_end(tokenizer_of(chat_template="{{ raise_exception('no') }}")) is None


# Padding


def test_a_pad_token_without_a_row():
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    student = model_of()
    findings = found(student=student, tokenizer=tokenizer)
    assert [(f.check, f.severity) for f in findings if f.is_problem] == [("pad", "error"), ("vocabulary", "error")]
    assert (
        f"'[PAD]' (id {VOCAB_SIZE})" in the(findings, "pad").seen and f"{VOCAB_SIZE} rows" in the(findings, "pad").seen
    )
    with pytest.raises(IndexError):
        student(torch.tensor([[tokenizer.pad_token_id]]))


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_padding_with_the_end_token_is_worth_knowing(pad):
    findings = found(tokenizer=tokenizer_of(pad_token=pad))
    assert problems(findings) == []
    assert infos(findings) == ["pad"]
    assert "'<|im_end|>' (id 3)" in the(findings, "pad").seen


# Beginning of sequence


def with_bos(token="<|im_start|>", adds=True, **changes):
    tokenizer = tokenizer_of(bos_token=token, **changes)
    if adds:
        number = tokenizer.convert_tokens_to_ids(token)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, number)]
        )
    return tokenizer


def test_a_tokenizer_that_adds_a_beginning():
    findings = found(dataset=texts(), teacher_tokenizer=with_bos())
    assert problems(findings) == [("bos", "warning")]
    assert "adds none" in the(findings, "bos").seen and "adds '<|im_start|>' (id 2)" in the(findings, "bos").seen
    assert problems(found(dataset=texts(), teacher_tokenizer=with_bos(), tokenizer=with_bos())) == []


def test_tokenizers_that_add_other_beginnings():
    findings = found(dataset=texts(), tokenizer=with_bos("<eos>"), teacher_tokenizer=with_bos())
    assert problems(findings) == [("bos", "warning")]


def test_templates_with_other_beginnings():
    bos = "<|im_start|>"
    template = tokenizer_of().chat_template.replace("<|im_start|>", "")
    ours = with_bos(adds=False, chat_template=template)
    theirs = with_bos(adds=False, chat_template="{{ bos_token }}" + template)
    findings = found(tokenizer=ours, teacher_tokenizer=theirs)
    assert problems(findings) == [("bos", "warning")]
    assert "begins with none for the student" in the(findings, "bos").seen and bos in the(findings, "bos").seen


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_two_beginnings(kind):
    template = tokenizer_of().chat_template.replace("<|im_start|>", "")
    tokenizer = with_bos(chat_template="<|im_start|><|im_start|>" + template)
    rows = {"text": [f"<|im_start|>{text}" for text in "abcdefgh"], "messages": CHAT}[kind]
    findings = found(dataset=chats(rows), tokenizer=tokenizer, teacher_tokenizer=tokenizer)
    assert problems(findings) == [("bos", "warning")]
    assert "begins with 2 of them for the student" in the(findings, "bos").seen


# Special tokens, vocabularies


def test_a_token_of_the_template_that_the_teacher_does_not_have():
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['role'] }}", "<|user|>")
    findings = found(tokenizer=tokenizer, student=model_of(vocab_size=VOCAB_SIZE + 1), teacher_chat_template="student")
    assert problems(findings) == [("special_tokens", "warning")]
    assert f"'<|user|>' (id {VOCAB_SIZE})" in the(findings, "special_tokens").seen


def test_a_special_token_at_another_id():
    ours, theirs = tokenizer_of(), tokenizer_of()
    for tokenizer, tokens in ((ours, ["<|a|>", "<|b|>"]), (theirs, ["<|b|>"])):
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    findings = found(
        tokenizer=ours,
        teacher_tokenizer=theirs,
        student=model_of(vocab_size=VOCAB_SIZE + 2),
        teacher=model_of(vocab_size=VOCAB_SIZE + 1),
        check=False,
    )
    assert ("special_tokens", "warning") in problems(findings)
    assert f"'<|b|>' is {VOCAB_SIZE + 1} and {VOCAB_SIZE}" in the(findings, "special_tokens").seen


def test_a_token_that_is_special_to_one_only_is_worth_knowing():
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    findings = found(tokenizer=tokenizer)
    assert problems(findings) == []
    assert infos(findings) == ["special_tokens"]


def test_a_padded_vocabulary_is_worth_knowing():
    findings = found(teacher=model_of(seed=1, vocab_size=64))
    assert problems(findings) == []
    assert infos(findings) == ["vocabulary"]
    seen = the(findings, "vocabulary").seen
    assert "51 rows (student) and 64 (the teacher)" in seen and "the 51 tokens" in seen


def test_another_vocabulary():
    theirs = make_tokenizer("zyxwvutsrqponmlkjihgfedcba0123456789 .<>|_:/\n")
    findings = found(dataset=texts(), teacher_tokenizer=theirs, teacher=model_of(eos=(EOS, IM_END)), check=False)
    assert ("vocabulary", "error") in problems(findings)
    assert "id 6 is 'a' to the student and 'z' to the teacher" in the(findings, "vocabulary").seen


def test_a_tokenizer_with_more_tokens_than_the_student_has_rows():
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["<|more|>"])
    findings = found(tokenizer=tokenizer)
    assert problems(findings) == [("vocabulary", "error")]
    assert f"'<|more|>' (id {VOCAB_SIZE})" in the(findings, "vocabulary").seen


# Retokenization


def test_a_normalizer_of_the_teacher():
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("b", "d")
    findings = found(teacher_tokenizer=tokenizer, dataset=chats([[{"role": "user", "content": "abc"}]] * 8))
    assert ("retokenization", "warning") in problems(findings)
    finding = the(findings, "retokenization")
    assert "their normalizers differ" in finding.seen and "['b', 'c']" in finding.seen and "['d', 'c']" in finding.seen


def test_another_normalizer_is_seen_by_the_probe_alone():
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("f", "d")
    findings = found(teacher_tokenizer=tokenizer, dataset=texts())
    assert problems(findings) == [("retokenization", "warning")]


def test_added_tokens_that_cut_text_otherwise():
    ours, theirs = tokenizer_of(), tokenizer_of()
    theirs.add_tokens(["item"])
    findings = found(teacher_tokenizer=theirs, teacher=model_of(vocab_size=64))
    assert problems(findings) == [("retokenization", "warning")]
    assert "added tokens" in the(findings, "retokenization").seen
    assert ours.tokenize("item") == list("item")


def test_text_that_the_tokenizer_swallows():
    findings = found(dataset=chats([[{"role": "user", "content": "abc DEF"}]] * 8))
    assert problems(findings) == [("retokenization", "warning")]
    assert (
        "8 of 8 prompts" in the(findings, "retokenization").seen and "'abcDEF'" in the(findings, "retokenization").seen
    )


def test_a_teacher_of_which_nothing_is_known_is_said_not_to_be_compared():
    run, _ = make_run(teacher=lambda batch: None, check=False)
    findings = check_facts(gather(run, [None]), memory=False)
    assert problems(findings) == []
    assert infos(findings) == ["bos", "special_tokens", "vocabulary", "retokenization"]
    assert all("the teacher" in f.seen and "not compared" in f.seen for f in findings if f.severity == "info")


def test_the_student_as_its_own_teacher_is_compared_with_nobody():
    findings = found(teacher="self")
    assert problems(findings) == [] and infos(findings) == []


def test_a_large_config_is_taken_for_what_it_is():
    from trl_opd.doctor.settings import approximate_parameters

    full = large_config(vocab_size=151936)
    assert approximate_parameters(full) == pytest.approx(596_049_920, rel=0.1)  # Qwen3-0.6B
