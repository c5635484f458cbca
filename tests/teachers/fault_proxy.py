"""A proxy before a teacher's server that spoils its answers in the ways that servers and networks do."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from stub_server import QuietServer


def _positions(answer: dict) -> list[Any]:
    """Entries by token, in either protocol: those of vLLM as dicts, those of SGLang as lists."""
    if "choices" in answer:
        return answer["choices"][0]["prompt_logprobs"]
    meta = answer["meta_info"]
    return meta.get("input_top_logprobs", meta["input_token_logprobs"])


def _spoil_last(value: Any) -> Callable[[dict], None]:
    def spoil(answer: dict) -> None:
        if "choices" in answer:
            next(iter(_positions(answer)[-1].values()))["logprob"] = value
        else:
            answer["meta_info"]["input_token_logprobs"][-1][0] = value

    return spoil


def _other_model(answer: dict) -> None:
    answer["model"] = "another-model"


def _fewer_positions(answer: dict) -> None:
    if "choices" in answer:
        _positions(answer).pop()
    else:
        answer["meta_info"]["input_token_logprobs"].pop()


def _fewer_logprobs(answer: dict) -> None:
    entries = _positions(answer)[-1]
    entries.popitem() if isinstance(entries, dict) else entries.pop()


def _no_logprobs(answer: dict) -> None:
    if "choices" in answer:
        answer["choices"][0]["prompt_logprobs"] = None
    else:
        del answer["meta_info"]["input_token_logprobs"]


def _logits(answer: dict) -> None:
    if "choices" in answer:
        for entry in _positions(answer)[-1].values():
            entry["logprob"] += 40.0
    else:
        answer["meta_info"]["input_token_logprobs"][-1][0] += 40.0


CONTENT_FAULTS: dict[str, Callable[[dict], None]] = {
    "nan": _spoil_last(float("nan")),
    "null": _spoil_last(None),
    "text": _spoil_last("many"),
    "other model": _other_model,
    "too few positions": _fewer_positions,
    "too few log-probs": _fewer_logprobs,
    "no log-probs": _no_logprobs,
    "logits": _logits,
}
# What the client makes of each
REASONS = {
    "drop": "disconnected|RemoteProtocolError|ReadError",
    "500": "HTTP 500",
    "503": "HTTP 503",
    "429": "HTTP 429",
    "truncated": "RemoteProtocolError|incomplete|cut off",
    "half of the JSON": "cut off or not JSON",
    "a web page": "cut off or not JSON",
    "hang": "no answer within",
    "drip": "no answer within",
    "nan": "NaN or null",
    "null": "NaN or null",
    "text": "not numbers",
    "other model": "another-model",
    "too few positions": "tokens in answer to",
    "too few log-probs": "were asked for|no log-prob of the sampled token",
    "no log-probs": "log-probs of no tokens|input_token_logprobs of no tokens",
    "logits": "where 0 is the highest|sum up to",
}


class FaultProxy:
    """
    Passes requests on to `upstream`.

    `plan` holds the names of faults for the next scoring requests (`None`: pass on); `always` is one for all of them
    after the plan.
    """

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream)
        self.plan: deque[str | None] = deque()
        self.always: str | None = None
        self.retry_after = "0"
        self.seen: list[tuple[float, str]] = []  # when, and what was done to it
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.http: QuietServer | None = QuietServer(("127.0.0.1", 0), self._handler())
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._serve()

    def _serve(self) -> None:
        assert self.http is not None
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """As if the server had ended: open connections break, new ones are refused."""
        self._ended.set()
        if self.http is not None:
            self.http.shutdown()
            self.http.server_close()
            self.http = None

    def start(self) -> None:
        """Again, at the same address."""
        self._ended.clear()
        self.http = QuietServer(("127.0.0.1", self.port), self._handler())
        self._serve()

    def next(self, faults: Iterable[str | None]) -> None:
        with self._lock:
            self.plan.extend(faults)

    def _fault(self, path: str) -> str | None:
        if path not in ("/v1/completions", "/generate"):
            return None
        with self._lock:
            fault = self.plan.popleft() if self.plan else self.always
            self.seen.append((time.monotonic(), fault or "passed on"))
            return fault

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._pass("GET", None)

            def do_POST(self) -> None:
                self._pass("POST", self.rfile.read(int(self.headers["content-length"])))

            def _pass(self, method: str, body: bytes | None) -> None:
                fault = proxy._fault(self.path)
                if proxy._ended.is_set() or fault == "drop":
                    self._drop()
                elif fault in ("500", "503", "429"):
                    extra = {"retry-after": proxy.retry_after} if fault != "500" else {}
                    self._send(int(fault), b'{"error": {"message": "out of order"}}', extra)
                elif fault == "a web page":
                    self._send(200, b"<html>Sign in to continue</html>")
                elif fault == "hang":
                    proxy._ended.wait(30)
                    self._drop()
                else:
                    status, content = self._ask(method, body)
                    if fault in CONTENT_FAULTS:
                        answer = json.loads(content)
                        CONTENT_FAULTS[fault](answer)
                        content = json.dumps(answer).encode()
                    if fault == "half of the JSON":
                        content = content[: len(content) // 2]
                    if fault == "truncated":
                        self._send(status, content[: len(content) // 2], length=len(content))
                        self._drop()
                    elif fault == "drip":
                        self._send(status, b"", length=len(content))
                        for i in range(len(content)):
                            if proxy._ended.wait(0.05):
                                break
                            self.wfile.write(content[i : i + 1])
                            self.wfile.flush()
                        self._drop()
                    else:
                        self._send(status, content)

            def _ask(self, method: str, body: bytes | None) -> tuple[int, bytes]:
                connection = http.client.HTTPConnection(proxy.upstream.hostname or "", proxy.upstream.port, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() in ("content-type", "authorization")}
                connection.request(method, self.path, body=body, headers=headers)
                response = connection.getresponse()
                content = response.read()
                connection.close()
                return response.status, content

            def _send(
                self, status: int, content: bytes, extra: dict[str, str] | None = None, length: int | None = None
            ) -> None:
                self.send_response(status)
                for key, value in {"content-type": "application/json", **(extra or {})}.items():
                    self.send_header(key, value)
                self.send_header("content-length", str(len(content) if length is None else length))
                self.end_headers()
                self.wfile.write(content)
                self.wfile.flush()

            def _drop(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *args: Any) -> None:
                pass

        return Handler
