"""Servers that mean harm: redirects with the key, streams that trickle or never end, huge and odd replies, text that steers."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from peft_unlearn.errors import UserError
from peft_unlearn.sharing import endpoint as ep
from peft_unlearn.sharing.endpoint import Endpoint
from peft_unlearn.sharing.server import Canary, check_canaries

Handler = http.server.BaseHTTPRequestHandler
COMPLETION = {"choices": [{"text": " Paris", "logprobs": None}]}


@contextmanager
def serving(act: Callable[[Handler], None]) -> Iterator[str]:
    """The address of a server that does `act` with every request."""

    class Handles(Handler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with suppress(OSError):  # the client went away, as it should
                act(self)

        do_POST = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handles)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler: Handler, value: object, status: int = 200, **headers: str) -> None:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(status)
    for name, text in {"Content-Length": str(len(raw)), **headers}.items():
        handler.send_header(name, text)
    handler.end_headers()
    handler.wfile.write(raw)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_gets_neither_prompt_nor_key(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    seen: list[str] = []

    def thief(handler: Handler) -> None:
        seen.append(handler.headers.get("Authorization", ""))
        send(handler, COMPLETION)

    with serving(thief) as other, serving(lambda h: send(h, b"", status, Location=f"{other}/v1/completions")) as url:
        with pytest.raises(UserError, match="redirects to another place"):
            Endpoint(url, "m").complete("The", 1)
        assert Endpoint(url, "m").offered() is None
    assert seen == []


def test_a_redirect_within_the_origin_is_followed_with_its_body_but_not_for_ever() -> None:
    def moved(handler: Handler) -> None:
        if handler.path.endswith("/"):
            send(handler, COMPLETION)
        else:
            send(handler, b"", 307, Location=handler.path + "/")

    with serving(moved) as url:
        assert Endpoint(url, "m").complete("The", 1) == (" Paris", None)
    with serving(lambda h: send(h, b"", 307, Location=h.path)) as url, pytest.raises(UserError, match="without end"):
        Endpoint(url, "m").complete("The", 1)


def trickle_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def trickle_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    while True:
        handler.wfile.write(b"X: y\r\n")
        handler.wfile.flush()
        time.sleep(0.1)


def trickle_error(handler: Handler) -> None:
    handler.send_response(500)
    trickle_body(handler)


@pytest.mark.parametrize("act", [trickle_body, trickle_headers, trickle_error, lambda h: time.sleep(300)])
def test_a_stream_that_never_ends_ends_at_the_deadline(act: Callable[[Handler], None]) -> None:
    with serving(act) as url:
        start = time.monotonic()
        with pytest.raises(UserError, match=r"too slow|cannot be reached|answered 500"):
            Endpoint(url, "m", timeout=0.6).complete("The", 1)
        assert time.monotonic() - start < 60  # far from both 0.6 and for ever: machines may be busy


def test_a_server_that_was_too_slow_once_is_not_asked_again_and_all_replies_share_one_deadline() -> None:
    with serving(trickle_body) as url:
        with pytest.raises(UserError, match="too slow"):
            Endpoint(url, "m", timeout=0.5).offered()
        start = time.monotonic()
        with pytest.raises(UserError):
            Endpoint(url, "m", timeout=300, total=0.5).complete("The", 1)
        assert time.monotonic() - start < 60


def test_a_reply_without_end_is_read_no_further_than_its_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ep, "MAX_REPLY", 1 << 20)

    def flood(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"[" * (1 << 16))

    with serving(flood) as url, pytest.raises(UserError, match="larger than 1 MB"):
        Endpoint(url, "m", timeout=20).complete("The", 1)


@pytest.mark.parametrize(
    "value",
    [
        [], None, 3, {"choices": {}}, {"choices": [None]}, {"choices": [{}]}, {"choices": [{"text": "x", "logprobs": 7}]},
        {"choices": [{"text": "x", "logprobs": {"top_logprobs": [{"a": [1]}]}}]},
        {"choices": [{"text": "x", "logprobs": {"top_logprobs": [{"a": 10**400}]}}]},
        b"\xff\xfe", b"", b"[" * 100_000, b'{"choices": [{"text": "x", "logprobs": {"top_logprobs": {"0": 1}}}]}',
    ],
)  # fmt: skip
def test_an_odd_reply_is_a_message(value: object) -> None:
    with serving(lambda h: send(h, value)) as url:
        with pytest.raises(UserError, match="OpenAI-compatible"):
            Endpoint(url, "m").complete("The", 1, logprobs=5)
        assert Endpoint(url, "m").offered() is None


@pytest.mark.parametrize("raw", [b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n", b""])
def test_what_is_no_http_is_a_message(raw: bytes) -> None:
    with serving(lambda h: h.wfile.write(raw) and None) as url, pytest.raises(UserError):
        Endpoint(url, "m", timeout=3).complete("The", 1)


def test_no_number_that_is_not_finite_counts() -> None:
    value = b'{"choices": [{"text": "x", "logprobs": {"top_logprobs": [{"a": NaN, "b": -Infinity, "c": -1}]}}]}'
    with serving(lambda h: send(h, value)) as url:
        assert Endpoint(url, "m").complete("The", 1, logprobs=5) == ("x", {"c": -1.0})


def test_text_of_a_server_cannot_steer_a_terminal_or_fill_it() -> None:
    evil = "\x1b]0;owned\x07\u202e" + "A" * 1500

    def act(handler: Handler) -> None:
        if handler.path.endswith("models"):
            send(handler, {"data": [{"id": evil}] * 2000})
        else:
            send(handler, {"choices": [{"text": evil}]})

    with serving(act) as url:
        report = check_canaries(Endpoint(url, "m"), [Canary("The", "a", "b", 1, 1.0)])
    assert report.offered is not None and len(report.offered) == 1000
    shown = str(report) + json.dumps(report.to_dict(), ensure_ascii=False)
    assert "\x1b" not in shown and "\u202e" not in shown and "\x07" not in shown
    assert len(report.evidence[0].answer) < 400 and max(map(len, report.offered)) < 300

    with serving(lambda h: send(h, {"error": evil}, 400)) as url, pytest.raises(UserError) as caught:
        Endpoint(url, "m").complete("The", 1)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("url", ["http://[", "http://a:b/", "http://", "ftp://x", "file:///etc/passwd", "http://u:p@h"])
def test_an_address_that_is_none_is_a_message(url: str) -> None:
    with pytest.raises(UserError, match="--server"):
        Endpoint(url, "m")
