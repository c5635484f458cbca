"""Tokens of logged completions: their values, whose they are, the files they are in, and how they look."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from alone import ids_of, logprobs_alone
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from processes import run_two
from rich.console import Console
from steps import build, student
from tiny import make_model, make_prompts, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_opd.collators import TeacherScores
from trl_opd.token_files import VALUES, choose, make_table
from trl_opd.token_text import TokenTexts, legend, render_tokens
from trl_opd.token_view import TokenRow

TEACHER, OTHER = {"hidden_size": 24, "seed": 1}, {"hidden_size": 24, "seed": 5}
SAMPLED = {"credit": "policy_gradient", "support": "sampled"}
OURS = ["token_ids", "tokens", *VALUES, "token_mask"]
# Its weights do not move, so that every step can be checked against the same models
STILL = {"learning_rate": 0.0, "optim": "sgd", "max_steps": 2}


def teacher(**kwargs):
    return make_model(**{**TEACHER, **kwargs}).double()


def count_letters(prompts, completions, **kwargs):
    return [float(sum(map(str.isalpha, c)) + 10 * len(p)) for p, c in zip(prompts, completions, strict=True)]


def run(tmp_path, **kwargs):
    """Train, and return the trainer and its files by step."""
    fields = {
        **STILL,
        "gradient_accumulation_steps": 2,
        "num_generations": 2,
        "per_device_eval_batch_size": 4,
        **kwargs,
    }
    trainer = build(tmp_path, **fields)
    trainer.train()
    return trainer, files(tmp_path)


def files(path):
    files = [*Path(path, "_opd/completions").glob("*"), *Path(path, "completions").glob("*")]
    return {int(f.stem.split("_")[1]): pd.read_parquet(f) for f in sorted(files)}


def seen(frame):
    return frame[frame["token_ids"].notna()]


def assert_true(frame, model, teachers=None, temperature=1.0, sampled=False):
    """The columns of each row are those of float64 log-probs of its prompt and completion, scored alone."""
    tokenizer, theirs = make_tokenizer(), teachers or (lambda prompt: teacher())
    for row in frame.itertuples():
        ids = row.token_ids.tolist()
        assert tokenizer.decode(ids, skip_special_tokens=True) == row.completion
        assert "".join(row.tokens) == tokenizer.decode(ids)
        with torch.no_grad():
            full = [
                (logprobs_alone(m, ids_of(row.prompt), ids) / temperature).log_softmax(-1)
                for m in (model, theirs(row.prompt))
            ]
        ours, other = (x.gather(-1, torch.tensor(ids)[:, None])[:, 0] for x in full)
        kl = (full[0].exp() * (full[0] - full[1])).sum(-1)
        assert row.token_mask.all() and len(row.token_mask) == len(ids)
        close = {"rtol": 2e-5, "atol": 2e-6}
        np.testing.assert_allclose(row.token_student_logprob, ours, **close)
        np.testing.assert_allclose(row.token_teacher_logprob, other, **close)
        np.testing.assert_allclose(row.token_gap, other - ours, **close)
        if sampled:
            assert row.token_reverse_kl is None and row.token_teacher_rank is None
        else:
            np.testing.assert_allclose(row.token_reverse_kl, kl, **close)
            assert row.token_teacher_rank.tolist() == (1 + (full[1] > other[:, None]).sum(-1)).tolist()


# Values, and whose they are


@pytest.mark.parametrize("objective", [{}, SAMPLED], ids=["distributions", "sampled tokens"])
def test_all_completions_of_the_log_have_the_values_of_their_own_tokens(tmp_path, objective):
    """Shuffled, two generations a prompt, two micro-batches a step, and an evaluation that shares the log."""
    arguments = {"reward_funcs": count_letters, "eval_dataset": make_prompts(4)}
    _, tables = run(
        tmp_path,
        teacher=teacher(),
        arguments=arguments,
        log_completions=True,
        eval_strategy="steps",
        eval_steps=1,
        temperature=0.9,
        num_generations_eval=1,
        **objective,
    )
    assert sorted(tables) == [1, 2]
    for frame in tables.values():
        assert len(frame) == 8 and frame["token_ids"].notna().all()
        assert_true(frame, student(), temperature=0.9, sampled="support" in objective)
        prompts, completions = frame["prompt"].tolist(), frame["completion"].tolist()
        assert frame["count_letters"].tolist() == count_letters(prompts, completions)
        assert frame["token_weight"].isna().all()
    # The file was last written after the evaluation of its step: the last four completions are that one's
    assert tables[1]["advantage"].tail(4).eq(0).all() and tables[1]["advantage"].head(4).ne(0).any()
    assert list(tables[1]) == ["step", "prompt", "completion", "count_letters", "advantage", *OURS]


def test_their_mean_is_what_the_run_logs(tmp_path):
    trainer, tables = run(tmp_path, teacher=teacher(), log_completions=True)
    for line in trainer.state.log_history[:2]:
        frame = tables[line["step"]]
        for column, metric in (("token_gap", "teacher_student_gap"), ("token_reverse_kl", "reverse_kl")):
            mean = np.concatenate(frame[column].tolist()).mean()
            assert mean == pytest.approx(line[f"distill/{metric}"], rel=1e-5)


def test_a_file_of_our_own_has_as_many_as_asked_for_spread_over_the_gap(tmp_path):
    both = {"teacher": teacher(), "arguments": {"reward_funcs": count_letters}}
    _, tables = run(tmp_path / "ours", token_view=3, **both)
    _, everything = run(tmp_path / "all", log_completions=True, **both)
    assert sorted(tables) == [1, 2]
    for step, frame in tables.items():
        assert list(frame) == ["step", "prompt", "completion", "count_letters", "advantage", *OURS]
        assert frame["step"].eq(step).all()
        assert_true(frame, student())
        means = sorted(map(np.mean, everything[step]["token_gap"]))
        ours = [gap.mean() for gap in frame["token_gap"]]
        assert len(ours) == 3 and ours[0] == means[0] and ours[-1] == means[-1]
        assert means[0] < ours[1] < means[-1]
        prompts, completions = frame["prompt"].tolist(), frame["completion"].tolist()
        assert frame["count_letters"].tolist() == count_letters(prompts, completions)
        known = {tuple(ids): a for ids, a in everything[step][["token_ids", "advantage"]].itertuples(index=False)}
        assert frame["advantage"].tolist() == [known[tuple(ids)] for ids in frame["token_ids"]]


@pytest.mark.slow
def test_of_a_batch_of_several_steps_only_the_step_s_own_completions_are_seen(tmp_path):
    _, tables = run(tmp_path, teacher=teacher(), log_completions=True, steps_per_generation=4, max_steps=3)
    for step, frame in tables.items():
        assert len(frame) == 16 and len(seen(frame)) == 8, step
        assert_true(seen(frame), student())
    first, second = (set(seen(tables[step]).index) for step in (1, 2))
    assert first | second == set(range(16)), "two steps see the whole batch between them"
    assert tables[1]["completion"].tolist() == tables[2]["completion"].tolist()


@pytest.mark.slow
def test_an_evaluation_between_the_steps_of_a_batch_changes_nothing(tmp_path):
    """Four steps are made of one batch of 16; before the last one, an evaluation takes four places of the log."""
    _, tables = run(
        tmp_path,
        teacher=teacher(),
        log_completions=True,
        gradient_accumulation_steps=1,
        steps_per_generation=4,
        max_steps=5,
        eval_strategy="steps",
        eval_steps=3,
        num_generations_eval=1,
        arguments={"eval_dataset": make_prompts(4)},
    )
    frame = tables[4]
    assert len(frame) == 16 and frame["token_ids"].tail(4).isna().all() and 1 <= len(seen(frame)) <= 4
    assert_true(seen(frame), student())
    assert tables[3]["token_ids"].tail(4).notna().all(), "the evaluation's own"


@pytest.mark.slow
def test_a_batch_that_the_log_has_forgotten_is_still_in_our_own_file(tmp_path):
    """Two generation batches in one optimizer step: GRPOTrainer's log holds the second alone."""
    trainer, tables = run(tmp_path, teacher=teacher(), steps_per_generation=1, token_view=20, max_steps=1)
    assert len(tables[1]) == 8 and len(trainer._logs["prompt"]) == 4
    assert_true(tables[1], student())


@pytest.mark.slow
def test_of_an_evaluation_that_is_longer_than_the_log_its_end_is_seen(tmp_path):
    """The log has 8 places, a batch of the evaluation 6 completions, and the evaluation 12 of different prompts."""
    prompts = Dataset.from_dict({"prompt": ["abc"[: 1 + i % 3] + str(i) for i in range(12)]})
    for size in (6, 12):
        _, tables = run(
            tmp_path / str(size),
            teacher=teacher(),
            log_completions=True,
            max_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=size,
            num_generations_eval=1,
            arguments={"eval_dataset": prompts},
        )
        assert set(tables[1]["prompt"]) < set(prompts["prompt"]) and len(seen(tables[1])) == 8
        assert_true(tables[1], student())


def test_only_logged_steps_are_seen(tmp_path):
    noted = []
    trainer = build(tmp_path, teacher=teacher(), **STILL | {"max_steps": 5}, logging_steps=2, log_completions=True)
    fetched = trainer._token_view.before_log

    def before_log():
        noted.append((trainer.state.global_step, sum(len(s.rows) for s in trainer._token_view._seen)))
        fetched()

    trainer._token_view.before_log = before_log
    trainer.train()
    assert noted == [(2, 4), (4, 4), (5, 4)]
    tables = files(tmp_path)
    assert sorted(tables) == [2, 4, 5]
    for frame in tables.values():
        assert_true(seen(frame), student())
        assert len(seen(frame)) == 4


def test_each_of_several_teachers_speaks_for_its_own(tmp_path):
    prompts = ["abc", "hello world", "x", "the quick brown fox"] * 4
    members = {"one": teacher(), "two": teacher(**OTHER)}
    dataset = Dataset.from_dict({"prompt": prompts, "teacher": ["one" if len(p) < 4 else "two" for p in prompts]})
    _, tables = run(tmp_path, teacher=members, log_completions=True, max_steps=1, arguments={"train_dataset": dataset})
    assert (tables[1]["prompt"].str.len() < 4).nunique() == 2
    assert_true(tables[1], student(), lambda prompt: members["one" if len(prompt) < 4 else "two"])


@pytest.mark.slow
def test_what_a_top_k_teacher_does_not_tell_is_left_out(tmp_path):
    def top_three(batch):
        ids = torch.tensor([6, 7, 8]).expand(*batch.completion_ids.shape, 3)
        return TeacherScores(topk_ids=ids, topk_logprobs=torch.full(ids.shape, -1.5, dtype=torch.float64))

    _, tables = run(tmp_path, teacher=top_three, log_completions=True, support="teacher_top_k", support_size=3)
    frame = tables[1]
    for name in ("token_gap", "token_teacher_logprob"):
        assert frame[name].isna().all()
    for row in frame.itertuples():
        full = logprobs_alone(student(), ids_of(row.prompt), row.token_ids.tolist()).detach().exp()
        ours = torch.cat([full[:, 6:9], 1 - full[:, 6:9].sum(-1, keepdim=True)], -1)
        p = math.exp(-1.5)
        kl = (ours * (ours / torch.tensor([p, p, p, 1 - 3 * p])).log()).sum(-1)
        np.testing.assert_allclose(row.token_reverse_kl, kl, rtol=1e-5)


def test_tokens_that_are_not_distilled_have_no_values(tmp_path):
    _, tables = run(
        tmp_path,
        teacher=teacher(),
        log_completions=True,
        special_token_masking=["a", "b", "c", "d", "e"],
        token_weighting={"prefix": {"length": 2}},
    )
    letters = set(ids_of("abcde"))
    frame = pd.concat(tables.values())
    for row in frame.itertuples():
        kept = np.array([i not in letters for i in row.token_ids])
        assert row.token_mask.tolist() == kept.tolist()
        for name in VALUES:
            assert np.isnan(getattr(row, name)).tolist() == (~kept).tolist(), name
        # `prefix` keeps the first tokens of a completion
        assert row.token_weight[kept].tolist() == (np.arange(len(kept)) < 2)[kept].astype(float).tolist()
    assert not np.concatenate(frame["token_mask"].tolist()).all()


def test_a_tool_s_tokens_are_there_without_values(tmp_path):
    def rollouts(prompts, trainer):
        ids = [ids_of(prompt + " used") for prompt in prompts]
        masks = [[int(j % 3 != 1) for j in range(len(row))] for row in ids]
        return {"prompt_ids": [ids_of(p) for p in prompts], "completion_ids": ids, "logprobs": None, "env_mask": masks}

    _, tables = run(
        tmp_path, teacher=teacher(), arguments={"rollout_func": rollouts}, token_view=8, max_completion_length=32
    )
    assert len(tables[1]) == 8
    for row in tables[1].itertuples():
        assert row.token_ids.tolist() == ids_of(row.prompt + " used")
        own = np.arange(len(row.token_ids)) % 3 != 1
        assert row.token_mask.tolist() == own.tolist() and np.isnan(row.token_gap).tolist() == (~own).tolist()


@pytest.mark.slow
def test_ranks_that_a_teacher_gives_are_kept(tmp_path):
    def ranked(batch):
        ranks = torch.arange(batch.completion_ids.shape[1]).expand(batch.completion_ids.shape).float()
        return TeacherScores(sampled_logprobs=torch.full(ranks.shape, -2.0), sampled_ranks=ranks)

    _, tables = run(tmp_path, teacher=ranked, log_completions=True, max_steps=1, **SAMPLED)
    several = [row for row in tables[1].itertuples() if len(row.token_ids) > 1]
    assert several
    for row in several:
        ranks = row.token_teacher_rank
        assert np.isnan(ranks[0]) and ranks[1:].tolist() == list(range(1, len(ranks))), "0 is not known"


@pytest.mark.slow
def test_truncated_completions_that_grpo_masks_keep_their_tokens(tmp_path):
    model = make_model().double()
    model.generation_config.eos_token_id = [1]
    _, tables = run(
        tmp_path, teacher=teacher(), model=model, mask_truncated_completions=True, log_completions=True, max_steps=1
    )
    cut = [row for row in tables[1].itertuples() if not row.token_mask.any()]
    assert cut
    for row in cut:
        assert len(row.token_ids) == 8 and np.isnan(row.token_gap).all()


@pytest.mark.slow
def test_the_liger_backend_tells_the_tokens_alone(tmp_path):
    pytest.importorskip("liger_kernel")
    if not torch.cuda.is_available():
        _, tables = _with_output_of_a_scalar(tmp_path)
    else:
        _, tables = run(tmp_path, teacher=teacher(), log_completions=True, loss_backend="liger")
    assert tables[1]["token_gap"].isna().all() and tables[1]["token_ids"].notna().all()


def _with_output_of_a_scalar(tmp_path):
    """As Liger's: the fused divergence tells nothing about single tokens."""
    trainer = build(tmp_path, teacher=teacher(), log_completions=True, **STILL)
    note = trainer._token_view.note_tokens

    def note_tokens(batch, logps, entropies):
        output = type(batch.output)(loss=batch.output.loss, log_probs=torch.zeros_like(logps))
        note(SimpleNamespace(**{**vars(batch), "output": output}), logps, entropies)

    trainer._token_view.note_tokens = note_tokens
    trainer.train()
    return trainer, files(tmp_path)


# Files


@pytest.mark.parametrize("log_completions", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_none_are_kept_if_none_are_asked_for(tmp_path, log_completions):
    _, tables = run(tmp_path, teacher=teacher(), token_view=0, log_completions=log_completions)
    assert sorted(tables) == ([1, 2] if log_completions else [])
    assert not any(set(OURS) & set(frame) for frame in tables.values())


@pytest.mark.slow
def test_trl_s_own_columns_stay_as_they_were(tmp_path):
    runs = [
        run(
            tmp_path / str(view),
            teacher=teacher(),
            token_view=view,
            log_completions=True,
            arguments={"reward_funcs": count_letters},
        )
        for view in (0, 1)
    ]
    for step in (1, 2):
        theirs, ours = (tables[step] for _, tables in runs)
        pd.testing.assert_frame_equal(ours[list(theirs)], theirs)
        schemas = [pq.read_schema(next((tmp_path / v / "completions").glob(f"*{step}.parquet"))) for v in "01"]
        assert [schemas[1].field(name).type for name in theirs] == [schemas[0].field(name).type for name in theirs]
    assert not list(tmp_path.glob("*/completions/.*")), "no half of a file is left"


def test_nothing_of_the_data_is_uploaded_with_the_model(tmp_path, monkeypatch):
    """What `push_to_hub` hands over: the folder, and which names stay behind."""
    trainer, tables = run(tmp_path, teacher=teacher())
    assert tables and (tmp_path / "_opd/run.json").exists()
    trainer.save_model(str(tmp_path))
    asked = {}
    monkeypatch.setattr(
        transformers.trainer, "hf_api", lambda: SimpleNamespace(upload_folder=lambda **k: asked.update(k))
    )
    for name in ("init_hf_repo", "_finish_current_push", "create_model_card"):
        monkeypatch.setattr(trainer, name, lambda *args, **kwargs: None)
    trainer.hub_model_id = "someone/something"
    trainer.push_to_hub()
    files = [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()]
    sent = set(filter_repo_objects(files, ignore_patterns=asked["ignore_patterns"]))
    assert "model.safetensors" in sent and not [name for name in sent if "opd" in name or "completions" in name]


def test_a_view_that_cannot_be_written_warns_once_and_the_run_goes_on(tmp_path):
    (tmp_path / "_opd").mkdir()
    (tmp_path / "_opd/completions").write_text("not a folder")
    with pytest.warns(UserWarning, match="The token view failed with .*The run goes on without it") as caught:
        trainer = build(tmp_path, teacher=teacher(), **STILL)
        trainer.train()
    assert trainer.state.global_step == 2
    assert sum("token view" in str(w.message) for w in caught) == 1


def test_images_leave_the_prompt_as_they_do_in_trl_s_log():
    image = Image.new("RGB", (2, 2))
    prompt = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]
    logged = {"prompt": prompt, "completion": [{"role": "assistant", "content": "a cat"}], "advantage": 0.5}
    table = make_table(7, [_row(0, [0.1, -0.2], logged=logged)], lambda ids: ["a"] * len(ids))
    content = table.to_pylist()[0]["prompt"][0]["content"]
    assert [part["type"] for part in content] == ["image", "text"] and "image" not in content[0]
    assert content[1]["text"] == "what?" and table.to_pylist()[0]["step"] == 7


def _row(place, gaps, logged=None):
    gaps = None if gaps is None else np.array(gaps, dtype=np.float32)
    values = dict.fromkeys(VALUES, None) | {"token_gap": gaps}
    size = 2 if gaps is None else len(gaps)
    return TokenRow(place, logged or {}, list(range(size)), np.ones(size, dtype=bool), values)


@pytest.mark.parametrize(
    ("number", "expected"), [(1, [-3.0]), (2, [-3.0, 4.0]), (3, [-3.0, 0.0, 4.0]), (9, [-3.0, -1.0, 0.0, 2.0, 4.0])]
)
def test_rows_to_show_are_spread_from_the_worst_to_the_best(number, expected):
    rows = [_row(i, [gap]) for i, gap in enumerate([2.0, -1.0, 4.0, -3.0, 0.0])] + [_row(5, None)]
    shown = choose(rows, number)
    assert [row.mean_gap for row in shown if row.place < 5] == expected
    assert [row.place for row in shown[5:]] == ([5] if number == 9 else [])


# Text


def byte_level_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"]
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "the dog"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def metaspace_tokenizer():
    """As Llama's: the decoder takes the space at the beginning away."""
    words = ["▁the", "▁cat", "a", "▁", "s", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["the cat sat", "日本語 und 😀 the dog", "é", "a\n\n  b\t", ""])
def test_texts_of_tokens_join_to_the_text(text):
    tokenizer = byte_level_tokenizer()
    ids = tokenizer(text)["input_ids"]
    texts = TokenTexts(tokenizer)(ids)
    assert "".join(texts) == tokenizer.decode(ids) == text and len(texts) == len(ids)
    assert not any("\ufffd" in t for t in texts)


def test_a_space_before_a_word_stays_with_it():
    tokenizer = metaspace_tokenizer()
    assert TokenTexts(tokenizer)([0, 1, 4, 0]) == ["the", " cat", "s", " the"]
    ids = [1, *(5 + b for b in "😀".encode()), 4]
    assert TokenTexts(tokenizer)(ids) == ["cat", "😀", "", "", "", "s"]


def test_half_a_character_is_shown_as_such():
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("日")["input_ids"]
    assert len(ids) == 3
    texts = TokenTexts(tokenizer)([*tokenizer("the")["input_ids"], *ids[:2]])
    assert "the" in "".join(texts) and "\ufffd" in "".join(texts)


def styles(text):
    return {text.plain[span.start : span.end]: str(span.style) for span in text.spans}


def test_colours_tell_less_from_more_likely_and_far_from_near():
    gaps = [-0.5, -1.0, -3.0, -5.0, 0.5, 1.0, 3.0, 5.0, math.nan, None]
    tokens = [f"t{i}" for i in range(len(gaps))]
    shown = styles(render_tokens(tokens, gaps))
    assert sorted(shown) == ["t1", "t2", "t3", "t5", "t6", "t7"]
    for i, (orange, blue) in enumerate([("t1", "t5"), ("t2", "t6"), ("t3", "t7")]):
        less, more = (re.search(r"on #(..)..(..)", shown[t]).groups() for t in (orange, blue))
        assert int(less[0], 16) > int(less[1], 16) and int(more[1], 16) > int(more[0], 16), "less likely is orange"
        assert ("underline" in shown[orange]) == ("underline" in shown[blue]) == (i == 2)
    assert styles(render_tokens(["a", "b"], [-9.0, -9.0], [True, False]))["b"] == "dim"


def test_it_is_readable_without_colour():
    tokens, gaps = ["so", " it", " is", "\n", " ", "x"], [-5.0, 3.0, -1.0, -9.0, 9.0, 0.0]
    assert render_tokens(tokens, gaps, marks=True).plain == "[-so-]{+ it+} is[-⏎-]\n{+␣+}x"
    assert render_tokens(tokens, gaps).plain == "so it is⏎\n␣x"
    assert "[-100×-]" in legend(marks=True).plain and "{+100×+}" in legend(marks=True).plain
    console = Console(no_color=True, force_terminal=True, width=80)
    with console.capture() as capture:
        console.print(render_tokens(["a", "b"], [-9.0, 0.0]))
    assert "\x1b[1;4m" in capture.get(), "strong ones are underlined where a terminal has no colours"


def test_a_completion_cannot_speak_to_the_terminal():
    text = render_tokens(["\x1b[2J", "\x07", "\x9b31m", "[red]x[/red]", "ok\r"], [0.0, -9.0, 0.0, -9.0, 0.0])
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text.plain) and "[red]x[/red]" in text.plain


def test_with_the_completions_log_they_are_printed_and_else_nothing_is(tmp_path, capsys):
    run(tmp_path / "printed", teacher=teacher(), log_completions=True, num_completions_to_print=2, max_steps=1)
    printed = capsys.readouterr().out
    assert printed.count("(mean gap") == 2 and "finds a token less likely" in printed
    assert "[-" in printed or "{+" in printed, "the output is no terminal, so there are marks"
    assert printed.index("Step 1") < printed.index("(mean gap"), "below the table of GRPOTrainer"
    run(tmp_path / "quiet", teacher=teacher(), max_steps=1)
    assert "mean gap" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.distributed
def test_completions_of_another_process_stay_without_tokens(tmp_path):
    run_two(str(Path(__file__).with_name("token_view_two_processes.py")), tmp_path)
    for frame in files(tmp_path).values():
        assert len(frame) == 8
        assert frame["token_ids"].notna().tolist() == [True] * 4 + [False] * 4
        assert_true(seen(frame), student())
