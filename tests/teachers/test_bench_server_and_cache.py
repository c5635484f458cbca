"""`trl-opd bench server` and `trl-opd bench cache`: their figures beside what went over the wire and onto the disk."""

import json

import numpy as np
import pytest
from tiny import VOCAB_SIZE

from trl_opd.bench import main as bench
from trl_opd.bench.cache import measure, samples
from trl_opd.teachers.cache import CacheMeta


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_servers_bytes_are_those_that_it_sent(serve, monkeypatch, tmp_path, capsys, kind):
    server, kept = serve(kind=kind), tmp_path / "server.json"
    sent, answer = [], type(server).answer

    def watched(self, method, path, body):
        status, content = answer(self, method, path, body)
        ids = body.get("prompt", body.get("input_ids")) if isinstance(body, dict) else None
        if isinstance(ids, list):
            sent.append((body, len(json.dumps(content))))
        return status, content

    monkeypatch.setattr(type(server), "answer", watched)
    small = ["--prompt", "4", "--completion", "6", "--sequences", "3", "--vocab", str(VOCAB_SIZE), "--lowest-id", "2"]
    assert bench(["server", "--url", server.url, *small, "--k", "0", "7", "--json", str(kept)]) == 0
    result = json.loads(kept.read_text())
    assert result["server"] == kind
    assert [row["k"] for row in result["rows"]] == [0, 7]
    texts = len(sent) // 2  # of each K: one that is not counted, three that are, and the one that is read
    assert texts == 5
    for i, row in enumerate(result["rows"]):
        counted = [size for _, size in sent[i * texts + 1 : i * texts + 4]]
        assert row["bytes_per_token"] == pytest.approx(sum(counted) / (3 * (4 + 6)), rel=0.02)
        assert row["tokens_per_s"] > 0 and row["read_us_per_token"] > 0
    assert server.url not in kept.read_text()
    assert "bytes a token" in capsys.readouterr().out


class Arguments:
    k, vocab, samples, prompt, completion, seed = 8, 300, 3, 5, 20, 0


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_caches_size_and_error_are_those_of_its_files(tmp_path, compression):
    made, tails = samples(Arguments)
    for (_, answer), tail in zip(made, tails, strict=True):
        np.testing.assert_allclose(1 - np.exp(answer.topk_logprobs.astype(np.float64)).sum(-1), tail, atol=1e-6)
    meta = CacheMeta(teacher="t", vocab_size=300, support_size=8, logprob_dtype="float16", compression=compression)
    row = measure(made, tails, meta, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.rglob("shard*"))
    assert row["bytes_per_token"] == pytest.approx(size / 60)
    largest = max(
        np.abs(a.topk_logprobs.astype(np.float16).astype(np.float32) - a.topk_logprobs).max() for _, a in made
    )
    assert 0 < row["worst_logprob_error"] <= 2 * largest
    assert row["worst_tail_error"] < 1e-5


def test_the_command_measures_every_form(tmp_path, capsys):
    kept = tmp_path / "cache.json"
    small = ["--k", "4", "--vocab", "100", "--samples", "2", "--prompt", "3", "--completion", "5"]
    assert bench(["cache", *small, "--json", str(kept)]) == 0
    rows = json.loads(kept.read_text())["rows"]
    assert {(row["logprob_dtype"], row["compression"]) for row in rows} == {
        (dtype, compression) for dtype in ("float32", "float16") for compression in ("none", "zstd")
    }
    assert "worst tail" in capsys.readouterr().out
