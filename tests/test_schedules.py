"""Schedules against their formulas, and what a configuration may say of them."""

import itertools
import json
import math
import sys
from types import ModuleType

import pytest

from trl_opd import OnPolicyDistillConfig
from trl_opd.schedules import SCHEDULABLE, SCHEDULABLE_DICTS, TYPES, ScheduleState, make_schedule, resolve_schedules
from trl_opd.schedules import value_range as range_of
from trl_opd.schedules.fields import get_value, set_value

STEPS = 20


def course(spec, max_steps=STEPS):
    schedule = make_schedule(spec, "schedule")
    return [schedule.value(ScheduleState(step, max_steps)) for step in range(max_steps + 1)]


def make_config(tmp_path, **fields):
    return OnPolicyDistillConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **fields)


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path)


# By the step alone


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (0.3, lambda x: 0.3),
        ({"type": "constant", "value": 2}, lambda x: 2),
        ({"type": "linear", "start": 1.0, "end": 3.0}, lambda x: 1 + 2 * x),
        ({"type": "linear", "start": 3.0, "end": 1.0}, lambda x: 3 - 2 * x),
        ({"type": "cosine", "start": 2.0, "end": -1.0}, lambda x: 2 - 3 * math.sin(math.pi * x / 2) ** 2),
        ({"type": "exponential", "start": 8.0, "end": 0.5}, lambda x: 8 * (1 / 16) ** x),
        ({"type": "exponential", "start": 0.1, "end": 10}, lambda x: 0.1 * 100**x),
    ],
)
def test_the_course_over_a_whole_run(spec, expected):
    values = course(spec)
    assert values == pytest.approx([expected(k / STEPS) for k in range(STEPS + 1)], rel=1e-12)
    if isinstance(spec, dict) and "end" in spec:
        assert (values[0], values[-1]) == (spec["start"], spec["end"])  # exactly


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("where", [{"begin": 0.25, "finish": 0.75}, {"begin": 5, "finish": 15, "unit": "steps"}])
def test_begin_and_finish(name, where):
    values = course({"type": name, "start": 0.7, "end": 0.1, **where})
    assert values[:6] == [0.7] * 6
    assert values[15:] == [0.1] * 6
    middle = math.sqrt(0.7 * 0.1) if name == "exponential" else 0.4
    assert values[10] == pytest.approx(middle, rel=1e-12)
    assert all(a > b for a, b in itertools.pairwise(values[5:16]))
    whole = course({"type": name, "start": 0.7, "end": 0.1}, 10)
    assert values[5:16] == pytest.approx(whole, rel=1e-12)


def test_steps_go_to_the_end_of_the_run_by_default():
    spec = {"type": "linear", "start": 0.0, "end": 1.0, "unit": "steps"}
    assert course(spec, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert course({**spec, "begin": 2}, 4) == [0, 0, 0, 0.5, 1]


def test_piecewise():
    points = [[0.25, 1.0], [0.5, 5.0], [0.75, 3.0]]
    assert course({"type": "piecewise", "points": points}, 8) == [1, 1, 1, 3, 5, 4, 3, 3, 3]
    assert course({"type": "piecewise", "points": points, "interpolate": False}, 8) == [1, 1, 1, 1, 5, 5, 3, 3, 3]
    points = [(2, 1.0), (3, 7.0)]
    for interpolate in (True, False):
        spec = {"type": "piecewise", "points": points, "interpolate": interpolate, "unit": "steps"}
        assert course(spec, 4) == [1, 1, 1, 7, 7]


def test_anneal_is_that_of_kdrl():
    spec = {"type": "anneal", "start": 5e-3, "end": 1e-3, "change_per_step": 5e-5}
    values = course(spec, 100)
    assert values[0] == 5e-3
    assert values[1] == pytest.approx(4.95e-3, rel=1e-12)
    assert values[79] == pytest.approx(1.05e-3, rel=1e-12)
    assert values[81:] == [1e-3] * 20
    assert course({"type": "anneal", "start": 1, "end": 2, "change_per_step": 0.4}, 4) == pytest.approx(
        [1, 1.4, 1.8, 2, 2]
    )


def test_numbers_that_yaml_takes_for_text():
    spec = {"type": "anneal", "start": "5e-3", "end": "1e-3", "change_per_step": "5e-5"}
    assert course(spec) == course({"type": "anneal", "start": 5e-3, "end": 1e-3, "change_per_step": 5e-5})
    points = [["0", "1e-1"], ["5e-1", "2"]]
    assert course({"type": "piecewise", "points": points}, 2) == [0.1, 2, 2]
    assert course("2e-1", 1) == [0.2, 0.2]


# By a metric


def follow(spec, measurements, max_steps=STEPS):
    """Values before the first and after each measurement, one a step, with the state through JSON in between."""
    schedule = make_schedule(spec, "schedule")
    values = [schedule.value(ScheduleState(0, max_steps))]
    for step, measured in enumerate(measurements, start=1):
        schedule.observe(measured, ScheduleState(step, max_steps))
        state = json.loads(json.dumps(schedule.state_dict()))
        schedule = make_schedule(spec, "schedule")
        schedule.load_state_dict(state)
        values.append(schedule.value(ScheduleState(step, max_steps)))
        assert values[-1] == schedule.value(ScheduleState(step, max_steps))  # asking changes nothing
    return values


def test_metric_is_distillms_threshold():
    spec = {"type": "metric", "metric": "eval_loss", "by": 0.125, "start": 0.0, "change": 0.1, "maximum": 0.3}
    # The first is compared with until a rise of 0.125, at once or bit by bit
    losses = [1.0, 1.05, 0.5, 1.09, 1.125, 1.2, 1.25, 3.0, 9.0, 0.0]
    expected = [0, 0, 0, 0, 0, 0.1, 0.1, 0.2, 0.3, 0.3, 0.3]
    assert follow(spec, losses) == pytest.approx(expected, rel=1e-12)


def test_metric_that_falls():
    spec = {
        "type": "metric",
        "metric": "reward",
        "when": "falls",
        "by": 1.0,
        "start": 5.0,
        "change": -2.0,
        "minimum": 2.0,
    }
    assert follow(spec, [0.0, 3.0, -0.5, -1.0, -1.5, -2.0, -9.0]) == [5, 5, 5, 5, 3, 3, 2, 2]
    assert follow({**spec, "change": 2.0, "maximum": 6.0}, [0.0, -1.0, -2.0]) == [5, 5, 6, 6]


def test_entropy_gated():
    spec = {"type": "entropy_gated", "threshold": 0.5, "start": 8, "change": 4, "maximum": 14}
    assert follow(spec, [0.6, 0.5, 0.1, 0.51, 2.0]) == [8, 12, 12, 12, 14, 14]


def test_a_product_is_distillms_share_of_fresh_text(tmp_path):
    grows = {"type": "metric", "metric": "eval_loss", "start": 0.0, "change": 0.5, "maximum": 1.0}
    fresh = {"type": "product", "factors": [grows, {"type": "linear", "start": 1.0, "end": 0.0}]}
    replayed = {"type": "product", "factors": [{"type": "linear", "start": 0.0, "end": 1.0}, grows]}
    losses = [1.0, 2.0, 0.0, 3.0, 4.0]
    assert follow(fresh, losses, 5) == pytest.approx([0, 0, 0.5 * 0.6, 0.5 * 0.4, 0.2, 0])
    assert follow(replayed, losses, 5) == pytest.approx([0, 0, 0.5 * 0.4, 0.5 * 0.6, 0.8, 1])
    twice = {"type": "product", "factors": [-2, {"type": "linear", "start": -1.0, "end": 3.0}]}
    assert course(twice, 4) == [2, 0, -2, -4, -6]
    assert make_schedule(twice, "s").bounds == (-6, 2)
    # At each step the two together are at most 1, though each of them may be 1
    config = make_config(tmp_path, eval_strategy="steps", eval_steps=1)
    schedules = {"student_fraction": fresh, "replay_fraction": replayed}
    config.student_fraction, config.replay_fraction = 0.0, 0.0
    assert resolve_schedules(schedules, config).keys() == schedules.keys()
    config.schedules = schedules
    assert range_of(config, "student_fraction") == (0, 1)
    with pytest.raises(ValueError, match="at step 500: student_fraction"):
        resolve_schedules({**schedules, "replay_fraction": {**replayed, "factors": [2.0, replayed]}}, config)


def taid_by_hand(losses, max_steps, start, end, alpha, beta):
    t, previous, m, values = start, None, 0.0, [start]
    for step, loss in enumerate(losses, start=1):
        if previous is not None:
            m = beta * m + (1 - beta) * (previous - loss) / previous
            t = t + alpha / (1 + math.exp(-m)) * (1 - t)
        t = min(end, max(start + (end - start) * step / max_steps, t))
        previous = loss
        values.append(t)
    return values


@pytest.mark.parametrize("alpha", [5e-4, 0.3])
def test_taid(alpha):
    losses = [2.0, 1.5, 1.6, 0.9, 0.1, 0.5, 0.5, 0.49, 0.3, 0.2]
    values = follow({"type": "taid", "alpha": alpha, "momentum": 0.9}, losses)
    assert values == pytest.approx(taid_by_hand(losses, STEPS, 0.4, 1.0, alpha, 0.9), rel=1e-12)
    assert all(a <= b for a, b in itertools.pairwise(values))
    line = course({"type": "linear", "start": 0.4, "end": 1.0})
    assert all(t >= x for t, x in zip(values, line, strict=False))
    assert values[1] == pytest.approx(line[1])  # the first loss is only remembered
    assert (values[2] > line[2]) == (alpha == 0.3)


def test_taid_without_alpha_is_linear_and_stops_at_its_end():
    losses = [3.0, 1.0, 0.0, 2.0, 1e-9, 5.0, 0.0, 0.0]
    assert follow({"type": "taid", "alpha": 0.0}, losses, 8) == course({"type": "linear", "start": 0.4, "end": 1.0}, 8)
    values = follow({"type": "taid", "alpha": 1.0, "momentum": 0.0, "end": 0.8}, losses, 8)
    assert max(values) == 0.8 == values[-1]


def test_taid_defaults_are_the_papers():
    taid = make_schedule({"type": "taid"}, "s")
    assert (taid.start, taid.end, taid.alpha, taid.momentum, taid.metric) == (0.4, 1.0, 5e-4, 0.99, "distill/loss")


def adakd_by_hand(losses, max_steps, epsilon, sigma, momentum, warmup, minimum):
    r, average, reference, values = 1.0, None, None, [1.0]
    for step, loss in enumerate(losses, start=1):
        average = loss if average is None else momentum * average + (1 - momentum) * loss
        if reference is None:
            if step > warmup * max_steps:
                reference = average
        elif average > (1 + epsilon) * reference:
            r, reference = min(1.0, r * (1 + sigma)), average
        elif average < (1 - epsilon) * reference:
            r, reference = max(minimum, r * (1 - sigma)), average
        values.append(r)
    return values


def test_adakd():
    losses = [5.0, 1.0, 0.9, 0.5, 0.5, 0.1, 0.01, 0.8, 0.9, 3.0, 3.0, 0.1]
    values = follow({"type": "adakd", "momentum": 0.3, "sigma": 0.5, "minimum": 0.2, "warmup": 0.1}, losses)
    assert values == pytest.approx(adakd_by_hand(losses, STEPS, 0.05, 0.5, 0.3, 0.1, 0.2), rel=1e-12)
    assert values[:4] == [1.0] * 4  # in the warm-up (two of twenty steps), and where the reference is taken
    assert min(values) == 0.2
    assert values[-2] > values[7]
    assert follow({"type": "adakd", "sigma": 0.0, "momentum": 0.0}, losses) == [1.0] * 13
    kd = make_schedule({"type": "adakd"}, "s")
    defaults = (kd.start, kd.minimum, kd.epsilon, kd.sigma, kd.momentum, kd.warmup)
    assert defaults == (1.0, 0.1, 0.05, 0.05, 0.99, 0.05)


def test_a_state_of_another_type_is_refused():
    taid = make_schedule({"type": "taid"}, "s")
    with pytest.raises(ValueError, match="must be that of this type"):
        taid.load_state_dict(make_schedule({"type": "adakd"}, "s").state_dict())


# Functions


def halve(state):
    return state.value / 2


class Doubling:
    def __init__(self):
        self.now = 0.5

    def __call__(self, state):
        self.now *= 2
        return self.now

    def state_dict(self):
        return {"now": self.now}

    def load_state_dict(self, state):
        self.now = state["now"]


def test_functions(config, monkeypatch):
    for spec in (halve, f"{__name__}.halve"):
        schedule = resolve_schedules({"distill_coef": spec}, config)["distill_coef"]
        assert schedule.value(ScheduleState(3, 4, value=0.5)) == 0.25
        assert schedule.state_dict() == {}
    monkeypatch.setitem(sys.modules, "mine", module := ModuleType("mine"))
    module.doubling = Doubling()
    schedule = resolve_schedules({"distill_coef": "mine.doubling"}, config)["distill_coef"]
    assert module.doubling.now == 0.5  # a copy was asked
    assert schedule.value(ScheduleState(0, 4)) == 1.0
    assert schedule.state_dict() == {"now": 1.0}
    schedule.load_state_dict({"now": 3.0})
    assert schedule.value(ScheduleState(0, 4)) == 6.0


# Fields


def test_every_field_that_may_move_exists(config):
    for name in (*SCHEDULABLE, *SCHEDULABLE_DICTS):
        assert hasattr(config, name), name


def test_whole_numbers_are_rounded_halves_up(config):
    for value, expected in ((7.49, 7), (7.5, 8), (8.5, 9), (8.51, 9)):
        assert set_value(config, "max_completion_length", value) == expected
        assert config.max_completion_length == expected
        assert type(config.max_completion_length) is int
    set_value(config, "discount", 0.5)
    assert config.discount == 0.5


def test_numbers_inside_dicts(tmp_path):
    kwargs = {"alpha": 0.5, "beta": 0.25}
    config = make_config(tmp_path, divergence="alpha_beta_divergence", divergence_kwargs=kwargs)
    assert get_value(config, "divergence_kwargs.beta") == 0.25
    set_value(config, "divergence_kwargs.beta", 0.75)
    assert config.divergence_kwargs == {"alpha": 0.5, "beta": 0.75}
    assert kwargs["beta"] == 0.25

    config.divergence_kwargs = None
    assert get_value(config, "divergence_kwargs.beta") is None
    set_value(config, "divergence_kwargs.beta", 0.75)
    assert config.divergence_kwargs == {"beta": 0.75}

    config.token_weighting = "some"
    set_value(config, "token_weighting.some.fraction", 0.5)
    assert config.token_weighting == {"some": {"fraction": 0.5}}
    config.token_weighting = weighting = {"some": {"fraction": 1.0}, "my.module.function": {"some": 1}, "my": {}}
    set_value(config, "token_weighting.my.module.function.some", 2.0)
    set_value(config, "token_weighting.some.fraction", 0.5)
    assert config.token_weighting == {"some": {"fraction": 0.5}, "my.module.function": {"some": 2.0}, "my": {}}
    assert weighting == {"some": {"fraction": 1.0}, "my.module.function": {"some": 1}, "my": {}}


def test_ranges_of_values(tmp_path):
    specs = {
        "distill_coef": {"type": "piecewise", "points": [[0, 0.5], [0.5, 2.0], [1.0, 1.0]]},
        "reward_coef": halve,
        "divergence_kwargs.beta": {"type": "adakd"},
    }
    config = make_config(tmp_path, divergence="generalized_jsd")
    config.schedules = specs
    assert range_of(config, "distill_coef") == (0.5, 2.0)
    assert range_of(config, "divergence_kwargs.beta") == (0.1, 1.0)
    assert range_of(config, "reward_coef") is None
    assert range_of(config, "temperature") == (1.0, 1.0)
    assert range_of(config, "advantage_clip") is None


def test_two_fields_that_only_fit_together(tmp_path):
    config = make_config(tmp_path, credit="policy_gradient", support="sampled")
    spec = {"type": "linear", "start": 1.0, "end": 0.5}
    assert resolve_schedules({"temperature": spec, "distill_temperature": spec}, config).keys() == {
        "temperature",
        "distill_temperature",
    }
    with pytest.raises(ValueError, match="distill_temperature must equal temperature"):
        resolve_schedules({"distill_temperature": spec}, config)
    assert config.temperature == 1.0
    assert config.distill_temperature is None


@pytest.mark.parametrize("empty", [None, {}])
def test_no_schedules(config, empty):
    assert resolve_schedules(empty, config) == {}


LINE = {"type": "linear", "start": 0.0, "end": 1.0}


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ([1], r"schedules must be a dict"),
        ({"distil_coef": LINE}, r"got 'distil_coef'\. .*Did you mean 'distill_coef'\?"),
        ({"divergence": LINE}, r"must name numbers, got 'divergence'\. divergence is of type str, 'reverse_kl'"),
        ({"bf16": LINE}, "must name numbers, got 'bf16'"),
        ({"special_token_masking": LINE}, "must name numbers, got 'special_token_masking'"),
        ({"model_init_kwargs.x": LINE}, "must name numbers"),
        ({"distill_coef.x": LINE}, "must name numbers"),
        ({"learning_rate": LINE}, "read during the run, got 'learning_rate'.*lr_scheduler_type"),
        ({"per_device_train_batch_size": LINE}, "read during the run"),
        ({"num_generations": LINE}, "read during the run.*injected_completions"),
        ({"max_steps": LINE}, "read during the run"),
        ({"beta": LINE}, "beta must not be 0 in the configuration"),
        ({"entropy_coef": LINE}, "entropy_coef must not be 0 in the configuration"),
        ({"divergence_kwargs": LINE}, r"one number in divergence_kwargs.*'divergence_kwargs\.NAME'"),
        ({"divergence_kwargs.gamma": LINE}, "at step 0: .*gamma"),
        ({"token_weighting.none.fraction": LINE}, r"There is no 'none'"),
        (
            {"distill_temperature": {**LINE, "start": 1.0, "end": -0.5}},
            r"-0.5\} at step 1000: distill_temperature must be",
        ),
        ({"distill_coef": {**LINE, "start": -1.0}}, "at step 0: distill_coef must be .*at least 0"),
        ({"top_p": LINE}, r"range of top_p, in \(0, 1\], got 0.0 at step 0"),
        ({"temperature": {**LINE, "start": 1.0, "end": 0.0}}, "range of temperature, above 0, got 0.0 at step 1000"),
        ({"max_completion_length": {"type": "piecewise", "points": [[0, 8], [0.3, 0.4], [1.0, 8]]}}, "at step 300"),
        (
            {"distill_coef": {"type": "metric", "metric": "x", "start": 0, "change": -1, "minimum": -2}},
            "'distill_coef': -2",
        ),
        (
            {"distill_coef": {"type": "metric", "metric": "eval_loss", "start": 0, "change": 1, "maximum": 2}},
            "eval_str",
        ),
        ({"distill_coef": lambda state: float("nan")}, r"must give finite numbers, got nan at step 0"),
        ({"distill_coef": lambda state: "high"}, r"must give finite numbers, got 'high'"),
        ({"distill_coef": lambda state: 1 - state.step / 500}, r"at step 1000: distill_coef must"),
        ({"distill_coef": "nothing"}, r"schedules\['distill_coef'\] must be .* It cannot be imported"),
        ({"distill_coef": "math.nothing"}, "got 'math.nothing'"),
        ({"distill_coef": True}, "must be a number, a dict with a type"),
        ({"distill_coef": {"start": 1}}, "must be a number, a dict with a type"),
        ({"distill_coef": {"type": "linar"}}, r"\.type must be a known name, got 'linar'.*'linear'"),
        ({"distill_coef": {"type": "linear", "start": 1}}, r"\]\.end must be set"),
        ({"distill_coef": {**LINE, "stop": 1}}, "parameters of 'linear' only, got 'stop'"),
        ({"distill_coef": {**LINE, "end": "many"}}, r"\['distill_coef'\]\.end must be a finite number, got 'many'"),
        ({"distill_coef": {**LINE, "end": math.inf}}, "end must be a finite number"),
        ({"distill_coef": {**LINE, "end": None}}, "end must be a finite number"),
        ({"distill_coef": {**LINE, "start": False}}, "start must be a finite number"),
        ({"distill_coef": {**LINE, "finish": 50}}, r"finish must be a share.*unit='steps'"),
        ({"distill_coef": {**LINE, "finish": 0.5, "unit": "steps"}}, r"finish must be a whole.*unit='fraction'"),
        ({"distill_coef": {**LINE, "begin": -1, "unit": "steps"}}, "begin must be a whole"),
        ({"distill_coef": {**LINE, "unit": "epochs"}}, "unit must be 'fraction' or 'steps'"),
        ({"distill_coef": {**LINE, "begin": 0.5, "finish": 0.5}}, r"finish must be after begin \(0.5\)"),
        ({"distill_coef": {**LINE, "begin": 1.0}}, "begin must be before the end"),
        ({"distill_coef": {"type": "exponential", "start": 1, "end": 0}}, "end must be above 0"),
        ({"distill_coef": {"type": "piecewise", "points": []}}, "points must be a list"),
        ({"distill_coef": {"type": "piecewise", "points": [1, 2]}}, "points must be a list"),
        ({"distill_coef": {"type": "piecewise", "points": [[0.5, 1], [0.5, 2]]}}, "increasing order"),
        ({"distill_coef": {"type": "piecewise", "points": [[0, 1], [20, 2]]}}, "unit='steps'"),
        ({"distill_coef": {"type": "piecewise", "points": [[0, "x"]]}}, "finite values"),
        ({"distill_coef": {"type": "piecewise", "points": [[0, 1]], "interpolate": 2}}, "true or false"),
        ({"distill_coef": {"type": "anneal", "start": 1, "end": 0, "change_per_step": -1}}, "above 0"),
        ({"distill_coef": {"type": "metric", "metric": "x", "start": 0, "change": 1}}, "maximum must be set"),
        ({"distill_coef": {"type": "metric", "metric": "x", "start": 0, "change": -1}}, "minimum must be set"),
        ({"distill_coef": {"type": "metric", "metric": "x", "start": 0, "change": 0}}, "other than 0"),
        (
            {"distill_coef": {"type": "metric", "metric": "", "start": 0, "change": 1, "maximum": 1}},
            "name of a metric",
        ),
        (
            {"distill_coef": {"type": "metric", "metric": "x", "start": 3, "change": 1, "maximum": 1}},
            r"start must be in \[3, 1\]",
        ),
        (
            {"distill_coef": {"type": "metric", "metric": "x", "when": "up", "start": 0, "change": 1, "maximum": 1}},
            "'rises' or 'falls'",
        ),
        ({"distill_coef": {"type": "product", "factors": [1.0]}}, r"\.factors must be a list of at least two"),
        ({"distill_coef": {"type": "product", "factors": [1.0, halve]}}, "factors must be without functions"),
        ({"distill_coef": {"type": "product", "factors": [1.0, {"type": "linear"}]}}, r"\]\.factors\[1\]\.start must"),
        (
            {"distill_coef": {"type": "product", "factors": [{"type": "taid"}, {"type": "taid", "metric": "x"}]}},
            "factors must be of one metric",
        ),
        ({"distill_coef": {"type": "taid", "start": 0.9, "end": 0.8}}, "end must be in"),
        ({"distill_coef": {"type": "taid", "alpha": -1}}, "alpha must be at least 0"),
        ({"distill_coef": {"type": "taid", "momentum": 1}}, r"momentum must be in \[0, 1\)"),
        ({"distill_coef": {"type": "adakd", "minimum": 0}}, r"minimum must be in \(0, start\]"),
        ({"distill_coef": {"type": "adakd", "sigma": 1}}, "sigma must be in"),
        ({"distill_coef": {"type": "adakd", "warmup": 5}}, "warmup must be a share"),
        (
            {"distill_coef": {"type": "entropy_gated", "threshold": 1, "start": 2, "change": 1, "maximum": 1}},
            "maximum must be at least start",
        ),
    ],
)
def test_bad_schedules(config, schedules, message):
    with pytest.raises(ValueError, match=message):
        resolve_schedules(schedules, config)


def test_a_turn_that_the_run_does_not_reach_is_not_checked(tmp_path):
    specs = {"discount": {"type": "linear", "start": 0.0, "end": 2.0, "finish": 100, "unit": "steps"}}
    kwargs = {"credit": "policy_gradient", "support": "sampled"}
    resolve_schedules(specs, make_config(tmp_path, max_steps=50, **kwargs))
    with pytest.raises(ValueError, match="at step 51"):
        resolve_schedules(
            {"discount": {**specs["discount"], "finish": 51}}, make_config(tmp_path, max_steps=51, **kwargs)
        )


def test_fields_of_generation_that_generation_kwargs_hold(tmp_path):
    config = make_config(tmp_path, generation_kwargs={"top_p": 0.5})
    with pytest.raises(ValueError, match="generation_kwargs must not have 'top_p'"):
        resolve_schedules({"top_p": {"type": "linear", "start": 0.5, "end": 1.0}}, config)


def test_the_catalogue_is_complete():
    timed = {"constant", "linear", "cosine", "exponential", "piecewise", "anneal"}
    assert set(TYPES) == timed | {"metric", "entropy_gated", "taid", "adakd", "product"}
