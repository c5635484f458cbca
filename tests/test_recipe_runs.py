"""Every recipe builds from its name and trains three steps, and nothing but the student learns."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_cases import make_trainer, tiny_fields, world_of
from transformers import TrainerCallback

from trl_opd.recipes import RECIPES, SLOTS, list_recipes

# In the fast suite: together they touch every slot, and every need
FAST = (
    "gkd", "distillm2", "minillm", "exopd", "taid", "adakd", "paced", "lightning_opd", "mad_opd", "sdpo", "gates",
    "delta_kd", "sod", "mimo", "rlsd", "kepo", "luffy",
)  # fmt: skip
# The distillation has no term of its own: it scales the reward's advantages
WITHOUT_TERM = {"rlsd"}
# Shares of the student's completions in the three steps
SHARES = {
    "offline_rl_kd": [0, 0, 0],
    "idft": [0, 0, 0],
    "minitron": [0, 0, 0],
    "paced": [0, 0, 1],
    "luffy": [7 / 8, 7 / 8, 7 / 8],
}
# Values of the schedules in the three steps, as far as they do not depend on the losses
SCHEDULES = {
    "veto": {"target_kwargs.beta": [0.8, 0.8 * 2 / 3, 0.8 / 3]},
    "taid": {"target_kwargs.t": [0.4, 0.6, 0.8]},
    "adakd": {"token_weighting.adakd.fraction": [1.0, 1.0, 1.0]},
    "rlsd": {"reward_mix_kwargs.strength": [0.5, 0.49, 0.48]},
    "paced": {"student_fraction": [0, 0, 1]},
    "distillm": {
        "student_fraction": [0, 0.19 + 0.06 / 3, 0.25 - 0.06 * 2 / 3],
        "replay_fraction": [0, 0.06 + 0.19 / 3, 0.25 + 0.31 * 2 / 3],
    },
    "fast_opd": {"max_completion_length": [128, 427, 725]},
}


class WatchGradients(TrainerCallback):
    """Parameters that have a gradient before a step."""

    def __init__(self, frozen: list[torch.nn.Module]):
        self.frozen, self.steps, self.reached, self.elsewhere = frozen, 0, set(), []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps += 1
        for name, p in model.named_parameters():
            if p.grad is not None and bool((p.grad != 0).any()):
                assert bool(p.grad.isfinite().all()), name
                self.reached.add(name)
        self.elsewhere += [name for m in self.frozen for name, p in m.named_parameters() if p.grad is not None]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_three_steps(name: str, folder: Path) -> list[dict[str, float]]:
    """Train, hold what every run must hold, and return the log lines."""
    recipe = RECIPES[name]
    world = world_of(recipe, dtype=torch.float32)
    made = make_trainer(folder, world, recipe=name, **tiny_fields(recipe))
    trainer = made.trainer
    grpo_reference = [] if trainer.ref_model is None else [trainer.ref_model]
    frozen = [*made.teachers, *made.references, *grpo_reference]
    before, start = [weights(m) for m in frozen], weights(trainer.model)
    watch = WatchGradients(frozen)
    trainer.add_callback(watch)
    trainer.train()

    assert trainer.state.global_step == watch.steps == 3
    lines = trainer.state.log_history[:3]
    for line in lines:
        assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
        assert ("distill/loss" in line) is (name not in WITHOUT_TERM)
        assert all(math.isfinite(value) for key, value in line.items() if key.startswith("distill/"))
    assert watch.reached == set(start), "parts of the student have no gradient"
    assert not watch.elsewhere
    for model, old in zip(frozen, before, strict=True):
        assert all(torch.equal(p, old[n]) for n, p in model.named_parameters())
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == set(start)
    if world.teacher == "self":
        kept = trainer.teacher._weights
        assert not any(w.requires_grad or w.grad_fn for w in kept.values())
        if trainer.args.teacher_sync in ("frozen", "every_n"):  # of every_n no update is due yet
            assert all(torch.equal(w, start[n]) for n, w in kept.items()) and set(kept) == set(start)
        elif trainer.args.teacher_sync == "ema":
            assert not any(torch.equal(w, start[n]) for n, w in kept.items()) and set(kept) == set(start)
    return lines


CASES = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in list_recipes()]


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_trains_the_student_and_nothing_else(tmp_path, name):
    lines = train_three_steps(name, tmp_path)
    if name in SHARES:
        assert [line["rollout/student_share"] for line in lines] == SHARES[name]
    for field, values in SCHEDULES.get(name, {}).items():
        assert [line[f"schedule/{field}"] for line in lines] == pytest.approx(values)


def test_the_fast_ones_touch_every_slot_and_every_need():
    assert {slot for name in FAST for slot in RECIPES[name].slots} == set(SLOTS)
    needs = {need for name in list_recipes() for need in RECIPES[name].needs}
    assert {need for name in FAST for need in RECIPES[name].needs} == needs
    assert set(SHARES) | set(SCHEDULES) | WITHOUT_TERM <= set(list_recipes())
    scheduled = {name: set(RECIPES[name].fields["schedules"]) for name in list_recipes() if _is_scheduled(name)}
    assert {name: set(fields) for name, fields in SCHEDULES.items()} == scheduled


def _is_scheduled(name: str) -> bool:
    return "schedules" in RECIPES[name].fields
