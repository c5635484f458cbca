"""Folders of runs as `record.py` and `token_view.py` leave them, written by hand."""

import json
import math
import os
import platform
import random
import time
from pathlib import Path
from typing import Any

import pandas as pd

HOSTILE = '</script><img src=x onerror=alert(1)><!-- & "quotes" \'n'
BUCKETS = ["00000-00007", "00008-00015", "00016-00031", "00032-00063", "00064-00127"]
GONE = 2**22 + 7  # a pid that no Linux gives

FINDING = {
    "check": "eos",
    "severity": "warning",
    "seen": "The student ends with '<|im_end|>' (151645), the teacher with '<|endoftext|>' (151643).",
    "why": "A student that learns the teacher's end token does not stop at its own.",
    "do": "Set generation_kwargs={'eos_token_id': [151645, 151643]}.",
}
CHECKS = [FINDING, {"check": "pad", "severity": "ok", "seen": "Both pad with '<|endoftext|>'.", "why": "", "do": ""}]
RECIPE = {
    "name": "gkd",
    "title": "Generalized knowledge distillation",
    "paper": "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    "link": "https://arxiv.org/abs/2306.13649",
    "citation": "@inproceedings{agarwal2024onpolicy,\n    title = {On-Policy Distillation of Language Models},\n}",
    "fidelity": "exact",
    "changes": {"divergence_kwargs": [{"beta": 0.5}, {"beta": 0.9}]},
}


def config(**changes: Any) -> dict[str, Any]:
    fields = {"learning_rate": 1e-4, "divergence": "reverse_kl", "temperature": 1.0, "num_generations": 1}
    return {**fields, "max_completion_length": 256, "support": "full", **changes}


def alarm(step: int, name: str = "kl_spike", **fields: Any) -> dict[str, Any]:
    return {
        "time": 1_700_000_000.0 + step,
        "step": step,
        "alarm": name,
        "severity": "warning",
        "seen": f"distill/reverse_kl jumped from 0.21 to 1.94 at step {step}.",
        "why": "A spike of the KL comes before many collapses.",
        "do": "Lower learning_rate to 5e-05.",
        "values": {"distill/reverse_kl": 1.94 + 1 / 3e7, "median": 0.21},
        **fields,
    }


def course(num_steps: int, seed: int = 0, reward: bool = True) -> list[tuple[int, dict[str, float]]]:
    """Log lines of a run that goes well."""
    rng = random.Random(seed)
    lines = []
    for step in range(1, num_steps + 1):
        t = step / num_steps
        falls = math.exp(-4 * t)

        def noisy(value: float, size: float = 0.05) -> float:
            return value * (1 + rng.gauss(0, size))

        logs = {
            "loss": noisy(0.6 * falls + 0.1),
            "grad_norm": noisy(0.9 + 0.4 * falls, 0.2),
            "learning_rate": 1e-4 * (1 - t),
            "num_tokens": 8000.0 * step,
            "completions/mean_length": noisy(180 - 60 * t),
            "completions/min_length": noisy(20),
            "completions/max_length": 256.0,
            "completions/clipped_ratio": max(0.0, noisy(0.3 * falls + 0.02, 0.3)),
            "completions/repetition": noisy(2.6),
            "completions/repetitive_share": max(0.0, rng.gauss(0.02, 0.01)),
            "completions/distinct_share": min(1.0, noisy(0.97, 0.01)),
            "completions/empty_share": 0.0,
            "distill/loss": noisy(0.6 * falls + 0.1),
            "distill/reverse_kl": noisy(0.8 * falls + 0.08),
            "distill/forward_kl": noisy(1.1 * falls + 0.1),
            "distill/student_entropy": noisy(0.9 - 0.4 * t),
            "distill/teacher_entropy": noisy(0.42),
            "distill/entropy_gap": noisy(0.5 * falls + 0.1),
            "distill/overlap": min(1.0, noisy(0.72 + 0.19 * (1 - falls), 0.01)),
            "distill/overlap_advantage": -noisy(0.4 * falls + 0.02),
            "distill/teacher_student_gap": -noisy(0.8 * falls + 0.08),
            "distill/teacher_rank": noisy(1.2 + 1.5 * falls),
            "distill/rejected_share": noisy(0.1 * falls + 0.01),
            "distill/teacher_wait": noisy(1.3),
            "distill/tokens_per_second": noisy(2100),
            "distill/effective_sample_size": noisy(0.6),
            "distill/loss_share/light": 0.1,
            "distill/loss_share/even": 0.3,
            "distill/loss_share/heavy": 0.6,
            "step_time": noisy(3.9),
            "my_own_number": noisy(7.0),
            "epoch": t,
        }
        for i, bucket in enumerate(BUCKETS):
            logs[f"distill/gap_at/{bucket}"] = -noisy((0.3 + 0.5 * i) * falls + 0.03 * i, 0.15)
            logs[f"distill/reverse_kl_at/{bucket}"] = noisy((0.3 + 0.5 * i) * falls + 0.03 * i, 0.15)
        if reward:
            logs |= {"reward": noisy(0.3 + 0.5 * t), "reward_std": noisy(0.3), "rewards/<lambda>/mean": noisy(0.4)}
            logs["distill/reward_correlation"] = noisy(0.35, 0.3)
        lines.append((step, logs))
    return lines


def tokens_frame(step: int, num: int = 4, *, text: str = "", length: int = 60, seed: int = 0) -> pd.DataFrame:
    """A completions log with token columns; the first completion strays most, `text` is one of its tokens."""
    rng = random.Random(f"{seed}{step}")
    words = "First , we add the two numbers : 1 7 plus 2 5 gives 4 2 . So the answer is 4 2 | Therefore é 世 ."
    words = ["\n" if word == "|" else word for word in words.split()]
    rows = []
    for i in range(num):
        size = length + 7 * i
        tokens = [(" " if k else "") + words[k % len(words)] for k in range(size)]
        gaps = [rng.gauss(-0.05, 0.3) for _ in range(size)]
        for k in range(5, size, 11):
            gaps[k] -= (num - i) * 1.6
        gaps[7], gaps[13] = 2.8, 0.9
        if text:
            tokens[4] = text
        mask = [k < size - 4 for k in range(size)]
        gaps = [gap if keep else math.nan for gap, keep in zip(gaps, mask, strict=True)]
        student = [rng.uniform(-2, -0.01) if keep else math.nan for keep in mask]
        rows.append(
            {
                "step": step,
                "prompt": f"What is 17 + 25? {text}",
                "completion": "".join(tokens),
                "accuracy_reward": float(i % 2),
                "advantage": rng.gauss(0, 1),
                "token_ids": list(range(size)),
                "tokens": tokens,
                "token_gap": gaps,
                "token_student_logprob": student,
                "token_teacher_logprob": [s + g for s, g in zip(student, gaps, strict=True)],
                "token_reverse_kl": [abs(gap) for gap in gaps],
                "token_weight": None,
                "token_mask": mask,
            }
        )
    return pd.DataFrame(rows)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, items: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def write_status(folder: Path, state: str = "finished", **fields: Any) -> None:
    status = {"state": state, "step": 60, "max_steps": 60, "updated": time.time(), "pid": os.getpid()}
    write_json(folder / "_opd/status.json", {**status, "host": platform.node(), "error": None, **fields})


def write_run(
    folder: Path,
    *,
    num_steps: int = 60,
    seed: int = 0,
    state: str = "finished",
    alarms: tuple[int, ...] = (),
    changes: dict[str, Any] | None = None,
    text: str = "",
    reward: bool = True,
    status: dict[str, Any] | None = None,
) -> Path:
    """A run with everything that a run can leave; `text` is put wherever a run can have text."""
    changed = {"divergence": "generalized_jsd", "learning_rate": 2e-4, **(changes or {})}
    facts = {
        "format": 1,
        "started": "2026-11-26T07:00:00+00:00",
        "command": ["trl-opd", "train", "--config", "run.yaml", text],
        "pid": os.getpid(),
        "host": platform.node(),
        "config": config(**changed),
        "changed": changed,
        "recipe": {**RECIPE, "title": RECIPE["title"] + text},
        "student": {
            "name": f"Qwen/Qwen3-1.7B{text}",
            "class": "Qwen3ForCausalLM",
            "parameters": 1_720_574_976,
            "trainable_parameters": 69_730_304,
            "adapter": "LORA r=64 alpha=64",
        },
        "teacher": {
            "name": "Qwen/Qwen3-8B",
            "kind": "LocalTeacher",
            "members": [{"name": "Qwen/Qwen3-8B", "kind": "LocalTeacher", "vocab_size": 151936}],
        },
        "versions": {"python": "3.12.3", "trl-opd": "0.1.0", "trl": "1.16.0", "torch": "2.13.0"},
        "device": "NVIDIA H200",
        "num_processes": 1,
        "position_edges": [0, 8, 16, 32, 64],
        "history": [{"started": "2026-11-26T06:00:00+00:00", "command": ["trl-opd", "train"], "step": 20}],
    }
    write_json(folder / "_opd/run.json", facts)
    lines = [{"time": 1_700_000_000.0 + 4 * s, "step": s, "logs": logs} for s, logs in course(num_steps, seed, reward)]
    for line in lines[9::10]:
        line["logs"]["eval_loss"] = line["logs"]["loss"] * 1.1
        line["logs"]["eval_distill/reverse_kl"] = line["logs"]["distill/reverse_kl"] * 1.2
    lines[-1]["logs"]["train_runtime"] = 240.5
    write_lines(folder / "_opd/log.jsonl", lines)
    write_lines(folder / "_opd/alarms.jsonl", [alarm(step, do=f"Lower learning_rate. {text}") for step in alarms])
    findings = [{**FINDING, "seen": FINDING["seen"] + text}]
    write_json(folder / "_opd/findings.json", {"findings": findings, "checks": CHECKS})
    write_status(folder, state, **{"step": num_steps, "max_steps": num_steps, **(status or {})})
    (folder / "completions").mkdir(exist_ok=True)
    for step in (1, num_steps // 2, num_steps):
        frame = tokens_frame(step, text=text, seed=seed)
        frame.to_parquet(folder / f"completions/completions_{step:05d}.parquet")
    return folder


def write_checkpoint(folder: Path, step: int, max_steps: int = 40) -> Path:
    """A checkpoint of a run that has no opd folder, as transformers writes it."""
    history = [{"step": s, **logs} for s, logs in course(step)]
    write_json(folder / "trainer_state.json", {"global_step": step, "max_steps": max_steps, "log_history": history})
    return folder
