"""A judge behind an OpenAI-compatible endpoint (`POST …/chat/completions`): OpenAI, vLLM, llama.cpp, Ollama …

The key comes from the environment, is sent to the given host only, and is in no message, row or file.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from email.message import Message
from typing import Any

from pmpd.errors import UserError

MOST_BYTES = 8 * 2**20
LONGEST_WAIT_SECONDS = 60.0


class JudgeError(ValueError):
    """The judge gave no usable answer."""


@dataclass(frozen=True)
class Endpoint:
    """Where a judge is, and how patiently it is asked."""

    url: str
    """Up to the version: https://api.openai.com/v1."""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; without one no key is sent."""
    timeout_seconds: float = 120.0
    """Of one request, however slowly its answer drips."""
    attempts: int = 6
    """Requests per judgment; 429, 5xx, lost connections and damaged answers are tried again."""
    first_wait_seconds: float = 1.0
    """Doubled after every failed attempt; a server's Retry-After goes first."""
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--judge-url {_shown(self.url)}: wanted is http(s)://host[:port]/v1")
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"--judge-url {_shown(self.url)}: no user, password or query in it; give the key in the "
                f"environment variable {self.key_variable}"
            )

    def ask(self, system: str, text: str) -> str:
        """The judge's answer at temperature 0. JudgeError, without the key in it, where there is none."""
        key = os.environ.get(self.key_variable)
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        wait, told = self.first_wait_seconds, ""
        for attempt in range(1, self.attempts + 1):
            try:
                return _content(self._post(json.dumps(body).encode(), key))
            except urllib.error.HTTPError as error:
                told = f"HTTP {error.code} {error.reason}: {_start_of(error)}"
                if error.code != 429 and error.code < 500:
                    break
                wait = _retry_after(error.headers) or wait
            except (OSError, JudgeError) as error:  # OSError: refused, reset, timed out
                told = f"{type(error).__name__}: {error}"
            if attempt < self.attempts:
                time.sleep(min(wait, LONGEST_WAIT_SECONDS))
                wait *= 2
        told = told.replace(key, "…") if key else told
        raise JudgeError(f"judge {self.model}: no answer after {attempt} requests; the last: {told}")

    def _post(self, body: bytes, key: str | None) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", body, headers)
        end = time.monotonic() + self.timeout_seconds
        content = b""
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout_seconds) as response:
            while part := response.read1(65536):
                content += part
                if time.monotonic() > end:
                    raise TimeoutError(f"no whole answer in {self.timeout_seconds:g} s")
                if len(content) > MOST_BYTES:
                    raise JudgeError(f"an answer of more than {MOST_BYTES} bytes")
        return content


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another host must not be given the key."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _content(body: bytes) -> str:
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise JudgeError(f"not an answer of chat completions: {body[:200]!r}") from None
    if not isinstance(text, str) or not text.strip():
        raise JudgeError("an empty answer")
    return text


def _start_of(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode(errors="replace").strip()
    except OSError:
        return ""


def _retry_after(headers: Message) -> float | None:
    try:
        return max(0.0, float(headers.get("Retry-After") or ""))
    except ValueError:
        return None


def _shown(url: str) -> str:
    """The URL without what may be secret."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
