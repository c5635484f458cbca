"""A recipe in a configuration: explicit fields win, conflicts and needs are named, what is saved comes back."""

import dataclasses
import json
import pickle
import warnings

import pytest
import yaml
from trl import TrlParser

from trl_opd import OnPolicyDistillConfig
from trl_opd.recipes import (
    RECIPES,
    SLOT_OF,
    RecipeParser,
    add_to_model_card,
    check_needs,
    explain_conflict,
    list_recipes,
    model_card_section,
    passed_fields,
)

BASE = {"use_cpu": True, "bf16": False, "report_to": "none"}


def config(tmp_path, **kwargs):
    return OnPolicyDistillConfig(output_dir=str(tmp_path), **BASE, **kwargs)


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_builds_from_its_name(tmp_path, name):
    args = config(tmp_path, recipe=name)
    assert args.recipe == name and args.recipe_changes == {}
    for field, value in RECIPES[name].fields.items():
        assert getattr(args, field) == value, field
    plain = config(tmp_path)
    for field in SLOT_OF:
        if field not in RECIPES[name].fields:
            assert getattr(args, field) == getattr(plain, field), field


def test_an_alias_builds_and_is_stored_under_its_name(tmp_path):
    assert config(tmp_path, recipe="thinking-machines").recipe == "opd"


def test_positional_arguments_are_given_too():
    second = [f.name for f in dataclasses.fields(OnPolicyDistillConfig) if f.init][1]
    assert passed_fields(OnPolicyDistillConfig, ("out", 4), {"recipe": "gkd"}) == {"output_dir", second, "recipe"}


def test_without_a_recipe_nothing_changes(tmp_path):
    args = config(tmp_path)
    assert args.recipe is None and args.recipe_changes is None


def test_configurations_do_not_share_the_entrys_dicts(tmp_path):
    config(tmp_path, recipe="gkd").divergence_kwargs["beta"] = 0.9
    assert RECIPES["gkd"].fields["divergence_kwargs"] == {"beta": 0.5}
    assert config(tmp_path, recipe="gkd").divergence_kwargs == {"beta": 0.5}


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.7},
        {"temperature": 1.0},  # the default, given
        {"student_fraction": 1.0},
        {"divergence_kwargs": {"beta": 0.1}},
        {"student_fraction": 1.0, "temperature": 1.0},
        {"temperature": 0.9},  # the recipe's own
    ],
)
def test_what_is_given_wins_and_is_recorded(tmp_path, given):
    args = config(tmp_path, recipe="gkd", **given)
    recipe = dict(RECIPES["gkd"].fields)
    assert {name: getattr(args, name) for name in recipe} == {**recipe, **given}
    assert args.recipe_changes == {n: [recipe[n], value] for n, value in given.items() if value != recipe[n]}


def test_the_parameters_of_a_replaced_choice_are_dropped(tmp_path):
    args = config(tmp_path, recipe="gkd", divergence="forward_kl")
    assert args.divergence_kwargs is None
    assert args.recipe_changes == {
        "divergence": ["generalized_jsd", "forward_kl"],
        "divergence_kwargs": [{"beta": 0.5}, None],
    }
    args = config(tmp_path, recipe="gkd", divergence="skew_forward_kl", divergence_kwargs={"skew": 0.2})
    assert args.divergence_kwargs == {"skew": 0.2}
    args = config(tmp_path, recipe="gkd", divergence="generalized_jsd")  # the same choice keeps them
    assert args.divergence_kwargs == {"beta": 0.5} and args.recipe_changes == {}
    args = config(tmp_path, recipe="opsdc", teacher_sync="live")
    assert args.teacher_sync_steps == 1
    args = config(tmp_path, recipe="reopold", credit="k2", token_weighting=None)
    assert args.advantage_floor is None and args.support == "sampled"


def test_the_schedule_of_a_field_that_is_given_is_dropped_with_a_warning(tmp_path):
    def build(**given):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            args = config(tmp_path, **given)
        return args, [str(w.message) for w in caught if "recipe" in str(w.message)]

    args, (warning,) = build(recipe="fast_opd", max_completion_length=64)
    assert "schedules max_completion_length, and max_completion_length is given as 64" in warning
    assert args.schedules is None and args.max_completion_length == 64
    assert set(args.recipe_changes) == {"schedules", "max_completion_length"}
    args, (warning,) = build(recipe="taid", target_kwargs={"t": 0.5})
    assert "schedules target_kwargs.t" in warning and args.schedules is None
    args, (warning,) = build(recipe="taid", target="veto")
    assert "schedules target_kwargs.t" in warning and args.schedules is None and args.target_kwargs is None
    mine = {"max_completion_length": {"type": "linear", "start": 8, "end": 32}}
    args, none = build(recipe="fast_opd", max_completion_length=32, schedules=mine)
    assert args.schedules == mine and not none


def test_a_saved_configuration_comes_back_as_it_was(tmp_path):
    args = config(tmp_path, recipe="gkd", temperature=1.0, divergence="forward_kl")
    same = [pickle.loads(pickle.dumps(args))]
    saved = json.loads(args.to_json_string())
    assert saved["recipe_changes"]["temperature"] == [0.9, 1.0]
    saved = {k: v for k, v in saved.items() if k not in ("generation_batch_size", "_n_gpu")}
    same.append(OnPolicyDistillConfig(**saved))
    everything = {f.name: None for f in dataclasses.fields(OnPolicyDistillConfig) if f.init} | saved
    same.append(OnPolicyDistillConfig(**{**everything, "generation_batch_size": None}))
    for back in same:
        for name in (*RECIPES["gkd"].fields, "recipe"):
            assert getattr(back, name) == getattr(args, name), name
        assert back.recipe_changes == args.recipe_changes


# From files and command lines


def parse(tmp_path, *arguments, parser=RecipeParser, **fields):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output_dir": str(tmp_path), **BASE, **fields}))
    parsed = parser((OnPolicyDistillConfig,), prog="test")
    return parsed.parse_args_and_config(["--config", str(tmp_path / "run.yaml"), *arguments])[0]


def test_in_a_file_named_fields_win_with_their_default_too(tmp_path):
    args = parse(tmp_path, recipe="gkd", temperature=1.0)
    assert args.temperature == 1.0 and args.student_fraction == 0.5
    assert args.recipe_changes == {"temperature": [0.9, 1.0]}
    assert parse(tmp_path, recipe="gkd").recipe_changes == {}
    assert parse(tmp_path, recipe="gkd", divergence_kwargs={"beta": 0.1}).divergence_kwargs == {"beta": 0.1}


def test_on_the_command_line_they_win_too(tmp_path):
    args = parse(tmp_path, "--temperature", "1.0", "--student_fraction=1.0", recipe="gkd")
    assert args.recipe_changes == {"student_fraction": [0.5, 1.0], "temperature": [0.9, 1.0]}
    args = parse(tmp_path, "--recipe", "gkd", "--divergence_kwargs", '{"beta": 0.1}')
    assert args.divergence_kwargs == {"beta": 0.1} and args.temperature == 0.9
    assert args.recipe_changes == {"divergence_kwargs": [{"beta": 0.5}, {"beta": 0.1}]}
    args = parse(tmp_path, "--divergence_kwargs", '{"beta": 0.5}', recipe="gkd")
    assert args.recipe_changes == {}


def test_with_trls_parser_what_differs_from_the_default_wins(tmp_path):
    args = parse(tmp_path, parser=TrlParser, recipe="gkd", temperature=0.7)
    assert args.temperature == 0.7 and args.student_fraction == 0.5
    assert parse(tmp_path, parser=TrlParser, recipe="gkd", temperature=1.0).temperature == 0.9


def test_a_parser_leaves_nothing_behind(tmp_path):
    parse(tmp_path, recipe="gkd", temperature=1.0)
    assert config(tmp_path, recipe="gkd").temperature == 0.9
    assert parse(tmp_path, parser=TrlParser, recipe="gkd", temperature=1.0).temperature == 0.9


# Conflicts and needs


@pytest.mark.parametrize(
    "name, given, of_recipe, of_person",
    [
        (
            "gkd",
            {"credit": "policy_gradient"},
            "support='full' (slot support)",
            "credit='policy_gradient' (slot credit)",
        ),
        ("opd", {"credit": "direct"}, "support='sampled' (slot support)", "credit='direct' (slot credit)"),
        ("todi", {"support": "sampled"}, "credit='direct' (slot credit)", "support='sampled' (slot support)"),
        # The remedy names the credit too, which does not conflict
        (
            "exopd",
            {"divergence": "forward_kl"},
            "target='extrapolate' (slot target)",
            "divergence='forward_kl' (slot divergence)",
        ),
        # Only the remedy names the recipe's fields
        (
            "f_opd",
            {"credit": "policy_gradient", "support": "sampled"},
            "student_fraction=0.5 (slot rollout), replay_fraction=0.5 (slot rollout)",
            "credit='policy_gradient' (slot credit)",
        ),
    ],
)
def test_an_impossible_combination_names_both_slots(tmp_path, name, given, of_recipe, of_person):
    with pytest.raises(ValueError) as error:
        config(tmp_path, recipe=name, **given)
    _, _, told = str(error.value).partition(" Two slots conflict: ")
    assert told == (
        f"recipe {name!r} has {of_recipe}, and given is {of_person}. Leave the second unset, set the first too, or "
        "leave the recipe out."
    )


def test_an_error_between_given_fields_names_the_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"teacher_sync_steps must be unset with teacher_sync='live'.*recipe 'opsdc'"):
        config(tmp_path, recipe="opsdc", teacher_sync="live", teacher_sync_steps=5)


def test_an_error_without_a_recipe_stays_as_it_is(tmp_path):
    error = ValueError("support must be something")
    assert explain_conflict(error, config(tmp_path)) is error


@pytest.mark.parametrize(
    "name, missing",
    [
        ("gkd", "column `completion`"),
        ("opsd", "column `teacher_prompt`, or the argument teacher_view"),
        ("exopd", "argument reference_model"),
        ("delta_kd", "two models in the argument reference_model"),
        ("kdrl", "argument reward_funcs"),
        ("nemotron_cascade2", "column `teacher`"),
        ("deepseek_v4", "MixtureTeacher"),
        ("f_distill_tvd", "a teacher in this process"),
    ],
)
def test_a_missing_need_is_named(tmp_path, name, missing):
    with pytest.raises(ValueError, match=f"^recipe '{name}' needs ") as error:
        check_needs(
            config(tmp_path, recipe=name), columns=["prompt"], teachers="remote", num_references=name == "delta_kd"
        )
    assert missing in str(error.value)


@pytest.mark.parametrize("name", list_recipes())
def test_with_everything_given_no_need_is_missing(tmp_path, name):
    kind = "mixture" if "mixture" in RECIPES[name].needs else "routed"
    check_needs(
        config(tmp_path, recipe=name),
        columns=["prompt", "completion", "teacher_prompt", "teacher"],
        has_rewards=True,
        num_references=2,
        teachers=kind,
        has_turns=True,
    )


def test_a_need_goes_with_its_field(tmp_path):
    with pytest.raises(ValueError, match="column `completion`"):
        check_needs(config(tmp_path, recipe="gkd"), columns=["prompt"])
    check_needs(config(tmp_path, recipe="gkd", student_fraction=1.0), columns=["prompt"])
    check_needs(config(tmp_path, recipe="gkd"))  # columns that are not known are not missed
    check_needs(config(tmp_path, recipe="opsd"), columns=["prompt"], has_view=True)
    check_needs(config(tmp_path), columns=[])


# The model card


def test_the_model_card_has_recipe_citation_and_changes(tmp_path):
    section = model_card_section(config(tmp_path, recipe="gkd", temperature=0.7))
    assert "`recipe: gkd`" in section and "https://arxiv.org/abs/2306.13649" in section
    assert "Fidelity: exact" in section and "@misc{agarwal2024gkd," in section
    assert "| `temperature` | `0.9` | `0.7` |" in section
    assert "nothing that the recipe sets" in model_card_section(config(tmp_path, recipe="gkd"))
    assert model_card_section(config(tmp_path)) == ""


def test_the_section_enters_a_card_once(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Model\n\n### Framework versions\n\n- TRL\n")
    args = config(tmp_path, recipe="taid")
    add_to_model_card(args, card)
    add_to_model_card(args, card)
    text = card.read_text()
    assert text.count("### Recipe") == 1 and text.endswith("### Framework versions\n\n- TRL\n")
    assert text.index("### Recipe") < text.index("### Framework versions")
    add_to_model_card(config(tmp_path), tmp_path / "none.md")
    assert not (tmp_path / "none.md").exists()
