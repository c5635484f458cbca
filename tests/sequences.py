"""The truth for `test_credit.py` and `test_returns.py`: all sequences of two tokens, and returns token by token."""

import itertools

import torch
from textbook import reverse_kl

V = 5
SEQUENCES = list(itertools.product(range(V), repeat=2))
EVERY_TOKEN = torch.ones(V * V, 2, dtype=torch.bool)
# All; a tool's tokens in the middle and padding; none; one
ROWS = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0]]
MASK = torch.tensor(ROWS, dtype=torch.bool)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_steps():
    """A student and a teacher over sequences of two tokens: logits of the first, and of the second given the first."""
    student = [normal(V, seed=4).requires_grad_(), normal(V, V, seed=5).requires_grad_()]
    return student, [normal(V, seed=6).softmax(-1), normal(V, V, seed=7).softmax(-1)]


def along(first, second):
    """What belongs to the two tokens of all V² sequences, `(V², 2)`, of `(V,)` and `(V, V)`."""
    return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in SEQUENCES])


def mean_gradient(student, advantages):
    """Of the policy gradient with given advantages `(V², 2)`, over all sequences."""
    ours = along(*(z.log_softmax(-1) for z in student))
    loss = -(ours.detach().sum(-1).exp()[:, None] * advantages * ours).sum()
    return torch.autograd.grad(loss, student)


def frozen_prefix_loss(student, teacher):
    """Σ_t KL(s_t‖t_t) over visited prefixes that are held fixed."""
    first, second = (z.softmax(-1) for z in student)
    return reverse_kl(first, teacher[0]) + (first.detach() * reverse_kl(second, teacher[1])).sum()


def sequence_loss(student, teacher):
    """KL between the distributions of whole sequences."""
    first, second = (z.softmax(-1) for z in student)
    return reverse_kl((first[:, None] * second).flatten(), (teacher[0][:, None] * teacher[1]).flatten())


def by_hand(gap, mask, discount, horizon, normalize_length, from_next):
    """Token by token."""
    expected = torch.zeros_like(gap)
    for b, t in mask.nonzero().tolist():
        later = [i for i in range(t + from_next, gap.shape[1]) if mask[b, i]][:horizon]
        total = sum(discount ** (i - t - from_next) * gap[b, i] for i in later)
        expected[b, t] = total / (max(len(later), 1) if normalize_length else 1)
    return expected
