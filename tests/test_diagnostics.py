"""Diagnostics of a log line equal the textbook, whatever the micro-batches, and never stand in a run's way."""

import math
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from steps import build, full_logprobs, loss_mask, record, reverse_kl, sampled, take_step
from tiny import VOCAB_SIZE, make_model
from transformers import TrainerCallback

from trl_opd import diagnostics
from trl_opd.collators import TeacherScores
from trl_opd.diagnostics import completions, derived, position_edges, throughput
from trl_opd.metrics import TokenMetrics

ALONE = SimpleNamespace(num_processes=1, is_main_process=True)
PG = {"credit": "policy_gradient", "support": "sampled"}
NEW = {"distill/entropy_gap", "distill/overlap_advantage", "distill/teacher_rank", "distill/rejected_share"}
NEW |= {"distill/tokens_per_second", "completions/repetition", "completions/repetitive_share"}
NEW |= {"completions/distinct_share", "completions/empty_share"}
LABELS = ["00000-00007", "00008-00015", "00016-00023"]


def wide():
    return make_model(hidden_size=24, seed=1).double()


def writer():
    """A student whose completions are a few to 24 tokens long."""
    model = make_model().double()
    model.generation_config.eos_token_id = [1, 2, 3]
    return model


def take(path, **kwargs):
    """A step over completions that reach into the third bucket of positions."""
    fields = {"model": writer(), "teacher": wide(), "max_completion_length": 24, **kwargs}
    return take_step(path, **fields)


def some_reward(completion_ids, **kwargs):
    return [None if sum(ids) % 4 == 0 else float(sum(ids) % 7) for ids in completion_ids]


def weights_of_ids(stats):
    """Token weights that are spread over four octaves, none near half or twice their mean."""
    return 2.0 ** ((stats.completion_ids % 5).double() - 2)


def known_of(step, model=None, teacher=None, masks=None):
    """Full log-probs of both models, masks and inputs of a step's micro-batches, as rows of one table of tokens."""
    tokens = []
    for i, inputs in enumerate(step.batches):
        with torch.no_grad():
            s, t = (full_logprobs(m, inputs) for m in (model or writer(), teacher or wide()))
        mask = loss_mask(inputs) if masks is None else masks[i]
        for row, column in mask.bool().nonzero().tolist():
            token = int(inputs["completion_ids"][row, column])
            own = s[row, column], t[row, column]
            tokens.append(SimpleNamespace(s=own[0], t=own[1], id=token, position=column, row=(i, row)))
    assert len(tokens) > 20
    return tokens


def overlap_advantage(s, t, k=16):
    common = sorted({*s.topk(k).indices.tolist()} & {*t.topk(k).indices.tolist()})
    if not common:
        return 0.0
    s, t = (x[common].log_softmax(-1) for x in (s, t))
    return float((s.exp() * (t - s)).sum() / len(common))


def entropy(x):
    return -float((x.exp() * x).sum())


def gap(token):
    return float(token.t[token.id] - token.s[token.id])


def rank(token):
    return 1 + int((token.t > token.t[token.id]).sum())


def kl(token):
    return float(reverse_kl(token.s, token.t))


def assert_positions(logs, name, tokens, value):
    found = set()
    for i, label in enumerate(LABELS):
        inside = [value(token) for token in tokens if token.position // 8 == i]
        if inside:
            assert logs[f"distill/{name}_at/{label}"] == pytest.approx(np.mean(inside), rel=1e-5)
            found.add(f"distill/{name}_at/{label}")
    assert {key for key in logs if key.startswith(f"distill/{name}_at")} == found


@pytest.mark.parametrize("masked", [(), ("<eos>", *range(6, 20))], ids=["all", "masked"])
def test_tokens_equal_the_textbook(tmp_path, masked):
    step = take(tmp_path, special_token_masking=[*masked] or None, gradient_accumulation_steps=2)
    left_out = torch.tensor([1 if m == "<eos>" else m for m in masked], dtype=torch.long)
    masks = [loss_mask(b) * ~torch.isin(b["completion_ids"], left_out) for b in step.batches]
    assert len(masks) == 2
    tokens, logs = known_of(step, masks=masks), step.logs
    means = {
        "entropy_gap": [abs(entropy(x.t) - entropy(x.s)) for x in tokens],
        "overlap_advantage": [overlap_advantage(x.s, x.t) for x in tokens],
        "rejected_share": [rank(x) > 16 for x in tokens],
    }
    for name, values in means.items():
        assert logs[f"distill/{name}"] == pytest.approx(np.mean(values), rel=1e-5), name
    assert logs["distill/teacher_rank"] == pytest.approx(np.exp(np.mean([math.log(rank(x)) for x in tokens])))
    assert 0 < logs["distill/rejected_share"] < 1
    assert_positions(logs, "gap", tokens, gap)
    assert_positions(logs, "reverse_kl", tokens, kl)
    assert logs["distill/reverse_kl_at/00016-00023"] != logs["distill/reverse_kl_at/00000-00007"]


def test_a_window_of_two_steps_is_one_mean_and_ranks_are_of_the_logged_step(tmp_path):
    step = take(tmp_path, max_steps=2, logging_steps=2, learning_rate=0.0)
    tokens, logs = known_of(step), step.logs
    last = [x for x in tokens if x.row[0] == 1]
    assert len(step.batches) == 2 and 0 < len(last) < len(tokens)
    gaps = [abs(entropy(x.t) - entropy(x.s)) for x in tokens]
    assert logs["distill/entropy_gap"] == pytest.approx(np.mean(gaps), rel=1e-5)
    assert_positions(logs, "gap", tokens, gap)
    assert logs["distill/teacher_rank"] == pytest.approx(np.exp(np.mean([math.log(rank(x)) for x in last])))
    assert logs["distill/rejected_share"] == pytest.approx(np.mean([rank(x) > 16 for x in last]))


REWARDED = {"arguments": {"reward_funcs": some_reward}, "num_generations": 2, "reward_coef": 0.1}


@pytest.mark.parametrize(
    "fields",
    [{}, {"token_weighting": "test_diagnostics.weights_of_ids", **REWARDED}, {**PG, **REWARDED}],
    ids=["plain", "weights and rewards", "policy gradient"],
)
def test_the_micro_batching_changes_nothing(tmp_path, fields):
    sizes = {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    whole, parts = (take(tmp_path, **fields, **size) for size in sizes)
    assert len(parts.batches) == 4 * len(whole.batches) == 4
    names = [name for name in whole.logs if name.startswith(("distill/", "completions/")) and "second" not in name]
    assert {name for name in parts.logs if name.startswith(("distill/", "completions/"))} >= {*names}
    for name in names:
        assert parts.logs[name] == pytest.approx(whole.logs[name], rel=1e-6, abs=1e-9), name


def list_teacher(batch):
    """Four entries, the sampled token third, last or absent, by its id."""
    ids = batch.completion_ids[..., None] + torch.tensor([1, 2, 0, 3])
    ids = torch.where(batch.completion_ids[..., None] % 3 == 1, ids[..., [0, 1, 3, 2]], ids)
    ids = torch.where(batch.completion_ids[..., None] % 3 == 2, ids + 4, ids) % VOCAB_SIZE
    return TeacherScores(topk_ids=ids, topk_logprobs=torch.tensor([0.4, 0.3, 0.15, 0.1]).log().expand(ids.shape))


def test_ranks_of_a_list_end_behind_it(tmp_path):
    step = take(tmp_path, teacher=list_teacher)
    ranks = [3 + x.id % 3 for x in known_of(step)]  # absent: 5
    assert {3, 4, 5} == {*ranks}
    assert step.logs["distill/teacher_rank"] == pytest.approx(np.exp(np.mean(np.log(ranks))))
    assert step.logs["distill/rejected_share"] == pytest.approx(np.mean([r == 5 for r in ranks]))
    assert "distill/gap_at/00000-00007" not in step.logs and "distill/reverse_kl_at/00000-00007" in step.logs


def test_entries_that_the_student_chose_give_no_rank(tmp_path):
    step = take(tmp_path, teacher=list_teacher, support="student_top_k", support_size=4)
    assert "distill/reverse_kl_at/00000-00007" in step.logs
    assert not {name for name in step.logs if "rank" in name or "rejected" in name}


RANKS = torch.tensor([0, 3, 16, 17, 29])  # 0 is unknown, 16 the last that is not rejected


def rank_of(ids):
    found = RANKS[ids % 5]
    return found if isinstance(ids, torch.Tensor) else int(found)


def served(batch):
    """The sampled tokens' log-probs and ranks, as a server gives them."""
    logprobs = -0.5 - (batch.completion_ids % 4).double()
    return TeacherScores(sampled_logprobs=logprobs, sampled_ranks=rank_of(batch.completion_ids).float())


def test_sampled_tokens_equal_the_textbook(tmp_path):
    step = take(tmp_path, teacher=served, **PG)
    tokens, logs = known_of(step), step.logs

    def log_ratio(x):
        return -0.5 - x.id % 4 - float(x.s[x.id])

    ranks = [r for x in tokens if (r := rank_of(x.id))]
    assert len(ranks) < len(tokens)
    assert logs["distill/teacher_rank"] == pytest.approx(np.exp(np.mean(np.log(ranks))))
    assert logs["distill/rejected_share"] == pytest.approx(np.mean([r > 16 for r in ranks]))
    assert_positions(logs, "gap", tokens, log_ratio)
    assert_positions(logs, "reverse_kl", tokens, lambda x: math.exp(log_ratio(x)) - 1 - log_ratio(x))
    assert "distill/entropy_gap" not in logs and "distill/effective_sample_size" not in logs


def listed_and_ranked(batch):
    answer = list_teacher(batch)
    answer.sampled_ranks = rank_of(batch.completion_ids).float()
    return answer


def test_a_rank_that_the_teacher_gives_goes_before_that_in_its_list(tmp_path):
    step = take(tmp_path, teacher=listed_and_ranked)
    ranks = [(rank_of(x.id) or 3 + x.id % 3, bool(rank_of(x.id))) for x in known_of(step)]
    assert step.logs["distill/teacher_rank"] == pytest.approx(np.exp(np.mean([math.log(r) for r, _ in ranks])))
    rejected = [r > (16 if given else 4) for r, given in ranks]
    assert step.logs["distill/rejected_share"] == pytest.approx(np.mean(rejected))


def prompts_for(*names):
    prompts = ["abc", "hello world", "x", "the quick brown fox"] * 4
    return Dataset.from_dict({"prompt": prompts, "teacher": [names[i % len(names)] for i in range(16)]})


@pytest.mark.parametrize("fields", [{}, PG], ids=["distributions", "sampled"])
def test_each_of_several_teachers_has_its_own(tmp_path, fields):
    second = served if fields else list_teacher
    step = take(
        tmp_path, teacher={"a": wide(), "b": second}, arguments={"train_dataset": prompts_for("a", "b")}, **fields
    )
    logs, tokens = step.logs, known_of(step)
    index = [batch["teacher_index"].tolist() for batch in step.batches]
    mine, theirs = ([x for x in tokens if index[x.row[0]][x.row[1]] == i] for i in (0, 1))
    assert mine and theirs
    listed = [rank_of(x.id) if fields else 3 + x.id % 3 for x in theirs]
    listed = [r for r in listed if r]
    assert logs["distill/b/teacher_rank"] == pytest.approx(np.exp(np.mean(np.log(listed))))
    assert logs["distill/b/rejected_share"] == pytest.approx(np.mean([r > (16 if fields else 4) for r in listed]))
    if fields:
        return
    own = [rank(x) for x in mine]
    assert logs["distill/a/teacher_rank"] == pytest.approx(np.exp(np.mean(np.log(own))))
    assert logs["distill/teacher_rank"] == pytest.approx(np.exp(np.mean(np.log(own + listed))))
    assert logs["distill/rejected_share"] == pytest.approx(np.mean([r > 16 for r in own] + [r > 4 for r in listed]))
    expected = [abs(entropy(x.t) - entropy(x.s)) for x in mine]
    assert logs["distill/a/entropy_gap"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert_positions(logs, "gap", mine, gap)  # the list does not tell


def assert_shares(logs, weights, losses):
    """Effective sample size, and shares of the loss by weight, by hand."""
    weights, losses = np.array(weights), np.abs(losses)
    assert logs["distill/effective_sample_size"] == pytest.approx(
        weights.sum() ** 2 / (len(weights) * (weights**2).sum()), rel=1e-6
    )
    light, heavy = weights < weights.mean() / 2, weights > 2 * weights.mean()
    near = np.concatenate([weights / (weights.mean() / 2), weights / (2 * weights.mean())])
    assert not ((near > 0.97) & (near < 1.03)).any(), "a weight is too near a threshold"
    for name, of in {"light": light, "heavy": heavy, "even": ~(light | heavy)}.items():
        assert of.any(), name
        assert logs[f"distill/loss_share/{name}"] == pytest.approx(losses[of].sum() / losses.sum(), rel=1e-5), name


def weight(x):
    return 2.0 ** (x.id % 5 - 2)


@pytest.mark.parametrize("credit", ["direct", "k2", "policy_gradient"])
def test_weights_equal_the_textbook(tmp_path, credit):
    fields = {"credit": credit, **({} if credit == "direct" else {"support": "sampled"})}
    step = take(
        tmp_path,
        token_weighting="test_diagnostics.weights_of_ids",
        gradient_accumulation_steps=2,
        **fields,
    )
    tokens = known_of(step)
    term = {"direct": kl, "k2": lambda x: gap(x) ** 2 / 2, "policy_gradient": gap}[credit]
    assert_shares(step.logs, [weight(x) for x in tokens], [weight(x) * term(x) for x in tokens])


def test_weights_of_samples_and_of_the_ratio_count_too(tmp_path):
    """A completion of an eighth of the weight, and detached importance weights in the second pass over a batch."""
    seen = []

    def watch(trainer):
        note = trainer._diagnostics.note_tokens

        def keep(batch, logps, entropies):
            seen.append((batch, logps))
            note(batch, logps, entropies)

        trainer._diagnostics.note_tokens = keep

    step = take(
        tmp_path,
        prepare=watch,
        token_weighting="test_diagnostics.weights_of_ids",
        sample_weighting="test_diagnostics.light_samples",
        importance_weighting="truncate",
        importance_high=1.5,
        num_iterations=2,
        max_steps=2,
        **PG,
    )
    batch, logps = seen[1]
    mask, inputs = batch.loss_mask, step.batches[1]
    ratio = (logps - inputs["old_per_token_logps"]).exp()
    assert (ratio[mask] > 1.5).any() and (ratio[mask] < 1.4).any()
    weights = 2.0 ** ((inputs["completion_ids"] % 5).double() - 2) * ratio.clamp(max=1.5)
    weights = weights * torch.tensor([0.125, 1.0, 1.0, 1.0])[:, None]
    with torch.no_grad():
        t = sampled(full_logprobs(wide(), inputs), inputs)
    gaps = t - inputs["old_per_token_logps"]
    logs = step.trainer.state.log_history[1]
    w = weights[mask]
    assert logs["distill/effective_sample_size"] == pytest.approx(float(w.sum() ** 2 / (len(w) * (w**2).sum())))
    losses = (gaps * weights)[mask].abs()
    surely, maybe = (float(losses[w < w.mean() / 2 * edge].sum() / losses.sum()) for edge in (1 / 1.022, 1.022))
    assert 0.1 < surely <= logs["distill/loss_share/light"] <= maybe < 0.5
    assert logs["distill/importance_ratio"] == pytest.approx(ratio[mask].mean().item(), rel=1e-6)
    assert logs["distill/importance_ratio_max"] == pytest.approx(ratio[mask].max().item(), rel=1e-6)


def light_samples(stats):
    return torch.tensor([0.125, 1.0, 1.0, 1.0], dtype=torch.float64)


class Weights(TrainerCallback):
    """The student after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after.append({name: w.detach().clone() for name, w in model.state_dict().items()})


def test_ratios_are_those_of_the_policy_that_sampled(tmp_path):
    """Without a surrogate too, where GRPO's own ratio is not formed."""
    memory = Weights()
    step = take(
        tmp_path,
        num_iterations=2,
        max_steps=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        arguments={"callbacks": [memory]},
    )
    then, now = writer(), writer()
    now.load_state_dict(memory.after[0])
    first, second = step.trainer.state.log_history[:2]
    assert first["distill/importance_ratio"] == pytest.approx(1.0) == first["distill/importance_ratio_max"]
    ratios = []
    for inputs in step.batches[2:]:
        with torch.no_grad():
            change = sampled(full_logprobs(now, inputs), inputs) - sampled(full_logprobs(then, inputs), inputs)
        ratios += change[loss_mask(inputs).bool()].exp().tolist()
    assert second["distill/importance_ratio"] == pytest.approx(np.mean(ratios), rel=1e-5)
    assert second["distill/importance_ratio_max"] == pytest.approx(max(ratios), rel=1e-5)
    assert max(ratios) > 1.05


@pytest.mark.parametrize("fields", [{}, PG], ids=["distributions", "sampled"])
def test_rewards_and_gaps_are_correlated_as_numpy_does(tmp_path, fields):
    given = {"arguments": {"reward_funcs": some_reward}, "num_generations": 2, "reward_coef": 0.1}
    step = take(
        tmp_path, max_steps=2, logging_steps=2, learning_rate=0.0, gradient_accumulation_steps=2, **given, **fields
    )
    rows = {}
    for token in known_of(step):
        rows.setdefault(token.row, []).append(gap(token))
    kept = {row: float(step.batches[row[0]]["rewards"][row[1]]) for row in rows}
    kept = {row: reward for row, reward in kept.items() if not math.isnan(reward)}
    assert len(rows) == 16 > len(kept) > 8
    expected = np.corrcoef([*kept.values()], [np.mean(rows[row]) for row in kept])[0, 1]
    assert step.logs["distill/reward_correlation"] == pytest.approx(expected, rel=1e-5)


def test_equal_rewards_have_no_correlation(tmp_path):
    def same(completions, **kwargs):
        return [0.1] * len(completions)

    step = take(tmp_path, arguments={"reward_funcs": same}, num_generations=2, gradient_accumulation_steps=2)
    assert "distill/reward_correlation" not in step.logs
    assert "reward" in step.logs


TEXTS = ["ab" * 4, "abcdefgh", "ab" * 4, ""]


def write(prompts, trainer):
    """Prescribed completions: two are alike, and one is an end token alone."""
    encoded = trainer.processing_class(prompts)["input_ids"]
    ids = [[*trainer.processing_class(text)["input_ids"], 1] for text in TEXTS]
    return {"prompt_ids": encoded, "completion_ids": ids, "logprobs": None}


def test_completions_by_hand(tmp_path):
    step = take(tmp_path, arguments={"rollout_func": write})
    texts = [" ".join(text).encode() for text in TEXTS if text]  # as the tokenizer decodes characters
    ratios = [len(text) / len(zlib.compress(text)) for text in texts]
    assert step.logs["completions/repetition"] == pytest.approx(np.mean(ratios))
    assert step.logs["completions/repetitive_share"] == 0
    assert step.logs["completions/distinct_share"] == 0.75
    assert step.logs["completions/empty_share"] == 0.25


def test_repetition_is_that_of_the_last_ten_thousand_characters():
    random = "".join(chr(97 + i) for i in np.random.default_rng(0).integers(0, 26, 20_000))
    assert completions.repetition(random) < 2
    assert completions.repetition(random + "again. " * 1500) > 50
    expected = 10_000 / len(zlib.compress(random[-10_000:].encode()))
    assert completions.repetition(random) == expected != 20_000 / len(zlib.compress(random.encode()))
    assert completions.repetition("\ud800") > 0  # half a character


def test_text_of_messages_is_what_the_model_wrote():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "one"}}}
    conversation = [
        {"role": "assistant", "content": "", "reasoning_content": "I must add", "tool_calls": [call]},
        {"role": "tool", "content": "two", "name": "add"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is two"}]},
    ]
    assert completions.text_of(conversation).split("\n") == ["I must add", "add", "one", "It is two"]
    assert completions.text_of("plain") == completions.text_of([{"role": "assistant", "content": "plain"}]) == "plain"


def test_tokens_of_tools_are_not_the_models(tmp_path):
    """Two completions that differ in a tool's output alone are one; what is left is an end token."""

    def with_tool(prompts, trainer):
        encoded = trainer.processing_class(prompts)["input_ids"]
        ids, mask = [[7, 8, 1], [9, 8, 1], [7, 30, 31, 1], [1]], [[0, 1, 1], [0, 1, 1], [1, 1, 1, 1], [1]]
        return {"prompt_ids": encoded, "completion_ids": ids, "logprobs": None, "env_mask": mask}

    step = take(tmp_path, arguments={"rollout_func": with_tool})
    assert step.logs["completions/distinct_share"] == 0.75
    assert step.logs["completions/empty_share"] == 0.25


def test_evaluation_has_them_too(tmp_path):
    trainer = build(
        tmp_path,
        teacher=wide(),
        model=writer(),
        max_completion_length=24,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        arguments={"eval_dataset": Dataset.from_dict({"prompt": ["abc", "x", "12 34", "what is it"] * 2})},
    )
    step = record(trainer)
    trainer.train()
    _, *evaluated = step.batches
    assert len(evaluated) == 2
    (logs,) = [line for line in trainer.state.log_history if "eval_loss" in line]
    now = trainer.model.eval()
    tokens = known_of(SimpleNamespace(batches=evaluated), model=now)
    ranks = [math.log(rank(x)) for x in tokens]
    assert logs["eval_distill/teacher_rank"] == pytest.approx(np.exp(np.mean(ranks)), rel=1e-6)
    assert logs["eval_completions/empty_share"] == 0
    assert {f"eval_{name}" for name in NEW} - logs.keys() == {"eval_distill/tokens_per_second"}


def test_off_is_off_and_on_changes_nothing(tmp_path, monkeypatch):
    asked = []
    real = diagnostics.Diagnostics.head_options

    def ask(self):
        asked.append(real(self)["statistics"])
        return real(self)

    monkeypatch.setattr(diagnostics.Diagnostics, "head_options", ask)
    on, off = (take(tmp_path, diagnostics=value, max_steps=2, logging_steps=2) for value in (True, False))
    assert asked == [{}, {"teacher_rank": None}, {}, {}]
    expected = NEW - {"distill/overlap_advantage"}  # it comes with the overlap, but is not logged
    expected |= {f"distill/{name}_at/{label}" for name in ("gap", "reverse_kl") for label in LABELS}
    assert on.logs.keys() - off.logs.keys() == expected | {"distill/overlap_advantage"}
    assert off.logs.keys() <= on.logs.keys()
    for name in off.logs.keys() - {"step_time"}:
        assert on.logs[name] == off.logs[name], name
    for ours, theirs in zip(on.trainer.model.parameters(), off.trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "lost", "kept"),
    [
        ("add_completions", "completions/empty_share", "distill/teacher_rank"),
        ("add_token_diagnostics", "distill/teacher_rank", "completions/empty_share"),
    ],
)
def test_what_fails_warns_once_and_goes_quiet(tmp_path, monkeypatch, name, lost, kept):
    calls = []

    def fail(*args):
        calls.append(args)
        raise KeyError("surprise")

    monkeypatch.setattr(diagnostics, name, fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = take(tmp_path, max_steps=3)
    ours = [str(w.message) for w in caught if "surprise" in str(w.message)]
    assert len(ours) == len(calls) == 1
    assert "failed with KeyError('surprise')" in ours[0] and "diagnostics=False" in ours[0]
    lines = [line for line in step.trainer.state.log_history if "loss" in line]
    assert len(lines) == 3
    assert not any(lost in line for line in lines) and all(kept in line for line in lines)


def test_edges_double():
    assert position_edges(1) == [0, 1]
    assert position_edges(8) == [0, 8]
    assert position_edges(9) == [0, 8, 9]
    assert position_edges(100) == [0, 8, 16, 32, 64, 100]
    assert position_edges(16384) == [0, *(8 << i for i in range(11)), 16384]
    assert position_edges(10**6) == [0, *(8 << i for i in range(11)), 10**6]
    assert len(position_edges(10**6)) == 13


def test_tokens_behind_the_last_edge_are_in_the_last_bucket():
    metrics = TokenMetrics()
    positions = diagnostics.Positions(position_edges(20))
    values = torch.arange(30.0).expand(2, -1)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1] = False
    positions.add(metrics, {"x": values, "unknown": None}, mask)
    positions.add(metrics, {"x": values[:, :4] + 10}, mask[:, :4])
    found = {name: value for name, (value,) in metrics.compute(ALONE).items()}
    first = np.concatenate([np.arange(8), np.arange(10, 14)]).mean()
    assert found == {"x/00000-00007": first, "x/00008-00015": np.arange(8, 16).mean(), "x/00016-00019": 22.5}


def test_a_scheduled_length_does_not_rename_the_buckets(tmp_path):
    schedules = {"max_completion_length": {"type": "piecewise", "points": [[0, 4], [0.5, 12]]}}
    trainer = build(tmp_path, teacher=wide(), schedules=schedules)
    assert trainer._diagnostics.positions.labels[:3] == ["00000-00007", "00008-00015", "00016-00031"]
    assert len(trainer._diagnostics.positions.labels) == 12


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test lets it."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_time_between_steps_does_not_count_but_a_logs_wait_does(clock):
    timer = throughput.StepTimer()
    clock(5)  # before the first step
    for seconds in (2, 3):
        timer.on_step_begin()
        clock(seconds)
        timer.on_step_end()
        if seconds == 2:
            clock(50)  # evaluation
    clock(1)  # the log waits for the device
    assert timer.take() == 6
    clock(70)  # saving
    assert timer.take() == 0
    timer.on_step_begin()
    clock(4)
    timer.on_step_end()
    assert timer.take() == 4


def test_tokens_a_second(tmp_path, monkeypatch):
    class Timer(throughput.StepTimer):
        def take(self):
            return 0.5

    monkeypatch.setattr(diagnostics, "StepTimer", Timer)
    step = take(tmp_path, max_steps=2, logging_steps=2, gradient_accumulation_steps=2)
    tokens = sum(loss_mask(inputs).sum() for inputs in step.batches)
    lines = [line for line in step.trainer.state.log_history if "distill/tokens_per_second" in line]
    assert [line["distill/tokens_per_second"] for line in lines] == [pytest.approx(2 * float(tokens))]


# Metrics that are made of several sums


def shuffled_splits(num, seed):
    g = np.random.default_rng(seed)
    return np.array_split(g.permutation(num), sorted(g.integers(1, 9, 1))[0])


@pytest.mark.parametrize("seed", range(4))
def test_moments_merge_to_those_of_the_whole(seed):
    """In any order, with rows that do not count, and where the values are large beside their spread."""
    g = torch.Generator().manual_seed(seed)
    x = 1e6 + torch.randn(40, generator=g, dtype=torch.float64)
    y = 0.3 * (x - 1e6) + torch.randn(40, generator=g, dtype=torch.float64)
    mask = torch.rand(40, generator=g) > 0.3
    metrics = TokenMetrics()
    for part in map(torch.from_numpy, shuffled_splits(40, seed)):
        metrics.merge(
            "correlation", ["r"], derived.moments(x[part].masked_fill(~mask[part], torch.nan), y[part], mask[part])
        )
        metrics.merge("correlation", ["r"], derived.moments(x[:3], y[:3], torch.zeros(3, dtype=torch.bool)))
    (found,) = metrics.compute(ALONE)["r"]
    assert found == pytest.approx(np.corrcoef(x[mask], y[mask])[0, 1], rel=1e-7)


@pytest.mark.parametrize("values", [[], [1.0], [0.1] * 9, [1e9 + 0.1] * 7])
def test_what_does_not_vary_has_no_correlation(values):
    x = torch.tensor(values, dtype=torch.float64)
    y = torch.arange(len(values), dtype=torch.float64)
    for pair in ((x, y), (y, x)):
        metrics = TokenMetrics()
        for a, b in zip(*(v.split(2) for v in pair), strict=True):
            metrics.merge("correlation", ["r"], derived.moments(a, b, torch.ones(len(a), dtype=torch.bool)))
        assert metrics.compute(ALONE) == {}


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_equal_weights_have_no_effective_sample_size(value):
    w = torch.full((1000,), value, dtype=torch.float32).double()
    metrics = TokenMetrics()
    for part in w.split(7):
        sums = torch.stack([torch.tensor(float(len(part))).double(), part.sum(), part.square().sum()])
        metrics.merge("effective_sample_size", ["n"], sums[:, None])
    assert metrics.compute(ALONE) == {}


@pytest.mark.parametrize("seed", range(3))
def test_loss_shares_by_weight(seed):
    """Against plain thresholds, up to the tokens within 2.2 % of one."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(500, generator=g).mul(2).exp().double() * 10.0 ** (seed - 1)
    weights[:50] = 0.0
    losses = torch.randn(500, generator=g).double()
    mask = torch.rand(500, generator=g) > 0.2
    metrics = TokenMetrics()
    for part in map(torch.from_numpy, shuffled_splits(500, seed)):
        kept = derived.loss_by_weight(losses[part], weights[part], mask[part])
        metrics.merge("loss_by_weight", ["share"], kept)
    found = metrics.compute(ALONE)
    w, loss = weights[mask], losses[mask].abs()
    mean = w.mean()
    for name, sign, threshold in (("light", -1, mean / 2), ("heavy", 1, 2 * mean)):
        surely = loss[sign * (w - threshold * 1.022**sign) > 0].sum() / loss.sum()
        maybe = loss[sign * (w - threshold * 1.022**-sign) > 0].sum() / loss.sum()
        assert surely - 1e-12 <= found[f"share/{name}"][0] <= maybe + 1e-12
        assert surely > 0
    assert sum(value for (value,) in found.values()) == pytest.approx(1)


def test_a_metric_that_is_measured_alone_and_with_others_is_one():
    metrics = TokenMetrics()
    mask = torch.tensor([True, False, True])
    metrics.add_all({"a": torch.tensor([1.0, 9, 3]), "b": torch.tensor([5.0, 9, 7])}, mask)
    metrics.add("a", torch.tensor([11.0, 9, 9]), torch.tensor([True, False, False]))
    metrics.add_sum("none", torch.tensor(0.0), 0)
    metrics.merge("max", ["a_max"], torch.tensor([[3.0]]))
    metrics.merge("max", ["a_max"], torch.tensor([[2.0]]))
    assert metrics._sums["a"].tolist() == [15.0, 3.0]
    assert metrics.compute(ALONE) == {"a": [5.0], "b": [6.0], "a_max": [3.0]}
    assert metrics.compute(ALONE) == {}


def gathered(monkeypatch, everyone):
    """As on the first of several processes, whose others have gathered the rest."""

    def gather(own):
        others = [(metrics_module._on_host(m._kept), m._members, m.problem) for m in everyone]
        return own + [metrics_module._Own(*other) for other in others]

    from trl_opd import metrics as metrics_module

    monkeypatch.setattr(metrics_module, "gather_object", gather)
    return SimpleNamespace(num_processes=1 + len(everyone), is_main_process=True)


def test_processes_that_saw_different_things_are_one(monkeypatch):
    first, second = TokenMetrics(), TokenMetrics()
    first.add("a", torch.tensor([1.0]), torch.tensor([True]))
    second.add_all({"a": torch.tensor([2.0, 6.0]), "b": torch.tensor([1.0, 2.0])}, torch.tensor([True, True]))
    second.merge("max", ["m"], torch.tensor([[-4.0]]))
    for index, (ours, theirs) in enumerate([((b"x", b"y"), (b"x", b"z")), ((b"x",), ()), ((), (b"z", b"z"))], 1):
        first.add_members("distinct", index, ours)
        second.add_members("distinct", index, theirs)
    second.problem = "the second could not read its text"
    with pytest.warns(UserWarning, match="the second could not"):
        found = first.compute(gathered(monkeypatch, [second]))
    assert found == {"a": [3.0], "b": [1.5], "m": [-4.0], "distinct": [5 / 7]}
