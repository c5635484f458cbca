# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a top-k teacher costs in accuracy: the student's gradient from K entries beside that from the whole vocabulary.

    trl-opd bench topk                                                   # a pair trained here, on Python's own sources
    trl-opd bench topk --student PATH --teacher PATH --prompts FILE      # your models, your prompts (one a line)

The student samples completions; at those tokens the gradient of the mean divergence with respect to all of its
parameters is formed from the teacher's K likeliest entries, and compared with that from all entries: cosine, ratio of
norms, and ratio of values. `bucket` puts the rest of both distributions in one more entry, `renormalize` and `none`
are the two ways without. `sampled` is the policy gradient from the sampled token's log-prob alone, at the same tokens.

Without models, both are trained for --minutes: next-token prediction on Python sources with a BPE vocabulary made from
them, Qwen3 shapes of 4 layers x 256 and 2 layers x 128. Such a teacher is far less certain than one of billions of
parameters, so its tail is heavier and small K looks worse than it will be with yours: measure with your own.
"""

import argparse
import glob
import random
import sysconfig
import time
from typing import Any

import torch
from torch import Tensor

from ..heads import HeadCall, add_head_branch
from ..kernels import fused_linear_divergence
from .measure import machine, show_table, write_json
from .plots import new_figure

DIVERGENCES: dict[str, dict[str, Any]] = {
    "reverse_kl": {"divergence": "reverse_kl"},
    "forward_kl": {"divergence": "forward_kl"},
    "jsd_0.5": {"divergence": "generalized_jsd", "divergence_kwargs": {"beta": 0.5}},
}
TAILS = ("bucket", "renormalize", "none")


def sources(characters: int, seed: int = 0) -> list[str]:
    """Files of Python's standard library, in a fixed random order, up to so many characters."""
    paths = sorted(glob.glob(f"{sysconfig.get_path('stdlib')}/**/*.py", recursive=True))
    paths = [path for path in paths if "site-packages" not in path and "/test" not in path]
    random.Random(seed).shuffle(paths)
    texts: list[str] = []
    for path in paths:
        with open(path, encoding="utf-8", errors="ignore") as f:
            texts.append(f.read())
        characters -= len(texts[-1])
        if characters < 0:
            break
    return texts


def make_pair(args: argparse.Namespace) -> tuple[Any, Any, list[list[int]]]:
    """Teacher, student and prompts, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    texts = sources(args.characters)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=args.vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ids = torch.tensor([i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids])
    held_out = ids[-len(ids) // 20 :]
    pair = []
    for hidden, layers, share in ((256, 4, 0.75), (128, 2, 0.25)):
        torch.manual_seed(args.seed)
        config = Qwen3Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            tie_word_embeddings=True,
        )
        model = Qwen3ForCausalLM(config).to(args.device)
        loss = _train(model, ids[: -len(held_out)], 60 * args.minutes * share, args)
        print(f"{layers} layers x {hidden}: {loss:.2f} nats a token after training")
        pair.append(model.eval())
    starts = torch.randint(len(held_out) - 64, (args.prompts_num,), generator=torch.Generator().manual_seed(args.seed))
    prompts = [held_out[i : i + 32].tolist() for i in starts.tolist()]
    return pair[0], pair[1], prompts


def _train(model: Any, ids: Tensor, seconds: float, args: argparse.Namespace) -> float:
    """Next-token prediction for so long; the mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(args.seed)
    losses: list[float] = []
    started, length = time.perf_counter(), 128
    while (elapsed := time.perf_counter() - started) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (len(losses) + 1) / 50) * max(0.05, 1 - elapsed / seconds)
        starts = torch.randint(len(ids) - length - 1, (16,), generator=generator)
        batch = torch.stack([ids[i : i + length] for i in starts.tolist()]).to(args.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def load_pair(args: argparse.Namespace) -> tuple[Any, Any, list[list[int]]]:
    """Teacher, student and prompts from paths or hub ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.student)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(args.device).eval()
        for path in (args.teacher, args.student)
    ]
    with open(args.prompts) as f:
        lines = [line.strip() for line in f if line.strip()][: args.prompts_num]
    return models[0], models[1], [tokenizer(line)["input_ids"] for line in lines]


@torch.no_grad()
def rollouts(student: Any, prompts: list[list[int]], args: argparse.Namespace) -> list[tuple[Tensor, int]]:
    """`(ids (1, P + T), P)` of each prompt and a completion sampled at temperature 1."""
    torch.manual_seed(args.seed)
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=args.device)
        ids = student.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=args.completion,
            pad_token_id=0,
        )
        out.append((ids, len(prompt)))
    return out


def measure(teacher: Any, student: Any, sequences: list[tuple[Tensor, int]], args: argparse.Namespace) -> list[dict]:
    """One row for each divergence, tail and K."""
    add_head_branch(teacher)
    add_head_branch(student)
    head: dict[str, Any] = {}

    def run(model: Any, name: str) -> Tensor:
        def call(hidden_states: Tensor, live: Any, aux_loss: Tensor | None) -> dict[str, Tensor]:
            head[name] = live
            return {"hidden": hidden_states[0, prompt_length - 1 : -1]}

        return model(input_ids=ids, head_call=HeadCall(call))["hidden"]

    hidden, teacher_hidden, targets = [], [], []
    for ids, prompt_length in sequences:
        hidden.append(run(student, "student"))
        with torch.no_grad():
            teacher_hidden.append(run(teacher, "teacher"))
        targets.append(ids[0, prompt_length:])
    student_hidden, tokens = torch.cat(hidden), torch.cat(targets)
    vocab = min(head["student"].weight.shape[0], head["teacher"].weight.shape[0])
    parameters = [p for p in student.parameters() if p.requires_grad]

    def gradient(**fields: Any) -> tuple[float, Tensor]:
        result = fused_linear_divergence(
            student_hidden,
            head["student"].weight,
            torch.cat(teacher_hidden),
            head["teacher"].weight,
            student_bias=head["student"].bias,
            teacher_bias=head["teacher"].bias,
            student_logit_scale=head["student"].logit_scale,
            teacher_logit_scale=head["teacher"].logit_scale,
            student_softcap=head["student"].softcap,
            teacher_softcap=head["teacher"].softcap,
            target_ids=tokens,
            **fields,
        )
        loss = result.loss / len(tokens)
        assert result.divergence is not None
        if fields.get("per_token_grad"):
            assert result.teacher_logprobs is not None and result.student_logprobs is not None
            advantage = result.teacher_logprobs - result.student_logprobs.detach()
            loss = -(advantage * result.student_logprobs).mean()
        grads = torch.autograd.grad(loss, parameters, retain_graph=True)
        return float(result.divergence.detach().mean()), torch.cat([g.flatten().float() for g in grads])

    rows = []
    for name, fields in DIVERGENCES.items():
        value, full = gradient(**fields)
        if name == "reverse_kl":
            _, sampled = gradient(per_token_grad=True)
            rows.append(_row(name, "sampled", 1, None, sampled, value, full))
        for k in [k for k in args.k if k < vocab]:
            for tail in TAILS:
                if k == 1 and tail == "renormalize":
                    continue  # identically zero
                at_k, grads = gradient(support="teacher_top_k", support_size=k, tail=tail, **fields)
                rows.append(_row(name, tail, k, at_k, grads, value, full))
    return rows


def _row(name: str, tail: str, k: int, at_k: float | None, grads: Tensor, value: float, full: Tensor) -> dict:
    return {
        "divergence": name,
        "tail": tail,
        "k": k,
        "cosine": torch.nn.functional.cosine_similarity(grads, full, dim=0).item(),
        "norm_ratio": (grads.norm() / full.norm()).item(),
        "value_ratio": None if at_k is None else at_k / value,
        "full_value": value,
    }


def table(rows: list[dict]) -> str:
    """Cosines, and in brackets the value over that of the whole vocabulary."""
    lines: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        value = "" if row["value_ratio"] is None else f" ({row['value_ratio']:.2f})"
        lines.setdefault((row["divergence"], row["k"]), {})[row["tail"]] = f"{row['cosine']:.4f}{value}"
    head = ["divergence", "k", *TAILS, "sampled"]
    return show_table(head, [[n, str(k), *(line.get(t, "") for t in head[2:])] for (n, k), line in lines.items()])


def plot(result: dict[str, Any], path: str) -> bool:
    """Draw the cosines over K, a panel a divergence. Returns whether it was drawn."""
    figure = new_figure(11, 3.4)
    if figure is None:
        return False
    for axes, name in zip(figure.subplots(1, len(DIVERGENCES), sharey=True), DIVERGENCES, strict=True):
        rows = [row for row in result["rows"] if row["divergence"] == name]
        for tail in TAILS:
            points = [(row["k"], row["cosine"]) for row in rows if row["tail"] == tail]
            axes.plot([k for k, _ in points], [c for _, c in points], marker="o", markersize=3, label=tail)
        for row in rows:
            if row["tail"] == "sampled":
                axes.axhline(row["cosine"], color="#8a8a8a", linestyle="--", linewidth=1, label="sampled token")
        axes.set(xscale="log", xlabel="K", title=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(f"Gradient from K entries beside the full one: cosine, {result['tokens']} tokens", fontsize=10)
    figure.savefig(path, dpi=120)
    return True


def main(argv: list[str] | None = None, prog: str = "trl-opd bench topk") -> None:
    """Entry point."""
    description, _, details = (__doc__ or "").strip().partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=details, formatter_class=formatter)
    parser.add_argument("--student", help="path or hub id; with --teacher and --prompts")
    parser.add_argument("--teacher", help="path or hub id of the same tokenizer")
    parser.add_argument("--prompts", help="a text file with one prompt a line")
    parser.add_argument("--prompts-num", type=int, default=16, help="completions (default 16)")
    parser.add_argument("--completion", type=int, default=128, help="tokens of a completion (default 128)")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="sizes of the support")
    parser.add_argument("--vocab", type=int, default=16384, help="vocabulary of the pair that is trained here")
    parser.add_argument("--minutes", type=float, default=10.0, help="training of that pair (default 10)")
    parser.add_argument("--characters", type=int, default=8_000_000, help="of Python sources to train it on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="keep the figures")
    parser.add_argument("--png", metavar="FILE", help="draw them")
    args = parser.parse_args(argv)
    if bool(args.student) != bool(args.teacher) or bool(args.student) != bool(args.prompts):
        parser.error("--student, --teacher and --prompts go together")
    if args.threads:
        torch.set_num_threads(args.threads)
    teacher, student, prompts = load_pair(args) if args.student else make_pair(args)
    sequences = rollouts(student, prompts, args)
    rows = measure(teacher, student, sequences, args)
    tokens = sum(ids.shape[1] - prompt for ids, prompt in sequences)
    print(table(rows))
    result = {"machine": machine(torch.device(args.device)), "args": vars(args), "tokens": tokens, "rows": rows}
    write_json(args.json, result)
    if args.png:
        plot(result, args.png)


if __name__ == "__main__":
    main()
