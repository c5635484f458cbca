"""The checks that need weights: each fault is planted and found, and runs that are well are found well."""

import random
import re
from types import SimpleNamespace

import pytest
import torch
from alone import make_gpt2
from datasets import Dataset
from peft import LoraConfig
from planted import ENDS, LISTED, SAMPLED, Scores, look, make_run, make_student, names, near, problems
from steps import full_logprobs
from test_trainer_features import make_processor, make_vlm
from test_trainer_inputs import CALL, TOOL_VOCAB, messages, script, tool_tokenizer
from tiny import VOCAB_SIZE, make_model, make_prompts, make_tokenizer
from torch import nn

import trl_opd.distill_head
from trl_opd.doctor.distance import repetition
from trl_opd.doctor.measure import measure
from trl_opd.doctor.models import CHECKS, check_models
from trl_opd.doctor.samples import draw, undisturbed
from trl_opd.teachers import MixtureTeacher


def the_one(findings, check, severity=None):
    """The one problem, which is of that check and says what to do."""
    found = problems(findings)
    assert names(found) == {check}, [str(f) for f in found]
    assert all(f.why and f.do for f in found)
    assert severity is None or {f.severity for f in found} == {severity}
    return " ".join(str(f) for f in found)


LORA = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}
TWO = {"train_dataset": make_prompts(12).add_column("teacher", ["one", "two"] * 6)}
HINTS = {"train_dataset": make_prompts(12).add_column("teacher_prompt", ["a hint. abc", None] * 6)}
WELL = {
    "local": (lambda: near(), {}),
    "identical": (lambda: near(by=0), {}),
    "float32": (lambda: near().float(), {"model": make_student().float()}),
    "autocast": (lambda: near().float(), {"model": make_student().float(), "bf16": True}),
    "half": (lambda: near().bfloat16(), {"model": make_student().bfloat16(), "bf16": True}),
    "top-k": (lambda: Scores(near(), 20), LISTED),
    "sampled": (lambda: Scores(near()), SAMPLED),
    "local sampled": (lambda: near(), SAMPLED),
    "student's top k": (lambda: near(), {"support": "student_top_k", "support_size": 8}),
    "warm": (lambda: near(), {"temperature": 1.4}),
    "tempered": (lambda: Scores(near(), 20), {**LISTED, "temperature": 0.7}),
    "compared at another": (lambda: near(), {"distill_temperature": 1.7}),
    "cut": (lambda: near(), {"top_p": 0.8, "top_k": 30, "temperature": 0.8}),
    "self": (lambda: "self", {}),
    "base": (lambda: "base", {"arguments": LORA}),
    "routed": (lambda: {"one": near(), "two": Scores(near(1), 20)}, {"arguments": TWO}),
    "mixed": (lambda: MixtureTeacher([near(), near(1)]), {}),
    "with a reference": (
        lambda: near(),
        {"arguments": {"reference_model": near(3)}, "target": "extrapolate", "target_kwargs": {"scale": 1.2}},
    ),
    "hinted": (lambda: near(by=0), {"arguments": HINTS}),
    "masked": (lambda: near(), {"special_token_masking": ["<eos>", "<|im_end|>"]}),
}


@pytest.mark.parametrize("case", WELL)
def test_a_run_that_is_well_has_no_problem(tmp_path, case):
    teacher, fields = WELL[case]
    findings = look(make_run(tmp_path, teacher(), **fields))
    assert problems(findings) == [], [str(f) for f in problems(findings)]
    assert names(findings) == set(CHECKS)
    if case not in ("identical", "self", "base"):  # these have nothing to teach, and are told
        assert {f.severity for f in findings if f.check == "student_distance"} == {"ok"}


def test_a_view_sees_whole_groups_and_may_leave_samples_out(tmp_path):
    groups = []

    def view(example, completion, reward, group):
        groups.append(len(group))
        return None if len(groups) % 4 == 0 else f"{example['prompt']} {group[0]['completion']}"

    findings = look(make_run(tmp_path, near(), num_generations=4, arguments={"teacher_view": view}), num_samples=8)
    assert [f for f in problems(findings) if f.check not in ("student_distance", "gap_by_position")] == []
    assert groups == [3] * 8


@pytest.mark.parametrize("reference", [False, True], ids=["teacher", "target"])
def test_every_token_is_measured_as_full_logits_have_it(tmp_path, reference):
    """Gap, KL, rank, overlap, ends and the expectation of a sample, against float64 formulas."""
    student, teacher = make_student(), near(by=0.1)
    target = {"target": "extrapolate", "arguments": {"reference_model": near(3)}} if reference else {}
    trainer = make_run(tmp_path, teacher, model=student, temperature=0.8, top_p=0.7, **target)
    with undisturbed(trainer) as side:
        samples = draw(trainer, side, 6)
        tokens, _ = measure(samples.batch)
        inputs, mask = samples.batch.inputs, samples.batch.loss_mask
        ours, theirs = (full_logprobs(m, inputs, 0.8)[mask] for m in (student, teacher))
        ids = inputs["completion_ids"][mask][:, None]
        mine, yours = ours.gather(-1, ids)[:, 0], theirs.gather(-1, ids)[:, 0]
        sorted_, order = ours.sort(descending=True)
        kept = torch.zeros_like(ours).scatter(-1, order, (sorted_.exp().cumsum(-1) - sorted_.exp() < 0.7).double())
        weights = kept * ours.exp() / (kept * ours.exp()).sum(-1, keepdim=True)
        mean = (weights * ours).sum(-1)
    top = [x.topk(16).indices for x in (ours, theirs)]
    expected = {
        "student": mine,
        "teacher": yours,
        "entropy": -(ours.exp() * ours).sum(-1),
        "reverse_kl": (ours.exp() * (ours - theirs)).sum(-1),
        "forward_kl": (theirs.exp() * (theirs - ours)).sum(-1),
        "overlap": (top[0][:, :, None] == top[1][:, None, :]).any(-1).double().mean(-1),
        "rank": (theirs > yours[:, None]).sum(-1) + 1.0,
        "own_rank": (ours > mine[:, None]).sum(-1) + 1.0,
        "end": ours[:, ENDS].exp().sum(-1),
        "excess": mine - mean,
        "variance": (weights * (ours - mean[:, None]).square()).sum(-1),
        "best_logprob": theirs.amax(-1),
    }
    if reference:  # two answers to every token: which is the likeliest entry is not asked
        expected = {name: x for name, x in expected.items() if name not in ("rank", "best_logprob")}
    for name, values in expected.items():
        apart = (getattr(tokens, name) - values).abs().max().item()
        assert apart < 1e-5, f"{name}: {apart}"
    assert reference or tokens.best.tolist() == theirs.argmax(-1).tolist()
    assert tokens.last.tolist() == [int(i) in ENDS for i in ids[:, 0]]
    assert tokens.row.tolist() == mask.nonzero()[:, 0].tolist()
    assert tokens.position.tolist() == mask.nonzero()[:, 1].tolist()


def test_of_a_list_ranks_and_the_best_are_known_as_far_as_it_goes(tmp_path):
    student, teacher = make_student(), near(by=0.1)
    trainer = make_run(tmp_path, Scores(teacher, 9), model=student, **{**LISTED, "support_size": 9})
    with undisturbed(trainer) as side:
        samples = draw(trainer, side, 6)
        tokens, answered = measure(samples.batch)
        inputs, mask = samples.batch.inputs, samples.batch.loss_mask
        ours, theirs = (full_logprobs(m, inputs)[mask] for m in (student, teacher))
    yours = theirs.gather(-1, tokens.ids[:, None])
    rank = ((theirs > yours).sum(-1) + 1).clamp(max=10)
    assert tokens.rank.tolist() == rank.tolist() and {1, 10} < set(rank.tolist())
    assert tokens.best.tolist() == theirs.argmax(-1).tolist()
    listed = torch.cat([x.student[0].logprobs for x in answered])
    torch.testing.assert_close(listed, ours.gather(-1, theirs.topk(9).indices), rtol=0, atol=1e-5, check_dtype=False)


def test_nothing_of_it_stays_in_the_trainer(tmp_path, monkeypatch):
    """The run that follows is, bit for bit, the one that was never looked at; so are its log lines."""
    runs = []
    for looked_at in (False, True):
        trainer = make_run(
            tmp_path, near(by=0.1), max_steps=2, max_completion_length=12, gradient_accumulation_steps=2
        )
        trainer.model.model.layers[0].eval()
        if looked_at:
            state, kept = (
                torch.get_rng_state(),
                {k: dict(v) for k, v in trainer.__dict__.items() if isinstance(v, dict)},
            )
            parts = [trainer._groups, trainer._rollouts, trainer._teacher_side]
            noted = [dict(part.__dict__) for part in parts]
            with monkeypatch.context() as patch:
                for watcher in (trainer._diagnostics, trainer._token_view):
                    patch.setattr(watcher, "note_rollouts", lambda *args: pytest.fail("a watcher was told"))
                assert check_models(trainer, num_samples=6)
            for part, before in zip(parts, noted, strict=True):
                assert all(part.__dict__[name] is value for name, value in before.items())
            assert {k: dict(v) for k, v in trainer.__dict__.items() if isinstance(v, dict)} == kept
            assert not any(trainer._metrics.values()) and not trainer._logs["prompt"]
            assert not any(metrics._sums for metrics in trainer._token_metrics.values())
            assert torch.equal(state, torch.get_rng_state())
            assert not trainer.model.model.layers[0].training and trainer.model.training
            assert all(p.grad is None for p in trainer.model.parameters())
        trainer.train()
        logs = [
            {k: v for k, v in line.items() if not re.search("time|runtime|per_second|wait", k)}
            for line in trainer.state.log_history
        ]
        runs.append((logs, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
    (logs, weights), (logs_after, weights_after) = runs
    assert logs == logs_after and len(logs) > 2
    assert all(torch.equal(weights[n], weights_after[n]) for n in weights)


def test_rewards_are_not_asked_for(tmp_path):
    def reward(completions, **kwargs):
        raise AssertionError("was asked")

    trainer = make_run(tmp_path, near(), num_generations=2, arguments={"reward_funcs": reward})
    assert problems(look(trainer)) == []


def test_progress_names_every_check_and_its_time(tmp_path):
    lines = []
    check_models(make_run(tmp_path, near()), num_samples=4, progress=lines.append)
    assert all(re.fullmatch(r".+ \(\d+\.\d s\)", line) for line in lines)
    assert [line.split(" (")[0] for line in lines][2:] == list(CHECKS)


def test_samples_with_images_are_looked_at_in_one_batch(tmp_path):
    image = pytest.importorskip("PIL.Image")
    images = [image.new("RGB", (28, 28), (60 * i, 10, 200 - 50 * i)) for i in range(4)]
    rows = {"prompt": [[{"role": "user", "content": text}] for text in ("what", "is", "this", "one")], "image": images}
    student, teacher = make_vlm(), make_vlm()
    teacher.lm_head.weight.data.mul_(1.1)
    arguments = {"train_dataset": Dataset.from_dict(rows), "processing_class": make_processor()}
    trainer = make_run(tmp_path, teacher, model=student, per_device_train_batch_size=2, arguments=arguments)
    findings = look(trainer, num_samples=4)
    assert problems(findings) == []
    by_check = {f.check: f for f in findings}
    assert "images" in by_check["batch_invariance"].seen and "images" in by_check["teacher_perplexity"].seen
    assert by_check["self_kl"].severity == by_check["student_distance"].severity == "ok"


def test_results_of_tools_are_not_the_students(tmp_path):
    """They are left out of what is measured."""

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

    rows = messages("what is 3 + 4?", "hi", "what is 3 and 4?", "hello")
    arguments = {"train_dataset": rows, "processing_class": tool_tokenizer(), "tools": [add]}
    sizes = {"vocab_size": TOOL_VOCAB}
    trainer = make_run(
        tmp_path, near(**sizes), model=make_student(**sizes), max_completion_length=256, arguments=arguments
    )
    turns = script(trainer, CALL)
    findings = look(trainer, num_samples=4)
    assert len(turns) == 2
    (found,) = [f for f in findings if "rollouts" in f.seen]
    texts = [CALL + "the sum is 7<|im_end|>", "the sum is 77<|im_end|>", CALL + "the sum is 77<|im_end|>"]
    written = sum(len(tool_tokenizer()(text)["input_ids"]) for text in [*texts, "the sum is 7777<|im_end|>"])
    assert f"of {written} sampled tokens" in found.seen


# Determinism


def test_dropout_in_the_teacher(tmp_path):
    trainer = make_run(tmp_path, near(attention_dropout=0.3))
    trainer.teacher.model.train()
    assert re.search(r"asked twice about 4 samples.*dropout.*model\.eval|attn", the_one(look(trainer), "determinism"))


def test_noise_in_a_list(tmp_path):
    def noise(logprobs, prompt, completion):
        return (logprobs + 0.4 * torch.randn(logprobs.shape, dtype=logprobs.dtype)).log_softmax(-1)

    assert "model.eval()" in the_one(
        look(make_run(tmp_path, Scores(near(), 20, change=noise), **LISTED)), "determinism"
    )


# Padding and neighbours


def test_a_teacher_that_sees_the_padding(tmp_path):
    teacher = near()

    @torch.no_grad()
    def blind(batch):
        logits = teacher(input_ids=batch.input_ids).logits[:, -batch.num_completion_tokens - 1 : -1]
        return logits.log_softmax(-1).gather(-1, batch.completion_ids[..., None])[..., 0]

    found = the_one(look(make_run(tmp_path, blind, **SAMPLED)), "batch_invariance")
    assert "teacher 'blind'" in found and "attention mask" in found


@pytest.mark.parametrize("prompts", [["abc", "hello world"], ["abc", "xyz"]], ids=["padded", "of one length"])
def test_a_teacher_that_sees_its_neighbours_or_positions(tmp_path, prompts):
    """Scores that follow the mean of the batch; where nothing is padded, padding is added for the check."""
    inner = Scores(near())

    def mean(batch):
        scores = inner(batch).sampled_logprobs
        return scores - 0.02 * (batch.input_ids.shape[1] - batch.num_completion_tokens)

    rows = Dataset.from_dict({"prompt": prompts * 6})
    findings = look(make_run(tmp_path, mean, arguments={"train_dataset": rows}, **SAMPLED))
    the_one(findings, "batch_invariance")


def test_a_student_with_absolute_positions(tmp_path):
    model = make_gpt2()
    model.generation_config.eos_token_id = ENDS
    findings = look(make_run(tmp_path, Scores(make_gpt2()), model=model, **SAMPLED))
    (found,) = [f for f in problems(findings) if f.check == "batch_invariance"]
    assert found.seen.startswith("student") and "per_device_train_batch_size=1" in found.do


# The head


def test_a_head_that_reads_another_token(tmp_path, monkeypatch):
    op = trl_opd.distill_head.fused_linear_divergence

    def shifted(*args, target_ids, **kwargs):
        return op(*args, target_ids=target_ids.roll(1), **kwargs)

    trainer = make_run(tmp_path, near(by=0))
    monkeypatch.setattr(trl_opd.distill_head, "fused_linear_divergence", shifted)
    assert "distillation head and of the model's own logits" in the_one(
        [f for f in look(trainer) if f.check == "self_kl"], "self_kl", "error"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"student_logit_scale": 1.2},
        {"teacher_hidden": lambda h: h.roll(1, 0)},
    ],
    ids=["scale", "shift"],
)
def test_a_head_that_compares_other_things(tmp_path, monkeypatch, change):
    op = trl_opd.distill_head.fused_linear_divergence

    def wrong(*args, **kwargs):
        return op(*args, **{**kwargs, **{k: v(kwargs[k]) if callable(v) else v for k, v in change.items()}})

    trainer = make_run(tmp_path, near(by=0))
    monkeypatch.setattr(trl_opd.distill_head, "fused_linear_divergence", wrong)
    found = the_one([f for f in look(trainer) if f.check == "self_kl"], "self_kl", "error")
    assert "with itself as teacher" in found and "loss_backend" in found


def scaled(model, scale):
    """A forward that scales its logits, of which the head does not know."""
    forward = model.forward

    def patched(*args, **kwargs):
        output = forward(*args, **kwargs)
        if getattr(output, "logits", None) is not None:
            output.logits = output.logits * scale
        return output

    model.forward = patched
    return model


def test_a_student_whose_forward_is_patched(tmp_path):
    trainer = make_run(tmp_path, Scores(near(by=0)), **SAMPLED)
    scaled(trainer.model, 1.3)
    findings = look(trainer)
    (found,) = [f for f in problems(findings) if f.check == "self_kl"]
    assert "its forward does something to its logits" in found.why
    # It samples from the scaled logits, too: that is the other way in which it is seen
    assert names(problems(findings)) <= {"self_kl", "temperature"}


def test_its_own_teacher_that_is_not_the_student(tmp_path):
    trainer = make_run(tmp_path, "self")
    next(iter(trainer.teacher._weights.values())).add_(0.05)
    assert "teacher 'self' is the student before the first step" in the_one(look(trainer), "self_kl", "error")
    trainer = make_run(tmp_path, "base", arguments=LORA)
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            p.data.add_(0.05)  # a trained adapter may differ
    assert problems(look(trainer)) == []


# Temperature


@pytest.mark.parametrize(
    ("teacher", "fields", "words"),
    [
        (lambda: Scores(near(), 20, lambda t: 1.0), {**LISTED, "temperature": 0.7}, "ignores the one asked for"),
        (lambda: Scores(near(), 0, lambda t: 1.0), {**SAMPLED, "temperature": 0.7}, "ignores the one asked for"),
        (lambda: Scores(near(), 20, lambda t: t * t), {**LISTED, "temperature": 0.7}, "0.25 times.*should become 0.5"),
        (lambda: Scores(near(), 20, lambda t: 1 / t), {**LISTED, "temperature": 0.9}, "2 times.*should become 0.5"),
        (lambda: Scores(near(by=0), 20, lambda t: 2 * t), LISTED, "those of the student at 2 times the temperature"),
        (
            lambda: Scores(near(), 20, change=lambda x, *_: x + 0.005),
            {**LISTED, "support_size": VOCAB_SIZE},
            None,
        ),
    ],
    ids=["ignored", "ignored, sampled", "squared", "inverted", "doubled", "normalised"],
)
def test_a_teacher_at_another_temperature(tmp_path, teacher, fields, words):
    findings = look(make_run(tmp_path, teacher(), **fields))
    if words is None:
        assert problems(findings) == []
    else:
        assert re.search(words, the_one(findings, "temperature"))


@pytest.mark.parametrize("shift", [0.009, -0.02])
def test_lists_that_are_no_distribution(tmp_path, shift):
    """All entries are listed, and their probabilities do not sum to 1."""
    teacher = Scores(near(), VOCAB_SIZE, change=lambda logprobs, *_: logprobs + shift)
    found = the_one(look(make_run(tmp_path, teacher, support="teacher_top_k", support_size=VOCAB_SIZE)), "temperature")
    assert f"{VOCAB_SIZE} entries sum to" in found and "log_softmax" in found


def test_a_local_teacher_whose_logits_are_not_its_head_s(tmp_path):
    trainer = make_run(tmp_path, near())
    scaled(trainer.teacher.model, 0.7)
    found = [f for f in look(trainer) if f.check == "temperature"]
    assert "from its own logits" in the_one(found, "temperature", "error")


@pytest.mark.parametrize("kwargs", [{"temperature": 0.5}, {"temperature": 1.6}, {"top_p": 0.5}])
def test_rollouts_at_another_temperature(tmp_path, kwargs):
    findings = look(make_run(tmp_path, near(), generation_kwargs=kwargs), num_samples=24)
    found = the_one(findings, "temperature", "error")
    assert "rollouts" in found and "generation_kwargs" in found
    if "temperature" in kwargs:
        fitted = float(re.search(r"samples at temperature ([\d.]+)\.", found).group(1))
        assert fitted == pytest.approx(kwargs["temperature"], rel=0.15)


def test_rollouts_under_a_repetition_penalty_are_not_judged(tmp_path):
    found = [f for f in look(make_run(tmp_path, near(), repetition_penalty=1.3)) if f.check == "temperature"]
    assert problems(found) == [] and "repetition_penalty" in str(found[-1])


# Distance


def test_a_teacher_that_is_too_far(tmp_path):
    found = the_one(look(make_run(tmp_path, make_model(hidden_size=24, seed=9).double())), "student_distance")
    assert re.search(r"\d\d% of the top 16 in common", found) and "cold start" in found and "2604.13016" in found


def test_the_far_one_of_two_teachers_is_named(tmp_path):
    teachers = {"one": near(), "two": make_model(hidden_size=24, seed=9).double()}
    found = the_one(look(make_run(tmp_path, teachers, arguments=TWO)), "student_distance")
    assert "teacher 'two'" in found and "teacher 'one'" not in found


class Writes(Scores):
    """Scores one thing and writes another."""

    def __init__(self, model, writer, **kwargs):
        super().__init__(model, **kwargs)
        self.writer = writer

    @torch.no_grad()
    def generate(self, prompt_ids, sampling):
        written = []
        for prompt in prompt_ids:
            ids = torch.tensor([prompt])
            for _ in range(40):
                probs = self.writer(ids).logits[0, -1].double().softmax(-1)
                ids = torch.cat([ids, torch.multinomial(probs, 1)[None]], 1)
                if int(ids[0, -1]) in sampling.eos_token_ids:
                    break
            written.append(ids[0, len(prompt) :].tolist())
        return written


def test_a_teacher_that_does_not_know_its_own_text(tmp_path):
    """It writes as the student does, and is scored behind another prompt: the student predicts it better."""
    sharp = make_student()
    sharp.lm_head.weight.data.mul_(1.6)
    other = make_model(seed=4).double()
    findings = look(make_run(tmp_path, Writes(other, sharp), model=sharp, **SAMPLED))
    (found,) = [f for f in problems(findings) if f.check == "teacher_perplexity"]
    assert found.severity == "error" and "its own samples" in found.seen and "another prompt" in found.why
    assert problems(look(make_run(tmp_path, Writes(sharp, sharp), model=make_student(), **SAMPLED))) == []


def test_the_datasets_completions_where_the_teacher_writes_none(tmp_path):
    writer = Writes(None, make_student())
    sampling = SimpleNamespace(eos_token_ids=ENDS)
    tokenizer, rows = make_tokenizer(), make_prompts(8)
    torch.manual_seed(1)
    written = writer.generate(tokenizer(list(rows["prompt"]))["input_ids"], sampling)
    rows = rows.add_column("completion", tokenizer.batch_decode([ids[:-1] or [20] for ids in written]))
    rows = rows.add_column("completion_ids", written)
    arguments = {"train_dataset": rows}
    findings = look(make_run(tmp_path, Scores(near()), arguments=arguments, **SAMPLED))
    assert problems(findings) == []
    (found,) = [f for f in findings if f.check == "teacher_perplexity"]
    assert found.severity == "ok" and "the dataset's completions" in found.seen

    def behind(logprobs, prompt, completion):
        return (3 * logprobs.roll(1, -1)).log_softmax(-1)

    findings = look(make_run(tmp_path, Scores(near(), change=behind), arguments=arguments, **SAMPLED))
    (found,) = [f for f in problems(findings) if f.check == "teacher_perplexity"]
    assert found.severity == "warning" and "teacher_chat_template" in found.do


# By position


def lower(where):
    """A teacher to whom tokens are less likely by so many nats, `where(position, length, token)`."""

    def change(logprobs, prompt, completion):
        logprobs = logprobs.clone()
        for i, token in enumerate(completion):
            logprobs[i, token] -= where(i, len(completion), token)
        return logprobs

    return change


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (lambda i, n, token: 6.0 * (i < 2), "tokens 0 and 1.*block of thoughts.*teacher_chat_template"),
        (lambda i, n, token: 8.0 * (token in ENDS), "the end .*unlearns to stop.*generation_config.eos_token_id"),
    ],
    ids=["start", "end"],
)
def test_a_gap_at_the_start_or_at_the_end(tmp_path, where, words):
    trainer = make_run(tmp_path, Scores(near(), change=lower(where)), **SAMPLED)
    assert re.search(words, the_one(look(trainer), "gap_by_position", "warning"))


@pytest.mark.parametrize("same", [True, False], ids=["one beginning", "beginnings of their own"])
def test_a_teacher_that_begins_otherwise_means_its_template_only_if_it_always_begins_alike(tmp_path, same):
    def begin(logprobs, prompt, completion):
        logprobs = logprobs.clone()
        logprobs[:2, completion[:2]] -= 6.0
        wanted = 20 if same else 20 + len(prompt) % 13
        logprobs[0, wanted if wanted != completion[0] else 19] = 8.0
        return logprobs.log_softmax(-1)

    findings = look(make_run(tmp_path, Scores(near(), 20, change=begin), **LISTED))
    (found,) = [f for f in findings if f.check == "gap_by_position" and "tokens 0 and 1" in f.seen]
    assert found.severity == ("warning" if same else "info")
    assert ("in substance" in found.why) != same


def test_first_tokens_that_are_wrong_in_some_completions_are_no_template(tmp_path):
    def begin(logprobs, prompt, completion):
        logprobs = logprobs.clone()
        if len(prompt) > 4:  # about half of them
            logprobs[:2, completion[:2]] -= 12.0
        return logprobs

    findings = look(make_run(tmp_path, Scores(near(), change=begin), **SAMPLED))
    assert not [f for f in findings if f.check == "gap_by_position" and f.severity != "ok"]


def test_a_gap_that_grows_is_drift(tmp_path):
    teacher = Scores(near(), change=lower(lambda i, n, token: 0.06 * i))
    model = make_student()
    model.generation_config.eos_token_id = 1
    findings = look(make_run(tmp_path, teacher, model=model, max_completion_length=48, **SAMPLED))
    (found,) = [f for f in findings if f.check == "gap_by_position"]
    assert found.severity == "info" and "grows along" in found.seen and "max_completion_length" in found.do


def test_a_teacher_that_would_have_stopped(tmp_path):
    def stop(logprobs, prompt, completion):
        logprobs = logprobs.clone()
        logprobs[3, ENDS[0]] = 6.0 if len(logprobs) > 3 else logprobs[-1, ENDS[0]]
        return logprobs.log_softmax(-1)

    def guarded(logprobs, prompt, completion):
        return stop(logprobs, prompt, completion) if len(completion) > 4 else logprobs

    findings = look(make_run(tmp_path, Scores(near(), 20, change=guarded), **LISTED))
    found = [f for f in problems(findings) if f.check == "gap_by_position"]
    assert len(found) == 1 and "would have stopped with '<eos>' (id 1), where the student" in found[0].seen


def test_a_teacher_whose_end_ends_nothing_for_the_student(tmp_path):
    student, teacher = with_bias(5, 6.0), with_bias(5, 6.0)
    teacher.generation_config.eos_token_id = [5]
    found = problems(look(make_run(tmp_path, teacher, model=student)))
    (stops,) = [f for f in found if f.check == "gap_by_position"]
    assert "with '</think>' (id 5), which the student writes too, and goes on" in stops.seen
    assert "generation_config.eos_token_id" in stops.do


# Truncation


def with_bias(token, value):
    """A student with a bias at one entry of its head."""
    model = make_student()
    old, model.lm_head = model.lm_head, nn.Linear(model.config.hidden_size, VOCAB_SIZE, dtype=torch.float64)
    model.lm_head.weight.data.copy_(old.weight.data)
    model.lm_head.bias.data.zero_()
    for i in [token] if isinstance(token, int) else token:
        model.lm_head.bias.data[i] = value
    return model


@pytest.mark.parametrize(
    ("model", "length", "words"),
    [
        (lambda: with_bias(ENDS, -30.0), 20, "nowhere does the student give .*never learnt one"),
        (lambda: make_student(), 3, r"the student knows its end .*Raise max_completion_length to about 6"),
        (lambda: with_bias(9, 40.0), 400, "repeat themselves .*Raising the limit would not help"),
    ],
    ids=["no end", "too short", "loops"],
)
def test_completions_that_are_cut(tmp_path, model, length, words):
    student = model()
    teacher = Scores(model().eval())
    findings = look(make_run(tmp_path, teacher, model=student, max_completion_length=length, **SAMPLED))
    assert re.search(words, the_one(findings, "truncation", "warning"))


def test_a_special_token_that_ends_nothing(tmp_path):
    student = with_bias(5, 3.5)  # </think>
    student.generation_config.eos_token_id = 1
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    arguments = {"processing_class": tokenizer}
    trainer = make_run(
        tmp_path, Scores(with_bias(5, 3.5)), model=student, max_completion_length=16, arguments=arguments, **SAMPLED
    )
    assert "'</think>' (id 5)" in the_one(look(trainer), "truncation")


def test_repetition_is_bytes_over_compressed_bytes():
    assert repetition("ab" * 3000) > 100 > repetition("The quick brown fox jumps over the lazy dog.")
    letters = random.Random(0)
    assert repetition("x" * 20_000 + "".join(letters.choice("abcdefgh") for _ in range(10_000))) < 3  # the end alone
    assert repetition("") == 0.0


# What fails


def test_without_a_teacher_there_is_nothing_to_compare(tmp_path):
    trainer = make_run(tmp_path, None, num_generations=2, arguments={"reward_funcs": lambda **_: [0.0]})
    (found,) = check_models(trainer, num_samples=2)
    assert found.severity == "info"


def test_a_teacher_that_fails_is_an_error(tmp_path):
    def fails(batch):
        raise RuntimeError("the cluster is down")

    findings = look(make_run(tmp_path, fails, **SAMPLED))
    (found,) = problems(findings)
    assert found.severity == "error" and "the cluster is down" in found.seen
    findings = look(make_run(tmp_path, Scores(near(), change=lambda x, *_: x * torch.nan), **SAMPLED))
    assert "nan" in str(problems(findings)[0])


def test_generation_that_fails_is_an_error(tmp_path, monkeypatch):
    trainer = make_run(tmp_path, near())
    monkeypatch.setattr(trainer.model, "generate", lambda *a, **k: 1 / 0)
    (found,) = look(trainer)
    assert found.severity == "error" and "ZeroDivisionError" in found.seen


def test_cut_completions_that_are_masked_leave_nothing_to_distill(tmp_path):
    trainer = make_run(tmp_path, near(), max_completion_length=1, mask_truncated_completions=True)
    found = {f.check: f for f in problems(look(trainer, num_samples=3))}
    assert "no token of these completions is distilled" in found["determinism"].seen
    assert "max_completion_length" in found["truncation"].do


def test_a_check_that_fails_says_so_and_the_others_go_on(tmp_path, monkeypatch):
    from trl_opd.doctor import models

    def broken(exam):
        raise KeyError("inside")

    monkeypatch.setitem(models.CHECKS, "self_kl", (broken,))
    findings = look(make_run(tmp_path, near()))
    assert problems(findings) == [] and names(findings) == set(CHECKS)
    (found,) = [f for f in findings if f.check == "self_kl"]
    assert found.severity == "info" and "KeyError" in found.seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_healthy_pair_has_no_problem_whatever_the_seed(tmp_path, seed):
    trainer = make_run(tmp_path, near(seed), seed=seed)
    torch.manual_seed(seed)
    assert problems(check_models(trainer, num_samples=16)) == []
