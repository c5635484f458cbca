# Copyright 2026 The trl-opd authors. Licensed under the Apache License, Version 2.0.
"""The servers of one teacher: their addresses, the key, and which of them is asked next."""

import ipaddress
import os
import random
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

RETRY_AFTER_LIMIT = 600.0  # seconds: a server that asks for more is asked again nonetheless


def clean_url(url: str) -> str:
    """
    An address without what does not belong into it: a trailing slash, OpenAI's `/v1`.

    Raises:
        ValueError: If it is no http address, or holds a password (which is not repeated in the message).
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        shown = "an address without http:// or https://" if "@" in url else repr(url)
        raise ValueError(
            f"urls must be addresses of servers, got {shown}. There is nobody to ask. Set e.g. 'http://127.0.0.1:8000'."
        )
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"urls must be without a user or password, got one for {parts.hostname!r}. Addresses are logged. Put the "
            "key into an environment variable and name it as api_key_env."
        )
    if parts.query or parts.fragment:
        raise ValueError(f"urls must be without '?' and '#', got them for {parts.hostname!r}. They would be logged.")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_key(variable: str | None, urls: Sequence[str], over_http: bool) -> None:
    """
    Refuse a key that is not there, or that anybody on the way could read.

    Raises:
        ValueError: Naming the variable, never its value.
    """
    if variable is None:
        return
    if not os.environ.get(variable, "").strip():
        raise ValueError(
            f"api_key_env must name an environment variable that holds the key, got {variable!r}, which is not set. "
            "The servers would refuse every question. Export it on every node, or leave api_key_env unset."
        )
    bare = [url for url in urls if url.startswith("http://") and not is_loopback(url)]
    if bare and not over_http:
        raise ValueError(
            f"urls must be https for a key, got {bare[0]!r}. Anybody on the way could read it. Serve https (vLLM: "
            "--ssl-certfile and --ssl-keyfile, or a proxy before it), or set api_key_over_http=True in a network that "
            "you trust."
        )


def tls_context(urls: Sequence[str], verify: bool | str) -> "ssl.SSLContext | bool":
    """How the servers' certificates are checked: against the system's authorities, or those of a file or folder."""
    if verify is True:
        return True
    if not isinstance(verify, (str, os.PathLike)):
        raise ValueError(
            f"verify must be True or the path of a file or folder with certificates, got {verify!r}. Without it any "
            "machine on the way could answer for the teacher. Pass the certificate of a self-signed server."
        )
    path = os.fspath(verify)
    if not os.path.exists(path):
        raise ValueError(f"verify must be a file or folder with certificates, got {path!r}, which does not exist.")
    if not any(url.startswith("https://") for url in urls):
        raise ValueError("verify must be left unset without an https address. It would check nothing.")
    if os.path.isdir(path):
        return ssl.create_default_context(capath=path)
    return ssl.create_default_context(cafile=path)


@dataclass
class Identity:
    """Which model a server serves: what must not change during a run."""

    kind: str
    model: str
    root: str | None = None
    max_model_len: int | None = None


@dataclass(eq=False)
class Server:
    """One address, what is under way to it, and until when it rests."""

    url: str
    identity: Identity | None = None
    unsure: bool = True  # whether its identity must be looked at before the next question
    requests: int = 0
    tokens: int = 0
    failures: int = 0  # in a row
    failed_at: float = -1.0
    rests_until: float = 0.0

    def has_room(self, tokens: int, max_requests: int, max_tokens: int) -> bool:
        """A question longer than the limit is asked alone."""
        return self.requests < max_requests and (self.requests == 0 or self.tokens + tokens <= max_tokens)

    def rest(self, started: float, wait: float, longest: float, at_least: float | None) -> None:
        """
        Leave it alone for a while: twice as long after each failure in a row, with jitter.

        Questions that were under way together fail together; they count as one failure.
        """
        now = time.monotonic()
        if started >= self.failed_at:
            self.failures += 1
            self.failed_at = now
            pause = min(longest, wait * 2.0 ** min(self.failures - 1, 30))
            self.rests_until = max(self.rests_until, now + pause * random.uniform(0.5, 1.0))
        if at_least is not None:
            self.rests_until = max(self.rests_until, now + min(at_least, RETRY_AFTER_LIMIT))

    def answered(self) -> None:
        self.failures = 0


def choose(
    servers: Sequence[Server], tried: frozenset[Server], tokens: int, max_requests: int, max_tokens: int
) -> "Server | float | None":
    """
    Who answers next: the least loaded server that is awake and has room, one that has not failed this question first.

    Returns:
        [`Server`], the moment at which the first one wakes, or `None` if all that are awake are full.
    """
    now = time.monotonic()
    awake = [server for server in servers if server.rests_until <= now]
    if not awake:
        return min(server.rests_until for server in servers)
    fresh = [server for server in awake if server not in tried] or awake
    free = [server for server in fresh if server.has_room(tokens, max_requests, max_tokens)]
    return min(free, key=lambda server: (server.tokens, server.requests)) if free else None
