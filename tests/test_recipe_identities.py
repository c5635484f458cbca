"""
What each recipe computes: its formula with the paper's numbers, by hand, and its degenerate case.

One optimizer step in float64 (the last one, where the first cannot show it), over two generation batches.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_cases import (
    COMPLETIONS,
    PROMPTS,
    Outcome,
    World,
    long_completions,
    run,
    single_turns,
    tiny_fields,
    world_of,
)
from recipe_formulas import FORMULAS, Scene, bellman, opd, plain, rlad, supervised, top_16
from steps import assert_same_gradient, gradient_of
from tiny import VOCAB_SIZE, make_tokenizer
from torch import Tensor

from trl_opd import OnPolicyDistillConfig
from trl_opd.recipes import RECIPES, SLOTS, list_recipes

SAMPLED = {"credit": "policy_gradient", "support": "sampled"}
SECOND_UPDATE = {"num_iterations": 2, "max_steps": 2, "gradient_accumulation_steps": 1, "learning_rate": 0.1}
NO_CLIP = {"epsilon": 1e9, "epsilon_high": 1e9}
WIDE = VOCAB_SIZE + 300
# Fields of a setting that the run without the recipe has too
RUN_FIELDS = {*SECOND_UPDATE, "max_completion_length", "seed"}
# In the fast suite: together they touch every slot
FAST = (
    "gkd",
    "minillm",
    "eopd",
    "exopd",
    "taid",
    "selectkd",
    "paced",
    "mad_opd",
    "sdpo",
    "opcd",
    "sod",
    "rlsd",
    "luffy",
)


@dataclass(frozen=True)
class Setting:
    """The world and the fields in which a recipe shows what it does."""

    world: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    sequences: bool = False  # a mean over completions, not over tokens


SETTINGS: Mapping[str, Setting] = {
    "direction_adaptive": Setting({"student": "sharp"}),
    "eopd": Setting({"teacher": "sharp"}),
    "f_opd": Setting(fields={"max_steps": 2}),
    "fast_opd": Setting(
        {"student": "endless"},
        {"max_completion_length": 8, "schedules": {"max_completion_length": {"type": "linear", "start": 2, "end": 8}}},
    ),
    "glm5": Setting(fields=SECOND_UPDATE),
    "lightning_opd": Setting({"wide": True}),
    "luffy": Setting(fields={"max_steps": 2}),
    "mimo": Setting(fields=SECOND_UPDATE, sequences=True),
    "nemotron_cascade2": Setting(fields=SECOND_UPDATE),
    "oel": Setting({"wide": True}),
    "opcd": Setting({"wide": True}),
    "opsd": Setting(sequences=True),
    "paced": Setting(fields={"max_steps": 2}),
    "ptsf": Setting({"rollouts": long_completions, "teacher": "fading"}),
    "revisiting_opd": Setting({"student": "stuttering"}),
    "sdpo": Setting({"wide": True}),
    "ssopd": Setting(fields={"seed": 1}),
    "stable_opd": Setting(fields={"max_steps": 2, "seed": 138}),
}


@dataclass(frozen=True)
class Identity:
    """
    A degenerate case.

    Args:
        change: Fields of the recipe at the values of the case.
        equals: Fields of another run without a recipe, a formula, or 0.
        world: What the case changes in the world, and `other`: what of it the other run has too.
        grpo: Whether the other run is TRL's own trainer.
        tolerance: Of the gradient's largest entry; 0 is bit-equal.
        loss: Whether the losses are equal too.
    """

    change: Mapping[str, Any]
    equals: Mapping[str, Any] | Callable[[Scene], Any] | int
    world: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Any] | None = None
    grpo: bool = False
    tolerance: float = 0.0
    loss: bool = True


def own_prompt(**change: Any) -> Identity:
    """A self teacher who sees what the student sees."""
    return Identity(change, 0, world={"hints": False})


def grpo(*change: str, **fields: Any) -> Identity:
    return Identity(dict.fromkeys(change, 0.0), {"num_generations": 8, **fields}, grpo=True)


def given(x: Scene) -> Tensor:
    """Supervised distillation on the dataset's completions."""
    tokenizer = make_tokenizer()
    texts = dict(zip(PROMPTS, COMPLETIONS, strict=True))
    for prompt, mask, ids, own in zip(
        *(x.inputs[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
    ):
        text = "".join(tokenizer.convert_ids_to_tokens(prompt[mask.bool()]))
        assert ids[own.bool()].tolist() == [*tokenizer(texts[text])["input_ids"], tokenizer.eos_token_id][:8]
    return supervised(x)


def acceptance(x: Scene) -> Tensor:
    return 1 - torch.minimum(x.s.exp(), x.t.exp()).sum(-1)


def centred_mse(x: Scene) -> Tensor:
    """Variance of the logit gap over the vocabulary."""
    return (x.s - x.t).var(-1, correction=0)


OFF_TEACHER = {"off_policy_source": "teacher"}
JSD = {"divergence": "generalized_jsd"}
FORWARD = {"divergence": "forward_kl"}
EIGHT = {"num_generations": 8}
NO_INJECTION = {"distill_coef": 0.0, "injected_completions": 0, "injected_when": "always"}
NEAR = 1e-6  # the same value on another path

IDENTITIES: Mapping[str, tuple[Identity, ...]] = {
    "gkd": (
        Identity({"student_fraction": 1.0, "divergence_kwargs": {"beta": 1.0}}, {"temperature": 0.9}),
        Identity({"student_fraction": 0.0, "divergence_kwargs": {"beta": 0.0}}, given, tolerance=NEAR),
    ),
    "dagger": (Identity({"divergence": "reverse_kl"}, {}),),
    "offline_rl_kd": (Identity({"student_fraction": 1.0}, {}),),
    "kl_mixing": (Identity({"divergence_kwargs": {"reverse_kl": 1.0}}, {}),),
    "distillm2": (
        Identity(
            {"divergence_kwargs": {"skew": 0.0}, "off_policy_divergence_kwargs": {"skew": 0.0}},
            {"student_fraction": 0.5, **OFF_TEACHER, "off_policy_divergence": "forward_kl", "temperature": 0.8},
        ),
    ),
    "f_distill_js": (
        Identity(
            {"student_fraction": 0.0, "divergence_kwargs": {"beta": 0.0}},
            {"student_fraction": 0.0, **OFF_TEACHER, **FORWARD},
        ),
    ),
    "f_distill_tvd": (Identity({"student_fraction": 1.0}, {"divergence": "total_variation"}),),
    "todi": (
        Identity(
            {"divergence_kwargs": {"scale": 0.0}},
            {"divergence": "convex_mix", "divergence_kwargs": {"forward_kl": 0.5, "reverse_kl": 0.5}},
            tolerance=NEAR,
        ),
    ),
    "akl": (Identity({"divergence_kwargs": {"head_mass": 1.0}}, FORWARD, tolerance=NEAR),),
    "csd": (Identity({"divergence_kwargs": {"first": "uniform", "second": "uniform"}}, centred_mse, tolerance=NEAR),),
    "distillspec": (Identity({}, acceptance, tolerance=NEAR),),
    "revisiting_opd": (
        Identity(
            {
                "support_size": VOCAB_SIZE,
                "special_token_masking": None,
                "special_token_occurrence": "all",
                "top_p": 1.0,
            },
            EIGHT,
            tolerance=NEAR,
        ),
    ),
    "rethinking_opd": (Identity({"support_size": VOCAB_SIZE}, {"num_generations": 4}, tolerance=NEAR),),
    # I3: half the square has the same gradient at ratio 1
    "opd": (Identity({}, {"credit": "k2", "support": "sampled"}, tolerance=NEAR, loss=False),),
    "minillm": (
        # TRL's version, which counts the step twice
        Identity(
            {
                "discount": 0.0,
                "return_from_next": False,
                "return_normalization": False,
                "advantage_whitening": "none",
            },
            lambda x: plain(x) + opd(x),
            tolerance=NEAR,
        ),
        # Nothing follows the only token
        Identity({"max_completion_length": 1}, {"max_completion_length": 1}, tolerance=NEAR),
    ),
    "vopd": (Identity({"advantage_baseline": "none", "support": "sampled"}, SAMPLED),),
    "opd_plus": (Identity({"divergence_kwargs": {"beta": 1.0}}, SAMPLED),),
    "power_opd": (
        Identity({"advantage_power": 0.0}, SAMPLED),
        Identity({"advantage_power": 1.0}, lambda x: x.surrogate(x.other.exp() - x.own.exp()), tolerance=NEAR),
    ),
    "reopold": (
        Identity(
            {"advantage_floor": -1e9, "token_weighting": {"entropy_top": {"side": "student", "fraction": 1.0}}},
            SAMPLED,
        ),
    ),
    "eopd": (
        Identity(
            {"token_weighting": {"entropy_gate": {"side": "teacher", "above": float("inf")}}},
            SAMPLED,
            tolerance=NEAR,
        ),
        Identity(
            {"token_weighting": {"entropy_gate": {"side": "teacher", "above": -1.0}}},
            lambda x: opd(x) + top_16(x),
            tolerance=NEAR,
        ),
    ),
    "ketchup": (
        # Behind the last token there is no maximum: q(s_t, y_t) is left
        Identity(
            {"return_horizon": 8, "advantage_whitening": "none"},
            lambda x: x.surrogate(bellman(x, 100)),
            tolerance=NEAR,
        ),
        # LLMR
        Identity(
            {"return_horizon": 1, "advantage_whitening": "none"}, lambda x: x.surrogate(bellman(x, 1)), tolerance=NEAR
        ),
    ),
    "iw_opd": (Identity({"token_weighting": {"importance": {"gamma": 0.0}}}, SAMPLED),),
    "glm5": (Identity({"importance_low": 0.0, "importance_high": 1e9}, {**SAMPLED, **NO_CLIP}, tolerance=NEAR),),
    "lightning_opd": (Identity({"support_size": WIDE}, plain, tolerance=NEAR),),
    "exopd": (Identity({"target_kwargs": {"scale": 1.0}}, SAMPLED, other={"references": ()}),),
    "direct_opd": (Identity({}, 0, world={"references": ("teacher",)}),),
    "delta_kd": (
        Identity({}, FORWARD, world={"references": ("student", "student")}, other={"references": ()}, tolerance=NEAR),
        Identity({}, 0, world={"references": ("teacher", "student")}),
    ),
    "taid": (
        Identity({"target_kwargs": {"t": 1.0}, "schedules": None}, FORWARD),
        Identity({"target_kwargs": {"t": 0.0}, "schedules": None}, 0),
    ),
    "veto": (Identity({"target_kwargs": {"beta": 0.0}, "schedules": None}, FORWARD),),
    "aligndistil": (
        Identity(
            {}, {"distill_coef": 1000.0}, world={"references": ("teacher",)}, other={"references": ()}, tolerance=NEAR
        ),
    ),
    "adakd": (Identity({"temperature_adaptation": 0.0}, {}, tolerance=NEAR),),
    "selectkd": (
        Identity({"token_weighting": {"selectkd": {"beta": 1.0}}}, {}),
        Identity({"token_weighting": {"selectkd": {"k": VOCAB_SIZE}}}, {}),
    ),
    "tsd_kd": (Identity({"token_weighting": None}, {**JSD, "divergence_kwargs": {"beta": 0.9}}),),
    "ptsf": (
        # Seven blocks cannot have four on either side of a drop
        Identity({"token_weighting": {"prefix_release": {"min_blocks": 4}}}, SAMPLED, tolerance=NEAR),
    ),
    "tip": (Identity({"token_weighting": {"tip": {"fraction": 1.0}}}, {}, tolerance=NEAR),),
    "aopd": (Identity({"advantage_floor": None, "direct_coef": 0.0}, SAMPLED, tolerance=NEAR),),
    "paced": (
        Identity(
            {"sample_weighting": {"beta_kernel": {"a": 0.0, "b": 0.0}}},
            {
                **EIGHT,
                **OFF_TEACHER,
                "reward_coef": 0.0,
                "off_policy_divergence": "forward_kl",
                "student_fraction": 0.0,
                "schedules": {"student_fraction": {"type": "linear", "start": 0.0, "end": 1.0, "finish": 0.5}},
            },
            tolerance=NEAR,
        ),
        # The first stage: no prompt has been tried, and the pass rate is taken for a half
        Identity({"max_steps": 1}, lambda x: 0.25 * supervised(x), tolerance=NEAR),
    ),
    "f_opd": (
        Identity(
            {"sample_weighting": {"freshness": {"kappa": 0.0}}},
            {"student_fraction": 0.5, "replay_fraction": 0.5},
            tolerance=NEAR,
        ),
    ),
    "idft": (
        Identity({"token_weighting": {"idft": {"low": 1.0, "high": 1.0}}}, {"student_fraction": 0.0, **FORWARD}),
    ),
    "distillm": (Identity({"divergence_kwargs": {"skew": 0.0}}, {"student_fraction": 0.0}),),
    "fast_opd": (
        Identity({"schedules": {"max_completion_length": {"type": "constant", "value": 8}}}, {}),
        # Completions that end before the cut
        Identity(
            {"max_completion_length": 128, "schedules": None},
            {"max_completion_length": 128},
            world={"student": "plain"},
            other={"student": "plain"},
        ),
    ),
    "stable_opd": (Identity({"beta": 0.0}, {"student_fraction": 0.8, "off_policy_divergence": "forward_kl"}),),
    "brts": (
        Identity(
            {"off_policy_weight": 1.0, "support_size": VOCAB_SIZE},
            {"student_fraction": 0.5, **OFF_TEACHER},
            tolerance=NEAR,
        ),
        Identity({"off_policy_weight": 0.0, "support_size": VOCAB_SIZE}, lambda x: x.ours * plain(x), tolerance=NEAR),
    ),
    "minitron": (Identity({}, given, tolerance=NEAR), Identity({"student_fraction": 1.0}, FORWARD)),
    "gemma2": (Identity({}, {**JSD, "divergence_kwargs": {"beta": 0.0}}),),
    "qwen3": (Identity({}, {}),),
    "deepseek_v4": (Identity({}, {}, world={"teacher": "equals"}, other={"teacher": "one"}, tolerance=NEAR),),
    "mad_opd": (
        Identity(
            {},
            {**JSD, "divergence_kwargs": {"beta": 0.5}, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
            world={"teacher": "equals"},
            other={"teacher": "one"},
            tolerance=NEAR,
        ),
    ),
    "x_opd": (Identity({}, SAMPLED, world={"hints": False}, other={"hints": None}),),
    "video_opd": (Identity({}, SAMPLED),),
    "opsd": (own_prompt(),),
    "opsdc": (own_prompt(),),
    "sdpo": (own_prompt(),),
    # A raw sum has a gradient of its own where it leaves something out (I8c)
    "opcd": (own_prompt(support_tail="renormalize"), own_prompt(support_size=WIDE)),
    "oel": (own_prompt(support_tail="renormalize"), own_prompt(support_size=WIDE)),
    "sdft": (own_prompt(),),
    "opct": (own_prompt(),),
    "ophsd": (own_prompt(),),
    "ssopd": (
        own_prompt(),
        Identity(
            {"sample_weighting": {"beta_kernel": {"a": 0.0, "b": 0.0}}, "reward_mix": "add"},
            {**EIGHT, "reward_coef": 0.0, "teacher_sync": "live"},
            tolerance=NEAR,
        ),
    ),
    "gates": (
        own_prompt(),
        Identity({"reward_mix_kwargs": {"on": "consensus", "threshold": 0.5, "answer": "recipe_cases.no_answer"}}, 0),
    ),
    "direction_adaptive": (
        Identity({"token_weighting": {"direction_adaptive": {}}}, {**SAMPLED, "advantage_clip": 5.0}),
    ),
    "kdrl": (grpo("distill_coef"),),
    "sod": (
        Identity(
            {},
            {**SAMPLED, **EIGHT},
            world={"rollouts": single_turns},
            other={"rollouts": single_turns},
        ),
    ),
    "mimo": (
        Identity(
            {"reward_coef": 0.0, "importance_low": 0.0, "importance_high": 1e9},
            {**SAMPLED, **EIGHT, **NO_CLIP, "loss_type": "grpo", "reward_coef": 0.0},
            tolerance=NEAR,
        ),
    ),
    "nemotron_cascade2": (Identity({"importance_high": 1e9}, {**SAMPLED, **NO_CLIP}, tolerance=NEAR),),
    "rlad": (
        Identity({"ratio_anchor": 1.0}, EIGHT, grpo=True),
        Identity({}, EIGHT, grpo=True, world={"teacher": "student"}, tolerance=NEAR),
        Identity({"ratio_anchor": 0.8}, lambda x: rlad(x, 0.8), tolerance=NEAR),
    ),
    "rlsd": (Identity({"reward_mix_kwargs": {"strength": 0.0}, "schedules": None}, EIGHT, grpo=True),),
    "kepo": (Identity(NO_INJECTION, EIGHT, grpo=True, tolerance=NEAR),),
    "hdpo": (Identity(NO_INJECTION, EIGHT, grpo=True, tolerance=NEAR),),
    "pi_distill": (grpo("distill_coef"), Identity({}, EIGHT, grpo=True, world={"hints": False})),
    "luffy": (
        Identity(
            {"injected_completions": 0, "injected_shaping": None},
            {**EIGHT, "scale_rewards": "none", "entropy_coef": 0.001},
            grpo=True,
            tolerance=NEAR,
        ),
    ),
    "vold": (grpo("distill_coef"),),
    "reward_tilt": (
        Identity(
            {"target_kwargs": {"beta": 1e12}},
            {**SAMPLED, **EIGHT, "discount": 1.0, "reward_coef": 0.0},
            tolerance=NEAR,
        ),
    ),
    "codistill_grpo": (
        Identity({"distill_coef": 0.0, "advantage_whitening": "none"}, {**EIGHT, "scale_rewards": "none"}, grpo=True),
    ),
}
# The same as another run without any change
BY_DEFINITION = {"opd", "video_opd", "qwen3"}

# Values that one step does not show, copied from the specification
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "gkd": {"temperature": 0.9, "student_fraction": 0.5},
    "f_distill_js": {"student_fraction": 0.5},
    "f_distill_tvd": {"student_fraction": 0.5},
    "taid": {
        "schedules": {
            "target_kwargs.t": {"type": "taid", "start": 0.4, "end": 1.0, "alpha": 5e-4, "momentum": 0.99},
        },
    },
    "distillm": {"replay_size": 1000, "off_policy_source": "dataset"},
    "distillm2": {"temperature": 0.8, "student_fraction": 0.5},
    "revisiting_opd": {"top_p": 0.9, "num_generations": 8},
    "rethinking_opd": {"num_generations": 4},
    "mad_opd": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "opsd": {"temperature": 1.1, "top_p": 0.95, "top_k": 20, "teacher_sync": "frozen"},
    "opsdc": {"teacher_sync": "every_n", "teacher_sync_steps": 50},
    "sdpo": {"teacher_sync": "ema", "teacher_sync_rate": 0.05, "support_tail": "bucket", "reward_coef": 0.0},
    "sdft": {"teacher_sync": "frozen"},
    "opct": {"teacher_sync": "frozen"},
    "ophsd": {"teacher_sync": "frozen"},
    "rlsd": {"teacher_sync": "every_n", "teacher_sync_steps": 10},
    "sod": {"epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dapo"},
    "kepo": {"num_generations": 8, "injected_completions": 2, "scale_rewards": "group", "beta": 0.0},
    "luffy": {"num_generations": 8, "injected_completions": 1, "injected_when": "always"},
    "stable_opd": {"student_fraction": 0.8},
    "gates": {"student_fraction": 0.1},
    "hdpo": {"teacher_sync": "live"},
    "pi_distill": {"teacher_sync": "live"},
    "ssopd": {"teacher_sync": "live"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_values(tmp_path, name):
    config = OnPolicyDistillConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, recipe=name)
    assert {field: getattr(config, field) for field in PUBLISHED[name]} == PUBLISHED[name]


def by_hand(outcome: Outcome, formula: Callable[[Scene], Any], sequences: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the step by a formula: a mean over the batches of token (or completion) means."""
    made, values = outcome.made, []
    model = made.world.make_student()
    model.load_state_dict(outcome.weights)
    references = [made.world.make_student()] if made.world.saved else made.references
    for inputs in outcome.batches:
        scene = Scene(inputs, model, made.teachers, references, made.trainer.args.temperature)
        result = formula(scene)
        value, mask = result if isinstance(result, tuple) else (result, scene.mask)
        total = (value * mask).sum(1)
        values.append((total / mask.sum(1)).mean() if sequences else total.sum() / mask.sum())
    loss = torch.stack(values).mean()
    return loss.item(), gradient_of(model, loss)


def setting_of(name: str) -> tuple[World, dict[str, Any], bool]:
    setting = SETTINGS.get(name, Setting())
    recipe = RECIPES[name]
    return world_of(recipe, **setting.world), {**tiny_fields(recipe), **setting.fields}, setting.sequences


_RUNS: dict[str, Outcome] = {}


def run_of(name: str, folder: Path) -> Outcome:
    """The recipe as it stands."""
    if name not in _RUNS:
        world, fields, _ = setting_of(name)
        _RUNS[name] = run(folder / "recipe", world, recipe=name, **fields)
    return _RUNS[name]


def largest(gradient: Mapping[str, Tensor]) -> float:
    return max(g.abs().max().item() for g in gradient.values())


def assert_differs(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    gap = largest({name: gradient - theirs[name] for name, gradient in ours.items()})
    assert gap > 1e-3 * max(largest(ours), largest(theirs)), "the recipe does nothing of its own"


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", marked(FORMULAS))
def test_a_recipe_computes_its_formula(tmp_path, name):
    outcome = run_of(name, tmp_path)
    loss, gradient = by_hand(outcome, FORMULAS[name], setting_of(name)[2])
    assert outcome.loss == pytest.approx(loss, rel=1e-6, abs=1e-7)
    assert_same_gradient(outcome.gradient, gradient)
    lengths = {len(ids) for batch in outcome.rollouts for ids in batch}
    assert len(lengths) > 1 or name in ("fast_opd", "ptsf"), "a mean over tokens is one over completions"


@pytest.mark.parametrize("name", marked(IDENTITIES))
def test_a_degenerate_case_is_the_simpler_method(tmp_path, name):
    world, fields, sequences = setting_of(name)
    recipe = run_of(name, tmp_path)
    for i, case in enumerate(IDENTITIES[name]):
        changed = recipe
        if case.change or case.world:
            changed = run(tmp_path / f"{i}", replace(world, **case.world), recipe=name, **{**fields, **case.change})
        if case.equals == 0:
            assert abs(changed.loss) < 1e-12 and largest(changed.gradient) < 1e-12
            assert largest(recipe.gradient) > 1e-6
            continue
        if callable(case.equals):
            loss, gradient = by_hand(changed, case.equals, sequences)
        else:
            own = {key: value for key, value in fields.items() if key in RUN_FIELDS}
            elsewhere = replace(world, **(case.world if case.other is None else case.other))
            other = run(tmp_path / f"{i}_other", elsewhere, grpo=case.grpo, **{**own, **case.equals})
            assert other.rollouts == changed.rollouts
            loss, gradient = other.loss, other.gradient
        if case.loss:
            exact = case.tolerance == 0 and not case.grpo
            assert changed.loss == (loss if exact else pytest.approx(loss, rel=1e-6, abs=1e-7))
        assert_same_gradient(changed.gradient, gradient, case.tolerance)
        if case.change or case.world:
            assert_differs(recipe.gradient, gradient)
        elif name not in BY_DEFINITION:
            default = run(tmp_path / f"{i}_default", world, **fields)
            assert_differs(recipe.gradient, default.gradient)


def test_every_recipe_has_a_formula_and_a_degenerate_case():
    names = list_recipes()
    assert set(IDENTITIES) == set(FORMULAS) == set(names) and all(IDENTITIES.values())
    assert set(SETTINGS) | set(PUBLISHED) | BY_DEFINITION | set(FAST) <= set(names)
    assert {slot for name in FAST for slot in RECIPES[name].slots} == set(SLOTS)


def test_numbers_of_a_degenerate_case_are_not_the_recipes():
    for name, cases in IDENTITIES.items():
        for case in cases:
            fields = RECIPES[name].fields
            assert all(fields.get(key) != value for key, value in case.change.items()), name
