"""What the alarms compare with and when they speak: warm-up, hysteresis, levels, thresholds, and what they say."""

import dataclasses
import math
import random
import re
import statistics

import pytest
from alarm_lines import KL, QUIET, raised, several, steady

from trl_opd import OnPolicyDistillConfig
from trl_opd.alarms import ALARMS, THRESHOLDS, Alarm, AlarmCallback, Watch, check_on_alarm, check_thresholds
from trl_opd.alarms.advice import ADVICE
from trl_opd.alarms.history import History, Level, noise_of, spread_of
from trl_opd.alarms.rules import RULES

# Warm-up, windows, hysteresis, missing metrics


def test_the_run_itself_is_the_yardstick_only_after_the_warm_up():
    for num in (9, 10):
        lines = steady(num) + steady(2, reverse_kl=1.6)
        assert raised(lines) == ([] if num < 10 else [("kl_spike", 12)])
    assert raised(steady(4) + steady(2, reverse_kl=1.6), {"all.warm_up": 4}) == [("kl_spike", 6)]


def test_an_alarm_speaks_once_until_it_has_cleared():
    spike = steady(3, reverse_kl=1.6)
    assert raised(steady(50) + spike) == [("kl_spike", 52)]
    assert raised(steady(50) + spike + steady(60) + spike) == [("kl_spike", 52), ("kl_spike", 115)]
    # The sign is there at the second line of a spike; four lines without it are too few to have cleared
    for between, expected in ((3, [52]), (4, [52, 59])):
        lines = steady(50) + spike + steady(between) + spike
        assert raised(lines, {"all.quiet": 1}) == [("kl_spike", step) for step in expected], between
    assert raised(steady(50) + spike + steady(40) + spike) == [("kl_spike", 52)]  # cleared, but too soon


def test_a_sign_within_the_quiet_lines_speaks_when_they_are_over():
    lines = steady(50) + steady(2, reverse_kl=1.6) + steady(20) + steady(5, reverse_kl=1.6)
    assert raised(lines, {"all.quiet": 24}) == [("kl_spike", 52), ("kl_spike", 76)]


def test_several_alarms_of_one_line():
    lines = steady(20) + steady(2, reverse_kl=1.6, grad_norm=5.0)
    assert raised(lines) == [("kl_spike", 22), ("gradient_norm", 22)]


@pytest.mark.parametrize(
    "metrics", [(), ("learning_rate", "grad_norm"), (KL,), ("reward", "completions/clipped_ratio")]
)
def test_missing_metrics_silence_the_rules(metrics):
    everything = {
        "reverse_kl": 5.0, "grad_norm": 9.0, "clipped_ratio": 0.9, "repetition": 30.0, "empty_share": 1.0,
        "student_entropy": 0.01, "rejected_share": 0.9, "overlap": 0.1,
    }  # fmt: skip
    lines = steady(20) + steady(60, **everything)
    assert {name for name, _ in raised(lines)} == set(ALARMS) - {"reward_falls_with_kl", "not_a_number"}
    only = [{"loss": 1.0} | {name: line[name] for name in metrics} for line in lines]
    expected = {"grad_norm": "gradient_norm", KL: "kl_spike"}
    assert {name for name, _ in raised(only)} == {expected[name] for name in metrics if name in expected}


def test_a_metric_that_ends_is_silent():
    """What is no longer logged is not what others are compared with."""
    low = steady(20, student_entropy=0.2)
    gone = [{name: value for name, value in line.items() if name != "distill/teacher_entropy"} for line in low]
    assert raised(steady(20) + low) == [("entropy_collapse", 22)]
    assert raised(steady(20) + gone) == []


def test_lines_that_lack_a_metric_now_and_then():
    lines = steady(40) + steady(4, reverse_kl=1.6)
    del lines[5][KL], lines[30]["completions/repetition"], lines[41][KL]
    lines[12][KL] = math.nan
    assert raised(lines) == [("not_a_number", 13), ("kl_spike", 43)]


def test_levels_are_robust():
    assert spread_of([1.0] * 20 + [100.0]) == (1.0, 0.0)
    rng = random.Random(0)
    normal = [rng.gauss(3, 2) for _ in range(20_000)]
    median, spread = spread_of(normal)
    assert median == pytest.approx(3, abs=0.05) and spread == pytest.approx(2, rel=0.03)
    assert Level(median, normal).spread_of_shares == pytest.approx(2, rel=0.03)
    assert noise_of(normal) == pytest.approx(2, rel=0.03)
    assert noise_of([x + 0.01 * i for i, x in enumerate(normal)]) == pytest.approx(2, rel=0.03)
    # Events in 15% of the lines: their median absolute deviation is 0
    events = Level(0.0, [0.0] * 85 + [1.0] * 15)
    assert events.spread == 0.0 and events.spread_of_shares == pytest.approx(1 / 1.2816)
    assert Level(5.0, [5.0] * 9 + [0.0]).spread_of_shares == 0.0


def test_the_fall_of_the_kl_at_the_beginning_does_not_hide_a_spike():
    fall = [line | {KL: 4.0 * 0.7**i + 0.02} for i, line in enumerate(steady(30))]
    assert raised(fall + steady(3, reverse_kl=2.0)) == [("kl_spike", 32)]


def test_a_slow_onset_does_not_hide_itself():
    """The gap: a metric that takes thirteen lines to rise is compared with the lines before."""
    slow = [line | {KL: 0.5 * 1.15**i} for i, line in enumerate(steady(16))]
    ((name, step),) = raised(steady(12) + slow)
    assert name == "kl_spike" and 20 <= step <= 23


def test_the_error_of_a_drift():
    """Its standard error, for noise that lasts too: what the windows of many runs scatter by."""
    for memory in (0.0, 0.5):
        rng, drifts = random.Random(0), []
        for _ in range(300):
            history, value = History(60, 1), 0.0
            for step in range(60):
                value = memory * value + rng.gauss(0, 1)
                history.add(step, {"x": value})
            drifts.append(history.drift("x", 60))
        scatter = statistics.stdev(drift.last - drift.first for drift in drifts)
        claimed = statistics.median(drift.error for drift in drifts)
        assert claimed == pytest.approx(scatter, rel=0.25), memory


def test_history_forgets():
    history = History(capacity=5, num_first=2)
    for step in range(20):
        history.add(step, {"x": float(step), "name": "text", "flag": True})
        assert len(history._series["x"].values) <= 10
    assert history.up_to("x", 100) == [15.0, 16.0, 17.0, 18.0, 19.0]
    assert history.start("x") == 0.5 and history.peak("x") == 19.0
    assert history.up_to("name", 1) == history.up_to("flag", 1) == []


def test_a_watch_remembers_as_many_lines_as_its_rules_ask_for():
    watch = Watch({"all.window": 300, "kl_spike.lines": 7})
    assert watch.history._capacity >= 307
    assert Watch({"overlap_stalled.lines": 500}).history._capacity >= 500
    assert Watch({"empty_completions.lines": 900}).history._capacity >= 900


# Thresholds and texts


def test_thresholds_are_documented():
    names = [threshold.name for threshold in THRESHOLDS]
    assert len(set(names)) == len(names)
    for threshold in THRESHOLDS:
        assert threshold.unit and threshold.meaning and threshold.source, threshold.name
        assert threshold.name.partition(".")[0] in ("all", *ALARMS)
    assert tuple(RULES) == ALARMS
    assert {f"{name}.on" for name in ALARMS} <= set(names)


def test_every_threshold_is_read():
    """One that no rule looks up would be documented in vain."""
    asked = set()

    class Asked(dict):
        def __getitem__(self, name):
            asked.add(name)
            return super().__getitem__(name)

    watch = Watch(fp16=True)
    watch.thresholds = Asked(watch.thresholds)
    bad = {"overlap": 0.2, "rejected_share": 0.9, "student_entropy": 0.1, "empty_share": 0.5, "reward": 0.1}
    lines = steady(40) + steady(60, clipped_ratio=0.9, repetitive_share=0.9, reverse_kl=0.4, **bad)
    lines += steady(10) + steady(10, **bad) + [QUIET | {"grad_norm": math.nan}]
    for number, logs in enumerate(lines):
        watch.read(number, logs | several(0.1, 1.0))
    never = {threshold.name for threshold in THRESHOLDS} - asked
    assert never <= {f"{name}.on" for name in ALARMS}, never


def test_check_thresholds():
    assert check_thresholds(None) == {threshold.name: threshold.default for threshold in THRESHOLDS}
    assert check_thresholds({"kl_spike.factor": 5})["kl_spike.factor"] == 5
    assert raised(steady(20) + steady(3, reverse_kl=1.6), {"kl_spike.factor": 5}) == []
    assert raised(steady(20) + steady(3, reverse_kl=1.6), {"kl_spike.on": 0}) == []
    assert raised(steady(20) + steady(3, reverse_kl=1.6), {"kl_spike.on": False}) == []


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"kl_spike.facter": 5}, "Did you mean 'kl_spike.factor'"),
        ({"kl_spike": 5}, "got 'kl_spike'"),
        ({"kl_spike.factor": "5"}, "a finite number of at least 0, got '5'"),
        ({"kl_spike.factor": -1}, "a finite number of at least 0"),
        ({"kl_spike.factor": math.inf}, "kl_spike.on=0 silences"),
        ({"kl_spike.factor": True}, "a finite number"),
        ({"kl_spike.lines": 0}, "a whole number of at least 1"),
        ({"kl_spike.lines": 2.5}, "a whole number of at least 1"),
        ({"all.window": math.inf}, "a whole number of at least 1"),
        ({"kl_spike.on": 2}, "must be 0 or 1, got 2"),
        ([("kl_spike.factor", 5)], "must be a dict of numbers by name"),
    ],
)
def test_wrong_thresholds(thresholds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_thresholds(thresholds)
    with pytest.raises(ValueError, match="alarm_thresholds"):
        AlarmCallback(thresholds=thresholds)


def some_function(alarm):
    return None


NOT_A_FUNCTION = 3


def test_check_on_alarm():
    for value in ("warn", "stop", "off", "test_alarm_thresholds.some_function"):
        check_on_alarm(value)
    for value, message in (
        ("wran", "Did you mean 'warn'"),
        (None, "got None"),
        (True, "got True"),
        ("no_such_module.function", "no_such_module"),
        ("test_alarm_thresholds.no_such_function", "no_such_function"),
        ("test_alarm_thresholds.NOT_A_FUNCTION", "names 3"),
        (some_function, "AlarmCallback"),
    ):
        with pytest.raises(ValueError, match="on_alarm must be 'warn', 'stop', 'off' or the import path") as error:
            check_on_alarm(value)
        assert message in str(error.value)


def test_advice_names_fields_that_exist():
    fields = {field.name for field in dataclasses.fields(OnPolicyDistillConfig)}
    assert set(ALARMS) <= set(ADVICE)
    for advice in ADVICE.values():
        assert advice.why and advice.do
        named = set(re.findall(r"(\w+)=", advice.do)) | set(re.findall(r"\b[a-z]+_[a-z_]+\b", advice.do))
        unknown = named - fields - {"entropy_gated_kl", "generalized_jsd", "min_new_tokens", "student_top_k"}
        assert not unknown, unknown


def test_an_alarm_as_text():
    alarm = Alarm("kl_spike", 12, "warning", "reverse_kl 0.5 -> 1.6 since step 20", "Why.", "Do.")
    assert str(alarm) == "kl_spike at step 12: reverse_kl 0.5 -> 1.6 since step 20. Why. Do."
    assert list(alarm.as_dict()) == ["alarm", "step", "severity", "seen", "why", "do", "values"]
