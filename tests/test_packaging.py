"""The wheel, built from the tree, installed elsewhere, and used from outside the tree."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Runs with only the installed wheel before site-packages, where this tree may itself be installed in editable mode.
PROBE = """
import importlib.metadata, json, sys
import trl_opd.losses
print(json.dumps({
    "files": [trl_opd.__file__, trl_opd.losses.__file__],
    "modules": sorted(sys.modules),
    "version": trl_opd.__version__,
    "metadata_version": importlib.metadata.version("trl-opd"),
    "scripts": {e.name: e.value for e in importlib.metadata.distribution("trl-opd").entry_points},
}))
"""


def run(*command: str, **kwargs) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, **kwargs)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("dist")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", str(out_dir), str(ROOT), cwd=out_dir)
    (path,) = out_dir.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    options = ("--no-index", "--no-deps", "--disable-pip-version-check", "--target", str(target))
    run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


@pytest.fixture(scope="module")
def probe(installed: Path, tmp_path_factory) -> dict:
    env = os.environ | {"PYTHONPATH": str(installed)}
    return json.loads(run(sys.executable, "-c", PROBE, cwd=tmp_path_factory.mktemp("elsewhere"), env=env))


def test_wheel_holds_every_file_of_the_package(wheel: Path):
    """A room or a data file that the build forgot would only be missed by users."""
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if name.startswith("trl_opd/")}
    in_tree = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "trl_opd").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert in_wheel == in_tree
    assert "trl_opd/py.typed" in in_wheel


def test_wheel_holds_the_package_and_the_licence_alone(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.split("/")[0].split("-")[0] for name in names} == {"trl_opd"}
        (licence,) = [name for name in names if name.endswith("licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        assert b"Apache License" in archive.read(licence)


def test_imports_from_outside_the_tree(installed: Path, probe: dict):
    assert all(Path(file).is_relative_to(installed) for file in probe["files"])


@pytest.mark.parametrize("module", ["trl", "triton", "transformers", "liger_kernel"])
def test_losses_import_neither_host_nor_kernels(probe: dict, module: str):
    """The divergences are torch alone: readable and usable without TRL, and without a Triton that works."""
    assert module not in probe["modules"]


def test_version_is_stated_once(wheel: Path, probe: dict):
    assert probe["version"] == probe["metadata_version"]
    assert wheel.name.split("-")[1] == probe["version"]


def test_command_is_the_cli(installed: Path, probe: dict):
    assert probe["scripts"] == {"trl-opd": "trl_opd.cli:main"}
    assert (installed / "bin" / "trl-opd").is_file()
