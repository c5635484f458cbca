"""What the recipes need beside prompts, at tiny size: every need met by something made here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny import CHARACTERS, VOCAB_SIZE, make_model, make_tokenizer, trainer_config
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer
from trl_opd.recipes import RECIPES, Recipe
from trl_opd.teachers import CachedTeacher, LocalTeacher, MixtureTeacher, RecordingTeacher

# Of the two draws of the first step, one is the student's for every share of 0.03 or more, and the other is not for
# any below 0.97; one of the second step's is a replay with f-OPD's shares
SEED = 367
PROMPTS = ["abc", "hello world", "x", "the quick brown fox", "12 34", "what is it"]
HINTS = ["the answer is 42. abc", "h", "it is x", "fox", "34 12", "what is it. it is the 7th"]
COMPLETIONS = ["hij", "hi", "y", "jumps ontop", "56 78", "it"]
# More characters than the tokenizer of the other tests, for supports of more entries than that one has
MANY = CHARACTERS + "".join(chr(0x4E00 + i) for i in range(300))
EQUAL = "x" * 8  # a prompt for completions whose positions count


def judge(completion_ids, **kwargs):
    """Passes about every third completion."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def strict_judge(completion_ids, **kwargs):
    """Passes so few that whole groups fail."""
    return [float(sum(ids) % 11 == 0) for ids in completion_ids]


def digits(completion):
    """An answer that some completions share: how many digits there are."""
    return sum(character.isdigit() for character in completion)


def no_answer(completion):
    return None


def turns(prompts, trainer):
    """Completions of up to three turns, with what a tool said between them."""
    generator = torch.Generator().manual_seed(7 + trainer.state.global_step)
    ids = [trainer.processing_class(text=prompt)["input_ids"] for prompt in prompts]
    completions, own = [], []
    for i in range(len(prompts)):
        sizes = [2, 1, 3, 1, 1][: 1 + 2 * (i % 3)]
        own.append([1 - turn % 2 for turn, size in enumerate(sizes) for _ in range(size)])
        completions.append(torch.randint(6, VOCAB_SIZE, (len(own[-1]),), generator=generator).tolist())
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": own}


def single_turns(prompts, trainer):
    """The same without a tool."""
    rollouts = turns(prompts, trainer)
    return {**rollouts, "env_mask": [[1] * len(own) for own in rollouts["env_mask"]]}


def long_completions(prompts, trainer):
    """112 tokens each: seven blocks of PTSF."""
    generator = torch.Generator().manual_seed(3)
    ids = [trainer.processing_class(text=prompt)["input_ids"] for prompt in prompts]
    completions = torch.randint(6, VOCAB_SIZE, (len(prompts), 112), generator=generator).tolist()
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


@dataclass(frozen=True)
class World:
    """
    Models and data of a run. Models are made anew for each: float64 where two runs are compared.

    Args:
        student: `"plain"`, `"sharp"` (low entropies), `"stuttering"` (it repeats a special token) or `"endless"` (it
            never ends a completion).
        teacher: `"one"`, `"sharp"`, `"fading"` (flat from position 72 on), `"student"` (the student's weights, another
            model), `"self"`, `"routed"`, `"mixture"`, `"equals"` (a mixture of two equal ones) or `"cache"`.
        references: Seeds of the reference models, or `"student"`, `"teacher"`.
        hints: Whether the column `teacher_prompt` differs from `prompt`; `None` for no column.
        rewards: The reward function.
        rollouts: `rollout_func`.
        demonstrations: Whether there is a column `completion`.
        wide: Whether the vocabulary has more than 256 entries.
        saved: Whether the student is one from a folder, where GRPO's reference model is read.
        dtype: Of all models.
    """

    student: str = "plain"
    teacher: str = "one"
    references: tuple[Any, ...] = ()
    hints: bool | None = None
    rewards: Callable[..., Any] | None = None
    rollouts: Callable[..., Any] | None = None
    demonstrations: bool = False
    wide: bool = False
    saved: bool = False
    dtype: torch.dtype = torch.float64

    def make_student(self) -> Any:
        model = make_model(vocab_size=self.vocab_size).to(self.dtype)
        if self.student == "sharp":
            model.lm_head.weight.data *= 4
        if self.student == "stuttering":
            model.lm_head.weight.data[0] *= 6
        if self.student != "endless":  # a dozen of the tokens end a completion, so that lengths differ
            model.generation_config.eos_token_id = list(range(1, 13))
        else:
            model.generation_config.suppress_tokens = [0, 1]
        return model

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE + 300 if self.wide else VOCAB_SIZE

    def make_teachers(self) -> list[Any]:
        if self.teacher in ("self", "student"):
            return [self.make_student().eval()]
        seeds = {"routed": (1, 2), "mixture": (1, 2), "equals": (1, 1)}.get(self.teacher, (1,))
        models = [make_model(24, seed=seed, vocab_size=self.vocab_size).to(self.dtype).eval() for seed in seeds]
        if self.teacher == "sharp":
            models[0].lm_head.weight.data *= 4
        if self.teacher == "fading":
            models[0].model.norm.register_forward_hook(_fade)
        return models

    def make_references(self) -> list[Any]:
        special = {"student": self.make_student, "teacher": lambda: self.make_teachers()[0]}
        return [
            special[x]().eval() if x in special else make_model(20, seed=x).to(self.dtype).eval()
            for x in self.references
        ]

    def make_rows(self) -> Dataset:
        prompts = [EQUAL] * 6 if self.rollouts is long_completions else PROMPTS
        columns: dict[str, list[Any]] = {"prompt": prompts}
        if self.demonstrations:
            columns["completion"] = COMPLETIONS
        if self.hints is not None:
            columns["teacher_prompt"] = HINTS if self.hints else prompts
        if self.teacher == "routed":
            columns["teacher"] = ["math", "code"] * 3
        return Dataset.from_dict({name: values * 8 for name, values in columns.items()})


def _fade(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Positions from 72 on: behind a prompt of 8 tokens, the completion's from 64 on."""
    scale = torch.where(torch.arange(output.shape[1]) < 72, 4.0, 0.05).to(output)
    return output * scale[:, None]


def world_of(recipe: Recipe, **changes: Any) -> World:
    """A world in which the needs of a recipe are met."""
    needs = set(recipe.needs)
    teacher = "one"
    if recipe.teacher_model == "self":
        teacher = "self"
    elif str(recipe.teacher_model).startswith("cache:"):
        teacher = "cache"
    elif "several_teachers" in needs:
        teacher = "routed"
    elif "mixture" in needs:
        teacher = "mixture"
    references = (7, 8) if "two_references" in needs else (7,) if "reference_model" in needs else ()
    on_failure = recipe.fields.get("injected_when") == "group_failure"
    met = {
        "teacher": teacher,
        "references": references,
        "hints": True if "teacher_prompt" in needs else None,
        "rewards": None if "rewards" not in needs else strict_judge if on_failure else judge,
        "rollouts": turns if "tools" in needs else None,
        "demonstrations": "demonstrations" in needs,
        "saved": bool(recipe.fields.get("beta")),
    }
    return World(**{**met, **changes})


@dataclass
class Made:
    """A trainer, and the models that it was given."""

    trainer: Any
    world: World
    teachers: list[Any]
    references: list[Any]
    folder: Path


def make_trainer(folder: Path, world: World, grpo: bool = False, **fields: Any) -> Made:
    """A trainer in a world; `grpo`: TRL's own, without a teacher."""
    folder.mkdir(parents=True, exist_ok=True)
    teachers, references = world.make_teachers(), world.make_references()
    student = world.make_student()
    if world.saved:
        student.save_pretrained(folder / "student")
        student.config._name_or_path = str(folder / "student")
    config = GRPOConfig if grpo else OnPolicyDistillConfig
    args = config(**_config(folder, **fields))
    rows = world.make_rows()
    arguments: dict[str, Any] = {
        "model": student,
        "args": args,
        "train_dataset": rows,
        "processing_class": make_tokenizer(MANY if world.wide else CHARACTERS),
        "reward_funcs": world.rewards,
        "rollout_func": world.rollouts,
    }
    if grpo:
        return Made(GRPOTrainer(**arguments), world, [], [], folder)
    if world.teacher == "cache":
        teacher, arguments["train_dataset"] = _cached(folder, world, teachers[0], **fields)
    else:
        teacher = _argument(world, teachers)
    trainer = OnPolicyDistillTrainer(teacher_model=teacher, reference_model=references or None, **arguments)
    return Made(trainer, world, teachers, references, folder)


def _config(folder: Path, **fields: Any) -> dict[str, Any]:
    config = trainer_config(folder, **{"per_device_train_batch_size": 8, "seed": SEED, **fields})
    recipe = fields.get("recipe")
    own = recipe is not None and "max_completion_length" in RECIPES[recipe].fields
    if own and "max_completion_length" not in fields:  # the recipe's, and its schedule of it
        del config["max_completion_length"]
    return config


def _argument(world: World, teachers: list[Any]) -> Any:
    if world.teacher == "self":
        return "self"
    if world.teacher == "routed":
        return dict(zip(("math", "code"), teachers, strict=True))
    if world.teacher in ("mixture", "equals"):
        return MixtureTeacher(teachers, [0.3, 0.7], "loss_sum")
    return teachers[0]


def _cached(folder: Path, world: World, model: Any, **fields: Any) -> tuple[Any, Dataset]:
    """A teacher that has answered already, and the prompts that it was asked about."""
    one = replace(world, teacher="one")
    first = make_trainer(folder / "recorded", one, **{**fields, "max_steps": 2}).trainer
    recording = OnPolicyDistillTrainer(
        model=one.make_student(),
        teacher_model=RecordingTeacher(LocalTeacher(model), folder / "scores"),
        args=first.args,
        train_dataset=first.train_dataset,
        processing_class=first.processing_class,
    )
    asked: list[str] = []
    generate = recording._generate
    recording._generate = lambda prompts: asked.extend(prompts) or generate(prompts)
    recording.train()
    return CachedTeacher(folder / "scores"), Dataset.from_dict({"prompt": sorted(set(asked)) * 16})


def tiny_fields(recipe: Recipe) -> Mapping[str, Any]:
    """Fields of a recipe that tiny data asks for."""
    fields: dict[str, Any] = {}
    if recipe.name == "gates":  # texts agree with nobody
        mix = recipe.fields["reward_mix_kwargs"]
        fields["reward_mix_kwargs"] = {**mix, "answer": f"{__name__}.digits"}
    return fields


class _KeepSteps(TrainerCallback):
    def __init__(self, outcome: "Outcome"):
        self.outcome = outcome

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.outcome.weights = {name: w.detach().clone() for name, w in model.state_dict().items()}
        self.outcome.batches, self.outcome.losses = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = model.named_parameters()
        self.outcome.gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


@dataclass
class Outcome:
    """The last optimizer step of a run: the student before it, its micro-batches, their losses and the gradient."""

    made: Made
    weights: dict[str, Any] = field(default_factory=dict)
    batches: list[dict[str, Any]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    gradient: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return float(torch.stack(self.losses).sum())

    @property
    def rollouts(self) -> list[list[list[int]]]:
        """The completions of each micro-batch."""
        return [
            [ids[mask.bool()].tolist() for ids, mask in zip(x["completion_ids"], x["completion_mask"], strict=True)]
            for x in self.batches
        ]


def run(folder: Path, world: World, grpo: bool = False, **fields: Any) -> Outcome:
    """Train in a world, by default one step of two generation batches, without clipping the gradient."""
    defaults = {"max_steps": 1, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "steps_per_generation": 1}
    made = make_trainer(folder, world, grpo, **{**defaults, **fields})
    outcome, trainer = Outcome(made), made.trainer
    compute_loss = trainer._compute_loss

    def keep(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        outcome.batches.append(kept)
        loss = compute_loss(model, inputs)
        outcome.losses.append(loss.detach().clone())
        return loss

    trainer._compute_loss = keep
    trainer.add_callback(_KeepSteps(outcome))
    trainer.train()
    return outcome
