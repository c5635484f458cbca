"""`trl-opd bench teacher`: every way is measured or said to be left out, and the figures are what they say."""

import json

import pytest
import torch

from trl_opd.bench import teacher
from trl_opd.cli import main as cli
from trl_opd.teachers.memory import weight_bytes

TINY = ["--hidden", "64", "--layers", "1", "--vocab", "200", "--micro-batch", "2", "--generation", "4"]
TINY += ["--prompt", "3", "--completion", "8", "--repeats", "1"]


def parse(*options):
    args = teacher.make_parser("bench").parse_args([*TINY, *options])
    args.argv = []
    return args


@pytest.fixture
def two_ways(monkeypatch):
    """Of all ways one that changes the weights, one that does not, one that fails, one that needs a GPU."""
    chosen = ("plain", "int8", "batch size 1", "offload model", "offload layers", "device cpu")
    ways = teacher.ways
    monkeypatch.setattr(
        teacher,
        "ways",
        lambda args: {k: v for k, v in ways(args).items() if k in chosen} | {"broken": {"no_such_argument": 1}},
    )


def test_every_way_is_measured_or_said_to_be_left_out(tmp_path, two_ways, capsys):
    path = tmp_path / "teacher.json"
    assert cli(["bench", "teacher", *TINY, "--no-memory", "--json", str(path), "--png", str(tmp_path / "t.png")]) == 0
    result = json.loads(path.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {"plain", "int8", "batch size 1", "offload model", "offload layers", "device cpu", "broken"}
    assert rows["device cpu"]["problem"] == teacher.NEEDS_GPU
    assert "no_such_argument" in rows["broken"]["problem"]
    plain, int8, split = (rows[name] for name in ("plain", "int8", "batch size 1"))
    assert plain["kl"] == 0
    assert split["kl"] < 1e-9
    assert 1e-7 < int8["kl"] < 1e-2
    assert int8["weights_mib"] < plain["weights_mib"] == split["weights_mib"]
    for row in (plain, int8, split):
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        assert row["tokens_per_s"] * row["median_s"] == pytest.approx(result["tokens"])
    head = 200 * 64 * 4 / 2**20
    whole, layers = rows["offload model"], rows["offload layers"]
    assert whole["resident_mib"] == pytest.approx(head, abs=1e-3)  # and a few buffers
    assert whole["moved_mib"] == pytest.approx(plain["weights_mib"] - head, abs=1e-3)
    assert layers["resident_mib"] == pytest.approx(2 * head, abs=1e-3)  # and the embedding
    assert layers["moved_mib"] == pytest.approx(2 * (plain["weights_mib"] - 2 * head), abs=2e-3)  # two micro-batches
    assert whole["kl"] < 1e-9 and layers["kl"] < 1e-9
    assert (tmp_path / "t.png").stat().st_size > 1000
    table = capsys.readouterr().out
    assert all(name in table for name in rows)


def test_the_kl_is_that_of_the_full_distributions(tmp_path):
    args = parse()
    path = teacher.make_path(args, str(tmp_path))
    base, int8 = teacher.make_teacher(path, {}, args), teacher.make_teacher(path, {"quantization": "int8"}, args)
    batch = teacher.make_batch(200, args)
    pair = []
    for one in (base, int8):
        with torch.no_grad():
            logits = one.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        pair.append(logits[:, 2:-1].double().log_softmax(-1)[batch.completion_mask])
    expected = (pair[0].exp() * (pair[0] - pair[1])).sum(-1).mean()
    assert teacher.divergence(base, int8, batch, 2) == pytest.approx(expected.item(), rel=1e-3)
    parameters = sum(p.numel() for p in base.model.parameters()) * 4
    assert weight_bytes(base.model) == parameters + sum(b.nbytes for b in base.model.buffers())


@pytest.mark.slow
def test_peak_memory_is_measured_in_a_process_of_its_own(tmp_path):
    args = parse()
    path = teacher.make_path(args, str(tmp_path))
    assert 0 <= teacher._own_peak("batch size 1", path, args) < 500


def test_a_gpu_is_offered_every_way():
    names = set(teacher.ways(parse()))
    for kind in (
        "plain",
        "int8",
        "bnb_8bit",
        "bnb_4bit",
        "batch size 1",
        "offload model",
        "offload layers",
        "device cpu",
    ):
        assert kind in names
