"""Weights of tokens against their formulas in plain Python, their identities, and their bad inputs."""

import math
import statistics
from dataclasses import fields

import pytest
import torch
from textbook import total_variation

from trl_opd.token_weights import (
    TOKEN_WEIGHTINGS,
    TokenStats,
    adakd_temperatures,
    release_point,
    resolve_token_weighting,
    rollout_only,
    step_index_from_tool_mask,
    token_weights,
)

B, T, V = 3, 9, 7
INF = math.inf


def make_stats(seed=0, **changes):
    """Random statistics, float64, NaN outside an uneven mask that has holes."""
    generator = torch.Generator().manual_seed(seed)

    def rand():
        return torch.rand(B, T, generator=generator, dtype=torch.float64)

    mask = torch.arange(T) < torch.tensor([T, 6, 2])[:, None]
    mask[0, 3] = mask[1, 0] = False
    values = {
        "student_logprobs": -3 * rand(),
        "teacher_logprobs": -3 * rand(),
        "student_entropy": 2 * rand(),
        "teacher_entropy": 2 * rand(),
        "divergence": rand(),
        "hellinger": rand(),
        "teacher_margin": 4 * rand(),
    }
    values = {name: x.masked_fill(~mask, math.nan) for name, x in values.items()}
    values["accepted"] = rand() < 0.5
    values["step_index"] = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1], [0] * T])
    return TokenStats(**{"mask": mask, **values, **changes})


def weigh(spec, stats, **kwargs):
    return token_weights(resolve_token_weighting(spec), stats, **kwargs)


def by_token(stats, formula, *names):
    """`formula` of the named statistics, token by token; 0 outside the mask."""
    expected = torch.zeros(stats.mask.shape, dtype=torch.float64)
    for row, column in stats.mask.nonzero().tolist():
        expected[row, column] = formula(*(float(getattr(stats, name)[row, column]) for name in names))
    return expected


def assert_same(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-7)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


LOGPROBS = ("student_logprobs", "teacher_logprobs")
LOCAL = {
    "gate above": ({"entropy_gate": {"above": 0.8}}, lambda h: h > 0.8, "student_entropy"),
    "gate below, teacher": (
        {"entropy_gate": {"side": "teacher", "below": 0.8}},
        lambda h: h <= 0.8,
        "teacher_entropy",
    ),
    "gate band": (
        {"entropy_gate": {"above": 0.5, "below": 1.5}},
        lambda h: 0.5 < h <= 1.5,
        "student_entropy",
    ),
    "selectkd": ({"selectkd": {"beta": 0.25}}, lambda a: 1.0 if a else 0.25, "accepted"),
    "selectkd speculative": (
        {"selectkd": {"mode": "speculative", "beta": 0.2}},
        lambda s, t: min(1, math.exp(t - s)) + 0.2 * (1 - min(1, math.exp(t - s))),
        *LOGPROBS,
    ),
    "tsd_kd": ("tsd_kd", lambda s, t: sigmoid(s - t), "student_entropy", "teacher_entropy"),
    "direction_adaptive": (
        {"direction_adaptive": {"threshold": 1.0, "push": 0.5}},
        lambda h: 1.0 if h <= 1.0 else -0.5,
        "student_entropy",
    ),
    "idft": (
        {"idft": {"low": 0.2, "high": 0.9, "threshold": -0.3, "temperature": 0.7}},
        lambda s, h: 0.2 + 0.7 * sigmoid(-(s + h + 0.3) / 0.7),
        "student_logprobs",
        "student_entropy",
    ),
    "positive": ("log_ratio_sign", lambda s, t: t > s, *LOGPROBS),
    "negative": ({"log_ratio_sign": {"side": "negative"}}, lambda s, t: t <= s, *LOGPROBS),
}


@pytest.mark.parametrize("case", LOCAL.values(), ids=LOCAL)
def test_local_weights(case):
    spec, formula, *names = case
    stats = make_stats()
    weights = weigh(spec, stats)
    expected = by_token(stats, formula, *names)
    assert_same(weights, expected)
    assert len(expected[stats.mask].unique()) > 1  # the case tells the formulas apart
    # A local weighting may run on any subset of tokens, in any shape
    rows = TokenStats(**{f.name: _take(getattr(stats, f.name), stats.mask) for f in fields(stats)})
    assert torch.equal(weigh(spec, rows, check=False), weights[stats.mask])
    assert all(w.local for w in resolve_token_weighting(spec))


def _take(x, mask):
    return x[mask] if isinstance(x, torch.Tensor) else x


# Parameters at which a weighting is 1 on every token
IDENTITIES = [
    None,
    {},
    "entropy_gate",
    {"entropy_gate": {"side": "teacher", "above": -1.0}},
    {"entropy_gate": {"below": INF}},
    {"entropy_top": {"fraction": 1.0}},
    {"entropy_top": {"fraction": 1, "mean_over": "kept"}},
    "adakd",
    {"selectkd": {"beta": 1.0}},
    {"selectkd": {"mode": "speculative", "beta": 1}},
    {"tip": {"fraction": 1.0}},
    {"position": {"end": 1.0}},
    {"position": {"decay": "exponential", "end": 1.0, "length": 4}},
    "prefix",
    {"prefix": {"length": T}},
    {"importance": {"gamma": 0.0}},
    "prefix_release",
    "direction_adaptive",
    {"idft": {"low": 1.0}},
    {"log_ratio_sign": {"side": "both"}},
    {"adakd": {}, "prefix": None, "entropy_gate": {}},
]


@pytest.mark.parametrize("spec", IDENTITIES, ids=str)
def test_identities_are_bit_equal_to_ones(spec):
    stats = make_stats()
    assert torch.equal(weigh(spec, stats), stats.mask.to(weigh(spec, stats).dtype))


def test_every_weighting_has_an_identity_or_says_so():
    tested = {name for spec in IDENTITIES for name in ([spec] if isinstance(spec, str) else spec or ())}
    # step is 1 without turns, tested below; tsd_kd has no parameter: its identity is to be left out
    assert set(TOKEN_WEIGHTINGS) - tested == {"step", "tsd_kd"}


def test_specs_of_several_multiply():
    stats = make_stats()
    gate, sign = weigh({"entropy_gate": {"above": 0.6}}, stats), weigh("tsd_kd", stats)
    assert torch.equal(weigh({"entropy_gate": {"above": 0.6}, "tsd_kd": None}, stats), gate * sign)


def test_gates_above_and_below_part_the_tokens():
    stats = make_stats()
    stats.student_entropy[0, 0] = 0.75  # on the threshold
    above, below = (weigh({"entropy_gate": {side: 0.75}}, stats) for side in ("above", "below"))
    assert torch.equal(above + below, stats.mask.double()) and above[0, 0] == 0
    # a deterministic teacher never opens EOPD's gate
    stats.teacher_entropy = torch.zeros_like(stats.student_entropy)
    assert not weigh({"entropy_gate": {"side": "teacher", "above": 0.8}}, stats).any()


def test_expected_acceptance_is_one_minus_total_variation():
    """I14, by enumeration of the proposals."""
    torch.manual_seed(0)
    s, t = torch.randn(2, V, dtype=torch.float64).softmax(-1)
    stats = TokenStats(torch.ones(V, dtype=torch.bool), student_logprobs=s.log(), teacher_logprobs=t.log())
    weights = weigh({"selectkd": {"mode": "speculative", "beta": 0.0}}, stats)
    torch.testing.assert_close((s * weights).sum(), 1 - total_variation(s, t))


def top(stats, scores, fraction):
    """The tokens of the mask in the top fraction by `scores`, with those that tie with the last."""
    tokens = [tuple(token) for token in stats.mask.nonzero().tolist()]
    ranked = sorted((float(scores[token]) for token in tokens), reverse=True)
    last = ranked[max(1, int(fraction * len(tokens))) - 1] - 1e-12
    return [token for token in tokens if float(scores[token]) >= last], len(tokens)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_top_fractions(fraction):
    stats = make_stats()
    h = (stats.student_entropy - stats.student_entropy[stats.mask].min()).nan_to_num(0)
    d = (stats.divergence - stats.divergence[stats.mask].min()).nan_to_num(0)
    h, d = h / h.max(), d / d.max()
    for name, scores, mean_over, extra in (
        ("entropy_top", stats.teacher_entropy, "all", {"side": "teacher"}),
        ("entropy_top", stats.student_entropy, "kept", {"mean_over": "kept"}),
        ("adakd", stats.hellinger, "kept", {}),
        ("tip", h + d - h * d, "kept", {}),
    ):
        kept, num_tokens = top(stats, scores, fraction)
        expected = torch.zeros(B, T, dtype=torch.float64)
        for row, column in kept:
            expected[row, column] = num_tokens / len(kept) if mean_over == "kept" else 1.0
        assert_same(weigh({name: {"fraction": fraction, **extra}}, stats), expected)
    soft = weigh({"tip": {"fraction": None}}, stats)
    assert_same(soft, (h + d - h * d) * stats.mask)


def test_kept_weights_make_a_token_mean_the_mean_over_the_kept():
    stats = make_stats()
    weights = weigh({"adakd": {"fraction": 0.3}}, stats)
    loss = stats.divergence.nan_to_num(0)
    torch.testing.assert_close((weights * loss).sum() / stats.mask.sum(), loss[weights > 0].mean())


def test_ties_stay_together():
    stats = make_stats(hellinger=torch.full((B, T), 0.3, dtype=torch.float64))
    assert torch.equal(weigh({"adakd": {"fraction": 0.1}}, stats), stats.mask.double())
    equal = torch.full((B, T), 0.3, dtype=torch.float64)
    stats = make_stats(student_entropy=equal, divergence=equal)
    assert not weigh({"tip": {"fraction": None}}, stats).any()  # neither axis tells tokens apart


def test_an_empty_batch_has_no_weight():
    nothing = torch.zeros(B, T, dtype=torch.bool)
    for name in TOKEN_WEIGHTINGS:
        assert not weigh(name, make_stats(mask=nothing)).any()
    assert torch.equal(adakd_temperatures(torch.rand(B, T), nothing), torch.ones(B, T))


def test_adakd_temperatures():
    stats = make_stats()
    s, mask, c = stats.hellinger, stats.mask, 0.4
    median = statistics.median_low(s[mask].tolist())
    expected = by_token(stats, lambda x: math.exp(-c * math.tanh(math.log(x / median))), "hellinger")
    torch.testing.assert_close(adakd_temperatures(s, mask, c), expected + (~mask).double())
    hardest = s.masked_fill(~mask, 0).argmax()
    assert adakd_temperatures(s, mask).flatten()[hardest] < 1
    ones = torch.ones(B, T, dtype=torch.float64)
    assert torch.equal(adakd_temperatures(s, mask, c=0.0), ones)
    assert torch.equal(adakd_temperatures(torch.full_like(s, 0.2), mask), ones)
    assert torch.equal(adakd_temperatures(torch.zeros_like(s), mask), ones)
    # Most tokens agree exactly, one does not: finite, at the bound
    one = torch.zeros(B, T, dtype=torch.float64).index_fill(1, torch.tensor([1]), 0.5)
    assert adakd_temperatures(one, torch.ones_like(mask), 0.5).unique().tolist() == [math.exp(-0.5), 1.0]


POSITIONS = {
    "linear": ({}, lambda u, t: 1 - u),
    "rising": ({"start": 0.5, "end": 2.0}, lambda u, t: 0.5 + 1.5 * u),
    "exponential": ({"decay": "exponential", "start": 2.0, "end": 0.5}, lambda u, t: 2 * 0.25**u),
    "absolute": ({"length": 4}, lambda u, t: 1 - min(t / 4, 1)),
}


@pytest.mark.parametrize("case", POSITIONS.values(), ids=POSITIONS)
def test_position(case):
    params, formula = case
    stats = make_stats()
    expected = torch.zeros(B, T)
    for row, column in stats.mask.nonzero().tolist():
        last = [8, 5, 1][row]
        expected[row, column] = formula(column / last, column)
    assert_same(weigh({"position": params}, stats), expected)


def test_position_of_a_single_token_is_the_start():
    stats = TokenStats(torch.tensor([[True, False]]))
    assert weigh({"position": {"start": 0.5}}, stats).tolist() == [[0.5, 0.0]]


def test_prefix_keeps_the_first_columns():
    """What sampling no further than `length` would keep, whatever is masked."""
    stats = make_stats()
    assert torch.equal(weigh({"prefix": {"length": 4}}, stats), stats.mask.float() * (torch.arange(T) < 4))


@pytest.mark.parametrize("sampled", [False, True])
def test_importance(sampled):
    stats = make_stats()
    if sampled:
        stats.sampler_logprobs = stats.student_logprobs + torch.rand(B, T, dtype=torch.float64)
    behind = stats.sampler_logprobs if sampled else stats.student_logprobs
    expected = torch.zeros(B, T, dtype=torch.float64)
    for row in range(B):
        columns = stats.mask[row].nonzero().flatten().tolist()
        size = [abs(float(stats.teacher_logprobs[row, t] - behind[row, t])) for t in columns]
        for i, t in enumerate(columns):
            expected[row, t] = 1 + 0.3 * (1 - sum(size[:i]) / sum(size))
    weights = weigh({"importance": {"gamma": 0.3}}, stats)
    assert_same(weights, expected)
    assert weights[0, 0] == 1.3 and (weights[0, 1:][stats.mask[0, 1:]] < 1.3).all()


def test_importance_of_agreeing_models_is_uniform():
    stats = make_stats()
    stats.teacher_logprobs = stats.student_logprobs
    assert torch.equal(weigh({"importance": {"gamma": 0.5}}, stats), 1.5 * stats.mask)


@pytest.mark.parametrize("delta", [0.0, 0.2, 1e9])
def test_step_weights_are_the_clipped_product_of_ratios(delta):
    stats, epsilon = make_stats(), 1e-3
    weights = weigh({"step": {"delta": delta, "epsilon": epsilon}}, stats)
    expected = torch.zeros(B, T, dtype=torch.float64)
    for row in range(B):
        turns = {}
        for t in stats.mask[row].nonzero().flatten().tolist():
            turns.setdefault(int(stats.step_index[row, t]), []).append(t)
        drifts = [
            statistics.fmean(abs(float(stats.teacher_logprobs[row, t] - stats.student_logprobs[row, t])) for t in turn)
            for turn in turns.values()
        ]
        for k, turn in enumerate(turns.values()):
            product = math.prod((drifts[u] + epsilon) / (drifts[u + 1] + epsilon) for u in range(k))
            expected[row, turn] = min(product, 1 + delta)
    assert_same(weights, expected)
    assert (weights <= 1 + delta).all()
    assert len(weights[0][stats.mask[0]].unique()) > 1 or delta == 0.0


def test_step_weights_without_turns_or_drift_are_ones():
    stats = make_stats()
    for index in (None, torch.zeros(B, T, dtype=torch.long)):
        stats.step_index = index
        assert torch.equal(weigh("step", stats), stats.mask.double())
    stats = make_stats()
    stats.teacher_logprobs = stats.student_logprobs + 0.5  # equal drift, 0.5 exactly up to rounding
    torch.testing.assert_close(weigh({"step": {"delta": 1e6}}, stats), stats.mask.double())


def test_the_first_turn_is_the_first_that_is_trained():
    stats = make_stats()
    stats.mask[0, :4] = False
    first = weigh("step", stats)[0, 4:6]
    assert torch.equal(first, torch.ones(2, dtype=torch.float64))


def test_step_index_counts_turns_between_tool_outputs():
    tool_mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    mask = torch.arange(9) < torch.tensor([8, 5, 9])[:, None]
    mask[0, 1] = False  # a masked token ends no turn
    expected = [[0, 0, 0, 0, 1, 1, 2, 2, 0], [0, 0, 0, 1, 1, 0, 0, 0, 0], [0] * 9]
    assert step_index_from_tool_mask(tool_mask, mask).tolist() == expected
    assert step_index_from_tool_mask(torch.tensor([[1, 0, 1]]), torch.ones(1, 3)).dtype == torch.int64


def textbook_release_point(series, min_size):
    """Two Gaussian levels against one by BIC, over plain lists."""
    ordered, n = sorted(series), len(series)

    def quantile(q):
        at = q * (n - 1)
        low = math.floor(at)
        return ordered[low] + (at - low) * (ordered[min(low + 1, n - 1)] - ordered[low])

    low, high = quantile(0.05), quantile(0.95)
    x = [min(max(v, low), high) for v in series]
    x = [sorted((x[max(i - 1, 0)], x[i], x[min(i + 1, n - 1)]))[1] for i in range(n)]

    def rss(values):
        mean = sum(values) / len(values)
        return sum((v - mean) ** 2 for v in values)

    splits = [c for c in range(min_size, n - min_size + 1) if sum(x[:c]) / c > sum(x[c:]) / (n - c)]
    if not splits:
        return None
    best = min(splits, key=lambda c: rss(x[:c]) + rss(x[c:]))
    one = n * math.log(rss(x) / n) + 2 * math.log(n)
    two = n * math.log((rss(x[:best]) + rss(x[best:])) / n) + 4 * math.log(n)
    return best if two < one else None


def test_release_point_is_the_textbooks():
    generator = torch.Generator().manual_seed(0)
    found = []
    for case in range(300):
        n = 6 + case % 20
        drop = (torch.arange(n) < n // 2).double() * (case % 5 - 2)
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        series = drop + 0.7 * noise * (1 + 9 * (noise.abs() > 1.5))  # with outliers
        min_size = 2 + case % 3
        if n < 2 * min_size:
            continue
        found.append(release_point(series, min_size))
        assert found[-1] == textbook_release_point(series.tolist(), min_size), case
    assert None in found and len(set(found)) > 5


def steps(*levels):
    """A series of levels, with a wiggle that tells means from medians."""
    return torch.tensor([float(level) + 0.01 * (-1) ** i for i, level in enumerate(levels)], dtype=torch.float64)


def test_release_point_needs_a_drop():
    assert release_point(steps(3, 3, 3, 3, 1, 1, 1)) == 4
    assert release_point(steps(3, 3, 3, 3, 9, 1, 1, 1)) in (4, 5)  # an outlier is smoothed away
    assert release_point(steps(1, 1, 1, 3, 3, 3, 3)) is None  # a rise
    assert release_point(torch.full((12,), 0.1, dtype=torch.float64)) is None
    rounding = 1e-15 * (torch.arange(12) < 6).double()
    assert release_point(0.1 + rounding) is None
    assert release_point(steps(3, 3, 3, 1, 1)) is None  # too short for two regimes
    assert release_point(torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0, 1.0])) == 3  # a perfect fit


def test_prefix_release_drops_the_tokens_after_the_release_point():
    margins = torch.zeros(2, 17)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[0, 5] = False  # 16 tokens are left: 8 blocks of 2
    margins[0, mask[0]] = 3.0 * (torch.arange(16) < 8) + 0.01 * (torch.arange(16) // 2 % 2)
    margins[0, 5] = math.nan
    margins[1] = 2.0
    weights = weigh({"prefix_release": {"block": 2}}, TokenStats(mask, teacher_margin=margins))
    kept = torch.cat([torch.arange(5), torch.arange(6, 9)])
    expected = torch.stack([torch.zeros(17).index_fill(0, kept, 1.0), torch.ones(17)])
    assert torch.equal(weights, expected)
    assert torch.equal(weigh("prefix_release", TokenStats(mask, teacher_margin=margins)), mask.float())


@pytest.mark.parametrize("spec", [*TOKEN_WEIGHTINGS, {"tip": {"fraction": None}}], ids=str)
def test_what_is_outside_the_mask_changes_nothing(spec):
    stats, other = make_stats(), make_stats()
    for i, (name, x) in enumerate(vars(other).items()):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            setattr(other, name, x.nan_to_num(50.0 + 9 * i))
    assert torch.equal(weigh(spec, stats), weigh(spec, other))
    temperatures = [adakd_temperatures(x.hellinger, x.mask) for x in (stats, other)]
    assert torch.equal(*temperatures)


def test_weights_carry_no_gradient():
    stats = make_stats()
    for name in ("student_logprobs", "student_entropy", "hellinger", "divergence", "teacher_margin"):
        setattr(stats, name, getattr(stats, name).nan_to_num(0).requires_grad_())
    for name in TOKEN_WEIGHTINGS:
        assert not weigh(name, stats).requires_grad
    assert not adakd_temperatures(stats.hellinger, stats.mask).requires_grad


@pytest.mark.parametrize("name", TOKEN_WEIGHTINGS)
def test_a_weighting_needs_what_it_says(name):
    """It runs on the statistics that it names, and on nothing less; of the others it asks for none."""
    (resolved,) = resolve_token_weighting(name)
    full = make_stats()
    wanted = {need: getattr(full, need) for need in resolved.needs}
    stats = TokenStats(full.mask, **wanted)
    if name == "step":
        stats.step_index = full.step_index  # that there is none says that there are no tools
    assert torch.equal(token_weights([resolved], stats), token_weights([resolved], full))
    assert set(resolved.statistics) <= set(resolved.needs)
    for need in resolved.needs:
        with pytest.raises(ValueError, match=f"TokenStats.{need} must be known to weigh by it, got None"):
            token_weights([resolved], TokenStats(full.mask, **{**wanted, need: None}))


def test_resolved_requests():
    def one(spec):
        (resolved,) = resolve_token_weighting(spec)
        return resolved

    assert one({"selectkd": {"k": 3}}).statistics == {"accepted": 3}
    speculative = one({"selectkd": {"mode": "speculative"}})
    assert speculative.statistics == {} and speculative.needs == LOGPROBS
    assert one({"entropy_gate": {"side": "teacher"}}).needs == ("teacher_entropy",)
    assert one("adakd").statistics == {"hellinger": None}
    assert one({"prefix_release": {"k": 4.0}}).statistics == {"teacher_margin": 4}
    assert [name for name in TOKEN_WEIGHTINGS if one(name).signed] == ["direction_adaptive"]
    assert rollout_only(resolve_token_weighting({"position": {}, "prefix": {"length": 5}}))
    assert not rollout_only(resolve_token_weighting({"position": {}, "tsd_kd": {}}))
    assert not rollout_only(resolve_token_weighting(half))


def half(stats, share=0.5):
    return torch.full(stats.mask.shape, share)


class Signed:
    signed, needs, statistics = True, ("hellinger", "accepted"), {"accepted": 4, "hellinger": None}

    def __call__(self, stats):
        return -stats.hellinger


def test_functions_of_the_users_own():
    stats = make_stats()
    assert torch.equal(weigh(half, stats), 0.5 * stats.mask)
    assert torch.equal(weigh("test_token_weights.half", stats), 0.5 * stats.mask)
    both = {"test_token_weights.half": {"share": 0.25}, "entropy_gate": {"above": 0.8}}
    assert torch.equal(weigh(both, stats), 0.25 * weigh({"entropy_gate": {"above": 0.8}}, stats))
    (resolved,) = resolve_token_weighting(Signed())
    assert resolved.signed and not resolved.local and resolved.needs == ("hellinger", "accepted")
    assert resolved.statistics == {"accepted": 4, "hellinger": None}
    assert (weigh(Signed(), stats)[stats.mask] < 0).all()
    keep = weigh(lambda stats: stats.student_entropy > 1.0, stats)  # boolean gates are weights
    assert torch.equal(keep, (stats.mask & (stats.student_entropy > 1.0)).float())


BAD_SPECS = {
    "name": ("entropy_gat", r"token_weighting must be a known name .* 'entropy_gat'\. Did you mean 'entropy_gate'\?"),
    "type": (3, "token_weighting must be a name, .* got 3"),
    "parameters": ({"adakd": 0.5}, r"token_weighting\['adakd'\] must be a mapping of parameters, got 0.5"),
    "parameter": (
        {"selectkd": {"kk": 1}},
        r"token_weighting\['selectkd'\] has 'kk', but selectkd takes k, beta, mode",
    ),
    "no parameter": ({"tsd_kd": {"k": 1}}, "tsd_kd takes no parameters"),
    "range": ({"selectkd": {"beta": 1.5}}, r"\['selectkd'\]\['beta'\] must be in \[0, 1\], got 1.5"),
    "bool": ({"importance": {"gamma": True}}, r"\['gamma'\] must be a finite number of at least 0, got True"),
    "nan": ({"direction_adaptive": {"threshold": math.nan}}, r"\['threshold'\] must be a number, got nan"),
    "half a token": ({"selectkd": {"k": 2.5}}, r"\['k'\] must be a whole number of at least 1, got 2.5"),
    "margin of one": ({"prefix_release": {"k": 1}}, r"\['k'\] must be a whole number of at least 2, got 1"),
    "empty": ({"adakd": {"fraction": 0}}, r"\['fraction'\] must be in \(0, 1\], got 0"),
    "side": ({"entropy_gate": {"side": "both"}}, r"\['side'\] must be one of 'student', 'teacher', got 'both'"),
    "ratio": ({"position": {"decay": "exponential"}}, r"\['position'\] must have start and end above 0 .* end=0.0"),
    "module": ("no_such_module.weights", "token_weighting must be the import path of a function, got 'no_such_module"),
    "attribute": ("math.weights", "token_weighting must be the import path of a function, got 'math.weights'"),
    "value": ("math.pi", "got 'math.pi', a float"),
}


@pytest.mark.parametrize("case", BAD_SPECS.values(), ids=BAD_SPECS)
def test_bad_specs(case):
    spec, message = case
    with pytest.raises(ValueError, match=message):
        resolve_token_weighting(spec)


def test_bad_weights():
    stats = make_stats()

    def at(value):
        def weights(stats):
            return torch.ones(stats.mask.shape).index_put_((torch.tensor(1), torch.tensor(4)), torch.tensor(value))

        return weights

    for value, message in (
        (math.nan, r"token_weighting 'weights' must return finite weights, got nan at \(1, 4\)"),
        (INF, r"'weights' must return finite weights, got inf at \(1, 4\)"),
        (-1.0, r"'weights' must return weights of at least 0, got -1 at \(1, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            weigh(at(value), stats)
    with pytest.raises(ValueError, match=r"'<lambda>' must return a tensor of shape \(3, 9\), got shape \(9,\)"):
        weigh(lambda stats: torch.ones(T), stats)
    with pytest.raises(ValueError, match="got float"):
        weigh(lambda stats: 1.0, stats)
    stats.mask[1, 4] = False  # outside the mask nothing is wrong, and nothing weighs
    assert torch.equal(weigh(at(math.nan), stats), stats.mask.float())
