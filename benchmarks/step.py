"""
A whole training step, generation included: OnPolicyDistillTrainer beside TRL's DistillationTrainer.

    python benchmarks/step.py                    # one thread, Qwen3 shapes, hidden 128/256, 32k vocabulary

Same models, prompts, batch and completion length (the models are random, so a completion hardly ever ends early),
reverse KL, both in one process, in turn: the trainers run alternating rounds of a few steps, of which the first is not
counted. Peak memory on a CPU is that of the process and includes what its allocator keeps: an indication only.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from measure import PeakMemory, machine, summary, write_json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from trl_opd import OnPolicyDistillConfig, OnPolicyDistillTrainer


class StepTimer(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(hidden: int, layers: int, args: argparse.Namespace, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).to(args.device)


def make_trainer(name: str, args: argparse.Namespace, directory: str) -> tuple[Any, StepTimer]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, args.vocab, (args.batch * 4, args.prompt), generator=g)
    prompts = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]
    timer = StepTimer()
    common = {
        "output_dir": directory,
        "per_device_train_batch_size": args.batch,
        "max_completion_length": args.completion,
        "max_steps": args.steps + 1,
        "learning_rate": 1e-4,
        "gradient_checkpointing": False,
        "bf16": args.bf16,
        "use_cpu": args.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10**6,
    }
    shared = {
        "model": make_model(args.student_hidden, args.layers, args, 0),
        "teacher_model": make_model(args.teacher_hidden, args.layers, args, 1),
        "train_dataset": Dataset.from_dict({"prompt": prompts}),
        "processing_class": make_tokenizer(args.vocab),
        "callbacks": [timer],
    }
    if name == "trl":
        return DistillationTrainer(args=DistillationConfig(beta=1.0, **common), **shared), timer
    return OnPolicyDistillTrainer(args=OnPolicyDistillConfig(**common), **shared), timer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student-hidden", type=int, default=128)
    parser.add_argument("--teacher-hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    times: dict[str, list[float]] = {"ours": [], "trl": []}
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        trainers = {name: make_trainer(name, args, directory) for name in times}
        for _ in range(args.rounds):
            for name, (trainer, timer) in trainers.items():
                timer.seconds.clear()
                with PeakMemory(device) as peak:
                    trainer.train()
                times[name] += timer.seconds[1:]
                memory[name] = max(memory.get(name, 0.0), peak.mib)
    tokens = args.batch * args.completion
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "skip", "memory_of")}
    result = {"arguments": settings, "machine": machine(device), "tokens_per_step": tokens}
    print(result["machine"], settings)
    for name in times:
        result[name] = summary(times[name]) | {"peak_mib": memory[name]}
        median = result[name]["median_s"]
        print(f"{name:>5}: {median:.3f} s a step (min {min(times[name]):.3f}, max {max(times[name]):.3f}), "
              f"{tokens / median:.0f} tokens/s, peak +{memory[name]:.0f} MiB")  # fmt: skip
    pairs = [t / o for o, t in zip(times["ours"], times["trl"], strict=True)]
    result["trl_over_ours"] = {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}
    print(f"trl / ours: {result['trl_over_ours']['median']:.2f} (min {min(pairs):.2f}, max {max(pairs):.2f})")
    write_json(args.json, result)


if __name__ == "__main__":
    main()
