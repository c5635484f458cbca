"""Tiny models, tokenizers and datasets, all made here: nothing is downloaded."""

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .<>|_:/\n"
SPECIAL = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if no_think is defined and no_think %}<think></think>"
    "{% endif %}{% endif %}"
)


def make_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """A character tokenizer with a chat template."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(SPECIAL[:4])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    fast.add_tokens(SPECIAL[4:])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(hidden_size: int = 16, seed: int = 0, vocab_size: int = VOCAB_SIZE, **kwargs: Any) -> Qwen3ForCausalLM:
    """A two-layer Qwen3 with large enough weights that its distributions are far from uniform."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
        **{"tie_word_embeddings": False, **kwargs},
    )
    return Qwen3ForCausalLM(config)


def make_prompts(num: int = 16) -> Dataset:
    """Prompts of different lengths."""
    prompts = ["abc", "hello world", "x", "the quick brown fox", "12 34", "what is it"]
    return Dataset.from_dict({"prompt": [prompts[i % len(prompts)] for i in range(num)]})


def trainer_config(output_dir: Any, **kwargs: Any) -> dict[str, Any]:
    """Config fields of a three-step run on a CPU that writes nothing."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        **kwargs,
    }
