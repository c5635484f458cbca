"""Which line raises which alarm: every rule on lines made by hand, and healthy runs, which raise none."""

import json
import math
import random
import re
import statistics

import pytest
from alarm_lines import KL, QUIET, alarms_of, raised, several, steady
from healthy_logs import healthy_run


def test_a_quiet_run_raises_nothing():
    assert raised(steady(150)) == []


def test_healthy_runs_raise_nothing():
    for seed in range(200):
        lines = healthy_run(seed, num_lines=100, teachers=("math", "code") if seed % 2 else ())
        assert raised(lines) == [], seed


def test_healthy_lines_are_not_quiet():
    """The lines above would mean nothing if they hardly moved."""
    lines = [line for seed in range(40) for line in healthy_run(seed, num_lines=100)]
    small = [line for line in lines if line["completions/clipped_ratio"] >= 0.3]
    assert len(small) > 20
    norms = [line["grad_norm"] for line in lines]
    assert max(norms) > 5 * statistics.median(norms)


# Each rule


def test_truncation_and_repetition_jump_together():
    lines = steady(30) + steady(10, clipped_ratio=0.41, repetition=14.0)
    (alarm,) = alarms_of(lines)
    # The median of three lines has jumped at the second
    assert (alarm.alarm, alarm.step, alarm.severity) == ("truncation_and_repetition", 32, "warning")
    assert re.fullmatch(
        r"clipped_ratio 0\.0(49|5\d*) -> 0\.4\d* and repetition (2\.9\d*|3(\.0\d*)?) -> 1[34](\.\d)? since step 30",
        alarm.seen,
    ), alarm.seen
    assert alarm.values["completions/clipped_ratio"] == pytest.approx(0.41, rel=0.03)
    assert "learning_rate" in alarm.do and "mask_truncated_completions" in alarm.do


@pytest.mark.parametrize("changed", [{"clipped_ratio": 0.41}, {"repetition": 14.0, "repetitive_share": 0.4}])
def test_truncation_or_repetition_alone_is_no_alarm(changed):
    assert raised(steady(30) + steady(10, **changed)) == []


def test_the_share_of_repetitive_completions_may_jump_in_the_place_of_their_mean():
    lines = steady(30) + steady(10, clipped_ratio=0.3, repetitive_share=0.2)
    assert raised(lines) == [("truncation_and_repetition", 32)]
    assert raised(steady(30) + steady(10, clipped_ratio=0.3, repetitive_share=0.1)) == []


def test_longer_texts_compress_better_without_repeating():
    longer = steady(30, repetition=1.2) + steady(10, clipped_ratio=0.41, repetition=2.8)
    assert raised(longer) == []
    assert raised(longer, {"truncation_and_repetition.repetition": 2}) == [("truncation_and_repetition", 32)]


def test_truncation_and_repetition_from_the_start():
    lines = steady(8, clipped_ratio=0.6, repetitive_share=0.4)
    (alarm,) = alarms_of(lines)
    assert (alarm.alarm, alarm.step) == ("truncation_and_repetition", 3)
    assert alarm.seen.startswith("60% of") or alarm.seen.startswith("61% of") or alarm.seen.startswith("59% of")
    assert raised(steady(8, clipped_ratio=0.6, repetitive_share=0.2)) == []
    assert raised(steady(8, clipped_ratio=0.4, repetitive_share=0.4)) == []


def test_a_jump_within_the_spread_of_small_batches_is_none():
    rng = random.Random(0)
    noisy = [line | {"completions/clipped_ratio": rng.choice([0.0, 0.125, 0.25])} for line in steady(40)]
    jump = steady(3, clipped_ratio=0.4, repetition=14.0)
    assert raised(noisy + jump) == []
    assert raised(steady(40) + jump) == [("truncation_and_repetition", 42)]


def test_entropy_collapse():
    lines = steady(20) + steady(10, student_entropy=0.2)
    (alarm,) = alarms_of(lines)
    assert (alarm.alarm, alarm.step) == ("entropy_collapse", 22)
    assert "teacher's is 0.7" in alarm.seen or "teacher's is 0.69" in alarm.seen
    # Not below the teacher's: it follows a sharp teacher
    assert raised(steady(20) + steady(10, student_entropy=0.2, teacher_entropy=0.3)) == []
    # Not below its start
    assert raised(steady(30, student_entropy=0.2)) == []
    assert raised(steady(20) + steady(10, student_entropy=0.28)) == []


def test_overlap_stalled():
    lines = steady(60, noise=0.003, overlap=0.6)
    (alarm,) = alarms_of(lines)
    assert alarm.alarm == "overlap_stalled" and alarm.step >= 50
    assert "in 50 log lines" in alarm.seen
    assert raised(steady(60, noise=0.003, overlap=0.75)) == []  # not low
    rising = [line | {"distill/overlap": 0.5 + 0.0008 * i} for i, line in enumerate(steady(100, noise=0.003))]
    assert raised(rising) == []
    falling = [line | {KL: 0.5 * 0.997**i} for i, line in enumerate(steady(100, noise=0.003, overlap=0.6))]
    assert raised(falling) == []


def test_what_the_noise_may_hide_is_not_stalled():
    """Steady medians of lines that jump to and fro: a rise of 0.01 would not be seen among them."""
    for name, values in (("distill/overlap", (0.5, 0.6)), (KL, (0.4, 0.6))):
        noisy = [line | {name: values[i % 2]} for i, line in enumerate(steady(60, noise=0.003, overlap=0.55))]
        assert raised(noisy) == []
        assert raised(noisy, {"overlap_stalled.errors": 0}) == [("overlap_stalled", 50)]


def test_overlap_cannot_rise_before_the_learning_rate_has():
    lines = steady(60, noise=0.003, overlap=0.6)
    warming = [line | {"learning_rate": 1e-7 * i} for i, line in enumerate(lines)]
    assert raised(warming) == []
    decayed = [line | {"learning_rate": 1e-5} for line in steady(20)] + [
        line | {"learning_rate": 5e-7} for line in steady(55, noise=0.003, overlap=0.6)
    ]
    assert raised(decayed) == []
    for line in lines:
        del line["learning_rate"]
    assert [name for name, _ in raised(lines)] == ["overlap_stalled"]


def test_kl_spike():
    assert raised(steady(20) + steady(10, reverse_kl=1.6)) == [("kl_spike", 22)]
    assert raised(steady(20) + steady(10, reverse_kl=1.4)) == []
    assert raised(steady(20) + steady(1, reverse_kl=9.0) + steady(10)) == []  # one line is not enough
    assert raised(steady(20, reverse_kl=0.01) + steady(10, reverse_kl=0.05)) == []  # still close to the teacher
    assert raised(steady(20, reverse_kl=0.01) + steady(10, reverse_kl=0.11)) == [("kl_spike", 22)]
    (alarm,) = alarms_of(steady(20, noise=0) + steady(10, noise=0, reverse_kl=1.6))
    assert alarm.seen == "reverse_kl 0.5 -> 1.6 since step 20"


def test_gradient_norm():
    assert raised(steady(20) + steady(10, grad_norm=2.7)) == [("gradient_norm", 22)]
    assert raised(steady(20) + steady(10, grad_norm=2.3)) == []
    assert raised(steady(20, grad_norm=1e-6) + steady(10, grad_norm=1e-3)) == []
    for value in (math.nan, math.inf):
        (alarm,) = alarms_of([*steady(2), QUIET | {"grad_norm": value}])
        assert (alarm.alarm, alarm.step, alarm.severity) == ("gradient_norm", 3, "error")
        assert "bf16" in alarm.do
        json.dumps(alarm.as_dict(), allow_nan=False)


def test_loss_scaling_may_skip_two_steps():
    broken = [QUIET | {"grad_norm": math.inf}] * 2
    assert raised(broken + steady(3) + broken, fp16=True) == []
    assert raised([*broken, broken[0]], fp16=True) == [("gradient_norm", 3)]
    assert raised(broken) == [("gradient_norm", 1)]


def test_empty_completions():
    assert raised(steady(20) + steady(1, empty_share=1.0)) == [("empty_completions", 21)]
    assert raised(steady(20) + steady(10, empty_share=0.13)) == [("empty_completions", 28)]
    assert raised(steady(20) + steady(20, empty_share=0.09)) == []
    assert raised(steady(3, empty_share=1.0)) == [("empty_completions", 3)]
    (alarm,) = alarms_of(steady(3, noise=0, empty_share=1.0))
    assert alarm.seen == "100% of the completions of the last 3 log lines are empty"
    assert raised(steady(20), {"empty_completions.share": 0}) == []


def test_the_teacher_rejects_more_and_more():
    lines = steady(20) + steady(10, rejected_share=0.32)
    assert raised(lines) == [("teacher_disagreement", 22)]
    assert raised(steady(20) + steady(10, rejected_share=0.28)) == []  # not high
    assert raised(steady(40, rejected_share=0.4)) == []  # high from the start on
    assert raised(steady(20, rejected_share=0.25) + steady(10, rejected_share=0.35)) == []  # has hardly risen
    # A slow rise, which the running level follows
    slow = [line | {"distill/rejected_share": 0.1 + 0.002 * i} for i, line in enumerate(steady(160))]
    ((name, step),) = raised(slow)
    assert name == "teacher_disagreement" and 100 <= step <= 115


def test_one_of_several_teachers_is_left_behind():
    lines = [QUIET | several(1.0 * 0.8**i, 1.0) for i in range(40)]
    (alarm,) = alarms_of(lines)
    # After the warm-up and ten more lines; the median of these is then 0.8^14.5 = 0.04
    assert (alarm.alarm, alarm.step) == ("teacher_disagreement", 20)
    assert alarm.seen.startswith("reverse_kl to teacher 'math' 1 -> 1 since the start, while that to 'code' is 0.03")
    assert "teacher" in alarm.do and "balance" in alarm.do.lower()
    both_fall = [QUIET | several(0.2 * 0.97**i, 2.0 * 0.97**i) for i in range(40)]
    assert raised(both_fall) == []
    near_each_other = [QUIET | several(0.3, 1.2) for _ in range(40)]
    assert raised(near_each_other) == []
    close_to_both = [QUIET | several(0.01, 0.2) for _ in range(40)]
    assert raised(close_to_both) == []
    assert raised([QUIET | several(0.1, 0.4, third=1.0) for _ in range(40)]) == [("teacher_disagreement", 20)]


def test_reward_falls_with_kl():
    falls = [line | {KL: 0.5 * 0.98**i} for i, line in enumerate(steady(15) + steady(20, reward=0.3))]
    ((name, step),) = raised(falls)
    # The mean of ten lines is 0.2 below the best, and a quarter of 0.5 is 0.125: after seven lines
    assert name == "reward_falls_with_kl" and step in (22, 23)
    kl_rises = [line | {KL: 0.5 * 1.01**i} for i, line in enumerate(steady(15) + steady(20, reward=0.3))]
    assert raised(kl_rises) == []
    rises = [line | {KL: 0.5 * 0.98**i} for i, line in enumerate(steady(15) + steady(20, reward=0.9))]
    assert raised(rises) == []
    small = [line | {KL: 0.5 * 0.98**i} for i, line in enumerate(steady(15) + steady(20, reward=0.4))]
    assert raised(small) == []


def test_a_slow_fall_of_the_reward_is_seen():
    lines = [line | {KL: 0.5 * 0.99**i, "reward": 0.6 - 0.002 * i} for i, line in enumerate(steady(150))]
    ((name, step),) = raised(lines)
    assert name == "reward_falls_with_kl" and 75 <= step <= 100


def test_the_reward_falls_by_more_than_its_noise():
    rng = random.Random(1)
    lines = [line | {KL: 0.5 * 0.98**i, "reward": rng.choice([0.0, 0.5, 1.0])} for i, line in enumerate(steady(60))]
    assert raised(lines) == []
    assert raised(lines, {"reward_falls_with_kl.errors": 0}) != []


@pytest.mark.parametrize("name", ["loss", "distill/loss", KL, "distill/gap_at/00000-00007"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None])  # GRPOTrainer.log writes None for NaN
def test_not_a_number(name, value):
    (alarm,) = alarms_of([*steady(1), QUIET | {name: value}])
    assert (alarm.alarm, alarm.step, alarm.severity) == ("not_a_number", 2, "error")
    assert alarm.seen == f"{name} is {'NaN' if value is None else value}"
    assert alarm.as_dict()["values"] == {name: None}


def test_what_may_be_undefined_is_no_alarm():
    """The correlation with equal rewards, rewards of which there are none, and metrics that are not ours."""
    lines = [QUIET | {"distill/reward_correlation": None, "reward": None, "rewards/f/mean": None, "kl": math.nan}]
    assert raised(lines * 30) == []


def test_many_broken_metrics_are_counted():
    (alarm,) = alarms_of([dict.fromkeys(["loss", *(f"distill/{i}" for i in range(9))], math.nan)])
    assert alarm.seen == "loss is nan, distill/0 is nan, distill/1 is nan and 7 more"
    assert len(alarm.values) == 10
