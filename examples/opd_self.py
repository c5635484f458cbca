# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-opd",
# ]
# ///
"""
Self-distillation with privileged information: the teacher is the student's own start, and is shown the answer.

    python examples/opd_self.py
    accelerate launch --num_processes 8 examples/opd_self.py

No second model is loaded: the adapter exists twice. `teacher_sync="ema"` has the teacher follow the student. Not run
on the hub model (see README.md here). Papers: OPSD (2601.18734), SDFT (2601.19897), SDPO (2601.20802).
"""

from typing import Any

from datasets import load_dataset
from peft import LoraConfig

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer


def add_teacher_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """What the teacher reads in the place of the student's prompt."""
    hint = f"\n\nThe answer is {row['solution']}. Solve the problem step by step as if you did not know it."
    last = row["prompt"][-1]
    return {"teacher_prompt": [*row["prompt"][:-1], {**last, "content": last["content"] + hint}]}


def main() -> None:
    trainer = OnPolicyDistillTrainer(
        model="Qwen/Qwen3-1.7B",
        teacher_model="self",
        args=OnPolicyDistillConfig(
            output_dir="Qwen3-1.7B-OPSD",
            learning_rate=1e-4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            max_completion_length=2048,
            max_steps=200,
            divergence="generalized_jsd",
            divergence_kwargs={"beta": 0.5},
            chat_template_kwargs={"enable_thinking": False},
            teacher_max_length=8192,
            teacher_overflow="skip",
            logging_steps=5,
            save_steps=50,
        ),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train").map(add_teacher_prompt),
        peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
