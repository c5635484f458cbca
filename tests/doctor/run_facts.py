"""Runs to examine without weights: a clean pair of models, and places to plant a fault."""

import json
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from tiny import VOCAB_SIZE, make_model, make_prompts, make_tokenizer, trainer_config
from transformers import Qwen3Config

from trl_opd import OnPolicyDistillConfig
from trl_opd.checks import Run
from trl_opd.doctor import check_facts, gather
from trl_opd.teacher_preflight import check_teacher
from trl_opd.teachers import resolve_teacher

QUESTIONS = ("hi", "what is it", "the answer", "x y z", "1 2 3", "abc", "no", "go on")
CHAT = [[{"role": "user", "content": content}] for content in QUESTIONS]
IM_START, IM_END, EOS = 2, 3, 1


def tokenizer_of(**changes):
    """The tiny tokenizer, whose template closes an answer with its end-of-sequence token."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def model_of(seed=0, eos=(IM_END,), **config):
    model = make_model(seed=seed, **config)
    model.generation_config.eos_token_id = None if eos is None else list(eos)
    return model


def chats(rows=CHAT, **columns):
    return Dataset.from_dict({"prompt": list(rows), **columns})


def texts(num=16):
    return make_prompts(num)


def make_run(
    *,
    dataset=None,
    student=None,
    teacher=None,
    tokenizer=None,
    teacher_tokenizer=None,
    lora=False,
    has_rewards=False,
    teacher_view=None,
    check=True,
    **fields,
):
    """A [`Run`] and its teacher's tokenizers, as the trainer makes them before it loads weights."""
    config = {
        k: v for k, v in trainer_config("unused").items() if k not in ("learning_rate", "gradient_checkpointing")
    }
    args = OnPolicyDistillConfig(**{**config, **fields})
    student = student if student is not None else model_of()
    teacher = resolve_teacher(teacher if teacher is not None else model_of(seed=1))
    tokenizer = tokenizer or tokenizer_of()
    given = teacher_tokenizer or tokenizer_of()
    run = Run(
        args=args,
        model=student,
        teacher=teacher,
        has_rewards=has_rewards,
        datasets={"train_dataset": dataset if dataset is not None else chats(), "eval_dataset": None},
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM") if lora else None,
        teacher_view=teacher_view,
    )
    return run, check_teacher(teacher, student, args, tokenizer, given)[1] if check else [given]


def facts_of(num_samples=8, num_scanned=1000, **arguments):
    return gather(*make_run(**arguments), num_samples=num_samples, num_scanned=num_scanned)


def found(**arguments):
    """All findings of a run without weights."""
    return check_facts(facts_of(**arguments), memory=False)


def problems(findings):
    return [(finding.check, finding.severity) for finding in findings if finding.is_problem]


def infos(findings):
    return [finding.check for finding in findings if finding.severity == "info"]


def the(findings, check):
    """The one finding of a check, whatever its severity (problems first)."""
    chosen = sorted((f for f in findings if f.check == check), key=lambda f: not f.is_problem)
    assert chosen, check
    return chosen[0]


def large_config(**changes):
    """The sizes of a model of 0.6B parameters with the tiny vocabulary."""
    return Qwen3Config(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "max_position_embeddings": 40960,
            "eos_token_id": IM_END,
            "pad_token_id": 0,
            "architectures": ["Qwen3ForCausalLM"],
            **changes,
        }
    )


def save_config(folder: Path, tokenizer=None, **changes) -> str:
    """A model's folder that has everything but weights."""
    large_config(**changes).save_pretrained(folder)
    (tokenizer or tokenizer_of()).save_pretrained(folder)
    return str(folder)


def save_model(folder: Path, *, seed=0, tokenizer=None, eos=(IM_END,), **config) -> str:
    """A model's folder."""
    model_of(seed, eos, **config).save_pretrained(folder)
    (tokenizer or tokenizer_of()).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)
