"""Rows of a cache: what goes in comes out, and each answer belongs to one question."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from caches import contents, make_samples, meta

from trl_opd import TeacherBatch
from trl_opd.teachers import CachedTeacher, TeacherScoreError
from trl_opd.teachers.cache import Answer, CacheMeta, CacheReader, CacheWriter, Question
from trl_opd.teachers.keeping import make_question

CPU = torch.device("cpu")


def write(folder, samples, meta, size=5, **kwargs):
    with CacheWriter(folder, meta, **kwargs) as writer:
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            writer.write([q for q, _ in part], {writer.key(q): a for q, a in part})
    return CacheReader(folder)


def ask(teacher, questions, **fields):
    return teacher(replace(make_question(questions, teacher.meta, CPU), **fields))


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("vocab_size", [51, None, 65535, 65536, 151936])
def test_float32_scores_come_back_bit_by_bit(tmp_path, compression, vocab_size):
    samples = make_samples(17)
    reader = write(tmp_path, samples, meta(vocab_size=vocab_size, compression=compression))
    assert len(reader) == 17
    for question, answer in samples:
        row = reader[reader.meta.key(question.prompt_ids, question.completion_ids)]
        assert row.prompt_ids.tolist() == question.prompt_ids
        assert row.completion_ids.tolist() == question.completion_ids
        assert row.teacher_prompt_ids is None
        assert np.array_equal(row.answer.topk_ids, answer.topk_ids)
        assert np.array_equal(row.answer.topk_logprobs, answer.topk_logprobs)
        assert np.array_equal(row.answer.sampled_logprobs, answer.sampled_logprobs)


def test_ids_take_two_bytes_where_they_fit_and_four_elsewhere():
    assert meta(vocab_size=65535).id_type == pa.uint16()
    assert meta(vocab_size=65536).id_type == pa.int32()
    assert meta(vocab_size=None).id_type == pa.int32()


@pytest.mark.parametrize("vocab_size", [51, 70000])
def test_padding_of_a_short_support_stays_padding(tmp_path, vocab_size):
    answer = Answer(np.array([[3, -1, -1, -1], [4, 5, -1, -1]]), np.log(np.array([[0.9, 1, 1, 1], [0.5, 0.25, 1, 1]])))
    question = Question([1, 2], [3, 4])
    for dtype in ("float32", "float16"):
        folder = tmp_path / dtype
        write(folder, [(question, answer)], meta(vocab_size=vocab_size, logprob_dtype=dtype))
        scores = ask(CachedTeacher(folder), [question])
        assert scores.topk_ids.tolist() == [[[3, -1, -1, -1], [4, 5, -1, -1]]]
        real = scores.topk_ids >= 0
        torch.testing.assert_close(scores.topk_logprobs[real].exp(), torch.tensor([0.9, 0.5, 0.25]), atol=3e-4, rtol=0)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    question, answer = make_samples(1)[0]
    with pytest.raises(ValueError, match="ids must be below the vocabulary's size of 51, got 65535"):
        write(tmp_path, [(Question([65535], question.completion_ids), answer)], meta())


def test_half_precision_keeps_the_tail(tmp_path):
    """Rounding moves each log-prob by its 2^-11 part, but not their sum, of which a small tail would be lost."""
    torch.manual_seed(0)
    samples, tails = [], []
    for i in range(20):
        logprobs = (8 * torch.randn(3, 51, dtype=torch.float64)).log_softmax(-1)
        top = logprobs.topk(8, -1)
        samples.append((Question([i], [1, 2, 3]), Answer(top.indices.numpy(), top.values.float().numpy())))
        tails.append(1 - top.values.exp().sum(-1))
    tails = torch.stack(tails)
    assert ((tails > 1e-7) & (tails < 1e-4)).any()
    write(tmp_path, samples, meta(support_size=8, logprob_dtype="float16"))
    scores = ask(CachedTeacher(tmp_path), [q for q, _ in samples])
    exact = torch.tensor(np.stack([a.topk_logprobs for _, a in samples]))
    error = (scores.topk_logprobs - exact).abs() / (exact.abs() + 1e-3)
    assert 0 < error.max() < 1.5e-3
    rest = 1 - scores.topk_logprobs.double().exp().sum(-1)
    assert (rest - tails).abs().max() < 3e-7  # float32's own resolution
    rounded = 1 - exact.half().double().exp().sum(-1)
    assert (rounded - tails).abs().max() > 1e-4


def test_the_asked_k_is_the_top_of_the_stored_k(tmp_path):
    samples = make_samples(6)
    write(tmp_path, samples, meta())
    teacher = CachedTeacher(tmp_path)
    questions = [q for q, _ in samples]
    whole, few = ask(teacher, questions), ask(teacher, questions, support_size=2)
    assert few.topk_ids.shape[-1] == 2
    for i, (question, answer) in enumerate(samples):
        tokens = len(question.completion_ids)
        assert np.array_equal(few.topk_ids[i, :tokens], answer.topk_ids[:, :2])
        assert np.array_equal(few.topk_logprobs[i, :tokens], answer.topk_logprobs[:, :2])
        assert np.array_equal(whole.topk_ids[i, :tokens], answer.topk_ids)
        assert np.array_equal(whole.sampled_logprobs[i, :tokens], answer.sampled_logprobs)
    full = ask(teacher, questions, support="full")
    assert torch.equal(full.topk_ids, whole.topk_ids)
    sampled = ask(teacher, questions, support="sampled")
    assert sampled.topk_ids is None
    assert torch.equal(sampled.sampled_logprobs, whole.sampled_logprobs)


def test_a_cache_of_sampled_log_probs_holds_nothing_else(tmp_path):
    samples = [(q, Answer(sampled_logprobs=a.sampled_logprobs)) for q, a in make_samples(6)]
    write(tmp_path, samples, meta(support="sampled"))
    scores = ask(CachedTeacher(tmp_path), [q for q, _ in samples])
    assert scores.topk_ids is None
    for i, (question, answer) in enumerate(samples):
        assert np.array_equal(scores.sampled_logprobs[i, : len(question.completion_ids)], answer.sampled_logprobs)


def test_an_answer_is_given_to_its_own_question_alone(tmp_path):
    samples = make_samples(4)
    write(tmp_path, samples, meta())
    teacher = CachedTeacher(tmp_path)
    question = samples[2][0]
    assert len(question.completion_ids) > 1
    changed = [
        Question([*question.prompt_ids, 7], question.completion_ids),
        Question(question.prompt_ids[:-1], [question.prompt_ids[-1], *question.completion_ids]),  # the same text
        Question(question.prompt_ids, question.completion_ids[:-1]),
        Question(question.prompt_ids, [*question.completion_ids[:-1], (question.completion_ids[-1] + 1) % 51]),
        Question(question.prompt_ids, question.completion_ids, teacher_prompt_ids=[1, 2, 3]),
    ]
    ask(teacher, [question])
    for other in changed:
        with pytest.raises(TeacherScoreError, match="has no scores for 1 of 2 samples; the first is batch row 1"):
            ask(teacher, [question, other])
    with pytest.raises(TeacherScoreError, match=r"at temperature 1.0 cannot answer for temperature 0.5"):
        ask(teacher, [question], temperature=0.5)


def test_the_key_depends_on_all_that_the_scores_depend_on():
    base = meta()
    others = [
        meta(teacher="another"),
        meta(weights="abc"),
        meta(temperature=0.9),
        meta(support="sampled"),
        meta(support_size=5),
        meta(vocab_size=52),
        meta(vocabulary="abc"),
    ]
    keys = {m.key([1, 2], [3]) for m in [base, *others]}
    assert len(keys) == len(others) + 1
    assert meta(logprob_dtype="float16", compression="zstd").key([1, 2], [3]) == base.key([1, 2], [3])
    # Where the weights are known, the path they lie at does not matter
    assert meta(weights="abc", teacher="here").key([1], [2]) == meta(weights="abc", teacher="there").key([1], [2])


def test_a_view_of_the_teacher_is_part_of_the_question(tmp_path):
    (_, one), (_, other) = make_samples(2)
    one, other = ((Answer(a.topk_ids[:1], a.topk_logprobs[:1], a.sampled_logprobs[:1])) for a in (one, other))
    plain, hinted = Question([5, 6], [7]), Question([5, 6], [7], teacher_prompt_ids=[5, 9, 9, 6])
    reader = write(tmp_path, [(plain, one), (hinted, other)], meta())
    scores = ask(CachedTeacher(tmp_path), [plain, hinted])
    assert np.array_equal(scores.topk_ids[:, 0], [one.topk_ids[0], other.topk_ids[0]])
    row = reader[reader.meta.key([5, 9, 9, 6], [7])]
    assert row.prompt_ids.tolist() == [5, 6]
    assert row.teacher_prompt_ids.tolist() == [5, 9, 9, 6]


def test_a_sample_without_a_token_to_score_needs_no_scores(tmp_path):
    samples = make_samples(3)
    write(tmp_path, samples[:2], meta())
    batch = make_question([q for q, _ in samples], meta(), CPU)
    batch.completion_mask[2] = False
    scores = CachedTeacher(tmp_path)(batch)
    assert torch.isfinite(scores.topk_logprobs).all()
    batch.completion_mask[:] = False
    assert CachedTeacher(tmp_path)(batch).topk_ids is not None


def test_images_are_refused(tmp_path):
    samples = make_samples(2)
    write(tmp_path, samples, meta())
    with pytest.raises(TeacherScoreError, match="Stored scores are those of text, but the batch has"):
        ask(CachedTeacher(tmp_path), [samples[0][0]], model_inputs={"pixel_values": torch.zeros(1)})


def test_more_shards_than_files_that_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_opd.teachers.cache.reader._OPEN_SHARDS", 2)
    samples = make_samples(9)
    write(tmp_path, samples, meta(), size=1)
    teacher = CachedTeacher(tmp_path)
    scores = ask(teacher, [q for q, _ in samples])
    assert len(teacher.reader._open) == 2
    for i, (_, answer) in enumerate(samples):
        assert np.array_equal(scores.sampled_logprobs[i, : len(answer.sampled_logprobs)], answer.sampled_logprobs)


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for compression in ("none", "zstd"):
        for name in ("one", "other"):
            write(tmp_path / compression / name, make_samples(12), meta(compression=compression))
        assert contents(tmp_path / compression / "one") == contents(tmp_path / compression / "other")


def test_other_formats_and_wrong_values_are_named(tmp_path):
    write(tmp_path, make_samples(1), meta())
    text = (tmp_path / "meta.json").read_text()
    (tmp_path / "meta.json").write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"meta.json must be of format 1, got 2"):
        CachedTeacher(tmp_path)
    for fields, message in [
        ({"support": "student_top_k"}, "support must be one of"),
        ({"logprob_dtype": "float8"}, "logprob_dtype must be one of"),
        ({"compression": "lz4"}, "compression must be one of"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"support_size": 0}, "support_size must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            CacheMeta(**{"teacher": "t", **fields})
    with pytest.raises(ValueError, match="must be a folder that `trl-opd score` wrote"):
        CachedTeacher(tmp_path / "nowhere")


def test_a_batch_of_the_trainer_is_found_whatever_its_padding(tmp_path):
    samples = make_samples(3)
    write(tmp_path, samples, meta())
    teacher = CachedTeacher(tmp_path)
    tight = ask(teacher, [q for q, _ in samples])
    batch = make_question([q for q, _ in samples], meta(), CPU)
    left, right = torch.full((3, 3), 50), torch.full((3, 2), 50)
    wide = TeacherBatch(
        input_ids=torch.cat([left, batch.input_ids, right], 1),
        attention_mask=torch.cat([left * 0, batch.attention_mask, right * 0], 1),
        position_ids=torch.zeros(3, 1),
        completion_ids=torch.cat([batch.completion_ids, right], 1),
        completion_mask=torch.cat([batch.completion_mask, right.bool() & False], 1),
        support="teacher_top_k",
        support_size=4,
    )
    scores = teacher(wide)
    width = batch.completion_ids.shape[1]
    for i, (question, _) in enumerate(samples):
        tokens = len(question.completion_ids)
        assert torch.equal(scores.topk_ids[i, :tokens], tight.topk_ids[i, :tokens])
    assert scores.topk_ids.shape == (3, width + 2, 4)
