# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""A teacher behind one or several servers."""

import math
import os
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...collators import TeacherBatch, TeacherScores
from ..answers import TeacherScoreError
from .client import Client, Failed, Job, Limits, result_of
from .protocols import PROTOCOLS, Answer, Question, windows
from .servers import Identity, Server, check_key, clean_url, tls_context

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from .checks import Finding

_MOST_SCORES = 1 << 18  # of one request for chosen ids


class RemoteTeacher:
    """
    A teacher that vLLM or SGLang serves, unchanged. Neither they nor its weights are needed here.

    Questions about a generation batch leave as soon as its completions exist, the longest first, and are answered
    while the student works. The sampled tokens' log-probs and the top-k are asked for; `topk_ids` holds the K best
    entries, `sampled_logprobs` the sampled token whether it is one of them or not, `sampled_ranks` its rank where the
    server gives one (vLLM does, SGLang does not). A sequence without a token to score costs nothing. No server sends
    the whole vocabulary: `support="full"` means `"teacher_top_k"` here.

    A server that fails is left alone for a while and asked again; its questions go to the others meanwhile. An answer
    that is cut off, has too few scores, or is of another model counts as a failure. When all attempts are used up, a
    [`TeacherScoreError`] names server and reason, and nothing of the batch is trained on.

    Args:
        urls (`str` or `Sequence[str]`):
            Address of a server, or of several that serve the same model (not of a load balancer that hides servers of
            different models).
        model (`str`, *optional*): Name of the model as served. Defaults to the only one that there is.
        server (`str`, *optional*, defaults to `"auto"`): `"vllm"`, `"sglang"`, or found out.
        api_key_env (`str`, *optional*):
            Environment variable that holds the key. It is read for each request, and never kept, logged or shown.
        api_key_over_http (`bool`, *optional*, defaults to `False`):
            Send the key over plain http to other machines too.
        verify (`bool` or `str`, *optional*, defaults to `True`):
            Who signs the servers' certificates: the system's authorities, or a file or folder of certificates.
        trust_env (`bool`, *optional*, defaults to `False`): Use the proxies of the environment (`HTTPS_PROXY`).
        max_in_flight (`int`, *optional*, defaults to `64`): Requests under way to one server.
        max_batch_tokens (`int`, *optional*, defaults to `131072`): Tokens under way to one server.
        timeout (`float`, *optional*, defaults to `600.0`): Seconds for an answer, the server's own queue included.
        connect_timeout (`float`, *optional*, defaults to `10.0`): Seconds for a connection.
        retries (`int`, *optional*, defaults to `8`): Further attempts of a request, on all servers together.
        retry_wait (`float`, *optional*, defaults to `0.5`):
            Seconds that a server rests after its first failure, with jitter; doubled by each further one in a row.
        max_retry_wait (`float`, *optional*, defaults to `30.0`): Longest rest, unless the server asks for more.
        vocab_size (`int`, *optional*):
            Ids that the teacher knows, where they are fewer than the student's: others are not shown to it.
        tolerance (`float`, *optional*, defaults to `0.05`):
            Difference in nats between two answers to the same question that the check at the start puts up with.
    """

    asynchronous = True
    takes_requested_ids = True  # SGLang does; vLLM's refusal says what to set

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        model: str | None = None,
        server: str = "auto",
        api_key_env: str | None = None,
        api_key_over_http: bool = False,
        verify: bool | str = True,
        trust_env: bool = False,
        max_in_flight: int = 64,
        max_batch_tokens: int = 131072,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        retries: int = 8,
        retry_wait: float = 0.5,
        max_retry_wait: float = 30.0,
        vocab_size: int | None = None,
        tolerance: float = 0.05,
    ):
        addresses = list(dict.fromkeys(clean_url(url) for url in ([urls] if isinstance(urls, str) else urls)))
        if not addresses:
            raise ValueError("urls must hold the address of a server, got none. There is nobody to ask.")
        if server not in ("auto", *PROTOCOLS):
            raise ValueError(f"server must be 'auto', 'vllm' or 'sglang', got {server!r}. Leave it unset to find out.")
        least = {"max_in_flight": 1, "max_batch_tokens": 1, "retries": 0}
        positive = {"timeout": timeout, "connect_timeout": connect_timeout, "retry_wait": retry_wait}
        given = {"max_in_flight": max_in_flight, "max_batch_tokens": max_batch_tokens, "retries": retries}
        for name, value in given.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least[name]:
                raise ValueError(f"{name} must be a whole number of at least {least[name]}, got {value!r}.")
        for name, seconds in {**positive, "max_retry_wait": max_retry_wait}.items():
            if not math.isfinite(seconds) or seconds <= 0:
                raise ValueError(f"{name} must be a number of seconds above 0, got {seconds!r}.")
        check_key(api_key_env, addresses, api_key_over_http)
        self.urls, self.model, self.server = addresses, model, server
        self.vocab_size, self.tolerance = vocab_size, tolerance
        self.most_entries = vocab_size  # a request for more than the vocabulary has kills vLLM's engine
        self.client = Client(
            addresses,
            partial(_identify, kind=server, model=model),
            Limits(max_in_flight, max_batch_tokens, timeout, connect_timeout, retries, retry_wait, max_retry_wait),
            verify=tls_context(addresses, verify),
            key_variable=api_key_env,
            trust_env=trust_env,
        )
        weakref.finalize(self, self.client.close)

    def __repr__(self) -> str:
        return f"RemoteTeacher({self.urls!r})"

    @property
    def name(self) -> str:
        """Its addresses."""
        return ", ".join(self.urls)

    @property
    def served_model(self) -> str | None:
        """What the servers call the model; known once they were asked."""
        return next((s.identity.model for s in self.client.servers if s.identity is not None), self.model)

    @property
    def max_length(self) -> int | None:
        """Longest prompt and completion that all servers take; known once they were asked."""
        lengths = [PROTOCOLS[i.kind].max_length(i) for i in (s.identity for s in self.client.servers) if i is not None]
        return min((length for length in lengths if length is not None), default=None)

    def close(self) -> None:
        """Break off what is under way and close the connections."""
        self.client.close()

    # The check at the start

    def prepare(self, trainer: "GRPOTrainer") -> None:
        """Check the servers against the run, and refuse to start if its scores would be wrong."""
        args = trainer.args
        processing_class = getattr(trainer, "_tokenizer", None) or getattr(trainer, "processing_class", None)
        findings = self.check(
            support=getattr(args, "support", "teacher_top_k"),
            support_size=getattr(args, "support_size", 64),
            temperature=getattr(args, "divergence_temperature", 1.0),
            max_completion_length=getattr(args, "max_completion_length", None),
            tokenizer=getattr(processing_class, "tokenizer", processing_class),
        )
        errors = [finding for finding in findings if finding.severity == "error"]
        if errors:
            raise ValueError(
                f"The teacher {self.name!r} cannot teach this run:\n" + "\n".join(f"- {finding}" for finding in errors)
            )
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            for finding in findings:
                if finding.severity == "warning":
                    warnings.warn(f"Teacher {self.name!r}: {finding}", stacklevel=2)

    def check(
        self,
        *,
        support: str = "teacher_top_k",
        support_size: int = 64,
        temperature: float = 1.0,
        max_completion_length: int | None = None,
        tokenizer: Any = None,
    ) -> "list[Finding]":
        """
        Ask the servers what they are and a few questions, and say what is wrong and what mends it.

        Args:
            support (`str`), support_size (`int`), temperature (`float`), max_completion_length (`int`, *optional*):
                What the run will ask for.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The student's.

        Returns:
            `list[Finding]`: With severity `"ok"`, `"warning"` or `"error"`.
        """
        from .checks import Request, check_servers

        if tokenizer is not None and self.vocab_size is None:
            self.most_entries = max(tokenizer.get_vocab().values()) + 1
        return check_servers(self, Request(support, support_size, temperature, max_completion_length, tokenizer))

    # Questions of the run

    def __call__(self, batch: TeacherBatch) -> TeacherScores:
        rows = torch.arange(batch.completion_ids.shape[0])
        return self.submit(batch).collect(rows, batch)

    def submit(self, batch: TeacherBatch) -> "RemotePending":
        """Send the questions about a batch, and return at once."""
        if batch.model_inputs:
            raise ValueError(
                f"A remote teacher is given token ids alone, got {sorted(batch.model_inputs)} beside them. It would "
                "score the text without them. Use a teacher in this process."
            )
        if batch.support not in ("sampled", "full", "teacher_top_k") and batch.requested_ids is None:
            raise ValueError(
                f"support must be 'teacher_top_k' or 'sampled' with a remote teacher that is not told the student's "
                f"entries, got {batch.support!r}. Set support='teacher_top_k'."
            )
        jobs = [self._jobs(question) for question in _questions(batch, self.most_entries)]
        self.client.submit(sorted((job for row in jobs for job in row), key=lambda job: -job.tokens))
        return RemotePending(self, jobs, batch)

    def _jobs(self, question: "Question | None") -> list[Job]:
        """Requests that together answer about a sequence."""
        if question is None:
            return []
        if question.requested is None:
            return [self._job(question)]
        jobs, start = [], 0
        for end in windows(question.requested, _MOST_SCORES):
            prompt, requested = [*question.prompt, *question.completion[:start]], question.requested[start:end]
            ids = requested if requested.max() >= 0 else None
            jobs.append(self._job(Question(prompt, question.completion[start:end], 0, question.temperature, ids)))
            start = end
        return jobs

    def _job(self, question: Question) -> Job:
        def ask(server: Server) -> tuple[str, Any]:
            assert server.identity is not None
            protocol = PROTOCOLS[server.identity.kind]
            if question.requested is not None and not protocol.scores_requested_ids:
                raise Failed(
                    f"{protocol.title} cannot score entries that the student chose, only its own best ones and the "
                    "sampled token (set support='teacher_top_k', or serve the teacher with SGLang, or load it with a "
                    "path)",
                    retryable=False,
                )
            return protocol.ask(question, server.identity.model)

        def read(server: Server, answer: Any) -> Answer:
            assert server.identity is not None
            return PROTOCOLS[server.identity.kind].read(answer, question, server.identity.model)

        return Job(ask, read, len(question.prompt) + len(question.completion))

    def ask_now(self, server: Server, question: Question) -> Answer:
        """One question to one server, without retries."""
        job = self._job(question)
        return job.read(server, self.client.call(server, "POST", *job.ask(server)))


class RemotePending:
    """Answers that are on their way, row by row."""

    def __init__(self, teacher: RemoteTeacher, jobs: Sequence[Sequence[Job]], batch: TeacherBatch):
        self.teacher, self.jobs = teacher, jobs
        self._num_tokens = batch.num_completion_tokens
        width = batch.input_ids.shape[1] - self._num_tokens
        self._columns = [row.nonzero().squeeze(-1) for row in batch.attention_mask[:, width:].bool().cpu()]
        requested = batch.requested_ids
        self._size = 0 if batch.support == "sampled" else batch.support_size
        if requested is not None:
            self._size = requested.shape[-1]

    def collect(self, rows: Tensor, batch: TeacherBatch) -> TeacherScores:
        """Wait for the answers about these rows; see [`PendingScores`]."""
        shape = (len(rows), self._num_tokens, self._size)
        sampled = torch.zeros(shape[:2])
        ranks: Tensor | None = None
        ids, logprobs = torch.full(shape, -1), torch.full(shape, -math.inf)
        for place, row in enumerate(rows.tolist()):
            at = 0
            for job in self.jobs[row]:
                answer = self._answer(job)
                columns = self._columns[row][at : at + len(answer.sampled)]
                at += len(answer.sampled)
                sampled[place, columns] = torch.from_numpy(answer.sampled)
                if answer.ranks is not None:
                    ranks = torch.zeros(shape[:2]) if ranks is None else ranks
                    ranks[place, columns] = torch.from_numpy(answer.ranks)
                if answer.ids is not None and answer.logprobs is not None:
                    size = answer.ids.shape[-1]
                    ids[place, columns, :size] = torch.from_numpy(answer.ids)
                    logprobs[place, columns, :size] = torch.from_numpy(answer.logprobs)
        if not self._size:
            return TeacherScores(sampled_logprobs=sampled, sampled_ranks=ranks)
        return TeacherScores(topk_ids=ids, topk_logprobs=logprobs, sampled_logprobs=sampled, sampled_ranks=ranks)

    def _answer(self, job: Job) -> Answer:
        try:
            return result_of(job, self.teacher.name)
        except TeacherScoreError:
            self.teacher.client.cancel([other for row in self.jobs for other in row if not other.future.done()])
            raise


def _questions(batch: TeacherBatch, most_entries: int | None) -> "list[Question | None]":
    """One question a sequence, up to its last token that is scored; `None` where there is none."""
    size = 0 if batch.support == "sampled" else min(batch.support_size, most_entries or batch.support_size)
    width = batch.input_ids.shape[1] - batch.num_completion_tokens
    kept = batch.attention_mask[:, width:].bool().cpu()
    scored = (batch.completion_mask.bool().cpu() & kept).tolist()
    requested = None if batch.requested_ids is None else batch.requested_ids.cpu().numpy()
    questions: list[Question | None] = []
    for row, (prompt, completion) in enumerate(batch.sequences()):
        columns = kept[row].nonzero().squeeze(-1).tolist()
        length = max((i + 1 for i, column in enumerate(columns) if scored[row][column]), default=0)
        if length == 0:
            questions.append(None)
            continue
        if not prompt:
            raise ValueError(
                f"The prompt of batch row {row} must have a token, got none. A server scores a token by those before "
                "it. Start prompts with the tokenizer's begin-of-sequence token."
            )
        ids = None
        if requested is not None and size:
            mask = np.array([scored[row][column] for column in columns[:length]])
            ids = np.where(mask[:, None], requested[row][columns[:length]], -1)  # context is not asked about
        questions.append(Question(prompt, completion[:length], size, batch.temperature, ids))
    return questions


async def _identify(client: Client, server: Server, kind: str, model: str | None) -> Identity:
    """Which model a server serves."""
    listed = await client.request(server, "GET", "/v1/models")
    cards = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(cards, list) or not cards:
        raise Failed("/v1/models lists no model: it is no OpenAI-style server", retryable=False)
    names = [card.get("id") for card in cards]
    if model is None and len(names) > 1:
        raise Failed(f"it serves several models, {names} (set model= to one of them)", retryable=False)
    if model is not None and model not in names:
        raise Failed(f"it serves {names}, not {model!r} (set model=, or --served-model-name there)", retryable=False)
    card = cards[0 if model is None else names.index(model)]
    if kind == "auto":
        kind = "sglang" if card.get("owned_by") == "sglang" else "vllm"
    return Identity(kind, card["id"], card.get("root"), card.get("max_model_len"))
