"""The catalogue of methods: every entry is whole and says no more than is known."""

import dataclasses
import re

import pytest

from trl_opd import OnPolicyDistillConfig
from trl_opd.recipes import (
    ALIASES,
    EVIDENCE,
    FIDELITIES,
    KINDS,
    NEEDS,
    RECIPES,
    SLOT_OF,
    SLOTS,
    TEACHERS,
    get_recipe,
    list_recipes,
    paper_of,
)

BASE = {"use_cpu": True, "bf16": False, "report_to": "none"}
CONFIG_FIELDS = {f.name for f in dataclasses.fields(OnPolicyDistillConfig)}

# Copied by hand from the specification of the methods, not from the catalogue
ARXIV = {
    "gkd": "2306.13649", "minillm": "2306.08543", "distillm": "2402.03898", "distillm2": "2503.07067",
    "dskd": "2504.11426", "cmdp": "2509.22921", "ketchup": "2504.19024", "eopd": "2603.07079", "todi": "2505.16297",
    "akl": "2404.02657", "exopd": "2602.12125", "adakd": "2510.11615", "selectkd": "2510.24021", "csd": "2509.25837",
    "delta_kd": "2509.14526", "taid": "2501.16937", "promptkd": "2402.12842", "veto": "2601.07155",
    "reopold": "2603.11137", "tsd_kd": "2603.13260", "revisiting_opd": "2603.25562", "rethinking_opd": "2604.13016",
    "opd": None, "f_distill_js": "2307.15190", "f_distill_tvd": "2307.15190", "kl_mixing": "2605.16826",
    "extrapolation_cliff": "2605.08737", "ptsf": "2605.13643", "fast_opd": "2602.15260", "skd": "2410.11325",
    "distillspec": "2310.08461", "paced": "2603.11178", "adaswitch": "2510.07842", "x_kd": "2602.12674",
    "dasd": "2601.09088", "idft": "2602.12222", "f_opd": "2605.17862", "effopd": "2605.11739", "brts": "2605.09725",
    "motab": "2605.19433", "sod": "2605.07725", "oprd": "2606.06021", "luffy": "2504.14945", "uld": "2402.12030",
    "gold": None, "simct": "2605.07711", "gemma2": "2408.00118", "qwen3": "2505.09388", "mimo": "2601.02780",
    "nemotron_cascade2": "2603.19220", "minitron": "2407.14679", "mad_opd": "2605.01347", "vold": "2510.23497",
    "video_opd": "2602.02994", "x_opd": "2603.24596", "gad": "2511.10643", "lion": "2305.12870", "ovd": "2601.21968",
    "orpo_distill": "2509.25100", "dail": "2602.02405", "ropd": "2605.07396", "spin": "2401.01335",
    "opsd": "2601.18734", "opsdc": "2603.05433", "gates": "2602.20574", "sdpo": "2601.20802", "mtp_sd": "2602.06019",
    "opcd": "2602.12275", "oel": "2603.16856", "sdft": "2601.19897", "tms": "2602.03073", "pi_distill": "2602.04942",
    "hdpo": "2603.23871", "ophsd": "2605.08741", "rlsd": "2604.03128", "pbsd": "2605.05040", "opct": "2605.21834",
    "direction_adaptive": "2605.22263", "rlkd": "2505.16142", "rlad": "2602.22495", "aligndistil": "2503.02832",
    "kdrl": "2506.02208", "kepo": "2602.00400", "supercorrect": "2410.09008", "score": "2509.14257",
    "vopd": "2605.07865", "opd_plus": "2606.01039", "power_opd": "2606.17199", "tip": "2604.14084",
    "aopd": "2605.06387", "stable_opd": "2604.08527", "lightning_opd": "2604.13010", "distilled_rl": "2607.17247",
}  # fmt: skip
# Named there as not expressible by slots
OWN_MECHANISM = (
    "dskd oprd gad x_kd promptkd uld gold simct spin pbsd orpo_distill supercorrect mtp_sd effopd cmdp skd adaswitch "
    "motab lion score dasd dail tms"
)
# Their formulas are listed there as uncertain: to be marked as this library's, or not shipped
UNCERTAIN = (
    "cmdp x_kd motab f_opd direction_adaptive pbsd video_opd vold hdpo gates rlad reopold ketchup delta_kd sdft"
)


def config(tmp_path, **kwargs):
    return OnPolicyDistillConfig(output_dir=str(tmp_path), **BASE, **kwargs)


# Entries


def test_every_method_of_the_specification_has_an_entry():
    assert {name: RECIPES[name].arxiv for name in ARXIV} == ARXIV
    assert len(list_recipes()) >= 45
    assert all(RECIPES[name].kind != "slots" for name in OWN_MECHANISM.split())


@pytest.mark.parametrize("name", RECIPES)
def test_an_entry_is_whole(name):
    recipe = RECIPES[name]
    assert recipe.name == name and re.fullmatch(r"[a-z][a-z0-9_]*", name)
    assert recipe.title and recipe.paper and recipe.idea and recipe.formula and recipe.year
    assert recipe.kind in KINDS and recipe.evidence in EVIDENCE
    assert recipe.arxiv is None or re.fullmatch(r"\d{4}\.\d{5}", recipe.arxiv)
    assert all(code in TEACHERS for part in recipe.teacher.split(" + ") for code in part.split(" or "))
    assert re.fullmatch(r"(logit|outcome|self-play|hidden states|none)( \+ (logit|outcome))? / "
                        r"(white-box|black-box|self) / (token|sequence|hybrid)", recipe.axes)  # fmt: skip
    assert set(recipe.needs) <= set(NEEDS) and set(recipe.slots) <= set(SLOTS)
    if recipe.kind == "slots":
        assert recipe.fidelity_class in FIDELITIES and recipe.watch and not recipe.how
        assert ":" in recipe.fidelity or recipe.fidelity_class != "approximation"
        assert set(recipe.fields) <= CONFIG_FIELDS and set(recipe.fields) <= set(SLOT_OF)
        assert not {"learning_rate", "per_device_train_batch_size", "max_steps"} & set(recipe.fields)
        assert recipe.slots
    else:
        assert recipe.how and recipe.fidelity is None and not recipe.fields and not recipe.needs


@pytest.mark.parametrize("name", list_recipes())
def test_a_method_that_is_not_known_well_claims_nothing(name):
    recipe = RECIPES[name]
    if recipe.evidence != "V":
        assert recipe.fidelity_class in ("approximation", "sketch")
    if recipe.evidence == "U" or name in UNCERTAIN.split():
        assert recipe.fidelity_class == "sketch" or ":" in recipe.fidelity
        assert recipe.left_out or recipe.conflict or "this library's" in recipe.fidelity
    if recipe.fidelity == "sketch":
        assert recipe.left_out


def test_names_and_aliases_are_one_to_one():
    assert not set(ALIASES) & set(RECIPES)
    assert len(ALIASES) == sum(len(r.aliases) for r in RECIPES.values())
    for alias, name in ALIASES.items():
        assert get_recipe(alias).name == name
    assert get_recipe("Thinking-Machines").name == "opd"
    assert get_recipe(" Fast OPD ").name == "fast_opd"


def test_every_slot_of_a_method_has_its_fields():
    assert set(SLOT_OF) <= CONFIG_FIELDS
    assert len(SLOTS) == 10
    assert get_recipe("gkd").slots == ("rollout", "divergence")
    assert get_recipe("opd").slots == ("support", "credit")
    assert get_recipe("opsdc").slots == ("teacher", "view", "divergence")
    assert {slot for name in list_recipes() for slot in RECIPES[name].slots} == set(SLOTS)


def test_where_sources_disagree_the_entry_says_so():
    of_survey = {"todi", "taid", "eopd", "idft", "qwen3", "rlkd", "uld", "promptkd", "sod"}
    of_code = {"minillm", "revisiting_opd", "sdft", "opsd", "tsd_kd", "mad_opd"}
    assert all(RECIPES[name].conflict for name in of_survey | of_code)
    assert all("urvey" in RECIPES[name].conflict for name in of_survey)


@pytest.mark.parametrize("name", RECIPES)
def test_a_citation_is_bibtex_with_the_right_identity(name):
    recipe = RECIPES[name]
    assert re.match(r"@misc\{[a-z0-9]+\d{4}[a-z0-9]+,\n", recipe.citation)
    assert recipe.citation.count("{") == recipe.citation.count("}")
    assert (f"eprint = {{{recipe.arxiv}}}" in recipe.citation) is (recipe.arxiv is not None)
    assert paper_of(name).get("id") == recipe.arxiv
    assert paper_of(recipe)["citation"] == recipe.citation


def test_citation_keys_are_unique():
    keys = [r.citation.partition(",")[0] for r in RECIPES.values()]
    assert len(keys) == len(set(keys))


# Finding them


def test_filters_select():
    assert "exopd" in list_recipes(slot="target") and "gkd" not in list_recipes(slot="target")
    assert "gkd" in list_recipes(need="demonstrations") and "opd" not in list_recipes(need="demonstrations")
    assert "todi" in list_recipes(need="none") and "gkd" not in list_recipes(need="none")
    assert all(RECIPES[name].fidelity == "exact" for name in list_recipes(fidelity="exact"))
    assert all(RECIPES[name].fidelity_class == "sketch" for name in list_recipes(fidelity="sketch"))
    assert "gad" in list_recipes(kind="pipeline") and "gad" not in list_recipes()
    assert set(list_recipes(kind=None)) == set(RECIPES)


@pytest.mark.parametrize("wrong", [{"slot": "slots"}, {"need": "gpu"}, {"fidelity": "high"}, {"kind": "x"}])
def test_an_unknown_filter_is_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} must be a known name, got '{value}'"):
        list_recipes(**wrong)


@pytest.mark.parametrize(
    "name, near",
    [("gdk", "gkd"), ("minilm", "minillm"), ("opds", "opsd"), ("exo", "exopd"), ("distilm2", "distillm2")],
)
def test_an_unknown_recipe_gets_the_nearest_names(tmp_path, name, near):
    with pytest.raises(ValueError, match=rf"recipe must be a known name, got '{name}'.*Did you mean .*'{near}'"):
        config(tmp_path, recipe=name)


@pytest.mark.parametrize("name", list_recipes(kind="pipeline") + list_recipes(kind="not_yet"))
def test_a_method_without_fields_says_how_or_why_not(tmp_path, name):
    with pytest.raises(ValueError, match="recipe must be a method that fields of the configuration express") as error:
        config(tmp_path, recipe=name)
    assert RECIPES[name].how in str(error.value)
