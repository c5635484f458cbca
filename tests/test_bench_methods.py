"""`trl-opd bench methods`: what is counted and measured, what each method is given, and the command end to end."""

import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import DefaultFlowCallback, TrainerControl, TrainerState

from trl_opd.bench import methods, methods_measure, methods_plan, methods_report, methods_task, methods_train
from trl_opd.bench.methods_plan import BASELINES, ENDS, Plan, make_plan
from trl_opd.demo import FAST
from trl_opd.demo.stages import Settings, build_model
from trl_opd.demo.task import AdditionTask, build_tokenizer, is_correct, solve
from trl_opd.recipes import RECIPES

SETTINGS = replace(FAST, budget=methods.FAST_BUDGET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def start(folder):
    """A start with all of its parts."""
    start = methods._start(0, SETTINGS, folder)
    made = methods.make_parts(methods_task.PARTS, 0, SETTINGS, folder)
    assert made["status"] == "made", made["message"]
    return start


def train(plan, start):
    with methods.quiet():
        result = methods_train.run(plan, start)
    assert result["status"] == "done", result["message"]
    return result


# Measurements


def test_measurements_are_those_of_the_textbook():
    """Both KLs, entropy, accuracy and lengths, one completion and one token at a time, in float64."""
    task, tokenizer = AdditionTask(1, 12), build_tokenizer()
    tokenizer.add_tokens(["|"])
    student, teacher = build_model(FAST.student_shape, tokenizer, 1), build_model(FAST.teacher_shape, tokenizer, 2)
    hints = [methods_task.with_hint(problem) for problem in task.held_out]
    samples, written = [], []

    def generate(model, *args, **kwargs):
        ids = inner(model, *args, **kwargs)
        (written if model is teacher else samples).append(ids)
        return ids

    inner, methods_measure.generate = methods_measure.generate, generate
    try:
        found = methods_measure.measure(student, teacher, task, tokenizer, hints=hints, num_samples=3, num_prompts=4)
    finally:
        methods_measure.generate = inner

    def distributions(model, prompt, completion):
        ids = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids + completion])).logits[0].double()
        return logits[len(ids) - 1 : -1].softmax(-1)

    def mean(function, completions):
        values = []
        for problem, hint, completion in zip(task.held_out, hints, completions, strict=True):
            s, t = distributions(student, problem, completion), distributions(teacher, hint, completion)
            assert len(s) == len(completion)
            values += [function(s[i], t[i]).item() for i in range(len(s))]
        return sum(values) / len(values)

    def kl(a, b):
        return (a * (a / b).log()).sum()

    own, greedy, repeated = samples
    assert found["reverse_kl"] == pytest.approx(mean(kl, own), rel=1e-5)
    assert found["forward_kl"] == pytest.approx(mean(lambda s, t: kl(t, s), own), rel=1e-5)
    assert found["forward_kl_teacher"] == pytest.approx(mean(lambda s, t: kl(t, s), written[0]), rel=1e-5)
    assert found["entropy"] == pytest.approx(mean(lambda s, t: -(s * s.log()).sum(), own), rel=1e-5)
    assert found["length"] == sum(len(ids) for ids in own) / 12
    for key, completions in (("accuracy", own), ("greedy_accuracy", greedy)):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        assert found[key] == sum(is_correct(p, c) for p, c in zip(task.held_out, texts, strict=True)) / 12
    counts = [len({str(ids) for ids in repeated[3 * i : 3 * i + 3]}) for i in range(4)]
    assert found["distinct"] == sum(counts) / 4
    assert len({round(found[key], 6) for key in ("reverse_kl", "forward_kl", "forward_kl_teacher")}) == 3


def test_distinct_counts_different_completions_of_each_prompt():
    samples = [[(1, 2), (1, 2), (1,)], [(1, 2), (3,), (4,)], [(5,), (5,), (5,)]]
    assert methods_measure.mean_distinct(samples) == (2 + 3 + 1) / 3


def test_measuring_moves_no_random_numbers_and_is_the_same_each_time():
    task, tokenizer = AdditionTask(1, 12), build_tokenizer()
    student, teacher = build_model(FAST.student_shape, tokenizer, 1), build_model(FAST.teacher_shape, tokenizer, 2)
    student.train()
    state = torch.get_rng_state()
    first = methods_measure.measure(student, teacher, task, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert methods_measure.measure(student, teacher, task, tokenizer) == first
    assert student.training
    same = methods_measure.measure(teacher, teacher, task, tokenizer)
    assert same["reverse_kl"] == same["forward_kl"] == same["forward_kl_teacher"] == 0.0


# What each method is given


def test_every_recipe_has_a_plan_or_a_reason():
    for name, recipe in RECIPES.items():
        plan = make_plan(name, Settings())
        if recipe.kind != "slots":
            assert isinstance(plan, str)
            assert recipe.how in plan
            continue
        if isinstance(plan, str):
            assert "tools" in recipe.needs or recipe.teacher_model not in (None, "self", "teacher")
            continue
        assert plan.rewards == ("rewards" in recipe.needs)
        assert plan.demonstrations == ("demonstrations" in recipe.needs)
        assert plan.start == ("hinted" if "teacher_prompt" in recipe.needs else "plain")
        assert Settings().batch_size % plan.num_generations == 0
        if "group" in recipe.needs:
            assert plan.num_generations > 1
        wanted = 2 if "two_references" in recipe.needs else int("reference_model" in recipe.needs)
        assert len(plan.references) == wanted
    plans, refused, same = methods.make_plans([], Settings())
    recipes = {plan.name for plan in plans} - set(BASELINES) - set(ENDS)
    assert recipes | set(refused) | set(same) == set(RECIPES) | {"qwen3"}
    assert len(recipes) >= 25


def test_one_learning_rate_except_where_rewards_are_trained_on():
    rates = Settings().learning_rates
    plans, _, _ = methods.make_plans([], Settings())
    for plan in plans:
        if plan.name in ENDS:
            continue
        trained = plan.rewards and plan.effective.get("reward_coef", 1.0) != 0
        assert plan.learning_rate == (rates["grpo"] if trained else rates["opd"]), plan.name


def test_what_is_spelled_differently_and_the_same_runs_once():
    assert make_plan("qwen3", Settings()).signature == make_plan("reverse_kl", Settings()).signature
    assert make_plan("opd", Settings()).signature != make_plan("reverse_kl", Settings()).signature
    names = ["gkd", "minitron", "exopd", "opsd", "grpo", "sft", "reverse_kl", "opd"]
    assert len({make_plan(name, Settings()).signature for name in names}) == len(names)


def test_sizes_are_scaled_to_the_task():
    plan = make_plan("fast_opd", Settings())
    assert plan.effective["schedules"]["max_completion_length"] == {"type": "linear", "start": 1, "end": 7}
    assert make_plan("revisiting_opd", Settings()).effective["support_size"] == 4
    assert any("support_size 4" in change for change in make_plan("revisiting_opd", Settings()).changes)
    # Odd groups do not divide the batch
    assert make_plan("revisiting_opd", replace(Settings(), batch_size=12)).num_generations == 4


def test_steps_follow_the_lengths_of_completions():
    task, settings = AdditionTask(5, 64), Settings(budget=10_000)
    mean = sum(len(solve(problem)) + 1 for problem in task.held_out) / 64
    whole = methods_plan.max_steps(Plan(""), task, settings)
    assert whole == math.ceil(10_000 / (32 * mean))
    cut = methods_plan.max_steps(make_plan("fast_opd", settings), task, settings)
    assert 1.3 * whole < cut < 2.5 * whole
    assert methods_plan.max_steps(Plan("", effective={"num_iterations": 4}), task, settings) == 4 * whole


def test_hints_and_kinds():
    # 317 + 492 = 809
    assert methods_task.with_hint("713+294=") == "908|713+294="
    assert [methods_task.kind_of(p) for p in ("713+294=", "213+294=", "013+294=")] == ["odd", "even", "even"]


# Tokens


def count_generated(monkeypatch, counts):
    """Lengths of what models generate in training, up to and with the end-of-sequence token."""
    make = methods_train.make_trainer

    def counted(plan, start, model, meter, scratch):
        trainer, stop = make(plan, start, model, meter, scratch)
        inner = trainer._generate_single_turn

        def generate(*args, **kwargs):
            rollout = inner(*args, **kwargs)
            counts.append([len(ids) for ids in rollout[0]])
            return rollout

        trainer._generate_single_turn = generate
        return trainer, stop

    monkeypatch.setattr(methods_train, "make_trainer", counted)


@pytest.mark.parametrize(
    ("name", "sources", "passes"),
    [
        ("reverse_kl", {"student"}, 1.0),
        ("exopd", {"student"}, 2.0),
        ("grpo", {"student"}, 0.0),
        ("minitron", {"dataset"}, 2.0),
        ("offline_rl_kd", {"teacher"}, 2.0),
        ("nemotron_cascade2", {"student"}, 1.0),
        ("deepseek_v4", {"student"}, 2.0),
        ("fast_opd", {"student"}, 1.0),
    ],
)
def test_tokens_are_those_of_the_trained_completions(start, monkeypatch, name, sources, passes):
    counts = []
    count_generated(monkeypatch, counts)
    result = train(make_plan(name, SETTINGS), start)
    assert set(result["tokens"]) == sources
    assert sum(result["tokens"].values()) == sum(map(sum, counts)) >= SETTINGS.budget
    assert sum(map(sum, counts[:-1])) < SETTINGS.budget  # the step that crosses it is the last
    assert result["steps"] == len(counts)
    assert result["completions"] == sum(map(len, counts)) == SETTINGS.batch_size * len(counts)
    assert result["passes"] == passes


def test_mixed_sources_are_counted_apart(start, monkeypatch):
    counts, steps = [], []
    count_generated(monkeypatch, counts)
    make = methods_train.make_trainer

    def noted(*args):
        trainer, stop = make(*args)
        inner = trainer._rollouts.mark

        def mark(output):
            inner(output)
            steps.append(output["on_policy"].tolist())

        trainer._rollouts.mark = mark
        return trainer, stop

    monkeypatch.setattr(methods_train, "make_trainer", noted)
    result = train(make_plan("gkd", SETTINGS), start)
    own = sum(n for lengths, mine in zip(counts, steps, strict=True) for n, m in zip(lengths, mine, strict=True) if m)
    assert result["tokens"] == {"student": own, "dataset": sum(map(sum, counts)) - own}
    assert 0 < own < sum(map(sum, counts))


def test_fine_tuning_counts_the_teachers_tokens(start):
    result = train(make_plan("sft", SETTINGS), start)
    lengths = [len(ids) for ids in start.demonstrations["completion_ids"]]
    used = lengths[: SETTINGS.batch_size * result["steps"]]
    assert result["tokens"] == {"dataset": sum(used)}
    assert sum(used) >= SETTINGS.budget > sum(used[: -SETTINGS.batch_size])
    assert result["passes"] == 1.0


def test_the_learning_rate_falls_in_tokens():
    meter = methods_train.Meter(100)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = meter.schedule(optimizer, 2)
    rates = [schedule.get_last_lr()[0]]
    for lengths in ([10, 10], [20], [30, 40]):
        meter.note("student", lengths)
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert rates == pytest.approx([1.0, 1.6, 1.2, 0.0])


def test_a_run_goes_on_until_its_tokens_are_spent():
    """Also after the steps that schedules see, which are then at their end and not beyond it."""
    meter = methods_train.Meter(100)
    stop, state, control = methods_train.StopAtBudget(meter, 3), TrainerState(max_steps=6), TrainerControl()
    flow = DefaultFlowCallback()
    stop.on_train_begin(None, state, control)
    args = SimpleNamespace(logging_strategy="no", eval_strategy="no", save_strategy="no", logging_first_step=False)
    fractions = []
    while not control.should_training_stop:
        fractions.append(state.global_step / state.max_steps)
        state.global_step += 1
        meter.note("student", [12, 13])
        flow.on_step_end(args, state, control)
        stop.on_step_end(args, state, control)
    assert fractions == [0, 1 / 3, 2 / 3, 3 / 4]
    assert meter.tokens.total() == 100
    assert stop.steps == 4


def test_replayed_completions_are_told_from_the_data_sets():
    meter = methods_train.Meter(100)
    output = {"on_policy": torch.tensor([True, False, False]), "sampled_step": torch.tensor([5, 3, 5])}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        state=SimpleNamespace(global_step=5),
        args=SimpleNamespace(off_policy_source="dataset"),
        meter=meter,
        _lengths=[2, 3, 4],
    )
    methods_train.MeteredTrainer.note_sources(trainer, output)
    assert meter.tokens == {"student": 2, "replay": 3, "dataset": 4}


def test_a_run_whose_figures_are_no_numbers_has_failed(start, monkeypatch):
    monkeypatch.setattr(methods_train, "measure", lambda *args, **kwargs: {"accuracy": 0.5, "entropy": math.nan})
    with methods.quiet():
        result = methods_train.run(make_plan("start", SETTINGS), start)
    assert result == {"name": "start", "seed": 0, "status": "failed", "message": "ValueError: Not finite: entropy."}


def test_tokens_that_were_not_spent_are_a_failure(start, monkeypatch):
    monkeypatch.setattr(methods_train.StopAtBudget, "on_step_end", lambda *args, **kwargs: None)
    monkeypatch.setattr(methods_train, "max_steps", lambda *args: 1)
    with methods.quiet():
        result = methods_train.run(make_plan("reverse_kl", SETTINGS), start)
    assert result["status"] == "failed"
    assert f"of {SETTINGS.budget} tokens" in result["message"]


# The rows


def test_a_row_is_the_mean_over_seeds_with_its_standard_error():
    def result(name, seed, accuracy, seconds):
        metrics = {key: 0.5 for key, *_ in methods_measure.METRICS} | {"accuracy": accuracy}
        used = {"tokens": {"student": 150, "dataset": 50}, "completions": 40, "steps": 3, "passes": 1.25}
        return {"name": name, "seed": seed, "status": "done", "metrics": metrics, "cpu_seconds": seconds, **used}

    failed = {"name": "gkd", "seed": 3, "status": "failed", "message": "ValueError: no."}
    results = [result("gkd", s, a, c) for s, a, c in ((1, 0.4, 6.0), (0, 0.2, 2.0), (2, 0.9, 4.0))]
    results += [result("opd", s, 0.1, c) for s, c in ((0, 1.0), (1, 2.0), (2, 4.0))]
    rows = methods_report.make_rows([make_plan("opd", SETTINGS), make_plan("gkd", SETTINGS)], [*results, failed])
    row = rows[1]
    mean = (0.2 + 0.4 + 0.9) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in (0.2, 0.4, 0.9)) / 2)
    assert row["seeds"] == [0, 1, 2]
    assert row["mean"]["accuracy"] == pytest.approx(mean)
    assert row["error"]["accuracy"] == pytest.approx(deviation / math.sqrt(3))
    assert row["mean"]["cost"] == pytest.approx((2.0 + 3.0 + 1.0) / 3)  # each over opd's with its seed
    assert row["mean"]["own"] == 0.75
    assert rows[0]["mean"]["cost"] == 1.0
    assert row["failed"] == {"3": "ValueError: no."}
    shown = dict(zip(methods_report.HEAD, methods_report.cells(row), strict=True))
    assert shown["method"] == "gkd*"
    assert shown["accuracy %"] == f"{100 * mean:.1f} ± {100 * deviation / math.sqrt(3):.1f}"
    assert shown["own %"] == "75"
    assert shown["cost"].startswith("2.00 ± ")


# The command


@pytest.mark.slow
def test_the_command_writes_everything_resumes_and_reports_failures(start, folder, tmp_path, capsys, monkeypatch):
    kept, drawn, page = (tmp_path / name for name in ("m.json", "m.png", "m.md"))
    inner = methods_train.make_trainer
    broken = {"dagger"}

    def make_trainer(plan, start, model, meter, scratch):
        trainer, stop = inner(plan, start, model, meter, scratch)
        if plan.name in broken:
            raise RuntimeError("it broke")
        if plan.name == "kl_mixing":  # ends with weights that are no numbers
            trainer.create_optimizer()
            torch.nn.init.constant_(next(trainer.model.parameters()), math.nan)
        return trainer, stop

    monkeypatch.setattr(methods_train, "make_trainer", make_trainer)
    command = ["dagger", "kl_mixing", "opsd", "seqkd", "qwen3", "--fast", "--seeds", "1", "--output-dir", str(folder)]
    outputs = ["--json", str(kept), "--png", str(drawn), "--markdown", str(page)]
    methods.main([*command, *outputs])
    said, result = capsys.readouterr().out, json.loads(kept.read_text())

    assert set(result) == {"machine", "command", "seconds", "seeds", "settings", "rows", "same", "refused"}
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {*ENDS, *BASELINES, "opd", "dagger", "kl_mixing", "opsd"}
    keys = {key for key, *_ in methods_measure.METRICS}
    for row in rows.values():
        fields = {"name", "start", "learning_rate", "seeds", "values", "mean", "error", "changes", "failed"}
        assert set(row) == fields
        if row["mean"]:
            assert keys <= set(row["mean"])
            assert (row["name"] in ENDS) == ("cost" not in row["mean"])
    assert rows["dagger"]["failed"] == {"0": "RuntimeError: it broke"}
    assert rows["kl_mixing"]["failed"]["0"]
    assert not rows["dagger"]["mean"]
    assert result["same"] == {"qwen3": "reverse_kl"}
    assert "SFTTrainer" in result["refused"]["seqkd"]
    assert rows["teacher_with_hints"]["mean"]["reverse_kl"] == rows["teacher"]["mean"]["reverse_kl"] == 0.0
    assert rows["start"]["mean"]["reverse_kl"] > 0
    assert "dagger" in said
    assert "failed: RuntimeError: it broke" in said
    text = page.read_text(encoding="utf-8")
    assert "| opd |" in text
    assert methods_train.COUNTED in text
    if drawn.exists():  # matplotlib is an extra
        assert drawn.read_bytes().startswith(b"\x89PNG")
        assert "(m.png)" in text

    # Only what failed runs again, and other settings share nothing but the starts
    ran = []
    monkeypatch.setattr(methods, "run", lambda plan, start: ran.append(plan.name) or methods_train.run(plan, start))
    monkeypatch.setattr(methods, "make_parts", lambda *args: pytest.fail("the starts are there"))
    broken.clear()
    methods.main([*command, "--json", str(kept)])
    assert ran == ["dagger", "kl_mixing"]
    assert {row["name"]: row for row in json.loads(kept.read_text())["rows"]}["dagger"]["mean"]
    plan = make_plan("opd", SETTINGS)
    assert methods.known(plan, 0, SETTINGS, folder) is not None
    for other in (replace(SETTINGS, budget=100), replace(SETTINGS, batch_size=8)):
        assert methods.known(plan, 0, other, folder) is None
    assert methods.known(plan, 1, SETTINGS, folder) is None


def test_a_process_that_dies_is_named_and_the_others_go_on():
    # Functions that the processes know without importing this library
    calls = [
        methods.Call("a", 1, dict, ([("name", "a")],)),
        methods.Call("b", 2, os._exit, (3,)),
        methods.Call("c", 3, dict, ([("name", "c")],)),
    ]
    results = {result["name"]: result for result in methods.work(calls, jobs=2)}
    assert set(results) == {"a", "b", "c"}
    assert (results["b"]["status"], results["b"]["seed"]) == ("failed", 2)
    assert "terminated" in results["b"]["message"]


def test_the_list_says_what_runs_and_why_not(capsys):
    methods.main(["--list"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "one turn" in lines["sod"]
    assert "reference raw_teacher, student" in lines["delta_kd"]
    assert "the same as" in lines["qwen3"]
    assert set(lines) == {*ENDS, *BASELINES, *RECIPES}


def test_bad_input(capsys):
    for argv, message in (
        (["gkdd"], "Did you mean"),
        (["--seeds", "0"], "at least 1"),
        (["--jobs", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            methods.main(argv)
        assert message in capsys.readouterr().err
