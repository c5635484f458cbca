"""The configuration: GRPO's checks still run, promotion loses nothing, and bad fields are named."""

import warnings
from dataclasses import fields

import pytest
import yaml
from trl import GRPOConfig, TrlParser

from trl_opd import OnPolicyDistillConfig
from trl_opd.losses import DIVERGENCES

BASE = {"use_cpu": True, "bf16": False, "report_to": "none"}


def config(tmp_path, **kwargs):
    return OnPolicyDistillConfig(output_dir=str(tmp_path), **BASE, **kwargs)


def grpo_config(tmp_path, **kwargs):
    return GRPOConfig(output_dir=str(tmp_path), **BASE, **kwargs)


def test_one_completion_a_prompt_is_the_default_and_allowed(tmp_path):
    for args in (config(tmp_path), config(tmp_path, num_generations=1)):
        assert args.num_generations == 1
        assert type(args.num_generations) is int


def test_defaults_other_than_num_generations_are_those_of_grpo(tmp_path):
    ours, theirs = config(tmp_path), grpo_config(tmp_path)
    # The time of day is in none of the fields
    different = {f.name for f in fields(GRPOConfig) if getattr(ours, f.name) != getattr(theirs, f.name)}
    assert different == {"num_generations"}


GRPO_ERRORS = {
    "completions repo without completions": {"log_completions_hub_repo": "a/b"},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "generation batch not of whole batches": {"generation_batch_size": 6, "per_device_train_batch_size": 4},
    "generation batch given twice": {"generation_batch_size": 4, "steps_per_generation": 2},
    # Those that GRPO runs after it has refused a single generation
    "clip bounds in the wrong order": {"vllm_importance_sampling_clip_min": 3.0},
    "clip bounds equal": {"vllm_importance_sampling_clip_min": 2.0, "vllm_importance_sampling_clip_max": 2.0},
    "truncation without a bound": {
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": None,
    },
}


@pytest.mark.parametrize("bad", GRPO_ERRORS.values(), ids=GRPO_ERRORS.keys())
def test_grpo_errors_are_raised_with_one_generation(tmp_path, bad):
    with pytest.raises(ValueError) as theirs:
        grpo_config(tmp_path, num_generations=2, **bad)
    with pytest.raises(ValueError) as ours:
        config(tmp_path, num_generations=1, **bad)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_generations": 3, "per_device_train_batch_size": 4},
        {"num_generations": 1, "num_generations_eval": 3, "eval_strategy": "steps", "do_eval": True},
    ],
)
def test_batches_must_still_hold_whole_groups(tmp_path, bad):
    with pytest.raises(ValueError, match="must be divisible by"):
        config(tmp_path, **bad)


def test_the_deprecated_importance_cap_is_still_carried_over(tmp_path):
    with pytest.warns(FutureWarning, match="vllm_importance_sampling_cap"):
        args = config(tmp_path, num_generations=1, vllm_importance_sampling_cap=5.0)
    assert args.vllm_importance_sampling_clip_max == 5.0


def test_a_batch_of_an_odd_size_holds_whole_groups_of_one(tmp_path):
    assert config(tmp_path, per_device_train_batch_size=3).generation_batch_size == 3


@pytest.mark.parametrize("bad", [0, -1, None])
def test_num_generations_below_one_is_refused_by_name(tmp_path, bad):
    with pytest.raises(ValueError, match=r"num_generations must be .*at least 1.*got"):
        config(tmp_path, num_generations=bad)


def other_value(value):
    """A value that differs from a simple default, or `None` where there is no safe one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 2
    return value * 1.5 + 0.001 if isinstance(value, float) else None


def test_a_promoted_grpo_config_keeps_every_field(tmp_path):
    values = {
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "steps_per_generation": 6,
        "num_iterations": 2,
        "beta": 0.04,
        "loss_type": "cispo",
        "temperature": 0.7,
        "scale_rewards": False,
        "reward_weights": [0.5, 2.0],
        "chat_template_kwargs": {"enable_thinking": False},
        "generation_kwargs": {"suppress_tokens": [3]},
        "model_init_kwargs": {"dtype": "float32"},
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "label_names": ["x"],
        "run_name": "mine",
        "warmup_steps": 7,
        "eval_strategy": "steps",
        "num_generations_eval": 2,
        "pad_to_multiple_of": 8,
        "mask_truncated_completions": True,
        "vllm_importance_sampling_mode": "token_mask",
    }
    skipped = set(values) | set(BASE)
    skipped |= {
        # Exclusive with another field, deprecated, or about another device
        "generation_batch_size", "auto_find_batch_size", "fp16", "tf32", "jit_mode_eval", "push_to_hub", "local_rank",
        "use_transformers_paged", "use_liger_kernel", "torch_compile", "load_best_model_at_end", "do_predict",
        "fp16_full_eval", "bf16_full_eval", "use_vllm", "max_steps", "use_cache", "ignore_data_skip",
        "prediction_loss_only", "full_determinism", "dataloader_prefetch_factor", "batch_eval_metrics",
        "dataloader_persistent_workers", "dataloader_num_workers", "use_transformers_continuous_batching",
    }  # fmt: skip
    for f in fields(GRPOConfig):
        other = other_value(f.default) if f.init and f.name not in skipped else None
        if other is not None:
            values[f.name] = other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that transformers deprecates
        given = GRPOConfig(output_dir=str(tmp_path), **BASE, **values)
    promoted = OnPolicyDistillConfig.from_grpo_config(given)

    changed = [f.name for f in fields(GRPOConfig) if getattr(given, f.name) != f.default]
    assert len(changed) > 80
    for f in fields(GRPOConfig):
        assert getattr(promoted, f.name) == getattr(given, f.name), f.name
        assert type(getattr(promoted, f.name)) is type(getattr(given, f.name)), f.name
    # Attributes that are no fields: the accelerator's state, the number of devices
    assert {k: v for k, v in vars(promoted).items() if k in vars(given)} == vars(given)


def test_a_promoted_config_has_the_defaults_of_the_distillation(tmp_path):
    promoted, fresh = OnPolicyDistillConfig.from_grpo_config(grpo_config(tmp_path)), config(tmp_path)
    own = {f.name for f in fields(OnPolicyDistillConfig)} - {f.name for f in fields(GRPOConfig)}
    assert {name: getattr(promoted, name) for name in own} == {name: getattr(fresh, name) for name in own}
    assert promoted.num_generations == 8
    assert promoted.to_dict().keys() == fresh.to_dict().keys()


def test_yaml_sets_scalars_dicts_and_lists(tmp_path):
    path = tmp_path / "run.yaml"
    values = {
        "output_dir": str(tmp_path),
        **BASE,
        "divergence": "generalized_jsd",
        "divergence_kwargs": {"beta": 0.3},
        "teacher_model_init_kwargs": {"dtype": "bfloat16", "revision": "v2"},
        "special_token_masking": ["special", "<think>", 7],
        "support": "student_top_k",
        "support_size": 8,
        "learning_rate": 3.0e-5,
        "num_generations": 1,
    }
    path.write_text(yaml.safe_dump(values))
    (args,) = TrlParser((OnPolicyDistillConfig,)).parse_args_and_config(["--config", str(path)])
    for name, value in values.items():
        expected = [] if name == "report_to" else value
        assert getattr(args, name) == expected, name


def test_the_command_line_sets_dicts_and_lists_and_wins_over_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), **BASE, "divergence": "forward_kl"}))
    (args,) = TrlParser((OnPolicyDistillConfig,)).parse_args_and_config(
        [
            *("--config", str(path)),
            *("--divergence", "skew_reverse_kl"),
            *("--divergence_kwargs", '{"skew": 0.25}'),
            *("--teacher_model_init_kwargs", '{"revision": "main"}'),
            *("--special_token_masking", "added", "<|im_end|>"),
            *("--distill_temperature", "0.8"),
            *("--loss_chunk_mib", "16"),
        ]
    )
    assert args.divergence == "skew_reverse_kl"
    assert args.divergence_kwargs == {"skew": 0.25}
    assert args.teacher_model_init_kwargs == {"revision": "main"}
    assert args.special_token_masking == ["added", "<|im_end|>"]
    assert args.distill_temperature == 0.8
    assert args.loss_chunk_mib == 16


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_a_value_of_the_field(tmp_path, name):
    own = {"todi": 0.5, "reverse_kl": None} if name == "convex_mix" else None
    assert config(tmp_path, divergence=name, divergence_kwargs=own).divergence == name


SAMPLED = {"credit": "policy_gradient", "support": "sampled"}
# kwargs -> what the message must contain: the field, the rule, the value, the remedy
BAD = [
    ({"divergence": "reverse_k1"}, ["divergence must be", "'reverse_k1'", "mean 'reverse_kl'?", "adaptive_kl"]),
    ({"support": "teacher_topk"}, ["support must be", "'teacher_topk'", "Did you mean 'teacher_top_k'?"]),
    ({"support_tail": "renormalise"}, ["support_tail", "Did you mean 'renormalize'?"]),
    ({"credit": "policy-gradient"}, ["credit must be", "Did you mean 'policy_gradient'?", "direct"]),
    ({"loss_backend": "triten"}, ["loss_backend must be", "'triten'", "Valid: auto, torch, triton, liger"]),
    ({"divergence_kwargs": {"beta": 0.5}}, ["divergence_kwargs", "'beta'", "reverse_kl takes no parameters"]),
    (
        {"divergence": "generalized_jsd", "divergence_kwargs": {"beta": 1.5}},
        ["divergence_kwargs['beta'] of generalized_jsd", "in [0, 1]", "1.5"],
    ),
    (
        {"divergence": "skew_forward_kl", "divergence_kwargs": {"skew": 1.0}},
        ["divergence_kwargs['skew']", "in [0, 1)", "1.0"],
    ),
    ({"support_size": 0}, ["support_size must be", "at least 1", "got 0"]),
    ({"max_completion_length": 0}, ["max_completion_length must be at least 1", "got 0", "nothing to train on"]),
    ({**SAMPLED, "discount": 1.5}, ["discount must be in [0, 1]", "1.5"]),
    ({**SAMPLED, "advantage_clip": 0.0}, ["advantage_clip must be above 0", "got 0.0"]),
    ({"distill_temperature": 0.0}, ["distill_temperature must be above 0", "got 0.0"]),
    ({"temperature": 0.0}, ["temperature must be above 0", "got 0.0"]),
    ({"distill_coef": -1.0}, ["distill_coef must be", "at least 0", "-1.0"]),
    ({"reward_coef": float("nan")}, ["reward_coef must be", "finite", "nan"]),
    ({"overlap_top_k": -1}, ["overlap_top_k must be", "-1", "Set 0"]),
    ({"loss_chunk_mib": 0}, ["loss_chunk_mib must be at least 1", "got 0"]),
    ({"support": "sampled"}, ["support", "credit='direct'", "'sampled'", "Set credit='policy_gradient'"]),
    ({"credit": "policy_gradient"}, ["support must be 'sampled'", "'full'", "Set support='sampled'"]),
    ({**SAMPLED, "divergence": "todi"}, ["divergence must be an f-divergence", "'todi'"]),
    ({**SAMPLED, "distill_temperature": 0.5}, ["distill_temperature must equal temperature", "0.5"]),
    ({"discount": 0.5}, ["discount must be unset with credit='direct'", "0.5"]),
    ({"advantage_clip": 2.0}, ["advantage_clip must be unset with credit='direct'", "2.0"]),
    (
        {"support": "teacher_top_k", "support_size": 1, "support_tail": "renormalize"},
        ["support_size must be at least 2", "identically zero", "support_tail='bucket'"],
    ),
    (
        {"support": "intersection_top_k", "support_size": 1, "support_tail": "renormalize"},
        ["support_size must be at least 2", "identically zero", "support_tail='bucket'"],
    ),
    ({"support": "student_top_k", "loss_backend": "liger"}, ["loss_backend must be", "'liger'"]),
    ({"support": "intersection_top_k", "loss_backend": "liger"}, ["loss_backend must be", "'liger'"]),
    ({**SAMPLED, "loss_backend": "liger"}, ["loss_backend must be", "'liger'"]),
    ({"teacher_sync": "emma"}, ["teacher_sync must be", "'emma'", "Did you mean 'ema'?"]),
    ({"teacher_sync_steps": 0}, ["teacher_sync_steps must be a whole number of at least 1", "got 0"]),
    ({"teacher_sync_steps": None}, ["teacher_sync_steps must be a whole number", "got None"]),
    ({"teacher_sync": "ema", "teacher_sync_rate": 0.0}, ["teacher_sync_rate must be in (0, 1]", "got 0.0"]),
    ({"teacher_sync": "live", "teacher_sync_rate": 0.1}, ["teacher_sync_rate", "teacher_sync='ema'", "'live'"]),
    ({"teacher_sync": "frozen", "teacher_sync_steps": 10}, ["teacher_sync_steps", "'ema' or 'every_n'", "'frozen'"]),
    ({"teacher_chat_template": "teacher"}, ["teacher_chat_template must be", "Valid: own, student"]),
    ({"teacher_overflow": "truncate"}, ["teacher_overflow must be", "Valid: error, skip"]),
    ({"teacher_max_length": 0}, ["teacher_max_length must be a whole number", "got 0"]),
    ({"teacher_quantization": "int4"}, ["teacher_quantization must be", "Did you mean 'int8'?"]),
    ({"teacher_offload": "disk"}, ["teacher_offload must be", "Valid: model, layers"]),
    ({"teacher_batch_size": 1.5}, ["teacher_batch_size must be a whole number", "got 1.5"]),
    ({"loss_type": "dapoo"}, ["loss_type must be", "'dapoo'", "Did you mean 'dapo'?"]),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "parts"), BAD, ids=["-".join(bad) for bad, _ in BAD])
def test_a_bad_field_is_named_with_its_rule_and_value(tmp_path, bad, parts):
    with pytest.raises(ValueError) as error:
        config(tmp_path, **bad)
    for part in parts:
        assert part in str(error.value)


def test_a_promoted_config_is_validated_too(tmp_path):
    with pytest.raises(ValueError, match="max_completion_length must be at least 1"):
        OnPolicyDistillConfig.from_grpo_config(grpo_config(tmp_path, max_completion_length=0))


def test_one_masked_token_may_be_given_without_a_list(tmp_path):
    assert config(tmp_path, special_token_masking="<think>").special_token_masking == ["<think>"]
