"""An OpenAI-compatible server that is not trusted: what it may be sent, and how much of an answer is taken from it.

The key goes to the origin that the user named and to no other. A reply has a largest size and a time by which it must be whole,
however it trickles; text of it is cut and made printable before anybody sees it.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from typing import Any

from ..errors import UserError
from ..reporting.text import printable

MAX_REPLY = 4 << 20
REPLY_SECONDS, ALL_SECONDS = 60.0, 600.0
NAMES, NAME, ANSWER = 1000, 200, 2000  # listed models, characters of a name, characters of an answer
_MOVED = (301, 302, 303, 307, 308)
_NO_SERVER = "is this an OpenAI-compatible server?"


def brief(text: str, most: int = ANSWER) -> str:
    """Text of a server, fit to be shown."""
    return printable(text[:most], breaks=False) + (".." if len(text) > most else "")


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None  # a redirect comes back as an HTTPError, and `Endpoint` looks where it leads


class Endpoint:
    """A server and the name of a model on it. OPENAI_API_KEY is sent if set. Raises `UserError` with what it answered where it
    refuses.

    Args:
        timeout: seconds for one reply, from the request to its last byte.
        total: seconds for all of them together.
    """

    def __init__(self, url: str, model: str, timeout: float = REPLY_SECONDS, total: float = ALL_SECONDS) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.netloc and (parts.port or True)
        except ValueError:
            parts, valid = None, False
        if parts is None or not valid:
            raise UserError(f"--server {url!r}: expected the address of a server, e.g. http://localhost:8000")
        if parts.username or parts.password:
            raise UserError("--server: no credentials in the address; put the key into OPENAI_API_KEY")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model, self.timeout = model, timeout
        self._ends, self._open = time.monotonic() + total, urllib.request.build_opener(_Stay)

    def offered(self) -> list[str] | None:
        """Names that the server lists, None where it does not say."""
        try:
            rows = self._call("/v1/models")["data"]
            return [brief(str(row["id"]), NAME) for row in rows[:NAMES]]
        except _TooSlow:
            raise
        except (UserError, KeyError, TypeError):
            return None

    def complete(self, prompt: str, tokens: int, logprobs: int | None = None) -> tuple[str, dict[str, float] | None]:
        """Greedy continuation, and the first token's alternatives with their log-probabilities where the server gives them."""
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        if logprobs is not None:
            body["logprobs"] = logprobs
        reply = self._call("/v1/completions", body)
        try:
            choice = reply["choices"][0]
            top = ((choice.get("logprobs") or {}).get("top_logprobs") or [None])[0]
            return str(choice["text"])[:ANSWER], _scores(top)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            raise UserError(f"{self.url}: a completion without choices; {_NO_SERVER}") from None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        url, data = self.url + path, None if body is None else json.dumps(body).encode()
        ends = min(time.monotonic() + self.timeout, self._ends)
        for _ in range(4):
            raw = self._reply(url, data, ends)
            if isinstance(raw, str):
                url = self._followed(url, raw)
                continue
            try:
                return json.loads(raw)
            except (ValueError, RecursionError):
                raise UserError(f"{url}: the answer is not JSON; {_NO_SERVER}") from None
        raise UserError(f"{self.url}{path}: the server redirects without end")

    def _followed(self, url: str, location: str) -> str:
        """Where a redirect leads, which must be the same origin: prompts and key go nowhere else."""
        there = urllib.parse.urljoin(url, location)
        if urllib.parse.urlsplit(there)[:2] != urllib.parse.urlsplit(self.url)[:2]:
            raise UserError(
                f"{url}: the server redirects to another place ({brief(there, NAME)}), which is not followed; if you trust it, "
                "name it with --server"
            )
        return there

    def _reply(self, url: str, data: bytes | None, ends: float) -> bytes | str:
        """The body, or where a redirect leads. Asked for in a thread: no timeout of a socket bounds a reply that trickles."""
        found: list[bytes | str | Exception] = []

        def ask() -> None:
            try:
                found.append(self._ask(url, data, ends))
            except Exception as e:  # raised again below, in the thread that asked
                found.append(e)

        worker = threading.Thread(target=ask, daemon=True)
        worker.start()
        worker.join(max(0.0, ends - time.monotonic()))
        if not found:
            raise _TooSlow(f"{url}: no whole answer within {self.timeout:g} s; the server is too slow, or never ends")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _ask(self, url: str, data: bytes | None, ends: float) -> bytes | str:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            request = urllib.request.Request(url, data=data, headers=headers)
            with self._open.open(request, timeout=max(0.1, ends - time.monotonic())) as reply:
                return _body(reply, url, ends)
        except urllib.error.HTTPError as e:
            with e:
                if e.code in _MOVED and (location := e.headers.get("Location")):
                    return location
                said = b""
                with suppress(OSError, http.client.HTTPException):
                    said = e.read(300)
                why = brief(said.decode("utf-8", "replace").strip() or str(e.reason), 300)
            raise UserError(f"{url}: the server answered {e.code} for {self.model!r}: {why}") from None
        except TimeoutError:
            raise _TooSlow(f"{url}: no whole answer within {self.timeout:g} s; the server is too slow") from None
        except (urllib.error.URLError, OSError, http.client.HTTPException, ValueError) as e:
            why = brief(str(getattr(e, "reason", e)) or type(e).__name__, 300)
            raise UserError(f"{self.url}: the server cannot be reached ({why})") from None


class _TooSlow(UserError):
    """No reply in time: asking again would only take as long again."""


def _body(reply: Any, url: str, ends: float) -> bytes:
    out = bytearray()
    while time.monotonic() < ends and (piece := reply.read1(1 << 16)):
        out += piece
        if len(out) > MAX_REPLY:
            raise UserError(
                f"{url}: the answer is larger than {MAX_REPLY >> 20} MB, which no answer to a short prompt is"
            )
    if time.monotonic() >= ends:
        raise _TooSlow(f"{url}: no whole answer in time; the server is too slow, or never ends")
    return bytes(out)


def _scores(top: Any) -> dict[str, float] | None:
    """Finite log-probabilities by token text."""
    if not isinstance(top, dict):
        return None
    return {str(k): float(v) for k, v in top.items() if math.isfinite(float(v))}
