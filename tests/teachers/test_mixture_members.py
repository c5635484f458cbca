"""What the members of a mixture may be: paths, adapters, the student; and what is compared before they are loaded."""

import pytest
import steps as steps_module
import torch
from mixture_training import WEIGHTS, assert_as_by_hand, mixed_value, of_model
from routed_runs import routed_prompts, topk_teacher, wide, wider
from self_runs import adapted, trained
from steps import build, full_logprobs, student
from tiny import CHARACTERS, VOCAB_SIZE, make_model, make_tokenizer
from transformers import Qwen3ForCausalLM

from trl_opd.teachers import MixtureTeacher, SelfTeacher, TeacherScoreError

FOLLOWING = {
    "ema": {"sync": "ema", "rate": 0.3},
    "every_n": {"sync": "every_n", "steps": 2},
    "live": {"sync": "live"},
}


def save(folder, model, **tokenizer):
    model.save_pretrained(folder)
    written = make_tokenizer(tokenizer.pop("characters", CHARACTERS))
    for key, value in tokenizer.items():
        setattr(written, key, value)
    written.save_pretrained(folder)
    return str(folder)


def test_a_path_given_twice_is_loaded_once(tmp_path, monkeypatch):
    path, other = save(tmp_path / "wide", wide()), save(tmp_path / "wider", wider())
    loaded = []
    original = Qwen3ForCausalLM.from_pretrained.__func__

    def from_pretrained(cls, name, *args, **kwargs):
        loaded.append(str(name))
        return original(cls, name, *args, **kwargs)

    monkeypatch.setattr(Qwen3ForCausalLM, "from_pretrained", classmethod(from_pretrained))
    teacher = MixtureTeacher([path, other, path], [0.1, 0.7, 0.2])
    assert_as_by_hand(
        tmp_path, teacher, mixed_value([of_model(wide()), of_model(wider())], "arithmetic", steps_module.reverse_kl)
    )
    assert loaded == [path, other]


@pytest.mark.parametrize("member", ["base", "self"])
@pytest.mark.parametrize("mixture", ["arithmetic", "geometric", "loss_sum"])
def test_the_student_before_the_run_beside_a_path(tmp_path, mixture, member):
    path = save(tmp_path / "wide", wide())
    start = adapted().unload() if member == "base" else adapted()
    value = mixed_value([of_model(start), of_model(wide())], mixture, steps_module.reverse_kl)
    assert_as_by_hand(tmp_path, MixtureTeacher([member, path], WEIGHTS, mixture), value, adapted)


def following(make, sync, steps=1, rate=1.0):
    """The value of `WEIGHTS` of `wide()` and the student of some steps ago; called once an optimizer step."""
    theirs, step = make(), 0
    mine = trained(theirs)

    def value(model, inputs):
        nonlocal step
        if step and (sync == "live" or step % steps == 0):
            with torch.no_grad():
                for name, p in trained(model).items():
                    mine[name].copy_((1 - rate) * mine[name] + rate * p)
        step += 1
        members = [of_model(wide()), of_model(theirs)]
        return mixed_value(members, "arithmetic", steps_module.reverse_kl)(model, inputs)

    return value


@pytest.mark.parametrize("make", [student, adapted], ids=["full", "lora"])
@pytest.mark.parametrize("fields", FOLLOWING.values(), ids=FOLLOWING.keys())
def test_the_student_of_some_steps_ago_beside_a_model(tmp_path, fields, make):
    teacher = MixtureTeacher([wide(), SelfTeacher(**fields)], WEIGHTS)
    assert_as_by_hand(tmp_path, teacher, following(make, **fields), make, max_steps=4)


@pytest.mark.parametrize("told", [{"teacher_sync": "ema"}, {"teacher_sync": "every_n", "teacher_sync_steps": 2}])
def test_a_setting_that_a_member_does_not_follow_is_refused(tmp_path, told):
    for members in (["self", wide()], [SelfTeacher("ema", rate=0.3), wide()]):
        with pytest.raises(ValueError, match="teacher_sync must be unset with a SelfTeacher"):
            build(tmp_path, teacher=MixtureTeacher(members), **told)
    with pytest.raises(ValueError, match="teacher_sync must be 'frozen' unless"):
        build(tmp_path, teacher=MixtureTeacher([wider(), wide()]), **told)
    build(tmp_path, teacher=MixtureTeacher([SelfTeacher("ema"), wide()]), teacher_sync="ema")


def test_a_checkpoint_has_room_for_the_weights_of_one_self(tmp_path):
    with pytest.raises(ValueError, match="must follow the student in one way"):
        build(tmp_path, teacher=MixtureTeacher([SelfTeacher("ema"), SelfTeacher("every_n")]))
    for other in (SelfTeacher("live"), SelfTeacher("ema")):
        build(tmp_path, teacher=MixtureTeacher([SelfTeacher("ema"), other]))


def test_load_arguments_that_would_be_ignored_are_refused(tmp_path):
    teacher = MixtureTeacher([wide(), wider()])
    with pytest.raises(ValueError, match="teacher_model_init_kwargs must be unset when teacher_model is a Mixture"):
        build(tmp_path, teacher=teacher, teacher_model_init_kwargs={"dtype": "float32"})


def test_a_member_of_several_mixtures_is_prepared_once(tmp_path):
    """Twice it would follow the student twice."""
    shared = SelfTeacher("ema", rate=0.3)
    teachers = {"a": MixtureTeacher([wide(), shared], WEIGHTS), "b": MixtureTeacher([shared, wide()], WEIGHTS[::-1])}
    value = following(student, "ema", rate=0.3)
    assert_as_by_hand(tmp_path, teachers, value, prompts=routed_prompts, max_steps=4)
    for teachers in (
        {"a": shared, "b": MixtureTeacher([shared, wide()])},
        {"b": MixtureTeacher([shared]), "a": shared},
    ):
        trainer = build(tmp_path, teacher=teachers, arguments={"train_dataset": routed_prompts()})
        assert sum(type(c).__name__ == "_Follow" for c in trainer.callback_handler.callbacks) == 1


def of_padded(teacher, size):
    """The views of a model whose vocabulary is compared in its leading entries."""

    def views(model, inputs):
        s, t = (full_logprobs(m, inputs)[..., :size].log_softmax(-1) for m in (model, teacher))
        return s, t.detach()

    return views


@pytest.mark.parametrize(
    ("mixture", "routed"), [("arithmetic", False), ("geometric", False), ("loss_sum", False), ("arithmetic", True)]
)
@pytest.mark.parametrize(
    ("sizes", "unknown", "shared"),
    [((2, 7), (0, 0), 0), ((7, -3), (0, 3), -3), ((-3, 4), (3, 0), -3)],
)
def test_the_vocabulary_is_what_all_members_know(tmp_path, sizes, unknown, shared, mixture, routed):
    """The student's head has 7 rows of padding; members have as many, others, or do not know the last characters."""
    models, paths = [], []
    for i, (more, fewer) in enumerate(zip(sizes, unknown, strict=True)):
        models.append(make_model(hidden_size=24 + 8 * i, seed=i + 1, vocab_size=VOCAB_SIZE + more).double())
        paths.append(save(tmp_path / str(i), models[i], characters=CHARACTERS[: len(CHARACTERS) - fewer]))
    teacher = MixtureTeacher(paths, WEIGHTS, mixture)
    pairs = [of_padded(model, VOCAB_SIZE + shared) for model in models]
    trainer, _ = assert_as_by_hand(
        tmp_path,
        dict.fromkeys("ab", teacher) if routed else teacher,
        mixed_value(pairs, mixture, steps_module.reverse_kl),
        lambda: student(vocab_size=VOCAB_SIZE + 7),
        prompts=routed_prompts,
    )
    assert trainer.shared_vocab_size == VOCAB_SIZE + shared


def test_members_that_read_one_prompt_must_render_it_alike(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    paths = [save(tmp_path / "a", wide()), save(tmp_path / "b", wider(), chat_template=template)]
    arguments = {"train_dataset": routed_prompts()}
    for teacher in (MixtureTeacher(paths), {"a": paths[0], "b": MixtureTeacher(paths)}):
        with pytest.raises(ValueError, match="teacher_processing_class must be given for a mixture"):
            build(tmp_path, teacher=teacher, arguments=arguments)
        build(tmp_path, teacher=teacher, arguments=arguments, teacher_chat_template="student")
        told = make_tokenizer() if isinstance(teacher, MixtureTeacher) else {"b": make_tokenizer()}
        build(tmp_path, teacher=teacher, arguments={**arguments, "teacher_processing_class": told})
    build(tmp_path, teacher={"a": paths[0], "b": MixtureTeacher([paths[1], paths[1]])}, arguments=arguments)


def test_every_member_is_compared_with_the_student(tmp_path):
    paths = [save(tmp_path / "a", wide()), save(tmp_path / "b", wider(), characters=CHARACTERS[::-1])]
    for members in (paths, paths[::-1]):
        with pytest.raises(ValueError, match="id 6 is"):
            build(tmp_path, teacher=MixtureTeacher(members))
    with pytest.raises(ValueError, match="needs a PEFT student"):
        build(tmp_path, teacher=MixtureTeacher(["base", paths[0]]))


@pytest.mark.parametrize("mixture", ["arithmetic", "geometric", "loss_sum", "with top-k"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_broken_member_stops_the_run(tmp_path, mixture, place):
    broken = wide()
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    other = topk_teacher if mixture == "with top-k" else wider()
    members = [broken, other] if place == 0 else [other, broken]
    teacher = MixtureTeacher(members, WEIGHTS, "loss_sum" if mixture == "with top-k" else mixture)
    with pytest.raises(TeacherScoreError, match="not finite: nan at completion token 0 of batch row 0"):
        build(tmp_path, teacher=teacher).train()
