"""Names and parameters of divergences: defaults, special cases, and errors that say what to write instead."""

import pytest

from trl_opd.losses import DIVERGENCES, resolve_divergence


@pytest.mark.parametrize("name", DIVERGENCES)
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
    ],
)
def test_a_bad_parameter_is_refused_with_its_rule(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        resolve_divergence(name, kwargs)
