"""`trl-opd score`: datasets in, a teacher's exact log-probs out."""

import json

import datasets
import numpy as np
import pytest
import torch
from caches import TEACHER, contents, full_logprobs, make_rows, save_rows, save_teacher, score_arguments
from datasets import Dataset, DatasetDict
from stub_server import StubServer
from tiny import CHARACTERS, make_model, make_tokenizer

from trl_opd.cli import main
from trl_opd.score import ScoreArguments, score_dataset
from trl_opd.score.arguments import ScoringRun
from trl_opd.score.data import Renderer
from trl_opd.teachers.cache import CacheReader, Question


@pytest.fixture(autouse=True)
def no_shared_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def arguments_of(fields):
    return [x for name, value in fields.items() for x in (f"--{name.replace('_', '-')}", str(value))]


def run(tmp_path, **fields):
    """Run the command; the stored rows by the ids of prompt and completion."""
    assert main(["score", *arguments_of(score_arguments(tmp_path, **fields))]) == 0
    return stored(tmp_path)


def stored(tmp_path):
    reader = CacheReader(tmp_path / "scores")
    rows = [reader[key] for keys in reader.prompts.values() for key in keys]
    return {(tuple(row.prompt_ids.tolist()), tuple(row.completion_ids.tolist())): row for row in rows}


def ids_of(*texts):
    return tuple(tuple(make_tokenizer()(text=text)["input_ids"]) for text in texts)


def check_row(row, temperature=1.0, k=5, model=None, tolerance=5e-6):
    """A row against float64 logits of its sample alone."""
    theirs = None if row.teacher_prompt_ids is None else row.teacher_prompt_ids.tolist()
    question = Question(row.prompt_ids.tolist(), row.completion_ids.tolist(), theirs)
    logprobs = full_logprobs(make_model(**TEACHER) if model is None else model, question, temperature)
    top = torch.from_numpy(logprobs).topk(k, -1)
    assert np.array_equal(row.answer.topk_ids, top.indices)
    np.testing.assert_allclose(row.answer.topk_logprobs, top.values, atol=tolerance, rtol=0)
    sampled = logprobs[range(len(question.completion_ids)), question.completion_ids]
    np.testing.assert_allclose(row.answer.sampled_logprobs, sampled, atol=tolerance, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_scores_are_those_of_each_sample_alone(tmp_path, capsys, batch_size, temperature):
    rows = run(tmp_path, batch_size=batch_size, temperature=temperature)
    assert set(rows) == {ids_of(row["prompt"], row["completion"] + "<eos>") for row in make_rows()}
    for row in rows.values():
        check_row(row, temperature)
    out = capsys.readouterr().out
    assert "12 samples (12 scored now, 0 too long), 47 tokens" in out
    assert "MiB per million tokens" in out
    assert "tokens/s" in out


def test_sampled_log_probs_alone(tmp_path):
    for row in run(tmp_path, support="sampled", temperature=0.7).values():
        assert row.answer.topk_ids is None
        logprobs = full_logprobs(
            make_model(**TEACHER), Question(row.prompt_ids.tolist(), row.completion_ids.tolist()), 0.7
        )
        expected = logprobs[range(len(row.completion_ids)), row.completion_ids]
        np.testing.assert_allclose(row.answer.sampled_logprobs, expected, atol=5e-6)


def test_heads_with_a_bias_a_scale_or_a_softcap(tmp_path):
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    common = {
        "vocab_size": 51,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    for kind, config in (
        (CohereForCausalLM, CohereConfig(**common, logit_scale=0.3)),
        (Gemma2ForCausalLM, Gemma2Config(**common, final_logit_softcapping=2.0, attn_implementation="eager")),
    ):
        torch.manual_seed(0)
        folder = tmp_path / kind.__name__
        folder.mkdir()
        model = kind(config).eval()
        model.save_pretrained(folder / "teacher")
        make_tokenizer().save_pretrained(folder / "teacher")
        rows = run(folder, rows=make_rows(5))
        assert len(rows) == 5
        for row in rows.values():
            check_row(row, model=model, tolerance=2e-5)


def as_messages(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


FORMATS = {
    "jsonl": lambda rows, path: save_rows(path.with_suffix(".jsonl"), rows),
    "parquet": lambda rows, path: Dataset.from_list(rows).to_parquet(path.with_suffix(".parquet")),
    "saved": lambda rows, path: Dataset.from_list(rows).save_to_disk(path),
    "saved splits": lambda rows, path: DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(path),
}


@pytest.mark.parametrize("save", FORMATS.items(), ids=FORMATS.keys())
def test_every_kind_of_dataset_gives_the_same_scores(tmp_path, save):
    name, write = save
    write(make_rows(), tmp_path / "data")
    path = tmp_path / {"jsonl": "data.jsonl", "parquet": "data.parquet"}.get(name, "data")
    run(tmp_path)
    run(tmp_path, dataset=path, output=tmp_path / "other")
    assert contents(tmp_path / "other") == contents(tmp_path / "scores")


def test_messages_end_where_a_student_stops(tmp_path):
    """The template puts a newline after each message, which no student writes after its last token."""
    folder = tmp_path / "teacher"
    save_teacher(folder)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>{%", "<|im_end|>\n{%")
    tokenizer.save_pretrained(folder)
    rows = run(tmp_path, rows=[as_messages(row) for row in make_rows()])
    expected = {
        ids_of(
            f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n", row["completion"] + "<|im_end|>"
        )
        for row in make_rows()
    }
    assert set(rows) == expected
    for row in rows.values():
        check_row(row)


def test_ids_are_taken_as_they_are(tmp_path):
    pairs = [ids_of(row["prompt"], row["completion"]) for row in make_rows()]
    rows = [{"prompt_ids": list(p), "completion_ids": list(c), "teacher_prompt_ids": [4, *p]} for p, c in pairs]
    found = run(tmp_path, rows=rows)
    assert set(found) == set(pairs)
    for (prompt, _), row in found.items():
        assert row.teacher_prompt_ids.tolist() == [4, *prompt]
        check_row(row)


@pytest.mark.parametrize("conversational", [False, True])
def test_the_teachers_own_prompt(tmp_path, conversational):
    rows = [{**row, "teacher_prompt": f"hint {row['prompt']}" if i % 2 else None} for i, row in enumerate(make_rows())]
    if conversational:
        rows = [
            {
                **as_messages(row),
                "teacher_prompt": row["teacher_prompt"] and [{"role": "user", "content": row["teacher_prompt"]}],
            }
            for row in rows
        ]
    found = run(tmp_path, rows=rows)
    hinted = [row for row in found.values() if row.teacher_prompt_ids is not None]
    assert len(hinted) == 6
    assert all("hint" in "".join(make_tokenizer().decode(row.teacher_prompt_ids).split()) for row in hinted)
    for row in found.values():
        check_row(row)


def test_a_teacher_reads_conversations_in_its_own_template(tmp_path):
    save_teacher(tmp_path / "teacher")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "student")
    rows = [as_messages(row) for row in make_rows(4)]
    own = run(tmp_path, rows=rows, tokenizer=tmp_path / "student")
    for row, (prompt, _) in zip(make_rows(4), own, strict=True):
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|><|im_start|>assistant\n"
        assert (prompt,) == ids_of(text)
        theirs = own[prompt, _].teacher_prompt_ids.tolist()
        assert (tuple(theirs),) == ids_of(f"user: {row['prompt']}\nassistant: ")
        check_row(own[prompt, _])
    output = tmp_path / "students"
    fields = {"rows": rows, "tokenizer": tmp_path / "student", "output": output, "teacher_chat_template": "student"}
    run(tmp_path, **fields)
    reader = CacheReader(output)
    assert all(reader[key].teacher_prompt_ids is None for keys in reader.prompts.values() for key in keys)


@pytest.mark.parametrize(("fields", "message"), [({}, "at most 10 tokens, got"), ({"overflow": "skip"}, None)])
def test_long_samples_are_an_error_or_left_out_and_counted(tmp_path, capsys, fields, message):
    fields = {"max_length": 10, **fields}
    lengths = [sum(map(len, ids_of(row["prompt"], row["completion"] + "<eos>"))) for row in make_rows()]
    assert 0 < sum(length > 10 for length in lengths) < 12
    if message:
        with pytest.raises(ValueError, match=message):
            run(tmp_path, **fields)
        return
    rows = run(tmp_path, **fields)
    assert len(rows) == sum(length <= 10 for length in lengths)
    assert f"{sum(length > 10 for length in lengths)} too long" in capsys.readouterr().out
    before = contents(tmp_path / "scores")
    run(tmp_path, **fields)
    assert contents(tmp_path / "scores") == before


def test_the_longest_sample_is_what_the_teacher_takes(tmp_path):
    save_teacher(tmp_path / "teacher", max_position_embeddings=12)
    with pytest.raises(ValueError, match="at most 12 tokens, got"):
        run(tmp_path)


class Joining:
    """A tokenizer that joins 'x y' to one token, as real ones join words and spaces."""

    eos_token, eos_token_id, chat_template, name_or_path = "", None, None, "joining"

    def __call__(self, text):
        return {"input_ids": [[1 if w == "xy" else 2 for w in t.split()] for t in text]}

    def decode(self, ids, **kwargs):
        return str(list(ids))


def test_a_completion_that_changes_the_prompts_tokens_is_an_error(tmp_path):
    arguments = ScoreArguments(**score_arguments(tmp_path))
    scoring = ScoringRun(arguments)
    renderer = Renderer(scoring)
    scoring.tokenizer = Joining()
    assert renderer.question({"prompt": "x", "completion": " y"}, 3).completion_ids == [2]
    with pytest.raises(ValueError, match="Prompt and completion of row 3 must begin with the prompt's tokens"):
        renderer.question({"prompt": "x", "completion": "y"}, 3)


MISTAKES = {
    "no teacher": ({"teacher": ""}, "teacher must be given"),
    "no such file": ({"dataset": "nowhere.jsonl"}, "dataset must be a file that exists"),
    "no such teacher": ({"teacher": "/nowhere/at/all"}, "teacher must be a model's folder or a hub id"),
    "made of a student": ({"teacher": "base"}, "It is made of a student"),
    "support": ({"support": "student_top_k"}, "support must be one of"),
    "compression": ({"compression": "gzip"}, "compression must be one of"),
    "size": ({"support_size": 0}, "support_size must be a whole number of at least 1"),
    "columns": ({"rows": [{"question": "a", "answer": "b"}]}, r"must have the columns prompt and completion .* got"),
    "empty": ({"rows": [{"prompt_ids": [3], "completion_ids": []}]}, "Row 0 of the dataset must have a completion"),
    "mixed": (
        {"rows": [{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}]},
        "must both be text or both messages",
    ),
}


@pytest.mark.parametrize(("fields", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **fields)


def test_the_fields_may_come_from_a_yaml_file(tmp_path):
    fields = score_arguments(tmp_path)
    (tmp_path / "score.yaml").write_text(json.dumps(fields))
    assert main(["score", "--config", str(tmp_path / "score.yaml"), "--support-size", "3"]) == 0
    assert CacheReader(tmp_path / "scores").meta.support_size == 3


def test_help_lists_the_fields(capsys):
    assert main(["score", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("--teacher", "--dataset", "--output", "support_size", "compression", "overflow"):
        assert name in out


def test_a_server_is_asked_as_a_folder_is(tmp_path):
    save_teacher(tmp_path / "teacher")
    local = run(tmp_path)
    server = StubServer(make_model(**TEACHER), make_tokenizer())
    try:
        fields = {"teacher": server.url, "tokenizer": tmp_path / "teacher", "output": tmp_path / "served"}
        assert main(["score", *arguments_of(score_arguments(tmp_path, **fields))]) == 0
    finally:
        server.close()
    reader = CacheReader(tmp_path / "served")
    assert len(reader) == 12
    for keys in reader.prompts.values():
        for key in keys:
            row = reader[key]
            expected = local[tuple(row.prompt_ids.tolist()), tuple(row.completion_ids.tolist())].answer
            assert np.array_equal(row.answer.topk_ids, expected.topk_ids)
            np.testing.assert_allclose(row.answer.topk_logprobs, expected.topk_logprobs, atol=1e-3)
            np.testing.assert_allclose(row.answer.sampled_logprobs, expected.sampled_logprobs, atol=1e-3)


def test_another_tokenizer_than_the_teachers_is_refused(tmp_path):
    make_tokenizer(CHARACTERS[::-1]).save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="must share the student's tokenizer"):
        run(tmp_path, tokenizer=tmp_path / "student")


def test_float16_and_zstd_reach_the_files(tmp_path):
    run(tmp_path, logprob_dtype="float16", compression="zstd")
    meta = CacheReader(tmp_path / "scores").meta
    assert (meta.logprob_dtype, meta.compression) == ("float16", "zstd")


def test_a_run_without_progress_prints_none(tmp_path, capsys):
    score_dataset(ScoreArguments(**score_arguments(tmp_path)), progress=False)
    assert "samples/s" not in capsys.readouterr().err
