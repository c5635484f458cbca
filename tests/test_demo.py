"""The demo: its task and verifier, its measurements and token counts, its report, and one run of everything."""

import builtins
import json
import math

import pytest
import torch
from transformers import TrainerControl, TrainerState

from trl_opd.demo import FAST, report, run_demo
from trl_opd.demo.evaluation import BudgetCallback, Curve, Evaluator, Point, generate, mean_reverse_kl
from trl_opd.demo.methods import Workbench, distill, imitate, sample_from_teacher
from trl_opd.demo.stages import Shape, build_model
from trl_opd.demo.task import AdditionTask, accuracy_reward, build_tokenizer, is_correct, solve, supervised_dataset


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def bench(tokenizer, tmp_path):
    task = AdditionTask(FAST.num_digits, FAST.num_held_out)
    student, teacher = build_model(FAST.student_shape, tokenizer, 1), build_model(FAST.teacher_shape, tokenizer, 2)
    evaluator = Evaluator(task, tokenizer, teacher)
    return Workbench(student, teacher, task, tokenizer, evaluator, FAST, 0, tmp_path)


@pytest.mark.parametrize(
    ("prompt", "completion", "right"),
    [
        # 317 + 492 = 809
        ("713+294=", "908", True),
        ("999+999=", "8991", True),
        ("001+002=", "003", True),
        ("713+294=", "809", False),
        ("713+294=", "700", False),
        ("001+002=", "3", False),
        ("713+294=", "9080", False),
        ("713+294=", "90", False),
        ("713+294=", "", False),
        ("713+294=", "9+8", False),
    ],
)
def test_verifier(prompt, completion, right):
    assert is_correct(prompt, completion) is right
    assert accuracy_reward([prompt], [completion], completion_ids=None) == [float(right)]


def test_problems_are_sums_of_numbers_without_leading_zeros():
    task = AdditionTask(3, 64)
    for problem in task.sample(200, seed=1):
        left, right = problem.removesuffix("=").split("+")
        assert len(left) == len(right) == 3
        assert left[-1] != "0" != right[-1]
        assert len(solve(problem)) + 1 <= task.max_completion_length
        assert is_correct(problem, solve(problem))


def test_tokenizer_round_trip(tokenizer):
    ids = tokenizer("317+482=997" + tokenizer.eos_token)["input_ids"]
    assert len(ids) == 12
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "317+482=997"
    padded = tokenizer(["1+1=", "10+10="], padding=True)
    assert padded["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
    assert padded["attention_mask"][0] == [0, 0, 1, 1, 1, 1]


def test_held_out_problems_are_never_trained_on():
    task = AdditionTask(num_digits=1, num_held_out=40)
    assert len(set(task.held_out)) == 40
    drawn = task.sample(2000, seed=3)
    assert len(drawn) == 2000
    # Of the 81 one-digit problems the draw covers all but the held-out ones.
    assert len(set(drawn)) == 81 - 40
    assert not set(drawn) & set(task.held_out)


def test_draws_follow_their_seeds():
    assert AdditionTask(3, 32, seed=1).held_out == AdditionTask(3, 32, seed=1).held_out
    assert AdditionTask(3, 32, seed=1).held_out != AdditionTask(3, 32, seed=2).held_out
    task = AdditionTask(3, 32)
    assert task.sample(10, seed=1) == task.sample(10, seed=1) != task.sample(10, seed=2)


def test_too_many_held_out_problems():
    with pytest.raises(ValueError, match="num_held_out must be"):
        AdditionTask(num_digits=1, num_held_out=100)


def test_supervised_loss_is_on_the_completion_only(tokenizer):
    eos = tokenizer.eos_token_id
    row = supervised_dataset(["12+34="], [[6, 4, eos]], tokenizer)[0]
    assert row["input_ids"] == [1, 2, 10, 3, 4, 11, 6, 4, eos]
    assert row["labels"] == [-100] * 6 + [6, 4, eos]


def test_generate_ends_at_eos(bench):
    prompts = bench.task.sample(64, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        completion_ids = generate(bench.student, bench.tokenizer, prompts, 8)
    eos = bench.tokenizer.eos_token_id
    assert all(1 <= len(ids) <= 8 and eos not in ids[:-1] for ids in completion_ids)
    assert any(len(ids) < 8 for ids in completion_ids)
    assert any(len(ids) == 8 for ids in completion_ids)


def test_reverse_kl_equals_the_one_by_one_formula(bench):
    prompts = bench.task.held_out[:6]
    eos = bench.tokenizer.eos_token_id
    completion_ids = [[1, eos], [2, 3, eos], [4, 5, 6], [eos], [7, 7, eos], [8, eos]]
    total, count = 0.0, 0
    for prompt, completion in zip(prompts, completion_ids, strict=True):
        prompt_ids = bench.tokenizer(prompt)["input_ids"]
        ids = torch.tensor([prompt_ids + completion])
        with torch.no_grad():
            s, t = (m(ids).logits[0].double().softmax(-1) for m in (bench.student, bench.teacher))
        for i in range(len(prompt_ids) - 1, ids.shape[1] - 1):
            total += (s[i] * (s[i] / t[i]).log()).sum().item()
            count += 1
    value = mean_reverse_kl(bench.student, bench.teacher, bench.tokenizer, prompts, completion_ids)
    assert value == pytest.approx(total / count, rel=1e-5)
    assert mean_reverse_kl(bench.teacher, bench.teacher, bench.tokenizer, prompts, completion_ids) == 0.0


def test_measuring_moves_no_random_numbers(bench):
    state = torch.get_rng_state()
    first = bench.evaluator.measure(bench.student)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert bench.evaluator.measure(bench.student) == first


def test_budget_stops_with_the_step_that_spends_it(bench):
    curve = Curve("x")
    callback = BudgetCallback(curve, bench.evaluator, 100, 2, lambda state: 30 * state.global_step)
    state, control = TrainerState(max_steps=10), TrainerControl()
    callback.on_train_begin(None, state, control, model=bench.student)
    while not control.should_training_stop:
        state.global_step += 1
        callback.on_step_end(None, state, control, model=bench.student)
    callback.on_train_end(None, state, control)
    assert (curve.tokens, state.global_step) == (120, 4)
    assert [point.tokens for point in curve.points] == [0, 60, 120]


def count_generated(model, counts):
    """Count what `generate` returns, up to and with the end-of-sequence token."""
    inner = model.generate

    def counted(*args, **kwargs):
        output = inner(*args, **kwargs)
        eos = model.config.eos_token_id
        for ids in output[:, kwargs["input_ids"].shape[1] :].tolist():
            counts.append(ids.index(eos) + 1 if eos in ids else len(ids))
        return output

    model.generate = counted


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_counted_tokens_are_the_generated_ones(bench, monkeypatch):
    counts = []
    start = Workbench.start

    def counted_start(self):
        model = start(self)
        count_generated(model, counts)
        return model

    monkeypatch.setattr(Workbench, "start", counted_start)
    # Measurements generate as well; here they must not.
    monkeypatch.setattr(Evaluator, "measure", lambda self, model, tokens=0, step=0: Point(tokens, step, 0.0, 0.0))
    monkeypatch.setattr(Workbench, "finish", lambda self, curve, model: curve)
    curve = distill(bench)
    steps = curve.points[-1].step
    assert len(counts) == steps * FAST.batch_size
    assert curve.tokens == sum(counts) >= FAST.budget
    assert sum(counts[: -FAST.batch_size]) < FAST.budget


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_supervised_tokens_are_the_teachers(bench):
    torch.manual_seed(bench.seed)
    problems, completion_ids = sample_from_teacher(bench)
    assert len(problems) == len(completion_ids)
    curve = imitate(bench)
    assert curve.tokens == sum(map(len, completion_ids)) >= FAST.budget
    assert curve.points[-1].step == len(problems) / FAST.batch_size


def test_start_is_a_separate_copy(bench):
    first, second = bench.start(), bench.start()
    with torch.no_grad():
        next(first.parameters()).add_(1.0)
    assert torch.equal(next(second.parameters()), next(bench.student.parameters()))


def results():
    points = [Point(0, 0, 0.25, 1.0), Point(1000, 5, 0.5, 0.125)]
    model = {"accuracy": 0.25, "greedy_accuracy": 0.5, "reverse_kl": 1.0, "parameters": 1234, "seconds": 3.0}
    return {
        "task": "Reversed 3-digit addition",
        "seed": 7,
        "num_held_out": 100,
        "teacher": {**model, "accuracy": 0.99, "reverse_kl": 0.0},
        "start": model,
        "methods": [
            Curve("A", points, tokens=1003, seconds=2.0, greedy_accuracy=0.75).as_dict(),
            Curve("B", points, tokens=1001, seconds=4.0, greedy_accuracy=math.nan).as_dict(),
        ],
        "settings": {"budget": 1000},
        "seconds": 12.0,
    }


def test_report_shows_the_measured_numbers(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report.write_report(results(), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| A "))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "A", "50.0%", "75.0%", "0.1250", "1,003", "5", "2",
    ]  # fmt: skip
    assert "curves.png" in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text())["seed"] == 7
    report.print_table(results())
    assert "1,003" in capsys.readouterr().out


def test_report_without_matplotlib_and_rich(tmp_path, capsys, monkeypatch):
    find_spec, real_import = report.importlib.util.find_spec, builtins.__import__
    missing = ("matplotlib", "rich")

    def no_import(name, *args, **kwargs):
        if name.split(".")[0] in missing:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    monkeypatch.setattr(builtins, "__import__", no_import)
    report.write_report(results(), tmp_path)
    report.print_table(results())
    assert "trl-opd[plots]" in capsys.readouterr().out
    assert "trl-opd[plots]" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not (tmp_path / "curves.png").exists()


def test_models_follow_their_seed(tokenizer):
    shape = Shape(16, 1, 32, 0.08)
    one, same, other = (build_model(shape, tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.slow
def test_whole_demo(tmp_path):
    returned = run_demo(tmp_path / "out", seed=3, fast=True)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(returned))
    assert [method["name"] for method in returned["methods"]] == ["OPD (full)", "OPD (LoRA)", "GRPO", "SFT (teacher)"]
    most = FAST.batch_size * (FAST.num_digits + 2)
    for method in returned["methods"]:
        assert FAST.budget <= method["tokens"] < FAST.budget + most
        assert method["points"][0]["accuracy"] == returned["start"]["accuracy"]
        assert method["points"][0]["reverse_kl"] == returned["start"]["reverse_kl"]
        assert method["points"][-1]["tokens"] == method["tokens"]
    assert (tmp_path / "out" / "report.md").exists()
