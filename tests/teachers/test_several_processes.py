"""Routed teachers and self-teachers in two gloo processes, copied or sharded, are those of one process."""

import pytest
import several_processes
import torch
from processes import run_two
from several_processes import RUNS, SHARDED, one_process

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
TIMES = ("teacher_wait", "tokens_per_second")


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    return results(tmp_path_factory.mktemp("copied"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDED", "1")
        return results(tmp_path_factory.mktemp("sharded"))


def results(output_dir):
    run_two(several_processes.__file__, output_dir)
    return {path.stem: torch.load(path) for path in output_dir.glob("*.pt")}


def assert_as_one(results, name):
    alone = one_process(name)
    for rank in (0, 1):
        result = results[f"{name}.{rank}"]
        assert "error" not in result, result["error"]
        assert result["weights"].keys() == alone["weights"].keys()
        for key, expected in alone["weights"].items():
            torch.testing.assert_close(result["weights"][key], expected, rtol=1e-6, atol=1e-6)
    ours = results[f"{name}.0"]["logs"]
    assert len(ours) == len(alone["logs"])
    for line, expected in zip(ours, alone["logs"], strict=True):
        told, known = ({k for k in x if "distill/" in k and not k.endswith(TIMES)} for x in (line, expected))
        keys = known | ({"loss", "grad_norm"} & expected.keys())
        assert keys <= line.keys() and told <= keys
        for key in keys:
            assert line[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6), key
    shares = {key.split("/")[1] for line in ours for key in line if key.endswith("/share")}
    assert shares == (set() if RUNS[name]["teacher"]() == "self" else {"a", "b"})


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(copied, name):
    assert_as_one(copied, name)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_teachers_equal_whole_ones(sharded, name):
    assert_as_one(sharded, name)


def test_an_unknown_name_on_one_process_stops_both(copied):
    good, bad = (copied[f"unknown name.{rank}"] for rank in (0, 1))
    assert "must name one of the teachers ['a', 'b'], got 'ab'" in bad["message"]
    assert "on another process" in good["message"]
    assert good["step"] == bad["step"] == 1
    assert all("A checkpoint of step 1" in result["message"] for result in (good, bad))
