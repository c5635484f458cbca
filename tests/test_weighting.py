"""Weights of the one reduction against GRPO's own loss, and the tokens that leave the loss."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from tiny import SPECIAL, make_tokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_opd.weighting import mask_token_ids, reduction_weights, special_token_ids

LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
MAX_COMPLETION_LENGTH, NUM_PROCESSES, NUM_ITEMS = 7, 3, 41
MASKS = {
    "uneven": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [0, 1, 0, 0, 0]],
    "one empty sequence": [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
    "nothing": [[0, 0, 0], [0, 0, 0]],
}


def grpo_weights(mask, loss_type, training, accumulation, steps_per_generation):
    """
    The weight that `GRPOTrainer._compute_loss` gives each token: minus the gradient of its loss in the token's
    log-prob, at advantage 1 and ratio 1. The method runs on a stand-in for the trainer.
    """
    args = GRPOConfig(output_dir="unused", report_to="none", use_cpu=True, per_device_train_batch_size=8)
    args.steps_per_generation = steps_per_generation
    logps = torch.zeros(mask.shape, requires_grad=True)
    trainer = SimpleNamespace(
        args=args,
        accelerator=SimpleNamespace(
            num_processes=NUM_PROCESSES, gather=lambda x: x.reshape(-1), reduce=lambda x, reduction: x
        ),
        model=SimpleNamespace(training=training),
        loss_type=loss_type,
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=5.0,  # CISPO takes it as a bound on the ratio itself
        use_vllm=False,
        aux_loss_enabled=False,
        max_completion_length=MAX_COMPLETION_LENGTH,
        current_gradient_accumulation_steps=accumulation,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros(mask.shape), None),
        # VESPO multiplies the token's loss by a weight of the whole sequence, which is no part of the reduction
        get_gamma_weights=lambda **kwargs: torch.ones(len(mask), 1),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 2, dtype=torch.long),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": torch.ones(len(mask)),
        "num_items_in_batch": torch.tensor(float(NUM_ITEMS)),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return -torch.autograd.grad(loss, logps)[0]


def ours(mask, loss_type, training=True, accumulation=4, steps_per_generation=2, num_items=NUM_ITEMS):
    return reduction_weights(
        mask,
        loss_type,
        num_items=torch.tensor(float(num_items)),
        num_processes=NUM_PROCESSES,
        max_completion_length=MAX_COMPLETION_LENGTH,
        accumulation=accumulation if training else 1.0,
        steps_per_generation=steps_per_generation if training else 1.0,
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_are_those_of_grpo(loss_type, training, mask):
    mask = torch.tensor(mask, dtype=torch.bool)
    weights = ours(mask, loss_type, training)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, grpo_weights(mask, loss_type, training, 4, 2))
    assert (weights[~mask] == 0).all()


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("dapo", [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]]),
        ("bnpo", [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]]),
        ("grpo", [[1 / 4, 1 / 4, 0], [1 / 2, 0, 0]]),
        ("dr_grpo", [[1 / 14, 1 / 14, 0], [1 / 14, 0, 0]]),
        ("luspo", [[1 / 2, 1 / 2, 0], [1 / 2, 0, 0]]),
    ],
)
def test_weights_by_hand(loss_type, expected):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    weights = ours(mask, loss_type, training=False, num_items=3 * NUM_PROCESSES)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_token_mean_weights_sum_to_one_over_processes_and_micro_batches():
    """Gradients are averaged over processes and summed over micro-batches: Σ weights of all must be their number."""
    micro_batches = [torch.arange(5) < torch.tensor(n)[:, None] for n in ([5, 1], [2, 0], [3, 4])]
    num_items = sum(int(m.sum()) for m in micro_batches)
    weights = [ours(m, "dapo", accumulation=1, steps_per_generation=1, num_items=num_items) for m in micro_batches]
    assert float(sum(w.sum() for w in weights)) / NUM_PROCESSES == pytest.approx(1.0)


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="loss_type must be one of GRPO's, got 'ppo'"):
        ours(torch.ones(1, 2, dtype=torch.bool), "ppo")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize(
    ("tokens", "names"),
    [
        ([], []),
        (["special"], ["<pad>", "<eos>"]),
        (["added"], SPECIAL),
        (["<think>", "</think>"], ["<think>", "</think>"]),
        (["a", "<eos>", "a"], ["<eos>", "a"]),
        (["7"], ["7"]),
        (["special", "<think>"], ["<pad>", "<eos>", "<think>"]),
    ],
)
def test_ids_of_masked_tokens(tokenizer, tokens, names):
    assert special_token_ids(tokens, tokenizer) == sorted(tokenizer.convert_tokens_to_ids(names))


def test_ids_and_their_digits_are_ids(tokenizer):
    assert special_token_ids([5, "13", 2], tokenizer) == [2, 5, 13]


def test_a_string_of_several_tokens_is_refused_with_the_nearest_token(tokenizer):
    with pytest.raises(ValueError, match=r"special_token_masking must hold single tokens .* '<thinking>'.*'<think>'"):
        special_token_ids(["<thinking>"], tokenizer)


def test_masked_ids_leave_the_mask_and_nothing_else_changes():
    ids = torch.tensor([[3, 5, 3, 7], [5, 5, 1, 0]])
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]], dtype=torch.bool)
    expected = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(mask_token_ids(mask, ids, [0, 5]), expected)
    assert torch.equal(mask_token_ids(mask, ids, []), mask)


def test_the_first_occurrence_of_each_id_leaves_the_mask():
    ids = torch.tensor([[3, 5, 3, 5, 7, 3], [5, 5, 5, 3, 3, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    # of row 2, the first 5 is a tool's: the first of the loss counts
    expected = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(mask_token_ids(mask, ids, [3, 5], "first"), expected)
    assert torch.equal(mask_token_ids(mask, ids, [9], "first"), mask)
    assert torch.equal(mask_token_ids(mask, ids, [], "first"), mask)
