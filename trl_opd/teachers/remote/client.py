# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""
Questions to servers over HTTP, asked by a thread of their own while the student works.

A question is asked again, of another server if there is one, when the connection fails, when the server is overloaded
or broken, and when its answer cannot be one. It is not asked again when the server says that the question is wrong.
"""

import asyncio
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

from ..answers import TeacherScoreError
from .servers import Identity, Server, choose

RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529})
SHOWN = 400  # characters of a server's own words in a message


class WrongAnswer(Exception):
    """An answer that cannot be one: broken, incomplete, or of another model."""


class Failed(Exception):
    """A question that got no answer."""

    def __init__(self, reason: str, retryable: bool = True, retry_after: float | None = None, status: int = 0):
        super().__init__(reason)
        self.retryable, self.retry_after, self.status = retryable, retry_after, status


@dataclass(eq=False)
class Job:
    """A question on its way: `ask(server)` gives path and body, `read(server, answer)` the result."""

    ask: Callable[[Server], tuple[str, Any]]
    read: Callable[[Server, Any], Any]
    tokens: int
    future: "Future[Any]" = field(default_factory=Future)
    attempts: int = 0
    tried: frozenset[Server] = frozenset()
    refused: frozenset[Server] = frozenset()
    reasons: list[str] = field(default_factory=list)
    task: "asyncio.Task[None] | None" = None


@dataclass
class Limits:
    """See [`RemoteTeacher`] for what each means."""

    max_in_flight: int
    max_batch_tokens: int
    timeout: float
    connect_timeout: float
    retries: int
    retry_wait: float
    max_retry_wait: float


class Client:
    """
    A pool of connections to servers of one model.

    Args:
        urls (`Sequence[str]`): Their addresses.
        identify (`Callable`):
            `async (client, server) -> Identity`, called before the first question and after failures.
        limits ([`Limits`]): How much, how long, how often.
        verify: TLS context, or `True` for the system's authorities.
        key_variable (`str`, *optional*): Environment variable with the key. It is read for each request, never kept.
        trust_env (`bool`): Whether proxies of the environment are used.
    """

    def __init__(
        self,
        urls: Sequence[str],
        identify: Callable[["Client", Server], Any],
        limits: Limits,
        *,
        verify: Any = True,
        key_variable: str | None = None,
        trust_env: bool = False,
    ):
        self.servers = [Server(url) for url in urls]
        self.limits = limits
        self.counts = {"requests": 0, "retries": 0, "bytes": 0}
        self._identify, self._key_variable = identify, key_variable
        self._verify, self._trust_env = verify, trust_env
        self._waiting: deque[Job] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking: dict[Server, asyncio.Lock] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._http: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    # From the caller's thread

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put questions in line; their futures hold the answers or a [`Failed`]."""
        self._start().call_soon_threadsafe(self._enqueue, list(jobs))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget questions, those under way too."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._forget, list(jobs))

    def call(self, server: Server, method: str, path: str, body: Any = None) -> Any:
        """One request, without retries, from the caller's thread: the decoded answer."""
        return asyncio.run_coroutine_threadsafe(self.request(server, method, path, body), self._start()).result()

    def look(self, server: Server) -> None:
        """Find out what a server serves."""
        self.run(self._look(server))

    def run(self, coroutine: Any) -> Any:
        """The result of a coroutine of this client."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._start()).result()

    def close(self) -> None:
        """Break off what is under way and end the thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None or self._pid != os.getpid():
            return
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(timeout=10)

    def _start(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._pid != os.getpid():  # the thread stays behind in the parent of a fork
                self._loop = self._thread = self._http = None
                self._pid = os.getpid()
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._serve, args=(self._loop,), name="trl-opd-remote-teacher", daemon=True
                )
                self._thread.start()
            return self._loop

    # In the client's thread

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        self._looking = {}
        try:
            loop.run_forever()
        finally:
            loop.run_until_complete(self._end())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    async def _end(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._forget(list(self._waiting))
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()
            self._http = None
        # A connection that was broken off while it was being made belongs to nobody who would close it
        for transport in list(getattr(asyncio.get_running_loop(), "_transports", {}).values()):
            transport.abort()
        await asyncio.sleep(0)

    def _enqueue(self, jobs: list[Job]) -> None:
        self._waiting.extend(jobs)
        self._admit()

    def _forget(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.future.cancel()
            if job.task is not None:
                job.task.cancel()
        self._waiting = deque(job for job in self._waiting if not job.future.cancelled())

    def _admit(self) -> None:
        """Send the questions at the head of the line for which there is room: none overtakes a longer one."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        limits = self.limits
        while self._waiting:
            job = self._waiting[0]
            if job.future.cancelled():
                self._waiting.popleft()
                continue
            able = [server for server in self.servers if server not in job.refused]
            chosen = choose(able, job.tried, job.tokens, limits.max_in_flight, limits.max_batch_tokens)
            if chosen is None:
                return
            if isinstance(chosen, float):
                delay = max(0.0, chosen - time.monotonic()) + 0.001
                self._alarm = asyncio.get_running_loop().call_later(delay, self._admit)
                return
            self._waiting.popleft()
            chosen.requests += 1
            chosen.tokens += job.tokens
            job.task = asyncio.get_running_loop().create_task(self._attempt(job, chosen))
            self._tasks.add(job.task)
            job.task.add_done_callback(self._tasks.discard)

    async def _attempt(self, job: Job, server: Server) -> None:
        started = time.monotonic()
        try:
            async with self._looking.setdefault(server, asyncio.Lock()):
                if server.unsure:  # asked once, not by every question that waits
                    await self._look(server)
            path, body = job.ask(server)
            answer = await self.request(server, "POST", path, body)
            result = await asyncio.to_thread(job.read, server, answer)
        except asyncio.CancelledError:
            job.future.cancel()
            raise
        except WrongAnswer as error:
            self._failed(job, server, started, Failed(str(error)))
        except Failed as error:
            self._failed(job, server, started, error)
        except Exception as error:  # a mistake of ours: it must reach the caller instead of leaving it waiting
            self._finish(job, Failed(f"{type(error).__name__}: {self.redact(str(error))}", retryable=False))
        else:
            server.answered()
            self._finish(job, result)
        finally:
            server.requests -= 1
            server.tokens -= job.tokens
            self._admit()

    def _finish(self, job: Job, result: Any) -> None:
        if job.future.cancelled():
            return
        if isinstance(result, Failed):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)

    def _failed(self, job: Job, server: Server, started: float, error: Failed) -> None:
        job.attempts += 1
        job.tried |= {server}
        job.reasons.append(f"{server.url}: {error}")
        if error.retryable:
            server.unsure = True  # another model may be there when it is back
            server.rest(started, self.limits.retry_wait, self.limits.max_retry_wait, error.retry_after)
            if job.tried >= set(self.servers):
                job.tried = frozenset()  # all have failed it once: begin again
        else:
            job.refused |= {server}
        if job.attempts > self.limits.retries or job.refused >= set(self.servers):
            self._finish(job, Failed(self._summary(job), retryable=False))
            return
        self.counts["retries"] += 1
        self._waiting.appendleft(job)

    def _summary(self, job: Job) -> str:
        """What went wrong, each reason once."""
        reasons = list(dict.fromkeys(job.reasons))
        attempts = f" ({job.attempts} attempts)" if job.attempts > 1 else ""
        return "; ".join(reasons[-4:]) + attempts

    async def _look(self, server: Server) -> None:
        """Make sure that a server still serves what it did."""
        identity: Identity = await self._identify(self, server)
        known = server.identity or next((s.identity for s in self.servers if s.identity is not None), None)
        if known is not None and identity != known:
            raise WrongAnswer(f"it serves another model than at the start: {identity}, was {known}")
        server.identity, server.unsure = identity, False

    async def request(self, server: Server, method: str, path: str, body: Any = None) -> Any:
        """
        One request.

        Raises:
            Failed: With a reason that holds neither key nor request.
        """
        import httpx2

        if self._http is None:
            limit = self.limits.max_in_flight * len(self.servers) + 8
            self._http = httpx2.AsyncClient(
                verify=self._verify,
                trust_env=self._trust_env,
                timeout=httpx2.Timeout(self.limits.timeout, connect=self.limits.connect_timeout, pool=None),
                # Shorter than the 5 seconds after which uvicorn closes: no question meets a closing connection
                limits=httpx2.Limits(max_connections=limit, max_keepalive_connections=limit, keepalive_expiry=4.0),
            )
        headers = {"content-type": "application/json"}
        if self._key_variable is not None:
            headers["authorization"] = f"Bearer {os.environ.get(self._key_variable, '').strip()}"
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        self.counts["requests"] += 1
        failure: Failed | None = None
        try:
            async with asyncio.timeout(self.limits.timeout):
                response = await self._http.request(method, server.url + path, content=content, headers=headers)
        except (TimeoutError, httpx2.TimeoutException) as error:
            what = "connection" if isinstance(error, httpx2.ConnectTimeout) else "answer"
            seconds = self.limits.connect_timeout if what == "connection" else self.limits.timeout
            failure = Failed(f"no {what} within {seconds:g} s")
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            failure = Failed(f"{type(error).__name__}: {self.redact(str(error)) or 'the connection broke'}")
        finally:
            headers.clear()
        if failure is not None:
            raise failure  # outside of `except`: the chain of exceptions holds no frame with the key
        self.counts["bytes"] += response.num_bytes_downloaded
        if response.status_code >= 300:
            raise self._refusal(response)
        return await asyncio.to_thread(_decode, response.content)

    def _refusal(self, response: Any) -> Failed:
        status = response.status_code
        words = " ".join(self.redact(response.text).split())[:SHOWN]
        reason = f"HTTP {status} {response.reason_phrase}".strip() + (f": {words}" if words else "")
        if status in (401, 403):
            reason += (
                " (set api_key_env to the name of an environment variable with the server's key)"
                if self._key_variable is None
                else f" (is the key in the environment variable {self._key_variable} the server's?)"
            )
        return Failed(reason, status in RETRYABLE, _retry_after(response.headers.get("retry-after")), status)

    def redact(self, text: str) -> str:
        """Text of a server or library without the key."""
        key = os.environ.get(self._key_variable, "").strip() if self._key_variable is not None else ""
        return text.replace(key, "***") if key else text


def _decode(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise WrongAnswer(f"its answer of {len(content)} bytes is cut off or not JSON") from None


def _retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header, which holds them or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def result_of(job: Job, name: str) -> Any:
    """
    Wait for an answer.

    Raises:
        TeacherScoreError: Naming teacher, server and reason.
    """
    try:
        return job.future.result()
    except CancelledError:
        reason = "the question was taken back, because another one failed or the client was closed"
    except Failed as error:
        reason = str(error)
    raise TeacherScoreError(f"Teacher {name!r} did not answer: {reason}.")
