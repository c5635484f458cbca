# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
What vLLM and SGLang are asked, and how their answers are read.

Both are given token ids, and asked for the log-probs of the prompt: the completion is part of it. vLLM's
`/v1/completions` answers about every token of the prompt, SGLang's `/generate` from a position on. Both return the
sampled token's log-prob beside the K best, whether it is one of them or not. vLLM gives its rank too, SGLang does not.

Shapes: C completion tokens of one sequence, K support.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np

from .client import WrongAnswer
from .servers import Identity

MINUS_INFINITY = -9999.0  # JSON has none: vLLM writes this instead
_FULL = math.log(0.99)  # fewer entries than asked for are all there are if they hold this much probability


@dataclass(frozen=True)
class Question:
    """
    One sequence to score.

    Args:
        prompt (`Sequence[int]`): Ids before the completion, at least one.
        completion (`Sequence[int]`): The C ids to score.
        top_k (`int`): K; 0 asks for the sampled tokens alone.
        temperature (`float`): Of the log-probs.
        requested (`np.ndarray`, *optional*): Ids to score at each position, `(C, K)`; below 0 is padding.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    top_k: int
    temperature: float = 1.0
    requested: np.ndarray | None = None


@dataclass
class Answer:
    """
    Scores of one sequence.

    Args:
        sampled (`np.ndarray`): Log-probs of the completion, `(C,)`.
        ids (`np.ndarray`, *optional*): The K best entries, or the requested ones, `(C, K)`; below 0 is padding.
        logprobs (`np.ndarray`, *optional*): Their log-probs, `(C, K)`.
        ranks (`np.ndarray`, *optional*): Ranks of the completion's tokens, `(C,)`; 0 where none was given.
    """

    sampled: np.ndarray
    ids: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    ranks: np.ndarray | None = None


class ServerProtocol(Protocol):
    """How one kind of server is talked to."""

    kind: str
    title: str
    scores_requested_ids: bool

    def ask(self, question: Question, model: str) -> tuple[str, dict[str, Any]]:
        """Path and body of the request."""
        ...

    def read(self, answer: Any, question: Question, model: str) -> Answer:
        """
        The scores in a server's answer.

        Raises:
            WrongAnswer: If they are not all there, not finite, or not about this question.
        """
        ...

    def max_length(self, identity: Identity) -> int | None:
        """Longest prompt and completion."""
        ...


class VLLM:
    """vLLM's OpenAI-compatible server."""

    kind, title = "vllm", "vLLM"
    scores_requested_ids = False

    def ask(self, question: Question, model: str) -> tuple[str, dict[str, Any]]:
        return "/v1/completions", {
            "model": model,
            "prompt": [*question.prompt, *question.completion],
            "max_tokens": 1,  # it has no 0 with prompt_logprobs
            "temperature": question.temperature,
            "prompt_logprobs": question.top_k,
        }

    def read(self, answer: Any, question: Question, model: str) -> Answer:
        if not isinstance(answer, Mapping) or answer.get("model", model) != model:
            found = answer.get("model") if isinstance(answer, Mapping) else type(answer).__name__
            raise WrongAnswer(f"the answer is of the model {found!r}, not of {model!r}")
        try:
            positions = answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError):
            positions = None
        total, num_tokens = len(question.prompt) + len(question.completion), len(question.completion)
        if not isinstance(positions, list) or len(positions) != total:
            found = len(positions) if isinstance(positions, list) else "no"
            raise WrongAnswer(f"log-probs of {found} tokens in answer to {total}")
        sampled, ranks, rest = [], [], []
        for token, entries in zip(question.completion, positions[-num_tokens:], strict=True):
            own = entries.get(str(token)) if isinstance(entries, dict) else None
            if own is None:
                raise WrongAnswer(f"no log-prob of the sampled token {token}")
            sampled.append(own["logprob"])
            rank = own.get("rank")
            ranks.append(rank if isinstance(rank, int) and 0 < rank < 1 << 31 else 0)
            if question.top_k:
                if (ranks[-1] or len(entries)) > question.top_k:  # the sampled token is not one of the K best
                    del entries[str(token)]
                rest.append(entries)
        found = _answer(
            sampled,
            question,
            [len(entries) for entries in rest],
            lambda: list(map(int, chain.from_iterable(rest))),
            lambda: [entry["logprob"] for entries in rest for entry in entries.values()],
        )
        found.ranks = np.array(ranks, dtype=np.float32) if any(ranks) else None
        return found

    def max_length(self, identity: Identity) -> int | None:
        return (
            None if identity.max_model_len is None else identity.max_model_len - 1
        )  # it insists on a token of its own


class SGLang:
    """SGLang's own `/generate`."""

    kind, title = "sglang", "SGLang"
    scores_requested_ids = True

    def ask(self, question: Question, model: str) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "input_ids": [*question.prompt, *question.completion],
            "sampling_params": {"max_new_tokens": 0, "temperature": question.temperature},
            "return_logprob": True,
            "logprob_start_len": len(question.prompt) - 1,  # the entry of this position itself is null
            "top_logprobs_num": question.top_k if question.requested is None else 0,
            "return_text_in_logprobs": False,
        }
        if question.requested is not None:
            body["token_ids_logprob"] = _union(question.requested).tolist()
        return "/generate", body

    def read(self, answer: Any, question: Question, model: str) -> Answer:
        meta = answer.get("meta_info") if isinstance(answer, Mapping) else None
        if not isinstance(meta, Mapping):
            raise WrongAnswer("no meta_info in the answer")
        finish = meta.get("finish_reason")
        if isinstance(finish, Mapping) and finish.get("type") == "abort":
            raise WrongAnswer(f"the server gave the question up: {str(finish.get('message', ''))[:200]}")
        own = self._positions(meta, "input_token_logprobs", question)
        for token, entry in zip(question.completion, own, strict=True):
            if entry[1] != token and entry[1] != 0:  # 0 stands for the vocabulary's last entry
                raise WrongAnswer(f"log-prob of token {entry[1]} where {token} was sampled")
        key = "input_top_logprobs" if question.requested is None else "input_token_ids_logprobs"
        sampled = [entry[0] for entry in own]
        rest = self._positions(meta, key, question) if question.top_k or question.requested is not None else []
        found = _answer(
            sampled,
            question,
            [len(entries) for entries in rest],
            lambda: [entry[1] for entries in rest for entry in entries],
            lambda: [entry[0] for entries in rest for entry in entries],
        )
        return found if question.requested is None else _gather(found, question.requested)

    def _positions(self, meta: Mapping[str, Any], key: str, question: Question) -> list[Any]:
        """Entries of the completion's tokens; that of the position before them is null."""
        positions, num_tokens = meta.get(key), len(question.completion)
        if not isinstance(positions, list) or len(positions) != num_tokens + 1:
            found = len(positions) if isinstance(positions, list) else "no"
            raise WrongAnswer(f"{key} of {found} tokens in answer to {num_tokens + 1}")
        if not all(isinstance(entry, list) and entry for entry in positions[1:]):
            raise WrongAnswer(f"{key} has tokens without an entry")
        return positions[1:]

    def max_length(self, identity: Identity) -> int | None:
        return None if identity.max_model_len is None else identity.max_model_len - 1


PROTOCOLS: dict[str, ServerProtocol] = {"vllm": VLLM(), "sglang": SGLang()}


def _numbers(values: list[Any]) -> np.ndarray:
    """Log-probs; a null is a NaN."""
    try:
        array = np.array(values, dtype=np.float32)
    except (TypeError, ValueError):
        raise WrongAnswer("log-probs that are not numbers") from None
    if np.isnan(array).any():
        raise WrongAnswer(f"{int(np.isnan(array).sum())} log-probs that are NaN or null")
    array[array == MINUS_INFINITY] = -np.inf
    if array.size and array.max() > 1e-2:
        raise WrongAnswer(
            f"log-probs of up to {float(array.max()):.3g}, where 0 is the highest that there is (are they logits? "
            "then start the server without --logprobs-mode raw_logits or processed_logits)"
        )
    return array


def _answer(sampled: list[Any], question: Question, counts: list[int], ids: Any, logprobs: Any) -> Answer:
    """Put the entries of all positions into arrays, if every position has as many as were asked for."""
    own = _numbers(sampled)
    if not counts:
        return Answer(own)
    wanted = question.top_k if question.requested is None else len(_union(question.requested))
    fewest, most = min(counts), max(counts)
    if fewest != most or most > wanted:
        raise WrongAnswer(f"between {fewest} and {most} log-probs for a token where {wanted} were asked for")
    try:
        ids_CK = np.array(ids(), dtype=np.int64).reshape(len(counts), most)
    except (TypeError, ValueError):
        raise WrongAnswer("token ids that are not numbers") from None
    logprobs_CK = _numbers(logprobs()).reshape(len(counts), most)
    if question.requested is None:
        with np.errstate(divide="ignore"):
            mass = np.log(np.exp(logprobs_CK.astype(np.float64)).sum(-1))
        if mass.max() > 1e-2:
            raise WrongAnswer(f"the probabilities of a token's {most} entries sum up to {math.exp(mass.max()):.4g}")
        if most < wanted and mass.min() < _FULL:
            raise WrongAnswer(f"{most} log-probs for a token where {wanted} were asked for")
        ids_CK = np.where(np.isneginf(logprobs_CK), -1, ids_CK)
        padding = ((0, 0), (0, wanted - most))
        ids_CK = np.pad(ids_CK, padding, constant_values=-1)
        logprobs_CK = np.pad(logprobs_CK, padding, constant_values=-np.inf)
    return Answer(own, ids_CK, logprobs_CK)


def _union(requested: np.ndarray) -> np.ndarray:
    """The ids of all positions, sorted."""
    ids = np.unique(requested)
    return ids[ids >= 0]


def _gather(answer: Answer, requested: np.ndarray) -> Answer:
    """From scores of the union at every position to those that the position asked for."""
    assert answer.ids is not None and answer.logprobs is not None
    union = _union(requested)
    if (answer.ids != union).any():
        raise WrongAnswer("log-probs of other tokens than were requested")
    column = np.searchsorted(union, requested.clip(min=0)).clip(max=len(union) - 1)
    logprobs = np.take_along_axis(answer.logprobs, column, axis=1)
    return Answer(answer.sampled, requested, np.where(requested < 0, -np.inf, logprobs))


def windows(requested: np.ndarray, most: int) -> list[int]:
    """
    Where to split a sequence so that no window's positions times its ids are more than `most`.

    SGLang scores all requested ids at all positions: over a long completion that is the square of its length.

    Returns:
        `list[int]`: Ends of the windows.
    """
    ends, union, start = [], set[int](), 0
    for position, row in enumerate(requested):
        grown = union | {int(i) for i in row if i >= 0}
        if position > start and (position + 1 - start) * len(grown) > most:
            ends.append(position)
            start, grown = position, {int(i) for i in row if i >= 0}
        union = grown
    return [*ends, len(requested)]
