"""Datasets by name: files of every kind, folders, splits, and mistakes."""

import gzip
import json
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, DatasetDict
from trl import DatasetMixtureConfig

from trl_opd.data import choose_splits, load_splits

ROWS = [{"prompt": f"p{i}", "answer": str(i)} for i in range(10)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def arguments(name=None, **fields):
    defaults = {"dataset_config": None, "dataset_streaming": False, "prompt_column": None}
    splits = {"dataset_train_split": "train", "dataset_test_split": "test"}
    return SimpleNamespace(**{"dataset_name": name, **defaults, **splits, **fields})


def load(name, mixture=None, **fields):
    return load_splits(arguments(name, **fields), mixture or DatasetMixtureConfig())


def lines(rows=ROWS):
    return "\n".join(map(json.dumps, rows))


def write_all(folder):
    (folder / "a.jsonl").write_text(lines())
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "a.csv").write_text("prompt,answer\n" + "\n".join(f"p{i},{i}" for i in range(10)))
    (folder / "a.tsv").write_text("prompt\tanswer\n" + "\n".join(f"p{i}\t{i}" for i in range(10)))
    Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write(lines())


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "b.jsonl.gz"])
def test_a_file_of_each_kind(folder, name):
    write_all(folder)
    for given in (name, f"./{name}", str(folder / name)):
        splits = load(given)
        assert list(splits) == ["train"]
        assert splits["train"]["prompt"][:] == [row["prompt"] for row in ROWS]


def test_several_files_by_list_pattern_and_commas(folder):
    (folder / "x1.jsonl").write_text(lines(ROWS[:6]))
    (folder / "x2.jsonl").write_text(lines(ROWS[6:]))
    for given in (["x1.jsonl", "x2.jsonl"], "x*.jsonl", "x1.jsonl,x2.jsonl"):
        assert load(given)["train"]["prompt"][:] == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("as_text", [False, True])
def test_files_by_split(folder, as_text):
    (folder / "x1.jsonl").write_text(lines(ROWS[:6]))
    (folder / "x2.jsonl").write_text(lines(ROWS[6:]))
    given = {"train": "x1.jsonl", "test": "x2.jsonl"}
    splits = load(json.dumps(given) if as_text else given)
    assert {name: len(part) for name, part in splits.items()} == {"train": 6, "test": 4}


def test_folders_of_files_and_of_save_to_disk(folder):
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text(lines(ROWS[:7]))
    (folder / "data" / "test.jsonl").write_text(lines(ROWS[7:]))
    assert {name: len(part) for name, part in load("data").items()} == {"train": 7, "test": 3}
    Dataset.from_list(ROWS).save_to_disk(folder / "one")
    assert len(load("one")["train"]) == 10
    DatasetDict({"a": Dataset.from_list(ROWS[:3]), "b": Dataset.from_list(ROWS)}).save_to_disk(folder / "several")
    assert {name: len(part) for name, part in load("several").items()} == {"a": 3, "b": 10}


def test_a_mixture_is_split_the_same_way_every_time(folder):
    (folder / "a.jsonl").write_text(lines())
    given = {"datasets": [{"path": "json", "data_files": "a.jsonl"}], "test_split_size": 0.3}
    one, two = (load(None, DatasetMixtureConfig(**given)) for _ in range(2))
    assert one["test"]["prompt"][:] == two["test"]["prompt"][:] and len(one["test"]) == 3
    assert set(one["test"]["prompt"]) | set(one["train"]["prompt"]) == {row["prompt"] for row in ROWS}
    other = load_splits(arguments(), DatasetMixtureConfig(**given), seed=7)
    assert other["test"]["prompt"][:] != one["test"]["prompt"][:]


def test_test_split_size_is_for_files_too(folder):
    (folder / "a.jsonl").write_text(lines())
    assert len(load("a.jsonl", DatasetMixtureConfig(test_split_size=4))["test"]) == 4


def test_a_streamed_file(folder):
    (folder / "a.jsonl").write_text(lines())
    splits = load("a.jsonl", dataset_streaming=True)
    assert next(iter(splits["train"]))["prompt"] == "p0"
    assert choose_splits(splits, arguments(), evaluate=False).evaluation is None
    with pytest.raises(ValueError, match="cannot be held out"):
        choose_splits(splits, arguments(), evaluate=True)


# Splits


def parts(**sizes):
    return DatasetDict({name: Dataset.from_list(ROWS[:size]) for name, size in sizes.items()})


def test_the_only_split_is_trained_on():
    chosen = choose_splits(parts(validation=5), arguments(), evaluate=False)
    assert chosen.train_name == "validation" and len(chosen.train) == 5 and "only split" in chosen.notes[0]


@pytest.mark.parametrize(
    ("name", "expected"), [("train[:3]", "012"), ("train[7:]", "789"), ("train[20%:50%]", "234"), ("train[-2:]", "89")]
)
def test_a_slice_of_a_split(name, expected):
    chosen = choose_splits(parts(train=10, test=2), arguments(dataset_train_split=name), evaluate=True)
    assert "".join(p[1:] for p in chosen.train["prompt"]) == expected
    assert len(chosen.evaluation) == 2


def test_which_split_is_evaluated_on():
    assert len(choose_splits(parts(train=10, test=2, validation=3), arguments(), evaluate=True).evaluation) == 2
    chosen = choose_splits(parts(train=10, validation=3), arguments(), evaluate=True)
    assert len(chosen.evaluation) == 3 and "validation" in chosen.notes[0]
    named = arguments(dataset_test_split="extra")
    assert len(choose_splits(parts(train=10, extra=4), named, evaluate=True).evaluation) == 4
    assert choose_splits(parts(train=10, test=2), arguments(), evaluate=False).evaluation is None


def test_rows_are_held_out_where_there_is_no_split_for_evaluation():
    rows = DatasetDict({"train": Dataset.from_list([{"prompt": str(i)} for i in range(100)])})
    chosen = choose_splits(rows, arguments(), evaluate=True)
    assert len(chosen.evaluation) == 5 and len(chosen.train) == 95
    assert not set(chosen.evaluation["prompt"]) & set(chosen.train["prompt"])
    again = choose_splits(rows, arguments(), evaluate=True)
    assert again.evaluation["prompt"][:] == chosen.evaluation["prompt"][:]


def test_prompts_in_another_column(folder):
    (folder / "a.jsonl").write_text(lines([{"question": "q", "prompt": "old"}] * 3))
    train = load("a.jsonl", prompt_column="question")["train"]
    assert train["prompt"][:] == ["q"] * 3 and train.column_names == ["prompt"]
    with pytest.raises(ValueError, match=r"prompt_column must be one of.*Did you mean 'question'"):
        load("a.jsonl", prompt_column="questin")


# Mistakes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "dataset_name or datasets must be given"),
        ("dta.jsonl", "got 'dta.jsonl', which does not exist.*Did you mean 'data.jsonl'"),
        ("./data.jsn", "does not exist.*Did you mean 'data.jsonl'"),
        ("nowhere/data.jsonl", "Its folder 'nowhere' does not exist"),
        (["data.jsonl", "more.jsonl"], "got 'more.jsonl', which does not"),
        ("*.parquet", "got '\\*.parquet', which does not"),
        ("notes.txt", "files of one type.*got 'notes.txt'"),
        (["data.jsonl", "data.csv"], "files of one type.*among 2"),
        ("broken.jsonl", "broken.jsonl must hold a JSON object in each line, got in line 2: 'prompt: oh'"),
        ("texts.jsonl", "must hold a JSON object in each line, got in line 1"),
        ("empty", "which holds nothing"),
        ('{"train": ', "must be a name or a JSON object"),
    ],
)
def test_what_cannot_be_loaded_is_named(folder, name, message):
    (folder / "data.jsonl").write_text(lines())
    (folder / "data.csv").write_text("prompt\nx")
    (folder / "notes.txt").write_text("x")
    (folder / "broken.jsonl").write_text('{"prompt": "a"}\nprompt: oh\n')
    (folder / "texts.jsonl").write_text('"only a text"\n')
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        load(name)


def test_a_dataset_of_the_hub_that_is_not_there(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/none' cannot be loaded|no such dataset") as error:
        load("nobody/none")
    assert "folder 'nobody'" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "evaluate", "message"),
    [
        ({"dataset_train_split": "trian"}, False, r"one of \['a', 'train'\].*got 'trian'. Did you mean 'train'"),
        ({"dataset_test_split": "dev"}, True, r"dataset_test_split must be one of \['a', 'train'\].*got 'dev'"),
        ({"dataset_train_split": "train[x]"}, False, "slice such as 'train"),
        ({"dataset_train_split": "train[5:5]"}, False, "must have rows"),
    ],
)
def test_splits_that_do_not_exist(fields, evaluate, message):
    with pytest.raises(ValueError, match=message):
        choose_splits(parts(a=2, train=10), arguments(**fields), evaluate=evaluate)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("id", "question"), "Set prompt_column: question"),
        (("Problem", "text"), "Set prompt_column: Problem"),
        (("messages",), "Set prompt_column: messages. It must end before the answer"),
        (("user_prompt", "x"), "Set prompt_column: user_prompt"),
        (("x", "y"), "Set prompt_column to the column"),
    ],
)
def test_a_missing_prompt_column_says_which_it_may_be(columns, message):
    rows = DatasetDict({"train": Dataset.from_dict({column: ["x"] for column in columns})})
    with pytest.raises(ValueError, match=message):
        choose_splits(rows, arguments(), evaluate=False)
