# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""What is asked of the servers before a run, so that wrong scores are found before the first step."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...findings import Finding
from .client import Failed, WrongAnswer
from .protocols import PROTOCOLS, Answer, Question, ServerProtocol
from .servers import Server

if TYPE_CHECKING:
    from .teacher import RemoteTeacher

PROBE = "The quick brown fox jumps over the lazy dog. 0123456789, f(x) = 2x + 1; naïve café — 你好!\n\n\tEnd."
_LIKELY = -7.0  # nats: scores of less likely entries may differ more
_DIFFERENT = 0.5  # nats: more than rounding
_NEIGHBOURS = 8


@dataclass
class Request:
    """What the run will ask for; see [`RemoteTeacher.check`]."""

    support: str
    support_size: int
    temperature: float
    max_completion_length: int | None
    tokenizer: Any

    @property
    def top_k(self) -> int:
        """K of the questions."""
        return 0 if self.support == "sampled" else self.support_size


class Probe:
    """The checks of one server. Each returns findings; those after a failed one are left out where they need it."""

    def __init__(self, teacher: "RemoteTeacher", server: Server, request: Request):
        self.teacher, self.server, self.request = teacher, server, request
        self.findings: list[Finding] = []
        self.answer: Answer | None = None
        self.ids: list[int] = []

    def add(self, check: str, severity: str, seen: str, why: str = "", do: str = "") -> None:
        self.findings.append(Finding(check, severity, f"{self.server.url}: {seen}", why, do))

    def run(self) -> None:
        """All of them."""
        if not self._reach():
            return
        self._tokens()
        self._length()
        self._support()
        if not any(finding.severity == "error" for finding in self.findings if finding.check == "vocabulary"):
            self._top_k()
        if self.answer is not None:
            self._temperature()
            self._repeat()

    @property
    def protocol(self) -> ServerProtocol:
        assert self.server.identity is not None
        return PROTOCOLS[self.server.identity.kind]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        return self.teacher.client.call(self.server, method, path, body)

    def _ask(self, ids: list[int], top_k: int, temperature: float = 1.0) -> Answer:
        return self.teacher.ask_now(self.server, Question(ids[:1], ids[1:], top_k, temperature))

    def _reach(self) -> bool:
        """Whether it answers, what it is, and what it serves."""
        try:
            self.teacher.client.look(self.server)
        except (Failed, WrongAnswer) as error:
            self.add(
                "reachable",
                "error",
                str(error),
                "Nothing can be scored.",
                "Start the server, check host, port and firewall, and wait until GET /v1/models answers.",
            )
            return False
        identity = self.server.identity
        assert identity is not None
        version = self._version(identity.kind)
        self.add("reachable", "ok", f"{self.protocol.title} {version} serves {identity.model!r} ({identity.root})")
        return True

    def _version(self, kind: str) -> str:
        for path in ("/version",) if kind == "vllm" else ("/server_info", "/get_server_info"):
            try:
                return str(self._call("GET", path)["version"])
            except (Failed, WrongAnswer, KeyError, TypeError):
                continue
        return "of unknown version"

    def _tokens(self) -> None:
        """Whether text becomes the same ids there as here, and whether ids mean the same text."""
        assert self.server.identity is not None
        tokenizer, model = self.request.tokenizer, self.server.identity.model
        ours = None if tokenizer is None else list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
        try:
            answer = self._call("POST", "/tokenize", {"model": model, "prompt": PROBE, "add_special_tokens": False})
            theirs = [int(i) for i in answer["tokens"]]
        except (Failed, WrongAnswer, KeyError, TypeError, ValueError) as error:
            theirs = None
            if tokenizer is not None:
                self.add(
                    "vocabulary",
                    "warning",
                    f"the server does not tokenize ({error})",
                    "Whether it has the student's vocabulary is not known: with another one it scores other text.",
                    "Compare the two tokenizer.json yourself.",
                )
        self.ids = (ours or theirs or list(range(1, 17)))[:96]
        if len(self.ids) < 2:
            self.ids = [0, *self.ids, 0]
        if ours is None or theirs is None:
            return
        if ours != theirs:
            place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
            self.add(
                "vocabulary",
                "error",
                f"a probe text has {len(theirs)} ids there and {len(ours)} here, the first other one at {place}: "
                f"{theirs[place : place + 3]} there, {ours[place : place + 3]} here",
                "The teacher would score other text than the student wrote.",
                "Serve a model of the student's tokenizer family (--model, and --tokenizer if it is set).",
            )
            return
        self._special_tokens(tokenizer, model)
        self._last_id(tokenizer)

    def _special_tokens(self, tokenizer: Any, model: str) -> None:
        ids = sorted(set(getattr(tokenizer, "all_special_ids", [])))[:64]
        other = []
        for i in ids:
            try:
                text = self._call("POST", "/detokenize", {"model": model, "tokens": [i]})
                text = text.get("prompt", text.get("text"))
            except (Failed, WrongAnswer, AttributeError):
                return
            if isinstance(text, str) and text and text.strip() != tokenizer.decode([i]).strip():
                other.append(f"{i} is {text!r} there and {tokenizer.decode([i])!r} here")
        if other:
            self.add(
                "vocabulary",
                "error",
                f"special tokens differ: {'; '.join(other[:3])}",
                "The teacher would read the ends of messages as something else.",
                "Serve a model of the student's tokenizer family.",
            )
        else:
            self.add("vocabulary", "ok", f"{len(self.ids)} ids of a probe text and {len(ids)} special ones agree")

    def _last_id(self, tokenizer: Any) -> None:
        last = max(tokenizer.get_vocab().values())
        if self.teacher.vocab_size is not None and last >= self.teacher.vocab_size:
            return
        try:
            self._ask([*self.ids[:2], last, self.ids[0]], 0)
        except WrongAnswer:
            pass  # the id is known; what is wrong with its score is found elsewhere
        except Failed as error:
            if error.status == 400:
                self.add(
                    "vocabulary",
                    "warning",
                    f"the student's last id {last} is refused ({error})",
                    "A completion with such an id stops the run.",
                    "Pass vocab_size=, the teacher's number of ids, in teacher_model_init_kwargs: others are masked.",
                )

    def _length(self) -> None:
        assert self.server.identity is not None
        longest, wanted = self.protocol.max_length(self.server.identity), self.request.max_completion_length
        if longest is None:
            self.add("length", "warning", "it does not say how long a text may be", "A longer one stops the run.")
            return
        if wanted is not None and longest <= wanted:
            self.add(
                "length",
                "error",
                f"prompt and completion may have {longest} tokens, and max_completion_length is {wanted}",
                "No prompt fits beside the longest completion.",
                f"Start the server with {'--max-model-len' if self._is_vllm else '--context-length'} of at least "
                f"{wanted + 1} and the longest prompt, or lower max_completion_length.",
            )
        else:
            left = "" if wanted is None else f", {longest - wanted} of them for the prompt"
            self.add("length", "ok", f"up to {longest} tokens{left}")

    def _few_enough(self, top_k: int) -> int:
        return min(top_k, self.teacher.most_entries or top_k)

    @property
    def _is_vllm(self) -> bool:
        return self.protocol.kind == "vllm"

    def _support(self) -> None:
        support = self.request.support
        if support == "student_top_k" and not self.protocol.scores_requested_ids:
            self.add(
                "support",
                "error",
                f"{self.protocol.title} scores its own best entries only, and support is {support!r}",
                "The student's entries have no teacher scores.",
                "Set support='teacher_top_k', serve the teacher with SGLang, or load it by its path.",
            )
        elif support not in ("sampled", "full", "teacher_top_k", "student_top_k"):
            self.add(
                "support",
                "error",
                f"a server cannot score support={support!r}",
                "It sends its best entries and the sampled token, no more.",
                "Set support='teacher_top_k' (or 'sampled' with credit='policy_gradient').",
            )

    def _top_k(self) -> None:
        """Whether it sends as many entries as the run needs."""
        top_k = self._few_enough(self.request.top_k)
        try:
            self.answer = self._ask(self.ids, top_k)
        except (Failed, WrongAnswer) as error:
            too_many = self._is_vllm and "max allowed" in str(error)
            self.add(
                "max_logprobs",
                "error",
                str(error),
                f"support_size is {top_k}.",
                f"Start vLLM with --max-logprobs {top_k} (or -1), or lower support_size."
                if too_many
                else "See the server's log.",
            )
            return
        self.add("max_logprobs", "ok", f"it sends {top_k} entries a token")

    def _temperature(self) -> None:
        """Whether log-probs are those of the temperature that was asked for."""
        wanted = self.request.temperature
        other = wanted if wanted != 1.0 else 0.5
        top_k = self._few_enough(max(2, self.request.top_k)) if self.request.top_k else 0
        try:
            plain, tempered = self._ask(self.ids, top_k), self._ask(self.ids, top_k, other)
        except (Failed, WrongAnswer) as error:
            self.add("temperature", "error", str(error), "Log-probs at another temperature cannot be asked for.")
            return
        same = _difference(plain, tempered) <= self.teacher.tolerance
        if wanted == 1.0:
            self.add("temperature", "ok", f"1; log-probs of the text {'ignore' if same else 'follow'} others")
        elif same:
            self.add(
                "temperature",
                "error",
                f"log-probs of the text are those of temperature 1 whatever is asked for, and the run's is {wanted}",
                "The student would be compared at one temperature and the teacher at another.",
                "No flag mends it: --logprobs-mode processed_logprobs of vLLM is about generated tokens alone, and "
                "SGLang has none. Set distill_temperature=1.0 (and temperature=1.0 beside rewards).",
            )
        else:
            self.add("temperature", "ok", f"log-probs follow temperature {wanted}")

    def _repeat(self) -> None:
        """Whether the same question gets the same answer, alone and in company."""
        assert self.answer is not None
        question = Question(self.ids[:1], self.ids[1:], self._few_enough(self.request.top_k))
        try:
            again = self.teacher.ask_now(self.server, question)
            beside = self.teacher.client.run(self._in_company(question))
        except (Failed, WrongAnswer) as error:
            self.add("determinism", "error", str(error), "The server fails under several questions at a time.")
            return
        alone, company = _difference(self.answer, again), _difference(self.answer, beside)
        flag = "VLLM_BATCH_INVARIANT=1 in vLLM's environment" if self._is_vllm else "--enable-deterministic-inference"
        self._report(
            "determinism",
            max(alone, company),
            f"the same text differs by {alone:.2g} nats when asked twice, by {company:.2g} beside others",
            f"Start the server with {flag} (on the GPUs that have it), a float32 head, or pass a larger tolerance=.",
        )

    async def _in_company(self, question: Question) -> Answer:
        """One answer among several questions of other lengths."""
        assert self.server.identity is not None
        client, model = self.teacher.client, self.server.identity.model
        texts = [Question(self.ids[:1], self.ids[1 : 2 + i % len(self.ids)], 0) for i in range(1, _NEIGHBOURS)]
        asked = [self.protocol.ask(text, model) for text in [question, *(t for t in texts if t.completion)]]
        answers = await asyncio.gather(*(client.request(self.server, "POST", *one) for one in asked))
        return self.protocol.read(answers[0], question, model)

    def _report(self, check: str, difference: float, seen: str, do: str) -> None:
        tolerance = self.teacher.tolerance
        severity = "ok" if difference <= tolerance else "warning" if difference <= _DIFFERENT else "error"
        why = "" if severity == "ok" else f"The tolerance is {tolerance:g}: the student would follow noise."
        self.add(check, severity, seen, why, "" if severity == "ok" else do)


def _difference(one: Answer, other: Answer) -> float:
    """Largest difference of two answers to one question, over sampled tokens and common entries that are likely."""
    pairs = [(one.sampled, other.sampled)]
    if one.ids is not None and other.ids is not None and one.logprobs is not None and other.logprobs is not None:
        for ids, logprobs, other_ids, other_logprobs in zip(
            one.ids, one.logprobs, other.ids, other.logprobs, strict=True
        ):
            _, here, there = np.intersect1d(ids, other_ids, assume_unique=True, return_indices=True)
            pairs.append((logprobs[here], other_logprobs[there]))
    differences = [np.abs(a - b)[(np.maximum(a, b) > _LIKELY)] for a, b in pairs]
    return max((float(d.max()) for d in differences if d.size), default=0.0)


def check_servers(teacher: "RemoteTeacher", request: Request) -> list[Finding]:
    """Check each server, and whether they agree with one another."""
    probes = [Probe(teacher, server, request) for server in teacher.client.servers]
    for probe in probes:
        probe.run()
    findings = [finding for probe in probes for finding in probe.findings]
    answered = [probe for probe in probes if probe.answer is not None]
    if len(answered) > 1:
        findings += _compare(answered)
    return findings


def _compare(probes: list[Probe]) -> list[Finding]:
    """The replicas against the first."""
    first, findings = probes[0], []
    for probe in probes[1:]:
        before = len(probe.findings)
        if probe.ids != first.ids:
            probe.add("replicas", "error", f"other token ids than {first.server.url}", "They serve different models.")
        else:
            assert probe.answer is not None and first.answer is not None
            difference = _difference(first.answer, probe.answer)
            probe._report(
                "replicas",
                difference,
                f"differs from {first.server.url} by {difference:.2g} nats about the same text",
                "Serve the same weights, dtype and quantization on all of them, with the same version.",
            )
        findings += probe.findings[before:]
    return findings
