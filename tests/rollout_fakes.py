"""What the sources of completions read of a trainer, without one."""

from types import SimpleNamespace

import torch
from tiny import make_tokenizer

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
X = TOKENIZER.convert_tokens_to_ids("x")


def ids_of(text):
    return TOKENIZER(text)["input_ids"]


def make_args(**fields):
    defaults = {
        "seed": 42,
        "student_fraction": 1.0,
        "replay_fraction": 0.0,
        "replay_size": 1000,
        "off_policy_source": "dataset",
        "injected_completions": 0,
        "injected_when": "always",
        "mask_truncated_completions": False,
        "sample_weighting": None,
        "schedules": None,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 1,
    }
    return SimpleNamespace(**{**defaults, **fields})


def make_trainer(rank=0, **fields):
    """What the sources read of a trainer."""
    args = make_args(**fields)
    trainer = SimpleNamespace(
        args=args,
        accelerator=SimpleNamespace(
            process_index=rank, num_processes=1, device=torch.device("cpu"), reduce=lambda x, reduction: x
        ),
        state=SimpleNamespace(global_step=0),
        model=SimpleNamespace(training=True),
        num_generations=args.num_generations,
        num_iterations=1,
        _is_vlm=False,
        _step=0,
        tools=None,
        rollout_func=None,
        use_vllm=False,
        callbacks=[],
        _tokenizer=TOKENIZER,
        eos_token_ids=[EOS],
        max_completion_length=8,
        chat_template=None,
        chat_template_kwargs={},
        teacher=None,
    )
    trainer.add_callback = trainer.callbacks.append
    return trainer


class Writer:
    """A teacher of one's own."""

    name = "writer"

    def __init__(self, *completions):
        self.completions, self.asked = completions, []

    def __call__(self, batch):
        raise AssertionError

    def generate(self, prompt_ids, sampling):
        self.asked.append((prompt_ids, sampling))
        return [list(self.completions[i % len(self.completions)]) for i in range(len(prompt_ids))]
