# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-opd",
# ]
# ///
"""
Distil Qwen3-8B into a LoRA adapter of Qwen3-1.7B, on the student's own completions.

    python examples/opd_lora.py
    accelerate launch --num_processes 8 examples/opd_lora.py
    accelerate launch --config_file examples/deepspeed_zero3.yaml examples/opd_lora.py

Expected, from the papers and recipes named in README.md and not measured by us (this file has not been run on the hub
models): distill/reverse_kl falls within the first 50 steps, distill/overlap rises from about 0.7 towards 0.9, and the
completions keep their length. If completions grow to the limit instead, the teacher's chat template or end token
differs from the student's.

Learning rate: 1e-4 is in use for LoRA, 5e-6 to 2e-5 for full fine-tuning (then drop `peft_config`).
"""

from datasets import load_dataset
from peft import LoraConfig

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer


def main() -> None:
    trainer = OnPolicyDistillTrainer(
        model="Qwen/Qwen3-1.7B",
        teacher_model="Qwen/Qwen3-8B",
        args=OnPolicyDistillConfig(
            output_dir="Qwen3-1.7B-OPD",
            learning_rate=1e-4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            max_completion_length=2048,
            max_steps=200,
            chat_template_kwargs={"enable_thinking": False},
            # use_vllm=True, vllm_mode="colocate",  # faster rollouts, with `pip install "trl-opd[vllm]"`
            logging_steps=5,
            save_steps=50,
        ),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
