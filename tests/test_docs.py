"""The documentation: every command runs, every YAML file is one that the parser takes, every link leads somewhere."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from tiny import make_model, make_tokenizer

from trl_opd import OnPolicyDistillConfig
from trl_opd.cli import main
from trl_opd.recipes import RecipeParser
from trl_opd.train import OnPolicyDistillScriptArguments

ROOT = Path(__file__).resolve().parents[1]
# In the order of a reader: what a page makes, a later one reads
PAGES = [
    ROOT / "docs" / f"{name}.md"
    for name in ("README", "first_run", "choosing", "reading_the_report", "when_it_fails", "coming_from", "teachers")
] + [ROOT / "docs" / "objective.md", ROOT / "README.md", ROOT / "examples" / "README.md"]

# Commands that these tests do not run, and who does
ELSEWHERE = {
    "git clone": "CI starts from a clone",
    "make ": "CI runs test, lint, test-slow, test-browser and test-vllm; demo is tests/test_demo.py",
    "pip install": "make does",
    "trl-opd bench": "tests/test_bench*.py run each with small sizes",
    "vllm serve": "make test-vllm starts a server",
    "python -m vllm": "make test-vllm starts a server",
    "python -m sglang": "a live SGLang server has not been tried: README, limits",
}
# What makes a command small enough for a CPU. The command itself is run as it is written.
TRAIN = "--max_steps 2 --use_cpu true --bf16 false --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
TRAIN += "--max_completion_length 8 --report_to none --save_steps 1 --dtype float32 --lora_r 4"
DOCTOR = "--samples 2 --use_cpu true --bf16 false --max_completion_length 8 --dtype float32 --lora_r 4"
SMALLER = {
    "trl-opd train": TRAIN,
    "accelerate launch": f"{TRAIN} --output_dir of_two_processes",
    "trl-opd doctor": DOCTOR,
    "trl-opd demo": "--fast",
}
# A doctor that finds something says so with its exit code
MAY_FIND = ("trl-opd doctor",)
SLOW = ("accelerate launch", "trl-opd demo")


def blocks(page, language):
    """Fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    """The commands of a page, one each, without comments."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").split("\n"):
            for part in re.sub(r"(^|\s)#.*$", "", line).split("&&"):
                if part.strip():
                    found.append(part.strip())
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for command in re.findall(r"`(trl-opd [^`]+)`", prose):  # those without a word in capitals, which stands for yours
        if not re.search(r"\b[A-Z_]{2,}\b", command) and len(command.split()) > 2 and not command.endswith("--config"):
            found.append(command)
    return found


def every_command():
    cases, seen = [], set()
    for page in PAGES:
        for command in commands(page):
            if command in seen or any(command.startswith(start) for start in ELSEWHERE) or command.startswith("cd "):
                continue
            seen.add(command)
            marks = [pytest.mark.slow] if command.startswith(SLOW) else []
            cases.append(pytest.param(command, id=f"{page.stem}: {command[:70]}", marks=marks))
    return cases


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A folder in which the names of the documentation are small models and files."""
    folder = tmp_path_factory.mktemp("docs")
    for name, seed in (("Qwen/Qwen3-1.7B", 0), ("Qwen/Qwen3-8B", 1), ("Qwen/Qwen3-32B", 2)):
        model = make_model(hidden_size=16 + 8 * seed, seed=seed, max_position_embeddings=4096)
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    texts = ["abc", "hello", "x y z", "42", "what is it", "the quick brown fox"]
    rows = [{"prompt": [{"role": "user", "content": f"{text} {i}"}]} for i in range(4) for text in texts]
    lines = "\n".join(json.dumps(row) for row in rows)
    for name in ("trl-lib/DeepMath-103K/train.jsonl", "prompts.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(lines)
    traces = [{"prompt": text, "completion": text[::-1]} for text in texts]
    (folder / "traces.jsonl").write_text("\n".join(json.dumps(row) for row in traces))
    shutil.copytree(ROOT / "examples", folder / "examples")
    fields = yaml.safe_load((folder / "examples" / "opd_lora.yaml").read_text())
    for name in ("out", "another_run"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**fields, "output_dir": str(folder / name)}))
    (folder / "run.yaml").write_text(yaml.safe_dump({**fields, "output_dir": "of_run_yaml"}))
    return folder


@pytest.fixture
def inside(sandbox, monkeypatch, tmp_path):
    monkeypatch.chdir(sandbox)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("out", "another_run", "Qwen3-1.7B-OPD"):  # a run each, made once
        if not (sandbox / name).exists():
            config = "examples/opd_lora.yaml" if name == "Qwen3-1.7B-OPD" else f"{name}.yaml"
            assert main(["train", "--config", config, *TRAIN.split()]) in (0, None)
    return sandbox


@pytest.mark.parametrize("command", every_command())
@pytest.mark.timeout(600)
def test_command(command, inside, capsys):
    """It ends well."""
    command, _, output = command.partition(" > ")
    words = shlex.split(command)
    words += next((shlex.split(extra) for start, extra in SMALLER.items() if command.startswith(start)), [])
    allowed = (0, 1) if command.startswith(MAY_FIND) else (0,)
    if words[0] == "trl-opd":
        try:
            code = main(words[1:])
        except SystemExit as left:
            code = left.code
        shown = capsys.readouterr()
        assert (code or 0) in allowed, shown.err[-3000:]
        if output:
            (inside / output.strip()).write_text(shown.out)
        return
    if words[0] == "accelerate":  # two processes on a machine that has CPUs alone
        words[1:2] = ["launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        words[words.index("--num_processes") + 1] = "2"
    scripts = Path(sys.executable).parent
    words[0] = sys.executable if words[0] == "python" else str(scripts / words[0])
    result = subprocess.run(words, capture_output=True, text=True, timeout=500, cwd=inside, check=False)
    assert result.returncode in allowed, result.stderr[-3000:]


def test_every_exception_is_used():
    """A list of exceptions that no page needs would hide a command."""
    written = [command for page in PAGES for command in commands(page)]
    for start in ELSEWHERE:
        assert any(command.startswith(start) for command in written) or start.startswith("python -m"), start


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_compiles(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


def test_every_yaml_is_one_that_the_parser_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [(page.name, block) for page in PAGES for block in blocks(page, "yaml")]
    files += [(path.name, path.read_text()) for path in sorted((ROOT / "examples").glob("opd_*.yaml"))]
    taken = 0
    for name, text in files:
        if "model_name_or_path" not in text:
            continue
        (tmp_path / "run.yaml").write_text(text)
        from trl import DatasetMixtureConfig, ModelConfig

        parser = RecipeParser(
            (OnPolicyDistillScriptArguments, OnPolicyDistillConfig, ModelConfig, DatasetMixtureConfig)
        )
        parsed = parser.parse_args_and_config(["--config", "run.yaml", "--use_cpu", "true", "--bf16", "false"])
        written = yaml.safe_load(text)
        assert parsed[1].learning_rate == written["learning_rate"], name
        taken += 1
    assert taken >= 3


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("name", ["api", "alarms"])
def test_a_page_made_of_the_code_is_current(name):
    spec = importlib.util.spec_from_file_location("make_pages", ROOT / "docs" / "make_pages.py")
    make_pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_pages)
    written = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert written == getattr(make_pages, name)(), f"run: python docs/make_pages.py {name} > docs/{name}.md"
