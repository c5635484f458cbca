"""
The recipes' losses by hand: a value for each token, over full float64 log-probs, with the numbers of the papers.

Nothing here uses trl_opd. Each formula maps a [`Scene`] to values `(B, T)`, or to values and the mask of the tokens
they are a mean over.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import textbook
import torch
from steps import forward_kl, full_logprobs, jsd, loss_mask, reverse_kl, sampled
from tiny import make_tokenizer
from torch import Tensor


class Scene:
    """
    A micro-batch as the models see it. Log-probs are `(B, T, V)`, those of sampled tokens `(B, T)`.

    Args:
        inputs: The micro-batch.
        model: The student, with gradient.
        teachers, references: The models that it is compared with.
        temperature: At which all of them are taken.
    """

    def __init__(
        self, inputs: dict[str, Any], model: Any, teachers: list[Any], references: list[Any], temperature: float
    ):
        self.inputs, self.temperature = inputs, temperature
        view = {**inputs}
        for name in ("ids", "mask"):
            view[f"prompt_{name}"] = inputs.get(f"teacher_prompt_{name}", inputs[f"prompt_{name}"])
        self.s = full_logprobs(model, inputs, temperature)
        with torch.no_grad():
            self.teachers = [full_logprobs(m, view, temperature) for m in teachers]
            self.references = [full_logprobs(m, view, temperature) for m in references]
            self.view, self.models = view, teachers
        self.t = self.teachers[0]
        if "teacher_index" in inputs:
            index = inputs["teacher_index"][:, None, None]
            self.t = torch.where(index == 0, self.teachers[0], self.teachers[1])
        self.mask = loss_mask(inputs)

    @property
    def own(self) -> Tensor:
        return sampled(self.s, self.inputs)

    @property
    def other(self) -> Tensor:
        return sampled(self.t, self.inputs)

    @property
    def gap(self) -> Tensor:
        """ℓ, the teacher's minus the student's log-prob."""
        return (self.other - self.own).detach()

    @property
    def gap_then(self) -> Tensor:
        """ℓ from the student that sampled."""
        return self.other - self.inputs["old_per_token_logps"]

    @property
    def ratio(self) -> Tensor:
        """ρ, the student to the one that sampled."""
        return (self.own - self.inputs["old_per_token_logps"]).exp().detach()

    @property
    def ours(self) -> Tensor:
        """Whether the student sampled the completion, `(B, 1)`."""
        return self.inputs["on_policy"][:, None]

    @property
    def rewards(self) -> Tensor:
        return self.inputs["rewards"][:, None].double()

    @property
    def rates(self) -> Tensor:
        """Share of the group that passes; each prompt comes once."""
        return (self.inputs["group_rewards"] >= 0.5).double().mean(1, keepdim=True)

    @property
    def entropy(self) -> Tensor:
        return -(self.s.exp() * self.s).sum(-1)

    @property
    def teacher_entropy(self) -> Tensor:
        return -(self.t.exp() * self.t).sum(-1)

    def grpo(self, whitened: bool = True) -> Tensor:
        """GRPO's advantages, `(B, 1)`."""
        group = self.inputs["group_rewards"].double()
        centred = self.rewards - group.mean(1, keepdim=True)
        return centred / (group.std(1, keepdim=True) + 1e-4) if whitened else centred

    def surrogate(self, advantages: Tensor) -> Tensor:
        """−ρ A with ρ = 1 at the start of a step."""
        return -advantages.detach() * (self.own - self.own.detach()).exp()

    def white(self, values: Tensor) -> Tensor:
        kept = values[self.mask.bool()]
        return (values - kept.mean()) / (kept.std(correction=0) + 1e-4)


def normal(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


def take(x: Scene, ids: Tensor) -> tuple[Tensor, Tensor]:
    return x.s.gather(-1, ids), x.t.gather(-1, ids)


def bucketed(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """One more entry for the rest."""
    s, t = (torch.cat([p, torch.log1p(-p.exp().sum(-1, keepdim=True))], -1) for p in (s, t))
    return s, t


def total_variation(x: Scene) -> Tensor:
    return 0.5 * (x.s.exp() - x.t.exp()).abs().sum(-1)


def plain(x: Scene) -> Tensor:
    return reverse_kl(x.s, x.t)


def supervised(x: Scene) -> Tensor:
    return forward_kl(x.s, x.t)


def opd(x: Scene) -> Tensor:
    return x.surrogate(x.gap)


def half_jsd(x: Scene) -> Tensor:
    return jsd(x.s, x.t, 0.5)


def distillm2(x: Scene) -> Tensor:
    s, t = x.s.exp(), x.t.exp()
    on_ours = textbook.skew_reverse_kl(s, t, 0.1, detached=1)
    return torch.where(x.ours, on_ours, textbook.skew_forward_kl(s, t, 0.1))


def revisiting(x: Scene) -> tuple[Tensor, Tensor]:
    s, t = (normal(p) for p in take(x, x.t.topk(32).indices))
    mask, ids = x.mask.clone(), x.inputs["completion_ids"]
    for special in (0, 1):  # the tokenizer's are padding and end: the first of each
        for row in range(len(ids)):
            where = ((ids[row] == special) & x.mask[row].bool()).nonzero()
            if len(where):
                mask[row, where[0]] = 0.0
    assert 0 < (x.mask - mask).sum() < x.mask.bool().logical_and(ids < 2).sum(), "each comes once at most"
    return reverse_kl(s, t), mask


def rethinking(x: Scene) -> Tensor:
    return reverse_kl(*(normal(p) for p in take(x, x.s.detach().topk(16).indices)))


def following(values: Tensor) -> Tensor:
    """Sum of the values behind each."""
    return values.flip(1).cumsum(1).flip(1) - values


def minillm(x: Scene) -> Tensor:
    gap = x.gap * x.mask
    returns = following(gap) / following(x.mask).clamp(min=1)
    return plain(x) + x.surrogate(x.white(returns * x.mask))


def reopold(x: Scene) -> Tensor:
    kept = x.entropy[x.mask.bool()].sort(descending=True).values
    chosen = x.entropy >= kept[math.floor(0.2 * len(kept)) - 1]
    assert bool((chosen & x.mask.bool() & (x.gap < -2.2)).any())
    return x.surrogate(chosen * x.gap.clamp(min=-2.2))


def top_16(x: Scene) -> Tensor:
    return forward_kl(*take(x, x.t.topk(16).indices))


def eopd(x: Scene) -> Tensor:
    unsure = x.teacher_entropy > 0.8
    assert 0 < unsure[x.mask.bool()].double().mean() < 1
    return opd(x) + unsure * top_16(x)


def aopd(x: Scene) -> Tensor:
    return x.surrogate(x.gap.clamp(min=0)) + (x.gap <= 0) * top_16(x)


def teacher_logits(x: Scene) -> Tensor:
    ids, mask = (torch.cat([x.view[f"prompt_{k}"], x.inputs[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    with torch.no_grad():
        logits = x.models[0](input_ids=ids, attention_mask=mask).logits.double()
    return logits[:, x.view["prompt_ids"].shape[1] - 1 : -1]


def bellman(x: Scene, steps: int) -> Tensor:
    """Sums of q(s_t, y_t) − max q(s_{t+K}, ·) over every K-th token."""
    logits = teacher_logits(x)
    q, best = sampled(logits, x.inputs), logits.max(-1).values
    returns = torch.zeros_like(q)
    for row in range(len(q)):
        size = int(x.mask[row].sum())
        for t in range(size):
            for k in range(t, size, steps):
                returns[row, t] += q[row, k] - (best[row, k + steps] if k + steps < size else 0.0)
    return returns


def importance(x: Scene) -> Tensor:
    size = x.gap.abs() * x.mask
    before = size.cumsum(1) - size
    return x.surrogate((1.5 - 0.5 * before / size.sum(1, keepdim=True)) * x.gap)


def aligned(x: Scene) -> Tensor:
    r = x.references[0]
    w = 15 * (x.t.exp() - r.exp()).abs().sum(-1, keepdim=True) + 1e-3
    return reverse_kl(x.s, normal(x.t + w * (x.t - r))) / w[..., 0]


def adakd(x: Scene) -> Tensor:
    h = (0.5 * ((0.5 * x.s).exp() - (0.5 * x.t).exp()).square().sum(-1)).sqrt().detach()
    tau = (-0.5 * torch.tanh((h / h[x.mask.bool()].median()).log())).exp()[..., None]
    return tau[..., 0].square() * reverse_kl(normal(x.s / tau), normal(x.t / tau))


def selectkd(x: Scene) -> Tensor:
    accepted = (x.t.topk(5).indices == x.s.detach().argmax(-1, keepdim=True)).any(-1)
    assert 0 < accepted[x.mask.bool()].double().mean() < 1
    return torch.where(accepted, 1.0, 0.01) * plain(x)


def tsd_kd(x: Scene) -> Tensor:
    return torch.sigmoid(x.entropy - x.teacher_entropy).detach() * jsd(x.s, x.t, 0.9)


def ptsf(x: Scene) -> Tensor:
    """The teacher of this test grows flat at the completion's token 64."""
    return x.surrogate((torch.arange(x.gap.shape[1]) < 64) * x.gap)


def tip(x: Scene) -> Tensor:
    mask, scaled = x.mask.bool(), []
    for value in (x.entropy, plain(x)):
        low, high = value[mask].min(), value[mask].max()
        scaled.append(((value - low) / (high - low)).detach())
    score = 1 - (1 - scaled[0]) * (1 - scaled[1])
    values = score[mask].sort(descending=True).values
    kept = len(values) // 2
    return (score >= values[kept - 1]) * plain(x) * len(values) / kept


def idft(x: Scene) -> Tensor:
    weight = 0.1 + 0.9 * torch.sigmoid(-(x.own + x.entropy)).detach()
    return weight * supervised(x)


def brts(x: Scene) -> Tensor:
    return torch.where(x.ours, 1.0, 0.05) * reverse_kl(*bucketed(*take(x, x.t.topk(16).indices)))


def freshness(x: Scene) -> Tensor:
    then = x.inputs.get("sampling_per_token_logps", x.own.detach())
    drift = ((x.own.detach() - then).abs() * x.mask).sum(1, keepdim=True) / x.mask.sum(1, keepdim=True)
    assert bool((drift[~x.ours] > 1e-3).all()) and bool((drift[x.ours] < 1e-9).all())
    return torch.exp(-drift) * plain(x)


def stable(x: Scene) -> Tensor:
    """The student's start is the first of the references."""
    change = sampled(x.references[0], x.inputs) - x.own
    held = (change.exp() - change - 1) * (x.own - x.own.detach()).exp()  # TRL's use_bias_correction_kl
    return torch.where(x.ours, plain(x), supervised(x)) + 0.01 * held


def sdpo(x: Scene) -> Tensor:
    return jsd(*bucketed(*take(x, x.s.detach().topk(100).indices)), 0.5)


def top_256(x: Scene) -> Tensor:
    return reverse_kl(*take(x, x.s.detach().topk(256).indices))


def sdft(x: Scene) -> Tensor:
    return forward_kl(*bucketed(*take(x, x.t.topk(20).indices)))


def ssopd(x: Scene) -> Tensor:
    return 4 * x.rates * (1 - x.rates) * (x.rewards < 1) * plain(x)


def paced(x: Scene) -> Tensor:
    """The second stage, on the student's own completions."""
    return x.rates * (1 - x.rates) * plain(x)


def gates(x: Scene) -> Tensor:
    """The answer of a completion is how many digits it has."""
    digits = torch.tensor(make_tokenizer()("0123456789")["input_ids"])
    answers = (torch.isin(x.inputs["completion_ids"], digits) & x.mask.bool()).sum(1)
    return (answers.bincount().max() >= len(answers) / 2) * plain(x)


def direction(x: Scene) -> Tensor:
    assert bool((x.gap[x.mask.bool()].abs() > 5).any())
    return x.surrogate(torch.where(x.entropy <= 1, 1.0, -0.5) * x.gap.clamp(-5, 5))


def sod(x: Scene) -> Tensor:
    own = x.inputs["tool_mask"]
    weights = torch.ones_like(x.gap)
    for row in range(len(own)):
        first, start = None, 0
        while start < own.shape[1]:
            end = start
            while end < own.shape[1] and own[row, end] == own[row, start]:
                end += 1
            turn = x.mask[row, start:end].bool()
            if own[row, start] and turn.any():
                drift = x.gap[row, start:end][turn].abs().mean() + 1e-6
                first = drift if first is None else first
                weights[row, start:end] = (first / drift).clamp(max=1.2)
            start = end
    assert bool((weights[x.mask.bool()] != 1).any())
    return x.surrogate(x.grpo() + weights * x.gap)


def in_band(x: Scene) -> Tensor:
    inside = (x.ratio >= 0.5) & (x.ratio <= 5)
    assert 0 < inside[x.mask.bool()].double().mean() < 1
    return x.ratio * inside


def rlad(x: Scene, anchor: float = 0.5) -> Tensor:
    ratio = (x.own - anchor * x.own.detach() - (1 - anchor) * x.other).exp()
    a = x.grpo()
    return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)


def rlsd(x: Scene) -> Tensor:
    a = x.grpo()
    return x.surrogate(a * (0.5 + 0.5 * (a.sign() * x.gap).exp().clamp(0.8, 1.2)))


def on_success(x: Scene, injected: int) -> Tensor:
    """Where nobody passes, the last of the group are the teacher's."""
    failed = not bool(x.rewards[x.ours].any())
    assert (~x.ours).sum() == (injected if failed else 0)
    return x.surrogate(x.grpo()) + (x.rewards >= 1) * half_jsd(x)


def luffy(x: Scene) -> Tensor:
    assert (~x.ours).sum() == 1
    p = x.own.exp()
    a = x.grpo(whitened=False)
    shaped = p / (p + 0.1)
    # Beside the gradient of f the value is that of the surrogate, −weight · A at ratio 1
    weight = (0.1 * p / (p + 0.1).square()).detach()
    shaped = shaped - shaped.detach() + weight
    return torch.where(x.ours, x.surrogate(a), -a * shaped) - 0.001 * x.entropy


def tilted(x: Scene) -> Tensor:
    gap = x.gap * x.mask
    group = x.inputs["group_rewards"].double()
    others = (group.sum(1, keepdim=True) - x.rewards) / (group.shape[1] - 1)
    return x.surrogate(following(gap) + gap + x.rewards - others)


FORMULAS: Mapping[str, Callable[[Scene], Any]] = {
    "gkd": half_jsd,
    "dagger": supervised,
    "offline_rl_kd": plain,
    "kl_mixing": lambda x: 0.5 * supervised(x) + 0.5 * plain(x),
    "distillm2": distillm2,
    "f_distill_js": half_jsd,
    "f_distill_tvd": total_variation,
    "todi": lambda x: textbook.todi(x.s.exp(), x.t.exp(), 1.0),
    "akl": lambda x: textbook.adaptive_kl(x.s.exp(), x.t.exp(), 0.5),
    "csd": lambda x: textbook.concrete_score(x.s.exp(), x.t.exp(), "student", "uniform"),
    "distillspec": total_variation,
    "revisiting_opd": revisiting,
    "rethinking_opd": rethinking,
    "opd": opd,
    "minillm": minillm,
    "vopd": lambda x: x.surrogate(x.gap + plain(x)),
    "opd_plus": lambda x: x.surrogate(0.5 * ((1 + x.gap.exp()) / 2).log()),
    "power_opd": lambda x: x.surrogate((0.5 * x.other).exp() - (0.5 * x.own).exp()),
    "reopold": reopold,
    "eopd": eopd,
    "ketchup": lambda x: x.surrogate(x.white(bellman(x, 4))),
    "iw_opd": importance,
    "glm5": lambda x: x.surrogate(in_band(x) * x.gap_then),
    "lightning_opd": lambda x: reverse_kl(*bucketed(*take(x, x.t.topk(64).indices))),
    "exopd": lambda x: x.surrogate(1.25 * x.other - 0.25 * sampled(x.references[0], x.inputs) - x.own),
    "direct_opd": lambda x: x.surrogate(x.other - sampled(x.references[0], x.inputs)),
    "delta_kd": lambda x: forward_kl(x.s, normal(x.references[1] + x.t - x.references[0])),
    "taid": lambda x: forward_kl(x.s, normal(0.6 * x.s.detach() + 0.4 * x.t)),
    "veto": lambda x: forward_kl(x.s, normal(x.t + 0.8 * x.s.detach())),
    "aligndistil": aligned,
    "adakd": adakd,
    "selectkd": selectkd,
    "tsd_kd": tsd_kd,
    "ptsf": ptsf,
    "tip": tip,
    "aopd": aopd,
    "paced": paced,
    "f_opd": freshness,
    "idft": idft,
    "distillm": lambda x: textbook.skew_reverse_kl(x.s.exp(), x.t.exp(), 0.1),
    "fast_opd": plain,
    "stable_opd": stable,
    "brts": brts,
    "minitron": supervised,
    "gemma2": supervised,
    "qwen3": plain,
    "deepseek_v4": lambda x: 0.3 * reverse_kl(x.s, x.teachers[0]) + 0.7 * reverse_kl(x.s, x.teachers[1]),
    "mad_opd": lambda x: 0.3 * jsd(x.s, x.teachers[0], 0.5) + 0.7 * jsd(x.s, x.teachers[1], 0.5),
    "x_opd": opd,
    "video_opd": opd,
    "opsd": half_jsd,
    "opsdc": plain,
    "sdpo": sdpo,
    "opcd": top_256,
    "oel": top_256,
    "sdft": sdft,
    "opct": plain,
    "ophsd": plain,
    "ssopd": ssopd,
    "gates": gates,
    "direction_adaptive": direction,
    "kdrl": lambda x: x.surrogate(x.grpo()) + 0.002 * 0.5 * (x.other - x.own).square(),
    "sod": sod,
    "mimo": lambda x: x.surrogate(in_band(x) * (x.grpo() + x.gap_then)),
    "nemotron_cascade2": lambda x: x.surrogate(x.ratio.clamp(max=2) * x.gap_then),
    "rlad": rlad,
    "rlsd": rlsd,
    "kepo": lambda x: on_success(x, 2),
    "hdpo": lambda x: on_success(x, 1),
    "pi_distill": lambda x: x.surrogate(x.grpo() + x.gap),
    "luffy": luffy,
    "vold": lambda x: x.surrogate(x.grpo() + x.gap),
    "reward_tilt": tilted,
    "codistill_grpo": lambda x: x.surrogate(x.white(x.grpo(whitened=False) + x.gap)),
}
