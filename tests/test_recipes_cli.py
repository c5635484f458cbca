"""`trl-opd recipes`: the table, one method, its YAML, and docs/methods.md."""

import json
import pathlib
import re

import pytest
import yaml
from trl import DatasetMixtureConfig, ModelConfig

from trl_opd import OnPolicyDistillConfig
from trl_opd.cli import main
from trl_opd.recipes import RECIPES, RecipeParser, list_recipes
from trl_opd.recipes.markdown import markdown
from trl_opd.recipes_cli import describe, table
from trl_opd.train import OnPolicyDistillScriptArguments, parse_teacher

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "methods.md"


def run(capsys, *arguments):
    code = main(["recipes", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("columns", ["60", "80", "100", "119", "200"])
def test_the_table_fits_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = run(capsys)
    assert code == 0
    assert max(map(len, out.splitlines())) <= min(max(int(columns), 80), 119)
    names = {line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")}
    assert set(RECIPES) <= names
    assert f"{len(RECIPES)} methods." in out


def test_the_table_says_how_each_is_reached(capsys):
    _, out, _ = run(capsys)
    before, _, after = out.partition("With TRL's own trainers")
    assert "gkd " in before and "gad " not in before and "\ngad " in after.partition("Not yet")[0]
    assert "\ndskd " in after.partition("Not yet")[2]


def test_filters(capsys):
    _, out, _ = run(capsys, "--slot", "target", "--fidelity", "exact")
    assert "exopd" in out and "taid" not in out and "gkd" not in out
    _, out, _ = run(capsys, "--need", "demonstrations")
    assert "gkd" in out and "todi" not in out
    _, out, _ = run(capsys, "--kind", "pipeline")
    assert "gad" in out and "gkd" not in out
    _, out, _ = run(capsys, "--need", "tools", "--fidelity", "sketch")
    assert "No method is all of this" in out


def test_json_holds_everything(capsys):
    _, out, _ = run(capsys, "--json", "--kind", "slots")
    entries = json.loads(out)
    assert [e["name"] for e in entries] == list_recipes()
    _, out, _ = run(capsys, "gkd", "--json")
    gkd = json.loads(out)
    assert gkd["fields"] == dict(RECIPES["gkd"].fields) and gkd["slots"] == ["rollout", "divergence"]
    assert gkd["citation"] == RECIPES["gkd"].citation


@pytest.mark.parametrize("name", RECIPES)
def test_one_method_is_told_whole(name):
    recipe, text = RECIPES[name], describe(RECIPES[name])
    flat = re.sub(r"\s+", " ", text)
    for part in (
        recipe.idea,
        recipe.formula,
        recipe.paper,
        recipe.left_out,
        recipe.conflict,
        recipe.watch,
        recipe.how,
    ):
        assert re.sub(r"\s+", " ", part) in flat
    assert all(field in text for field in (*recipe.fields, *recipe.published, *recipe.needs[:0]))
    assert recipe.citation in text
    assert ("run.yaml" in text) is (recipe.kind == "slots")


def test_an_unknown_name_is_exit_code_2_with_the_nearest(capsys):
    code, out, err = run(capsys, "gdk")
    assert code == 2 and out == "" and "Did you mean 'gkd'" in err


def test_a_pipeline_has_no_yaml(capsys):
    code, _, err = run(capsys, "gad", "--yaml")
    assert code == 2 and "reward_funcs" in err


def test_yaml_needs_a_name(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["recipes", "--yaml"])
    assert stop.value.code == 2
    assert "needs the name of a method" in capsys.readouterr().err


@pytest.mark.parametrize("name", list_recipes())
def test_the_yaml_parses_and_builds_the_method(capsys, tmp_path, name):
    _, text, _ = run(capsys, name, "--yaml")
    (tmp_path / "run.yaml").write_text(text)
    parser = RecipeParser(
        (OnPolicyDistillScriptArguments, OnPolicyDistillConfig, ModelConfig, DatasetMixtureConfig), prog="test"
    )
    cpu = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--output_dir", str(tmp_path)]
    script, args, model, _ = parser.parse_args_and_config(["--config", str(tmp_path / "run.yaml"), *cpu])
    assert args.recipe == name and args.recipe_changes == {}
    assert model.model_name_or_path and script.dataset_name
    teacher = parse_teacher(script.teacher_model)
    assert isinstance(teacher, dict) is RECIPES[name].teacher_model.startswith("{")
    assert bool(script.reward_funcs) is ("rewards" in RECIPES[name].needs)


@pytest.mark.parametrize("name", list_recipes())
def test_the_commented_fields_of_the_yaml_are_the_recipes(capsys, name):
    _, text, _ = run(capsys, name, "--yaml")
    _, marker, commented = text.partition("To change a field, uncomment it.\n")
    assert bool(marker)
    fields = yaml.safe_load(re.sub(r"^# ", "", commented, flags=re.MULTILINE))
    assert fields == json.loads(json.dumps(dict(RECIPES[name].fields)))


def test_the_documentation_is_current(capsys):
    code, out, _ = run(capsys, "--markdown")
    assert code == 0 and out == markdown()
    if DOCS.exists():  # not in a source distribution
        assert DOCS.read_text(encoding="utf-8") == out, "trl-opd recipes --markdown > docs/methods.md"


def test_the_documentation_names_every_method():
    text = markdown()
    for name, recipe in RECIPES.items():
        assert f"\n### {name}\n" in text and recipe.paper in text


def test_an_empty_table_says_so():
    assert "trl-opd recipes" in table([])
