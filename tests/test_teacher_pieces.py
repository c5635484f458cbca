"""A teacher's own positions and micro-batches: the answers stay those of each sequence alone."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from memory_cases import LENGTHS, MODELS, logprobs, make_batch, make_gpt2, prepared
from tiny import make_model
from torch import nn
from transformers import Qwen3Config, XLNetConfig

from trl_opd import LocalTeacher
from trl_opd.heads import add_head_branch
from trl_opd.teachers import pieces
from trl_opd.teachers.scoring import score_with

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    return request.param()


def alone(model, batch):
    """Each sequence by itself, without any padding: log-probs of its completion tokens `(C, V)`."""
    answers = []
    with torch.no_grad():
        for prompt, completion in batch.sequences():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
            answers.append(logits[len(prompt) - 1 : -1].double().log_softmax(-1))
    return answers


def assert_as_alone(scores, batch, model):
    ours = logprobs(scores, batch)
    for i, (row, expected) in enumerate(zip(ours, alone(model, batch), strict=True)):
        assert len(expected) == LENGTHS[i][1]
        torch.testing.assert_close(row[: len(expected)], expected, **TOLERANCE)


# Positions


def test_with_a_prompt_of_its_own_a_teacher_answers_as_to_each_sequence_alone(model):
    batch = make_batch(own_prompt=True)
    assert_as_alone(prepared(LocalTeacher(model))(batch), batch, model)


def test_with_the_students_prompt_a_teacher_runs_as_the_student_does(model):
    batch = make_batch()
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        scores = prepared(LocalTeacher(model))(batch)
        ours = model.get_output_embeddings()(scores.hidden_states)
    assert torch.equal(
        ours[batch.completion_mask], logits[:, -batch.num_completion_tokens - 1 : -1][batch.completion_mask]
    )


class NoPositions(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, input_ids, attention_mask, **kwargs):
        self.seen.append(kwargs.keys())
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def test_a_model_that_takes_no_positions_is_given_none():
    inner = make_model().eval()
    add_head_branch(inner)
    outer = NoPositions(inner)
    score_with(outer, make_batch(own_prompt=True))
    assert outer.seen == [{"head_call"}]


# Micro-batches of its own


@pytest.mark.parametrize("own_prompt", [False, True], ids=["student's prompt", "own prompt"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_pieces_answer_as_the_whole(model, size, own_prompt):
    batch = make_batch(own_prompt)
    whole = prepared(LocalTeacher(model))(batch)
    teacher = prepared(LocalTeacher(model, batch_size=size))
    seen = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    answer = teacher(batch)
    handle.remove()
    assert answer.hidden_states.shape == whole.hidden_states.shape
    torch.testing.assert_close(logprobs(answer, batch), logprobs(whole, batch), **TOLERANCE)
    if own_prompt:
        assert_as_alone(answer, batch, model)
    assert [rows for rows, _ in seen] == [size] * (5 // size) + [5 % size] * (5 % size > 0)
    if size == 1:  # nothing but real tokens
        assert sorted(width for _, width in seen) == sorted(sum(pair) for pair in LENGTHS)


@pytest.mark.parametrize("size", [2, 5])
def test_sampled_tokens_in_pieces(model, size):
    batch = make_batch(support="sampled", temperature=0.7)
    whole = prepared(LocalTeacher(model))(batch).sampled_logprobs
    answer = prepared(LocalTeacher(model, batch_size=size))(batch).sampled_logprobs
    mask = batch.completion_mask
    torch.testing.assert_close(answer[mask], whole[mask], **TOLERANCE)
    assert whole[mask].abs().min() > 0


def test_a_batch_that_is_small_enough_is_not_touched(model):
    batch = make_batch()
    whole = prepared(LocalTeacher(model))(batch)
    answer = prepared(LocalTeacher(model, batch_size=5))(batch)
    assert torch.equal(answer.hidden_states, whole.hidden_states)


def test_images_are_not_split():
    batch = make_batch()
    batch.model_inputs = {"pixel_values": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"cannot be split between teachers.*without teacher_batch_size"):
        prepared(LocalTeacher(make_model(), batch_size=2))(batch)


def test_a_completion_without_tokens_has_a_column():
    batch = make_batch(lengths=[(2, 1), (4, 1)])
    batch.attention_mask[:, -1] = 0
    batch.completion_mask[:] = False
    answer = prepared(LocalTeacher(make_model(), batch_size=1))(batch)
    assert answer.hidden_states.shape == (2, 1, 16)


def test_padding_outside_the_pieces_is_zero():
    batch = make_batch()
    answer = pieces.assemble(
        [(torch.tensor([1]), prepared(LocalTeacher(make_model()))(batch.select(torch.tensor([1]))))], (5, 7)
    )
    assert not answer.hidden_states[[0, 2, 3, 4]].any()


# What a teacher says of itself


def test_the_longest_sequence_is_that_of_the_configuration(tmp_path):
    assert LocalTeacher(make_gpt2()).max_length == 40
    model = make_model(max_position_embeddings=123)
    assert LocalTeacher(model).max_length == 123
    model.save_pretrained(tmp_path)
    assert LocalTeacher(str(tmp_path)).max_length == 123  # before anything is loaded
    assert not LocalTeacher(model).changes


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "linear", "factor": 2.0}, 240),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 15}, 120),
        ({"rope_type": "default"}, 120),
    ],
)
def test_a_scaled_rotary_embedding_reaches_further(rope, limit):
    teacher = LocalTeacher(make_model())
    teacher._config = Qwen3Config(max_position_embeddings=120)
    teacher._config.rope_parameters = rope
    assert teacher.max_length == limit
    teacher._config.rope_parameters = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    assert teacher.max_length == limit


def test_the_longest_sequence_may_be_unknown():
    teacher = LocalTeacher(make_model())
    teacher._config = XLNetConfig()
    assert teacher.max_length is None


@pytest.fixture
def mixed_precision():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("size", [None, 2])
def test_hidden_states_keep_the_dtype_of_the_teacher_under_mixed_precision(mixed_precision, size):
    teacher = prepared(LocalTeacher(make_model().bfloat16(), batch_size=size), mixed_precision)
    assert teacher(make_batch()).hidden_states.dtype == torch.bfloat16
    assert teacher(make_batch(support="sampled")).sampled_logprobs.dtype == torch.float32
