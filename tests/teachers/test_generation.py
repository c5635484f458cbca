"""Completions that a teacher writes: from its own distribution, with its own weights, as the student samples."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from rollout_fakes import EOS, Writer, ids_of, make_trainer
from tiny import VOCAB_SIZE, make_model
from trl.trainer.utils import use_adapter

from trl_opd.teachers import AdapterTeacher, LocalTeacher, MixtureTeacher, RoutedTeacher, SelfTeacher
from trl_opd.teachers.answers import TeacherScoreError
from trl_opd.teachers.generation import Sampling, generate_from_teacher, why_no_generation


def make_generating_trainer(**fields):
    trainer = make_trainer()
    accelerator = Accelerator(cpu=True)
    defaults = {
        "accelerator": accelerator,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "shared_vocab_size": None,
        "is_fsdp_enabled": False,
        "is_deepspeed_enabled": False,
        "max_completion_length": 1,
    }
    vars(trainer).update({**defaults, **fields})
    trainer.args.cache_implementation = trainer.args.generation_kwargs = None
    trainer.args.gradient_checkpointing_kwargs = None
    return trainer


def first_token_probabilities(model, prompt, temperature=1.0):
    with torch.no_grad():
        return (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)


def assert_sampled_from(completions, probabilities):
    """Frequencies of first tokens within five standard deviations."""
    counts = torch.bincount(torch.tensor([row[0] for row in completions]), minlength=len(probabilities)).double()
    num = len(completions)
    spread = (num * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - num * probabilities).abs() <= 5 * spread + 1).all()
    assert probabilities.max() < 0.9  # or there is nothing to see


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_local_teacher_writes_from_its_own_distribution(temperature):
    teacher = LocalTeacher(make_model(hidden_size=24, seed=1))
    trainer = make_generating_trainer(temperature=temperature)
    short, long = ids_of("ab"), ids_of("hello world")
    torch.manual_seed(0)
    completions = generate_from_teacher(teacher, trainer, [short, long] * 2000)
    assert all(len(row) == 1 for row in completions)
    for prompt, part in ((short, completions[::2]), (long, completions[1::2])):
        assert_sampled_from(part, first_token_probabilities(teacher.model, prompt, temperature))


def spy(model):
    """Shapes of what a model is asked for, and of what it writes."""
    shapes, generate = [], model.generate

    def keep(input_ids, **kwargs):
        output = generate(input_ids=input_ids, **kwargs)
        shapes.append((len(input_ids), output.shape[1] - input_ids.shape[1]))
        return output

    model.generate = keep
    return shapes


def test_the_pieces_of_a_batch_are_in_order():
    teacher = LocalTeacher(make_model(hidden_size=24, seed=1), offload=None)
    teacher.batch_size = 3
    trainer = make_generating_trainer(max_completion_length=4, temperature=1e-4)
    prompts = [ids_of(text) for text in ("a", "bc", "def", "g", "hi", "jkl", "m")]
    whole = [generate_from_teacher(teacher, trainer, [prompt])[0] for prompt in prompts]
    shapes = spy(teacher.model)
    assert generate_from_teacher(teacher, trainer, prompts) == whole and len({tuple(row) for row in whole}) > 3
    assert [rows for rows, _ in shapes] == [3, 3, 1]


def test_the_teacher_stops_where_its_turn_ends():
    teacher, prompt = LocalTeacher(make_model(hidden_size=24, seed=1)), ids_of("ab")
    teacher.model.generation_config.eos_token_id = int(first_token_probabilities(teacher.model, prompt).argmax())
    shapes = spy(teacher.model)
    trainer = make_generating_trainer(max_completion_length=20, temperature=1e-4)
    assert generate_from_teacher(teacher, trainer, [prompt]) == [[EOS]] and shapes == [(1, 1)]


@pytest.mark.parametrize("offload", ["model", "layers"])
def test_weights_that_wait_elsewhere_write_the_same(offload):
    trainer = make_generating_trainer(max_completion_length=4, temperature=1e-4, environments=None)
    trainer.args.cast_lm_head_to_fp32 = False
    prompts = [ids_of(text) for text in ("a", "bc", "def", "g", "hi")]
    completions = []
    for where in (None, offload):
        teacher = LocalTeacher(make_model(hidden_size=24, seed=1), offload=where)
        teacher.prepare(trainer)
        completions.append(generate_from_teacher(teacher, trainer, prompts))
    assert completions[0] == completions[1]


def test_base_and_self_write_with_their_own_weights():
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    trainer = make_generating_trainer(model=model, model_wrapped=model)
    model.train()
    base = AdapterTeacher()
    base._trainer = trainer
    frozen, live = SelfTeacher(), SelfTeacher("live")
    for teacher in (frozen, live):
        teacher.prepare(trainer)
    prompt = ids_of("hello")
    start = first_token_probabilities(model, prompt)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.mul_(-3.0)
    now = first_token_probabilities(model, prompt)
    with use_adapter(model, None):
        bare = first_token_probabilities(model, prompt)
    assert min((a - b).abs().max() for a, b in ((start, now), (now, bare), (start, bare))) > 0.05
    torch.manual_seed(0)
    for teacher, probabilities in ((base, bare), (frozen, start), (live, now)):
        assert_sampled_from(generate_from_teacher(teacher, trainer, [prompt] * 3000), probabilities)
        assert torch.equal(first_token_probabilities(model, prompt), now) and model.training


def test_what_the_student_does_not_know_is_never_written():
    teacher = LocalTeacher(make_model(hidden_size=24, seed=1, vocab_size=VOCAB_SIZE + 30))
    trainer = make_generating_trainer(shared_vocab_size=40)
    prompt = ids_of("ab")
    torch.manual_seed(0)
    completions = generate_from_teacher(teacher, trainer, [prompt] * 3000)
    known = first_token_probabilities(teacher.model, prompt)[:40]
    assert_sampled_from(completions, known / known.sum())


def test_a_teachers_own_end_becomes_the_students():
    model = make_model(hidden_size=24, seed=1)
    model.generation_config.eos_token_id = list(range(10, 30))  # of which the student knows none
    teacher, trainer = LocalTeacher(model), make_generating_trainer(max_completion_length=20)
    torch.manual_seed(0)
    completions = generate_from_teacher(teacher, trainer, [ids_of("ab")] * 50)
    ended = [row for row in completions if row[-1] == EOS]
    assert len(ended) > 20
    assert not any(10 <= token < 30 for row in completions for token in row)
    assert all(EOS not in row[:-1] for row in completions)
    assert all(len(row) == 20 for row in completions if row[-1] != EOS)


def test_a_teacher_of_ones_own_is_asked_with_the_students_settings():
    teacher = Writer([5, 6, EOS, 7], [8] * 9)
    trainer = make_generating_trainer(max_completion_length=4, temperature=0.7, top_p=0.9, top_k=-1)
    assert generate_from_teacher(teacher, trainer, [[3], [4]]) == [[5, 6, EOS], [8, 8, 8, 8]]
    ((prompts, sampling),) = teacher.asked
    assert prompts == [[3], [4]]
    expected = {"max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "eos_token_ids": (EOS,)}
    assert expected.items() <= vars(sampling).items() and isinstance(sampling, Sampling)
    assert generate_from_teacher(teacher, trainer, []) == [] and len(teacher.asked) == 1


@pytest.mark.parametrize("completions", [([],), ([99],), ([-1],)])
def test_a_completion_that_is_none_is_refused(completions):
    with pytest.raises(TeacherScoreError, match="Teacher 'writer' must write one completion of known ids"):
        generate_from_teacher(Writer(*completions), make_generating_trainer(shared_vocab_size=50), [[3]])


def test_routed_teachers_write_for_their_own_samples():
    teacher = RoutedTeacher({"math": Writer([5]), "code": Writer([6])})
    assert why_no_generation(teacher) is None
    trainer = make_generating_trainer()
    assert generate_from_teacher(teacher, trainer, [[3], [4], [7]], [1, 0, 1]) == [[6], [5], [6]]
    assert teacher.members[1].asked[0][0] == [[3], [7]]


def test_teachers_that_cannot_write_say_why():
    def score(batch):
        raise AssertionError

    assert "writes none" in why_no_generation(score)
    assert "mixture" in why_no_generation(MixtureTeacher([Writer([1]), Writer([2])]))
    assert "'a'" in why_no_generation(RoutedTeacher({"b": Writer([1]), "a": score}))
    with pytest.raises(TeacherScoreError, match="cannot write completions"):
        generate_from_teacher(score, make_generating_trainer(), [[3]])
    trainer = make_generating_trainer(is_fsdp_enabled=True)
    with pytest.raises(TeacherScoreError, match="under FSDP"):
        generate_from_teacher(LocalTeacher(make_model()), trainer, [[3]])
