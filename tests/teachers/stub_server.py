"""An HTTP server that speaks vLLM's or SGLang's protocol over a tiny model, so that its numbers are real."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class QuietServer(ThreadingHTTPServer):
    """Connections are kept alive, and clients that leave early are no news."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class StubServer:
    """
    One server of one model.

    Args:
        model, tokenizer: What it serves.
        kind (`str`): `"vllm"` or `"sglang"`.
        name (`str`): The served model's name.
        key (`str`, *optional*): What the Authorization header must bear.
        max_logprobs (`int`), max_model_len (`int`): vLLM's limits.
        tempered (`bool`): Whether log-probs follow the temperature, which no stock server does.
        context: TLS context.
    """

    def __init__(self, model: Any, tokenizer: Any, kind: str = "vllm", name: str = "tiny", **options: Any):
        self.model, self.tokenizer, self.kind, self.name = model, tokenizer, kind, name
        self.key: str | None = options.pop("key", None)
        self.max_logprobs: int = options.pop("max_logprobs", 20)
        self.max_model_len: int = options.pop("max_model_len", 256)
        self.tempered: bool = options.pop("tempered", False)
        self.noise: float = options.pop("noise", 0.0)
        self.models: list[str] = options.pop("models", [name])
        self.delay: float = options.pop("delay", 0.0)
        context = options.pop("context", None)
        assert not options, options
        self.asked: list[dict[str, Any]] = []  # bodies of scoring requests
        self.headers: list[dict[str, str]] = []
        self.connections: set[Any] = set()
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        self.http = QuietServer(("127.0.0.1", 0), self._handler())
        if context is not None:
            # Hands are shaken by each connection's own thread: one that says nothing must not keep the others waiting
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"{'http' if context is None else 'https'}://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    @torch.no_grad()
    def logprobs(self, ids: list[int], temperature: float) -> torch.Tensor:
        """Of each token after the first, `(len(ids) - 1, V)`."""
        with self._lock:
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        if self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        return (logits / (temperature if self.tempered else 1.0)).log_softmax(-1)

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        vocab_size = self.model.config.vocab_size
        if path == "/v1/models":
            owner = {"owned_by": self.kind, "root": f"/models/{self.name}", "max_model_len": self.max_model_len}
            return 200, {"object": "list", "data": [{"id": name, **owner} for name in self.models]}
        if path == ("/version" if self.kind == "vllm" else "/server_info"):
            return 200, {"version": "0.32.0" if self.kind == "vllm" else "0.5.9"}
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return 200, {"tokens": ids, "count": len(ids), "max_model_len": self.max_model_len}
        if path == "/detokenize":
            text = self.tokenizer.decode(body["tokens"])
            return 200, {"prompt" if self.kind == "vllm" else "text": text}
        if method == "POST" and path == ("/v1/completions" if self.kind == "vllm" else "/generate"):
            self.asked.append(body)
            ids = body["prompt" if self.kind == "vllm" else "input_ids"]
            bad = [i for i in ids if not 0 <= i < vocab_size]
            if bad:
                return self._error(f"Token id {bad[0]} is out of vocabulary")
            if len(ids) + (self.kind == "vllm") > self.max_model_len:
                return self._error(f"This model's maximum context length is {self.max_model_len} tokens.")
            return self._completions(body) if self.kind == "vllm" else self._generate(body)
        return 404, {"detail": "Not Found"}

    def _error(self, message: str, status: int = 400) -> tuple[int, Any]:
        return status, {"error": {"message": message, "type": "BadRequestError", "code": status}}

    def _completions(self, body: Any) -> tuple[int, Any]:
        if body["model"] != self.name:
            return self._error(f"The model `{body['model']}` does not exist.", 404)
        top_k, ids = body["prompt_logprobs"], body["prompt"]
        if top_k > self.max_logprobs:
            return self._error(
                f"Requested prompt logprobs of {top_k}, which is greater than max allowed: {self.max_logprobs}"
            )
        if top_k > self.model.config.vocab_size:  # its engine dies of it
            return self._error("EngineCore encountered an issue.", 500)
        logprobs = self.logprobs(ids, body["temperature"])
        positions: list[Any] = [None]
        for token, row in zip(ids[1:], logprobs, strict=True):
            # The sampled token first, then the best: a token that is both is there once
            order = row.argsort(descending=True).tolist()
            entries = {token: order.index(token) + 1, **{i: r + 1 for r, i in enumerate(order[:top_k])}}
            text = {i: self.tokenizer.decode([i]) for i in entries}
            positions.append(
                {
                    str(i): {"logprob": row[i].float().item(), "rank": rank, "decoded_token": text[i]}
                    for i, rank in entries.items()
                }
            )
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": positions}
        return 200, {"object": "text_completion", "model": self.name, "choices": [choice]}

    def _generate(self, body: Any) -> tuple[int, Any]:
        ids, start, top_k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        logprobs = self.logprobs(ids, body["sampling_params"]["temperature"])[start:]
        tokens = ids[start + 1 :]
        last = self.model.config.vocab_size - 1
        meta: dict[str, Any] = {"id": "x", "finish_reason": {"type": "length", "length": 0}, "prompt_tokens": len(ids)}
        own = [[row[i].float().item(), i if i < last else 0, None] for i, row in zip(tokens, logprobs, strict=True)]
        meta["input_token_logprobs"] = [[None, ids[start], None], *own]
        if top_k:
            values, best = logprobs.float().topk(top_k)
            pairs = zip(values.tolist(), best.tolist(), strict=True)
            rows = [[[v, i, None] for v, i in zip(*pair, strict=True)] for pair in pairs]
            meta["input_top_logprobs"] = [None, *rows]
        if body.get("token_ids_logprob") is not None:
            wanted = body["token_ids_logprob"]
            rows = [[[row[i].float().item(), i, None] for i in wanted] for row in logprobs]
            meta["input_token_ids_logprobs"] = [None, *rows]
        return 200, {"text": "", "output_ids": [], "meta_info": meta}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._serve("GET", None)

            def do_POST(self) -> None:
                self._serve("POST", json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def _serve(self, method: str, body: Any) -> None:
                stub.headers.append({key.lower(): value for key, value in self.headers.items()})
                stub.connections.add(self.client_address)
                if stub.key is not None and self.headers["authorization"] != f"Bearer {stub.key}":
                    # Some servers repeat what they were sent
                    status, answer = 401, {"error": f"Unauthorized: {self.headers['authorization']}"}
                else:
                    with stub._lock:
                        stub.under_way += 1
                        stub.most_under_way = max(stub.most_under_way, stub.under_way)
                    if stub.delay and method == "POST":
                        time.sleep(stub.delay)
                    status, answer = stub.answer(method, self.path, body)
                    with stub._lock:
                        stub.under_way -= 1
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        return Handler
