# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""Settings that a person would want to be told of before the first step: sampling, learning rate, loss, memory."""

from typing import Any

from ..findings import Finding
from ..recipes import explicit_fields
from .known import RunFacts

# Parameters below which published learning rates say nothing: a model of this size takes far more
_SMALL = 50_000_000
# Full: 1e-6 to 2e-6 (verl, thunlp/OPD), 2e-5 (NeMo-RL, where 4e-5 was worse), 5e-5 (tinker-cookbook). LoRA: 1e-4 there
_FULL, _FULL_EXTREME = 2e-5, 1e-4
_LORA_LOW, _LORA_HIGH = 1e-5, 1e-3

# What `generate` takes from the model's generation config where GRPOTrainer leaves it unset, and values of no effect
_LEAKS: dict[str, tuple[Any, ...]] = {
    "min_p": (None, 0, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0),
    "top_h": (None,),
    "watermarking_config": (None,),
}
# What a generation config recommends for sampling, and the values that recommend nothing
_RECOMMENDED: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 1.0),
    "top_p": (None, 1.0),
    "top_k": (None, 0, 50),
    "repetition_penalty": (None, 1.0),
}


def check_generation_config(facts: RunFacts) -> list[Finding]:
    """Whether completions come from the distribution that the loss takes them to come from."""
    found = [*_leaked_settings(facts), *_overridden(facts), *_restricted_sampling(facts), *_temperatures(facts)]
    return found or [Finding("generation_config", "ok", f"sampled at {_sampling(facts.args)}")]


def _sampling(args: Any) -> str:
    return f"temperature {args.temperature}, top_p {args.top_p}, top_k {args.top_k}"


def _leaked_settings(facts: RunFacts) -> list[Finding]:
    args, config = facts.args, facts.student.generation_config
    if args.use_vllm or config is None:
        return []
    given = set(args.generation_kwargs or {}) | ({"min_p"} if args.min_p is not None else set())
    values = {name: getattr(config, name, None) for name in _LEAKS if name not in given}
    leaked = {name: value for name, value in values.items() if value not in _LEAKS[name]}
    if not leaked:
        return []
    shown = ", ".join(f"{name}={value!r}" for name, value in leaked.items())
    return [
        Finding(
            "generation_config",
            "warning",
            f"the student's generation config has {shown}, which GRPOTrainer does not set and generate() therefore "
            "keeps",
            "Completions come from another distribution than the one whose log-probs are trained.",
            f"Remove it from generation_config.json, or override it: generation_kwargs="
            f"{ {name: _neutral(name) for name in leaked} }.",
        )
    ]


def _neutral(name: str) -> Any:
    """A value that is set and has no effect (an unset one would be filled in again)."""
    return next((value for value in _LEAKS[name] if value is not None), None)


def _overridden(facts: RunFacts) -> list[Finding]:
    """`generation_kwargs` has the last word in sampling, and the loss does not hear of it."""
    args, kwargs = facts.args, facts.args.generation_kwargs or {}
    found = []
    other = {k: kwargs[k] for k in ("temperature", "top_p", "top_k") if k in kwargs and kwargs[k] != getattr(args, k)}
    if other:
        found.append(
            Finding(
                "generation_config",
                "warning",
                f"generation_kwargs samples with {other}, and the loss is computed at {_sampling(args)}",
                "The student is compared at another temperature, or over other entries, than it samples with.",
                f"Set {', '.join(f'{k}={v}' for k, v in other.items())} as fields, and leave generation_kwargs alone.",
            )
        )
    if "eos_token_id" in kwargs:
        found.append(
            Finding(
                "generation_config",
                "warning",
                f"generation_kwargs sets eos_token_id={kwargs['eos_token_id']}, which GRPOTrainer's mask does not use",
                f"It masks behind {facts.student.stop_ids}: padding behind another end counts as text of the student.",
                "Set eos_token_id in the student's generation_config.json instead.",
            )
        )
    return found


def _restricted_sampling(facts: RunFacts) -> list[Finding]:
    args, found = facts.args, list[Finding]()
    if args.repetition_penalty != 1.0:
        found.append(
            Finding(
                "generation_config",
                "warning",
                f"repetition_penalty is {args.repetition_penalty}",
                "It changes every distribution that is sampled from, and no log-prob of the loss: the student is "
                "trained on text that it would not write.",
                "Set repetition_penalty=1.0. A student that repeats itself is what the teacher corrects.",
            )
        )
    names = [
        f"{name}={getattr(args, name)}"
        for name, off in (("top_p", (1.0,)), ("top_k", (0, -1, None)), ("min_p", (None, 0.0)))
        if getattr(args, name) not in off
    ]
    if not names:
        return found
    estimates = args.credit != "direct" or args.support == "sampled"
    greedy = args.top_k == 1
    found.append(
        Finding(
            "generation_config",
            "warning" if estimates and not greedy else "info",
            f"completions are sampled with {', '.join(names)}",
            "The loss is an estimate from sampled tokens of a divergence over the whole vocabulary: tokens that are "
            "never sampled leave it biased."
            if estimates
            else "The divergence at each token is exact over its support all the same; the student is corrected only "
            "where such text leads.",
            "Set top_p=1.0, top_k=0 and min_p unset." if estimates else "",
        )
    )
    return found


def _temperatures(facts: RunFacts) -> list[Finding]:
    args, found = facts.args, list[Finding]()
    if args.divergence_temperature != args.temperature:
        found.append(
            Finding(
                "generation_config",
                "info",
                f"the student samples at temperature {args.temperature} and is compared at "
                f"{args.divergence_temperature} (distill_temperature)",
                "It is trained at a temperature at which it does not write.",
                "" if "distill_temperature" in explicit_fields(args) else "Leave distill_temperature unset.",
            )
        )
    for known in (facts.student, *(t for t in facts.teachers if not t.shared)):
        values = {name: getattr(known.generation_config, name, None) for name in _RECOMMENDED}
        other = {k: v for k, v in values.items() if v not in _RECOMMENDED[k] and v != getattr(args, k)}
        if other:
            shown = ", ".join(f"{k}={v}" for k, v in other.items())
            found.append(
                Finding(
                    "generation_config",
                    "info",
                    f"the generation config of {known.label} recommends {shown}; this run samples at "
                    f"{_sampling(args)}",
                    "GRPOTrainer sets these itself, which is right for training. Evaluate with the recommended ones.",
                )
            )
    return found


def approximate_parameters(config: Any) -> int | None:
    """Parameters of a dense decoder with these sizes, to within a factor of two; `None` where they are not known."""
    if config is None:
        return None
    text = config.get_text_config()
    hidden, layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    if not hidden or not layers:
        return None
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    return layers * (4 * hidden**2 + 3 * hidden * inner) + text.vocab_size * hidden


def check_learning_rate(facts: RunFacts) -> list[Finding]:
    """The learning rate beside what was published for on-policy distillation with LoRA and without."""
    args, lora = facts.args, facts.uses_lora
    rate, found = args.learning_rate, list[Finding]()
    size = approximate_parameters(facts.student.config)
    if size is not None and size < _SMALL:
        return [Finding("learning_rate", "ok", f"{rate:g}; nothing is published for a student of {size / 1e6:.2g}M")]
    name = "LoRA" if lora else "full"
    if rate <= 0:
        found.append(_rate(f"{rate:g}", "Nothing is trained.", "Set learning_rate, e.g. 1e-6 (1e-4 with LoRA)."))
    elif lora and rate < _LORA_LOW:
        default = "" if "learning_rate" in explicit_fields(args) else ", GRPOConfig's default,"
        found.append(
            _rate(
                f"{rate:g}{default} with LoRA",
                "Adapters start at zero and move by about one learning rate a step: at this one hundreds of steps "
                "change nothing.",
                "Set learning_rate=1e-4 (published with rank 128; 5e-5 to 3e-4 for smaller ranks).",
            )
        )
    elif lora and rate > _LORA_HIGH:
        found.append(_rate(f"{rate:g} with LoRA", "Runs collapse within tens of steps.", "Set learning_rate=1e-4."))
    elif not lora and rate > _FULL:
        why = (
            "Published runs use 1e-6 to 2e-5 (4e-5 was worse than 2e-5), 5e-5 at most."
            if rate <= _FULL_EXTREME
            else "Published runs use 1e-6 to 2e-5: at this one the student forgets what it can within tens of steps."
        )
        found.append(_rate(f"{rate:g} with all weights trained", why, "Set learning_rate=2e-5 or less, or use LoRA."))
    elif not lora and rate < 1e-7:
        found.append(
            _rate(
                f"{rate:g} with all weights trained",
                "A bfloat16 weight does not change by so little.",
                "Set learning_rate=1e-6 to 2e-5.",
            )
        )
    optimizer = str(getattr(args.optim, "value", args.optim))
    if not any(part in optimizer for part in ("adam", "muon", "lion", "ademamix", "schedule_free")):
        found.append(
            Finding(
                "learning_rate",
                "info",
                f"optim={optimizer!r}",
                "The learning rates that were published are Adam's, whose steps do not depend on the gradient's size.",
            )
        )
    return found or [Finding("learning_rate", "ok", f"{rate:g} ({name}) is within what was published")]


def _rate(seen: str, why: str, do: str) -> Finding:
    return Finding("learning_rate", "warning", f"learning_rate is {seen}", why, do)


def check_loss_type(facts: RunFacts) -> list[Finding]:
    """GRPO's loss types, as far as they weigh tokens otherwise than one may think."""
    args, found = facts.args, list[Finding]()
    kind, micro_batches = args.loss_type, args.gradient_accumulation_steps * args.world_size
    bound = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if kind == "cispo" and facts.has_policy_gradient and bound < 1:
        found.append(
            Finding(
                "loss_type",
                "warning",
                f"loss_type='cispo' with epsilon_high={bound:g}"
                f"{' (epsilon, as it is unset)' if args.epsilon_high is None else ''}",
                f"Its bound is on the ratio itself, which is 1 on fresh samples: every token's weight is {bound:g} "
                "and no ratio corrects anything.",
                "Set epsilon_high=5.0 (ScaleRL), or loss_type='dapo'.",
            )
        )
    if kind == "bnpo" and micro_batches > 1:
        found.append(
            Finding(
                "loss_type",
                "warning",
                f"loss_type='bnpo' with {micro_batches} micro-batches a step",
                "Each is divided by its own number of tokens: tokens beside short completions weigh more, and the "
                "gradient depends on how a batch is split.",
                "Set loss_type='dapo' (the mean over all tokens of the step).",
            )
        )
    if kind == "luspo":
        found.append(
            Finding(
                "loss_type",
                "info",
                "loss_type='luspo' sums the divergence over each completion",
                "The loss grows with the length: the learning rate in effect is that many times larger.",
                "Set loss_type='dapo' unless the sum is meant.",
            )
        )
    if kind in ("grpo", "sapo"):
        found.append(
            Finding(
                "loss_type",
                "info",
                f"loss_type={kind!r} takes the mean over each completion first",
                "Tokens of short completions weigh more than those of long ones, which favours short answers.",
                "" if "loss_type" in explicit_fields(args) or args.recipe else "Set loss_type='dapo'.",
            )
        )
    return found or [Finding("loss_type", "ok", f"loss_type={kind!r}")]


def check_memory(facts: RunFacts) -> list[Finding]:
    """The estimate for this configuration beside the device's memory."""
    from ..memory_estimate import estimate_memory

    if facts.student.config is None:
        return []
    estimate = estimate_memory(facts.run, student_config=facts.student.config)
    parts = sorted(estimate.parts.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {_gib(size)}" for name, size in parts[:4])
    device = estimate.device_total
    if device is None:
        return [Finding("memory", "info", f"about {_gib(estimate.total)} a process ({largest}); no accelerator here")]
    seen = f"about {_gib(estimate.total)} of {_gib(device)} a device ({largest})"
    if estimate.total <= 0.9 * device:
        return [Finding("memory", "ok", seen)]
    return [
        Finding(
            "memory",
            "warning",
            seen,
            "The run would stop in its first steps for want of memory, or at its first long completion.",
            "Lower per_device_train_batch_size, set gradient_checkpointing=True, train with LoRA (use_peft), shrink "
            "the teacher (teacher_quantization='int8', teacher_offload='model') or serve it behind a URL.",
        )
    ]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2g} GiB" if size < 100 * 2**30 else f"{size / 2**30:.0f} GiB"
