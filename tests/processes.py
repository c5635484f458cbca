"""Two gloo processes that run a script, and how each of them ends."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import trl_opd


def launch_two(script: str, output_dir: Path | str) -> tuple[list[str], dict[str, str]]:
    """The command that runs `script output_dir` in two processes, and its environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # The package may be on the path of this process alone (pytest run from the repository)
    path = os.pathsep.join([str(Path(trl_opd.__file__).parents[1]), str(Path(__file__).parent)])
    return [*command, script, str(output_dir)], {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run_two(script: str, output_dir: Path | str) -> None:
    """Run `script output_dir` in two processes to its end."""
    command, environment = launch_two(script, output_dir)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def leave() -> None:
    """End a process whose results are on disk; tearing gloo's threads down in order has once aborted it (SIGABRT)."""
    torch.distributed.barrier()
    os._exit(0)
