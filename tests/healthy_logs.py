"""Log lines of runs in which nothing is wrong: trends, random walks, small batches, single outliers."""

import math
import random
from collections.abc import Iterator
from typing import Any


class Walk:
    """A mean-reverting random walk: noise that lasts a few lines."""

    def __init__(self, rng: random.Random, size: float, memory: float = 0.8):
        self.rng, self.size, self.memory, self.value = rng, size, memory, 0.0

    def __call__(self) -> float:
        step = self.rng.gauss(0, self.size * math.sqrt(1 - self.memory**2))
        self.value = self.memory * self.value + step
        return self.value


def healthy_run(seed: int, num_lines: int = 200, teachers: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """
    Lines of a run: KLs fall, entropies meet, overlap rises, and completions are few enough for noisy shares.

    Half the runs are slow: they go less than two thirds of the way to where they would end.
    """
    rng = random.Random(seed)
    completions = rng.choice([8, 16, 64, 256])
    pace = rng.choice([1.2, 4.0]) * rng.uniform(1, 2) / num_lines
    warm_up = rng.choice([0, 10, 40])
    kl, kl_end = rng.uniform(0.3, 2.0), rng.uniform(0.05, 0.2)
    overlap, overlap_end = rng.uniform(0.55, 0.75), rng.uniform(0.85, 0.93)
    entropy, teacher_entropy = rng.uniform(0.4, 1.5), rng.uniform(0.2, 1.0)
    clipped, looping, repetition = rng.uniform(0, 0.15), rng.uniform(0, 0.3), rng.uniform(2, 4)
    reward, reward_end = rng.uniform(0.1, 0.5), rng.uniform(0.5, 0.8)
    noise = 0.5 / math.sqrt(completions)
    walks = {name: Walk(rng, noise * size) for name, size in (("kl", 0.8), ("overlap", 0.1), ("entropy", 0.5))}
    walks |= {"grad_norm": Walk(rng, 0.4, memory=0.2), "reward": Walk(rng, 0.03, memory=0.95)}
    moved, outlier = 0.0, 1.0
    for line in range(num_lines):
        rate = min(1.0, (line + 1) / (warm_up + 1)) * (0.5 + 0.5 * math.cos(math.pi * line / num_lines))
        moved += pace * rate

        def now(start: float, end: float, done: float = moved) -> float:
            return end + (start - end) * math.exp(-done)

        cut = [rng.random() < clipped for _ in range(completions)]
        ratios = [rng.uniform(12, 40) if c and rng.random() < looping else rng.gauss(repetition, 0.4) for c in cut]
        solved = now(reward, reward_end) + walks["reward"]()
        wins = sum(rng.random() < solved for _ in range(completions)) / completions
        outlier = 2.5 if outlier == 1.0 and rng.random() < 0.01 else 1.0
        noisy_kl = math.exp(walks["kl"]()) * outlier
        logs = {
            "loss": now(kl, kl_end) * noisy_kl,
            "learning_rate": 1e-5 * rate,
            "grad_norm": now(1.0, 0.3) * math.exp(walks["grad_norm"]()) * outlier**2,
            "distill/loss": now(kl, kl_end) * noisy_kl,
            "distill/reverse_kl": now(kl, kl_end) * noisy_kl,
            "distill/student_entropy": now(entropy, 0.9 * teacher_entropy) * math.exp(walks["entropy"]()),
            "distill/teacher_entropy": teacher_entropy * math.exp(rng.gauss(0, noise / 3)),
            "distill/overlap": now(overlap, overlap_end) + walks["overlap"](),
            "distill/rejected_share": now(0.25, 0.1) + 0.3 * noise * rng.gauss(0, 1),
            "completions/clipped_ratio": sum(cut) / completions,
            "completions/repetition": sum(ratios) / completions,
            "completions/repetitive_share": sum(ratio > 10 for ratio in ratios) / completions,
            "completions/empty_share": sum(rng.random() < 0.005 for _ in range(completions)) / completions,
            "reward": wins,
            "reward_std": math.sqrt(max(wins * (1 - wins), 0)),
        }
        for i, name in enumerate(teachers):
            logs[f"distill/{name}/share"] = 1 / len(teachers)
            logs[f"distill/{name}/reverse_kl"] = now(kl * (1 + i), kl_end) * noisy_kl
        yield logs
