"""Names and parameters of divergences: defaults, special cases, and errors that say what to write instead."""

import math

import pytest

from trl_opd.losses import DIVERGENCES, resolve_divergence
from trl_opd.resolve import NAMES, mixture_components


def test_every_divergence_has_its_rules():
    assert tuple(DIVERGENCES) == NAMES


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "convex_mix"])
def test_defaults_are_those_of_the_function(name):
    resolved, params = resolve_divergence(name)
    function = DIVERGENCES[name]
    assert resolved == name
    assert tuple(params.values()) == (function.__defaults__ or ())


@pytest.mark.parametrize(
    ("name", "kwargs", "same_as"),
    [
        ("generalized_jsd", {"beta": 0}, "forward_kl"),
        ("generalized_jsd", {"beta": 1.0}, "reverse_kl"),
        ("alpha_divergence", {"alpha": 1}, "forward_kl"),
        ("alpha_divergence", {"alpha": 0.0}, "reverse_kl"),
        ("skew_forward_kl", {"skew": 0.0}, "forward_kl"),
        ("skew_reverse_kl", {"skew": 0}, "reverse_kl"),
        ("skew_reverse_kl", {"skew": 0, "detached": 1}, "reverse_kl"),
        ("entropy_gated_kl", {"threshold": math.inf}, "reverse_kl"),
        ("entropy_gated_kl", {"coef": 0}, "reverse_kl"),
        ("convex_mix", {"forward_kl": 1}, "forward_kl"),
        ("convex_mix", {"forward_kl": 0.0, "reverse_kl": None}, "reverse_kl"),
        ("convex_mix", {"generalized_jsd": {"weight": 0.4, "beta": 1}, "reverse_kl": 0.6}, "reverse_kl"),
    ],
)
def test_special_cases_resolve_to_the_kl_that_they_are(name, kwargs, same_as):
    assert resolve_divergence(name, kwargs) == (same_as, {})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("reverse_k", "reverse_kl"), ("forwardkl", "forward_kl"), ("jsd", "generalized_jsd"), ("ToDi", "todi")],
)
def test_an_unknown_name_gives_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"got '{name}'. Did you mean '{nearest}'.*Valid: forward_kl, reverse_kl"):
        resolve_divergence(name)


@pytest.mark.parametrize("name", ["xyzzy", None, 3])
def test_a_name_like_no_other_gives_the_list_alone(name):
    with pytest.raises(ValueError, match=r"must be a known name, got [^ ]+ Valid: "):
        resolve_divergence(name)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("reverse_kl", {"beta": 0.5}, "'beta', but reverse_kl takes no parameters"),
        ("generalized_jsd", {"alpha": 0.5}, "'alpha', but generalized_jsd takes beta"),
        ("generalized_jsd", {"beta": 1.5}, r"'beta'\] of generalized_jsd must be in \[0, 1\], got 1.5"),
        ("generalized_jsd", {"beta": "0.5"}, "got '0.5'"),
        ("generalized_jsd", {"beta": True}, "got True"),
        ("generalized_jsd", {"beta": float("nan")}, "got nan"),
        ("skew_forward_kl", {"skew": 1.0}, r"in \[0, 1\), got 1.0"),
        ("skew_reverse_kl", {"skew": -0.1}, r"in \[0, 1\), got -0.1"),
        ("alpha_divergence", {"alpha": float("inf")}, "a finite number, got inf"),
        ("alpha_beta_divergence", {"alpha": 0.0}, "for the limit use forward_kl or reverse_kl"),
        ("alpha_beta_divergence", {"beta": 0.0}, "for the limit use forward_kl or reverse_kl"),
        ("alpha_beta_divergence", {"alpha": 0.5, "beta": -0.5}, "must not sum to 0, got alpha=0.5, beta=-0.5"),
        ("todi", {"scale": -1.0}, "at least 0, got -1.0"),
        ("adaptive_kl", {"head_mass": 0.0}, r"in \(0, 1\], got 0.0"),
        ("skew_reverse_kl", {"detached": 0.5}, r"'detached'\] of skew_reverse_kl must be 0 or 1, got 0.5"),
        ("skew_forward_kl", {"detached": 1}, "'detached', but skew_forward_kl takes skew"),
        ("concrete_score", {"first": "students"}, "must be one of student, teacher, uniform, got 'students'"),
        ("concrete_score", {"second": 1.0}, r"'second'\] of concrete_score must be one of .*, got 1.0"),
        ("concrete_score", {"first": None}, "got None"),
        ("generalized_jsd", {"beta": "student"}, "got 'student'"),
        ("entropy_gated_kl", {"threshold": float("nan")}, "must be a number .* got nan"),
        ("entropy_gated_kl", {"coef": -1}, "at least 0, got -1"),
        ("entropy_gated_kl", {"coef": math.inf}, "a finite number, at least 0, got inf"),
        ("convex_mix", None, "must name at least one divergence, got none.*Set for example {'forward_kl': 0.3"),
        ("convex_mix", {}, "must name at least one divergence, got none"),
        (
            "convex_mix",
            {"convex_mix": 1.0},
            "got 'convex_mix'. A mixture in a mixture is one mixture: name its",
        ),
        ("convex_mix", {"revers_kl": 1.0}, "known names, got 'revers_kl'. Did you mean 'reverse_kl'"),
        ("convex_mix", {"forward_kl": 0.3, "reverse_kl": 0.6}, "must sum to 1, got 0.9. .*write None for one"),
        ("convex_mix", {"forward_kl": 0.7, "reverse_kl": 0.6}, "must sum to 1, got 1.3"),
        ("convex_mix", {"forward_kl": 0.7, "todi": 0.6, "reverse_kl": None}, "must sum to 1, got 1.3 and 1 None"),
        ("convex_mix", {"forward_kl": None, "reverse_kl": None}, "must sum to 1, got 0 and 2 None"),
        ("convex_mix", {"forward_kl": -0.5, "reverse_kl": 1.5}, r"weight of 'forward_kl' .* in \[0, 1\].*got -0.5"),
        ("convex_mix", {"forward_kl": True}, "got True"),
        ("convex_mix", {"forward_kl": "0.5"}, "got '0.5'"),
        ("convex_mix", {"forward_kl": float("nan")}, "got nan"),
        (
            "convex_mix",
            {"todi": {"scale": 1.0}},
            r"weight of 'todi'.*got 'no weight'.*{'todi': {'weight': 0.5, \.\.\.}}",
        ),
        ("convex_mix", {"todi": {"weight": 1, "beta": 1.0}}, "'beta', but todi takes scale"),
        (
            "convex_mix",
            {"generalized_jsd": {"weight": 1, "beta": 2}},
            r"'beta'\] of generalized_jsd must be in \[0, 1\]",
        ),
    ],
)
def test_a_bad_parameter_is_refused_with_its_rule(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        resolve_divergence(name, kwargs)


def test_weightings_are_strings_and_numbers_are_floats():
    assert resolve_divergence("concrete_score", {"first": "teacher"}) == (
        "concrete_score",
        {"first": "teacher", "second": "uniform"},
    )
    name, params = resolve_divergence("skew_reverse_kl", {"detached": 1})
    assert (name, params) == ("skew_reverse_kl", {"skew": 0.1, "detached": 1.0})
    assert type(params["detached"]) is float


MIXED = {"forward_kl": 0.3, "generalized_jsd": {"weight": 0.2, "beta": 0.9}, "todi": None}


def test_a_mixture_resolves_to_weights_and_complete_parameters_and_then_to_itself():
    name, params = resolve_divergence("convex_mix", MIXED)
    assert name == "convex_mix"
    assert params == {
        "forward_kl": {"weight": 0.3},
        "generalized_jsd": {"weight": 0.2, "beta": 0.9},
        "todi": {"weight": 0.5, "scale": 1.0},
    }
    assert resolve_divergence(name, params) == (name, params)
    assert list(mixture_components(params))[1] == ("generalized_jsd", 0.2, {"beta": 0.9})
    assert MIXED["generalized_jsd"] == {"weight": 0.2, "beta": 0.9} and MIXED["todi"] is None


def test_what_is_the_same_divergence_is_added_and_what_has_no_weight_goes():
    mix = {"reverse_kl": 0.25, "skew_reverse_kl": {"weight": 0.25, "skew": 0}, "forward_kl": 0.5, "todi": 0}
    assert resolve_divergence("convex_mix", mix) == (
        "convex_mix",
        {"reverse_kl": {"weight": 0.5}, "forward_kl": {"weight": 0.5}},
    )


def test_weights_written_with_few_digits_need_not_sum_to_one_exactly():
    for weights in ((0.1, 0.2, 0.7), (0.3333333, 0.3333333, 0.3333333)):
        name, params = resolve_divergence(
            "convex_mix", dict(zip(("forward_kl", "reverse_kl", "todi"), weights, strict=True))
        )
        assert name == "convex_mix" and [x["weight"] for x in params.values()] == list(weights)
