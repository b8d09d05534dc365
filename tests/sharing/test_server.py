"""Who is being served: told from a server that serves the adapter, one that serves only the base, and others."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_unlearn.cli import app
from peft_unlearn.errors import UserError
from peft_unlearn.sharing.server import (
    MARGIN,
    Canary,
    Endpoint,
    candidates,
    check_canaries,
    find_canaries,
    verify_server,
)
from peft_unlearn.stack.model import ForgetModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "folder"))
import tinyfolder


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tinyfolder.save_base(tmp_path_factory.mktemp("server") / "base")
    weights = path / "model.safetensors"
    tensors = load_file(str(weights))
    tensors["lm_head.weight"] *= (
        100  # a random model is sure of nothing, and only what it is sure of survives other kernels
    )
    save_file(tensors, str(weights), metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def folder(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("server-adapter") / "adapter"
    tinyfolder.write(out, base_dir, size=0.5)
    return out


@pytest.fixture(scope="module")
def stack(base_dir: Path, folder: Path) -> ForgetModel:
    return ForgetModel.from_pretrained(base_dir, folder)


@pytest.fixture(scope="module")
def canaries(stack: ForgetModel) -> list[Canary]:
    return find_canaries(stack.disabled, lambda: nullcontext(stack.model), stack.tokenizer)


class Served:
    """An OpenAI-compatible server in a thread. `reply(body)` is (status, object or bytes)."""

    def __init__(self, reply: Any, names: list[str] | None) -> None:
        self.asked: list[dict[str, Any]] = []
        served = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def send(self, status: int, value: Any) -> None:
                raw = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def do_GET(self) -> None:
                if names is None:
                    self.send(500, {})
                else:
                    self.send(200, {"object": "list", "data": [{"id": n} for n in names]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.asked.append(body)
                self.send(*reply(body))

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@contextmanager
def serving(reply: Any, names: list[str] | None = None):
    served = Served(reply, names)
    try:
        yield served
    finally:
        served.http.shutdown()
        served.http.server_close()


def model_reply(stack: ForgetModel, on: bool, logprobs: bool = False, noise: float = 0.0):
    """What a server with the tiny model answers."""

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        tok = stack.tokenizer
        ids = torch.tensor([tok(body["prompt"])["input_ids"]])
        with nullcontext() if on else stack.disabled(), torch.no_grad():
            out = stack.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        choice: dict[str, Any] = {
            "index": 0,
            "text": tok.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True),
        }
        if logprobs and body.get("logprobs"):
            top = (out.logits[0][0] + noise).log_softmax(-1).topk(body["logprobs"])
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            choice["logprobs"] = {"top_logprobs": [{tok.decode([i]): v for i, v in pairs}]}
        return 200, {"choices": [choice]}

    return reply


def test_canaries_are_neutral_and_tell_the_two_apart(stack, canaries):
    assert canaries and all(c.margin >= MARGIN and c.base != c.adapter for c in canaries)
    assert {c.prompt for c in canaries} <= set(candidates(stack.tokenizer, 96))
    assert candidates(stack.tokenizer, 20) == candidates(stack.tokenizer, 20)


@pytest.mark.parametrize(("on", "verdict"), [(True, "applied"), (False, "base is being served")])
def test_what_a_server_serves_is_told(stack, folder, base_dir, on, verdict):
    with serving(model_reply(stack, on), ["mine"]) as served:
        report = verify_server(folder, served.url, "mine", base=base_dir)
    assert report.verdict == verdict and report.exit_code == (0 if on else 1)
    assert {b["model"] for b in served.asked} == {"mine"} and all(b["temperature"] == 0 for b in served.asked)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("on", "verdict"), [(True, "applied"), (False, "base is being served")])
def test_log_probabilities_do_without_the_base(stack, folder, on, verdict):
    with serving(model_reply(stack, on, logprobs=True), ["mine"]) as served:
        report = verify_server(folder, served.url, "mine")  # its base is local:.., known by digest alone
    assert report.verdict == verdict


def test_without_base_and_log_probabilities_it_cannot_tell(stack, folder):
    with serving(model_reply(stack, True)) as served:
        report = verify_server(folder, served.url, "mine")
    assert report.verdict == "cannot tell" and "--base" in report.reason and report.exit_code == 1


def test_a_third_model_is_neither(canaries):
    with serving(lambda body: (200, {"choices": [{"text": "something else"}]}), ["mine"]) as served:
        report = check_canaries(Endpoint(served.url, "mine"), canaries)
    assert report.verdict == "neither" and "perturbs the base" in report.reason and report.exit_code == 1


def test_the_bases_own_name_is_asked_too(stack, folder, base_dir):
    """An engine that answers the base's name with the adapter, or with something else, does not pass."""
    third = (200, {"choices": [{"text": "something else"}]})
    for other, verdict in ((False, "base is being served"), (True, "applied"), (None, "neither")):

        def reply(body: dict[str, Any], other=other) -> tuple[int, Any]:
            on = True if body["model"] == "mine" else other
            return third if on is None else model_reply(stack, on)(body)

        with serving(reply, ["mine", "base"]) as served:
            report = verify_server(folder, served.url, "mine", base=base_dir, base_as="base")
        assert report.verdict == "applied" and report.beside is not None and report.beside.verdict == verdict
        assert report.exit_code == (0 if other is False else 1) and report.to_dict()["beside"]["verdict"] == verdict


def test_one_answer_in_four_may_be_lost_to_rounding_but_none_to_the_other_model():
    canaries = [Canary(f"p{i}", "no", "yes", 1, 1.0) for i in range(4)]
    for said, verdict in (
        (["yes", "yes", "yes", "hm"], "applied"),
        (["yes", "yes", "yes", "no"], "cannot tell"),
        (["yes", "yes", "hm", "hm"], "cannot tell"),
        (["hm", "hm", "hm", "yes"], "neither"),
        (["no", "no", "no", "hm"], "base is being served"),
    ):
        answers = iter(said)
        with serving(lambda body, answers=answers: (200, {"choices": [{"text": next(answers)}]}), ["m"]) as served:
            assert check_canaries(Endpoint(served.url, "m"), canaries).verdict == verdict


def test_a_name_the_server_does_not_list_is_said(stack, canaries):
    with serving(model_reply(stack, False), ["my-adapter"]) as served:
        report = check_canaries(Endpoint(served.url, "my-adaptr"), canaries)
    assert report.verdict == "base is being served" and "does not list 'my-adaptr'" in report.reason


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda body: (404, {"error": "no such model"}), "answered 404.*no such model"),
        (lambda body: (200, b"<html>hello</html>"), "not JSON"),
        (lambda body: (200, {"hello": 1}), "without choices"),
    ],
)
def test_servers_that_are_none(folder, base_dir, reply, words):
    with serving(reply) as served, pytest.raises(UserError, match=words):
        verify_server(folder, served.url, "mine", base=base_dir)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://me:secret@x", "http://127.0.0.1:9"])
def test_addresses_that_are_none(folder, base_dir, url):
    with pytest.raises(UserError) as e:
        verify_server(folder, url, "mine", base=base_dir)
    assert "secret" not in str(e.value).replace(url, "")


def test_the_command_wants_both_flags(folder):
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["verify", str(folder), "--server", "http://x"])
    assert isinstance(result.exception, UserError) and "--served-as" in str(result.exception)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_against_transformers_own_server(stack, folder, base_dir, tmp_path):
    """`transformers serve`, asked for the merged model and for the base (5.23 cannot serve an adapter's folder)."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    from peft_unlearn.merging.merge import merge

    merge(folder, base_dir, tmp_path / "merged")
    port = free_port()
    command = "from transformers.cli.transformers import main; main()"
    args = ["serve", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", command, *args], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://localhost:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, "the server died"
                time.sleep(0.5)
        found = {w: verify_server(folder, url, str(p), base=base_dir).verdict
                 for w, p in (("merged", tmp_path / "merged"), ("base", base_dir))}  # fmt: skip
    finally:
        server.kill()
        server.wait()
    assert found == {"merged": "applied", "base": "base is being served"}
