"""Without a teacher the trainer is GRPOTrainer: same logs, same weights, same demands."""

import pytest
import torch
from tiny import make_model, make_prompts, make_tokenizer, trainer_config
from trl import GRPOConfig, GRPOTrainer

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer

TIMES = ("runtime", "per_second", "step_time")


def reward_e(completions, **kwargs):
    return [completion.count("e") + 0.1 * len(completion) for completion in completions]


def reward_short(completions, **kwargs):
    return [-float(len(set(completion))) for completion in completions]


def run(trainer_class, config_class, tmp_path, model=None, **fields):
    # The reference model of `beta` is read from the student's path
    path = tmp_path / "student"
    if not path.exists():
        make_model().save_pretrained(path)
    args = config_class(**trainer_config(tmp_path / trainer_class.__name__, num_generations=2, **fields))
    trainer = trainer_class(
        model=str(path),
        reward_funcs=[reward_e, reward_short],
        args=args,
        train_dataset=make_prompts(),
        eval_dataset=make_prompts(4) if args.eval_strategy != "no" else None,
        processing_class=make_tokenizer(),
    )
    trainer.train()
    return trainer


def without_times(history):
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in history]


CASES = {
    "default": {},
    "dr_grpo, beta": {"loss_type": "dr_grpo", "beta": 0.1},
    "bnpo, two iterations": {"loss_type": "bnpo", "num_iterations": 2, "max_steps": 4},
    "cispo, accumulation": {"loss_type": "cispo", "gradient_accumulation_steps": 2, "epsilon_high": 2.0},
    "grpo, sequence level": {"loss_type": "grpo", "importance_sampling_level": "sequence", "steps_per_generation": 2},
    "sapo, entropy bonus": {"loss_type": "sapo", "entropy_coef": 0.01},
    "luspo, no scaling": {"loss_type": "luspo", "scale_rewards": "none"},
    "vespo, evaluation": {"loss_type": "vespo", "eval_strategy": "steps", "eval_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True, "weight_decay": 0.1},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_logs_and_weights_are_bit_identical(tmp_path, fields):
    theirs = run(GRPOTrainer, GRPOConfig, tmp_path, **fields)
    ours = run(OnPolicyDistillTrainer, OnPolicyDistillConfig, tmp_path, **fields)
    assert without_times(ours.state.log_history) == without_times(theirs.state.log_history)
    assert len(ours.state.log_history) > 3
    start = make_model().state_dict()
    weights = theirs.model.state_dict()
    assert ours.model.state_dict().keys() == weights.keys()
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert not torch.equal(weights["lm_head.weight"], start["lm_head.weight"])


def test_a_plain_grpo_config_trains_to_the_same_weights(tmp_path):
    theirs = run(GRPOTrainer, GRPOConfig, tmp_path, max_steps=2)
    ours = run(OnPolicyDistillTrainer, GRPOConfig, tmp_path, max_steps=2)
    assert isinstance(ours.args, OnPolicyDistillConfig)
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(weight, theirs.model.state_dict()[name]), name


def test_the_distillation_fields_change_nothing_without_a_teacher(tmp_path):
    theirs = run(GRPOTrainer, GRPOConfig, tmp_path, max_steps=2)
    fields = {
        "distill_coef": 3.0,
        "reward_coef": 0.5,
        "divergence": "forward_kl",
        "special_token_masking": ["special"],
    }
    ours = run(OnPolicyDistillTrainer, OnPolicyDistillConfig, tmp_path, max_steps=2, **fields)
    assert without_times(ours.state.log_history) == without_times(theirs.state.log_history)
    assert not any(key.startswith("distill") for line in ours.state.log_history for key in line)


def test_rewards_alone_need_two_completions_a_prompt(tmp_path):
    with pytest.raises(ValueError, match="num_generations must be at least 2 without a teacher, got 1"):
        OnPolicyDistillTrainer(
            model=make_model(),
            reward_funcs=reward_e,
            args=OnPolicyDistillConfig(**trainer_config(tmp_path)),
            train_dataset=make_prompts(),
            processing_class=make_tokenizer(),
        )


def test_without_a_teacher_the_model_card_is_that_of_grpo(tmp_path):
    theirs = run(GRPOTrainer, GRPOConfig, tmp_path, max_steps=1)
    ours = run(OnPolicyDistillTrainer, OnPolicyDistillConfig, tmp_path, max_steps=1)
    cards = []
    for trainer in (ours, theirs):
        trainer.create_model_card(model_name="student")
        cards.append((tmp_path / type(trainer).__name__ / "README.md").read_text())
    assert "DeepSeekMath" in cards[0]
    assert cards[0] == cards[1]
