"""Short runs against a served teacher, whose completions depend on the prompt alone: two runs sample the same."""

import torch
from datasets import Dataset
from tiny import VOCAB_SIZE, make_model, make_tokenizer, trainer_config
from transformers import TrainerCallback

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer

PROMPTS = ["abc", "hello world", "the quick", "x", "12 34", "what is it", "zz", "quiet"]


def complete(prompt):
    """1 to 8 tokens."""
    seed = sum(map(ord, prompt))
    return [6 + (seed * (i + 3) + i * i) % (VOCAB_SIZE - 6) for i in range(seed % 8)] + [1]


def rollouts(prompts, trainer):
    encoded = trainer.processing_class(prompts)["input_ids"]
    return {"prompt_ids": encoded, "completion_ids": [complete(p) for p in prompts], "logprobs": None}


class RememberWeights(TrainerCallback):
    """The weights after each whole step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after[state.global_step] = {name: w.detach().clone() for name, w in model.named_parameters()}


def make_trainer(path, teacher, callbacks=(), reward_funcs=None, **fields):
    config = {
        "max_steps": 3,
        "learning_rate": 0.05,
        "shuffle_dataset": False,
        "gradient_accumulation_steps": 2,
        "support_size": 8,
        **fields,
    }
    return OnPolicyDistillTrainer(
        model=make_model().double(),
        teacher_model=teacher,
        args=OnPolicyDistillConfig(**trainer_config(path, **config)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=make_tokenizer(),
        rollout_func=rollouts,
        callbacks=list(callbacks),
        reward_funcs=reward_funcs,
    )


def weights_of(trainer):
    return {name: w.detach().clone() for name, w in trainer.model.named_parameters()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
