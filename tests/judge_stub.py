"""A judge on loopback that speaks OpenAI's chat completions: verdicts from the text it is asked about, and,
when told so, the moods of real servers: 429, stalls, broken JSON, answers without a verdict."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes] | str
"""(status, body), or what the judge says."""


class StubJudge(ThreadingHTTPServer):
    """`answer(messages, attempt)` -> what is replied; `attempt` counts requests of the same messages, from
    1. `stall` seconds are waited where it says "stall"."""

    daemon_threads = True

    def __init__(self, answer: Callable[[list[dict[str, str]], int], Reply], stall: float = 5.0) -> None:
        self.asked: list[dict[str, Any]] = []
        """Bodies of the requests."""
        self.keys: set[str | None] = set()
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._over = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.asked.append(body)
                    server.keys.add(self.headers.get("Authorization"))
                    identity = json.dumps(body["messages"])
                    server._attempts[identity] += 1
                    attempt = server._attempts[identity]
                reply = (
                    answer(body["messages"], attempt)
                    if self.path.endswith("/chat/completions")
                    else (404, b"")
                )
                if reply == "stall":
                    server._over.wait(stall)
                if isinstance(reply, str):
                    message = {"role": "assistant", "content": reply}
                    usage = {"prompt_tokens": 7, "completion_tokens": 3}
                    reply = 200, json.dumps({"choices": [{"message": message}], "usage": usage}).encode()
                self.send_response(reply[0])
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply[1])))
                if reply[0] == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(reply[1])

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *_: object) -> None:
        """A client that would not wait any longer is no fault."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self) -> None:
        self._over.set()
        self.shutdown()
        self.server_close()


@contextmanager
def stub_judge(
    answer: Callable[[list[dict[str, str]], int], Reply], stall: float = 5.0
) -> Iterator[StubJudge]:
    server = StubJudge(answer, stall)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.close()


def rating_of(messages: list[dict[str, str]]) -> str:
    """A rating from 1 to 10 that follows from the text, in the form that graders are asked for."""
    return f"It is fine. Rating: [[{1 + len(messages[-1]['content']) % 10}]]"
