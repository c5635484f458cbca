"""`torchrun` and `accelerate launch` run the same YAML in two processes: one plan, one log, both weights the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer, trainer_config

import trl_opd

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    # On a machine with CPUs alone this is what starts two processes; the YAML's use_cpu keeps them there
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"],
}
LAUNCHERS["accelerate"] += ["--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for name, size in (("student", 16), ("teacher", 24)):
        make_model(hidden_size=size, seed=size).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": text} for text in ("abc", "hello", "x y z", "42")] * 4
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def launch(launcher, world, folder, *more, **fields):
    known = {
        **trainer_config(folder / "out", save_strategy="steps", save_steps=2, ddp_timeout=60),
        "per_device_train_batch_size": 2,
        "model_name_or_path": str(world / "student"),
        "teacher_model": str(world / "teacher"),
        "dataset_name": str(world / "data.jsonl"),
        "eval_strategy": "steps",
        "eval_steps": 3,
        "per_device_eval_batch_size": 1,
        **fields,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(known))
    environment = {**os.environ, "PYTHONPATH": str(Path(trl_opd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "trl_opd.train"]
    command += ["--config", str(folder / "run.yaml"), *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(world, tmp_path, launcher):
    done = launch(launcher, world, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    out = done.stdout
    assert out.count("Student ") == out.count("Start ") == 1 and out.count("step 3/3  ") == 1
    assert out.count("The model is in") == 1
    assert "2 in a micro-batch x 1 accumulated x 2 processes" in " ".join(out.split())
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "train_config.json").read_text())["num_processes"] == 2
    if launcher == "accelerate":
        return
    assert "A copy on each of 2 processes" in launch(launcher, world, tmp_path, "--dry-run", max_steps=5).stdout
    # The same command line is done, a longer run goes on, both in all processes
    again = launch(launcher, world, tmp_path)
    assert again.returncode == 0 and again.stdout.count("Already finished") == 1
    longer = launch(launcher, world, tmp_path, max_steps=4)
    assert longer.returncode == 0, longer.stderr[-3000:]
    assert longer.stdout.count("resumes after step 3") == 1 and longer.stdout.count("step 4/4  ") == 1
    checkpoint, saved = (load_file(p / "model.safetensors") for p in (tmp_path / "out/checkpoint-4", tmp_path / "out"))
    assert all((checkpoint[name] == saved[name]).all() for name in saved)


def test_a_mistake_ends_both_processes(world, tmp_path):
    done = launch("torchrun", world, tmp_path, divergence="forward_k")
    assert done.returncode != 0
    assert done.stderr.count("trl-opd train: error: ") == 1 and "Did you mean 'forward_kl'" in done.stderr
    assert "[process 1]" in done.stderr
    launch("torchrun", world, tmp_path)
    other = launch("torchrun", world, tmp_path, learning_rate=1e-5)
    assert other.returncode != 0 and "learning_rate was 0.01, now 1e-05" in other.stderr
