"""Log lines made by hand, and the alarms that they raise."""

import random

from trl_opd.alarms import Watch

KL = "distill/reverse_kl"
# A run in which nothing happens; every value has a little noise, which `steady` adds
QUIET = {
    "loss": 0.5,
    "learning_rate": 1e-5,
    "grad_norm": 0.5,
    KL: 0.5,
    "distill/student_entropy": 0.8,
    "distill/teacher_entropy": 0.7,
    "distill/overlap": 0.85,
    "distill/rejected_share": 0.1,
    "completions/clipped_ratio": 0.05,
    "completions/repetition": 3.0,
    "completions/repetitive_share": 0.02,
    "completions/empty_share": 0.0,
    "reward": 0.5,
    "reward_std": 0.3,
}


def steady(num, seed=0, noise=0.02, **changed):
    """So many lines about QUIET; `changed` names metrics with their last part."""
    rng = random.Random(seed)
    full = {next((name for name in QUIET if name.endswith(key)), key): value for key, value in changed.items()}
    base = QUIET | full
    return [{name: value * (1 + noise * rng.uniform(-1, 1)) for name, value in base.items()} for _ in range(num)]


def alarms_of(lines, thresholds=None, **kwargs):
    """Every alarm, whose step is the line's number from 1."""
    watch = Watch(thresholds, **kwargs)
    return [alarm for number, logs in enumerate(lines, 1) for alarm in watch.read(number, logs)]


def raised(lines, thresholds=None, **kwargs):
    return [(alarm.alarm, alarm.step) for alarm in alarms_of(lines, thresholds, **kwargs)]


def several(near, far, third=None):
    """Metrics of teachers of these KLs."""
    kls = {"code": near, "math": far} | ({} if third is None else {"chat": third})
    shares = {f"distill/{name}/share": 1 / len(kls) for name in kls}
    return shares | {f"distill/{name}/reverse_kl": kl for name, kl in kls.items()}
