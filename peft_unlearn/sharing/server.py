"""Does a server that claims to serve an adapter serve it? Servers are known to accept an adapter and to answer with the base.

Two kinds of evidence, both from prompts about nothing in particular, never from the forget set. With the base at hand: prompts
are sought (neutral sentences, then seeded random words of the vocabulary) on which base and adapter part company in greedy
decoding by a margin that other kernels and half precision do not bridge, and the server is asked to continue them. Without it,
and where the server gives log-probabilities: its most probable first tokens against the logits that the manifest stored.
"""

from __future__ import annotations

import json
import math
import os
import random
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError, nearest
from ..folder.manifest import NEUTRAL_PROMPTS, Probes

Answer = Literal["applied", "base is being served", "cannot tell"]
MARGIN = 0.25
"""Smallest gap, in logits, between the best and the second best token for a prompt to count: bfloat16 was seen to move logits by .08."""
TOKENS, WANTED, TRIED, ROUND = 16, 6, 96, 8


@dataclass(frozen=True)
class Canary:
    """A prompt on which the two models say different things. margin: the least gap of best over second best token on the way there."""

    prompt: str
    base: str
    adapter: str
    tokens: int
    margin: float


@dataclass
class ServerReport:
    """verdict, and the evidence: per prompt what either model would say, what the server said and whom that resembles."""

    url: str
    served_as: str
    verdict: Answer
    reason: str
    offered: list[str] | None = None
    evidence: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 0 if self.verdict == "applied" else 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.served_as} at {self.url}: {self.verdict} ({self.reason})"]
        lines += [f"  {e['like']:<8} {e['prompt']!r} -> {e['said']!r}" for e in self.evidence]
        return "\n".join(lines)


class Endpoint:
    """An OpenAI-compatible server. Raises `UserError` with what it answered where it refuses. OPENAI_API_KEY is sent if set."""

    def __init__(self, url: str, model: str, timeout: float = 120.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"--server {url!r}: expected the address of a server, e.g. http://localhost:8000")
        if parts.username or parts.password:
            raise UserError("--server: no credentials in the address; put the key into OPENAI_API_KEY")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model, self.timeout = model, timeout

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as e:
            said = e.read(300).decode("utf-8", "replace").strip()
            raise UserError(
                f"{self.url}{path}: the server answered {e.code} for the model {self.model!r}: {said or e.reason}"
            ) from None
        except (urllib.error.URLError, OSError) as e:
            raise UserError(f"{self.url}: the server cannot be reached ({getattr(e, 'reason', e)})") from None
        except ValueError:
            raise UserError(f"{self.url}{path}: the answer is not JSON; is this an OpenAI-compatible server?") from None

    def offered(self) -> list[str] | None:
        """Names that the server lists, None where it does not say."""
        try:
            found = self._call("/v1/models")
            return [str(row["id"]) for row in found["data"]]
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
            return str(choice["text"]), {str(k): float(v) for k, v in top.items()} if isinstance(top, dict) else None
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(
                f"{self.url}: a completion without choices came back; is this an OpenAI-compatible server?"
            ) from None


def verify_server(
    folder: str | Path,
    url: str,
    served_as: str,
    base: str | Path | None = None,
    scale: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ServerReport:
    """Ask the server at `url` for the model `served_as` and say whether the adapter in `folder` is on it.

    base: folder, Hub id or ``embedded:NAME``, default the manifest's; where it cannot be had the manifest's probes have to do.
    scale: at which the adapter should be served, default the manifest's (plain PEFT serves at 1).
    Raises `UserError` for a folder that is no adapter, a wrong base, a server that cannot be reached or refuses.
    """
    from ..folder.base import load_tokenizer, resolve_base
    from ..folder.fetch import resolve_adapter
    from ..folder.read import read_adapter
    from ..stack.model import ForgetModel

    folder = resolve_adapter(folder)
    found = read_adapter(folder)
    endpoint = Endpoint(url, served_as)
    try:
        resolve_base(found.manifest.base.ref, override=base, revision=found.manifest.base.revision)
    except UserError:
        if base is not None:
            raise
        if found.manifest.probes is None:
            raise UserError(f"{folder}: neither its base nor probes are at hand; name the base with --base") from None
        return ask_probes(endpoint, found.manifest.probes, load_tokenizer(folder))
    endpoint.complete(NEUTRAL_PROMPTS[0], 1)  # a server that is not there is told before a model is loaded
    stack = ForgetModel.from_pretrained(base, folder, scales=None if scale is None else [scale])
    canaries = find_canaries(stack.disabled, lambda: nullcontext(stack.model), stack.tokenizer, progress=progress)
    return ask(endpoint, canaries)


def candidates(tokenizer: Any, count: int, seed: int = 0) -> list[str]:
    """`count` prompts about nothing: the manifest's neutral ones, then four to ten random entries of the vocabulary."""
    rng = random.Random(seed)
    out: list[str] = list(NEUTRAL_PROMPTS)
    special = set(tokenizer.all_special_ids)
    words = [i for i in range(len(tokenizer)) if i not in special]
    while len(out) < count:
        text = tokenizer.decode(rng.choices(words, k=rng.randint(4, 10))).strip()
        if text and text.isprintable() and "\ufffd" not in text and text not in out:
            out.append(text)
    return out[:count]


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int = TOKENS) -> tuple[list[int], list[float]]:
    """Greedy token ids of one prompt, and at each the gap (logits) of the best over the second best token."""
    import torch

    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.get_input_embeddings().weight.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, temperature=None,
            top_p=None, top_k=None, num_beams=1, output_logits=True, return_dict_in_generate=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )  # fmt: skip
    new = out.sequences[0, ids.shape[1] :].tolist()
    best = torch.stack([z[0].float().topk(2).values for z in out.logits])  # (tokens, 2)
    return new, (best[:, 0] - best[:, 1]).tolist()


def find_canaries(
    base: Callable[[], Any],
    adapter: Callable[[], Any],
    tokenizer: Any,
    wanted: int = WANTED,
    tried: int = TRIED,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Canary]:
    """Prompts on which the two subjects (context managers that yield a model) part company by at least `MARGIN`, best first."""
    prompts, found = candidates(tokenizer, tried), []
    for start in range(0, len(prompts), ROUND):
        batch = prompts[start : start + ROUND]
        with base() as model:
            without = [continuation(model, tokenizer, p) for p in batch]
        with adapter() as model:
            on = [continuation(model, tokenizer, p) for p in batch]
        found += [c for c in map(_canary, batch, without, on, [tokenizer] * len(batch)) if c is not None]
        if progress is not None:
            progress("looking for prompts that tell them apart", min(start + ROUND, len(prompts)), len(prompts))
        if len(found) >= wanted:
            break
    return sorted(found, key=lambda c: -c.margin)[:wanted]


def _canary(
    prompt: str, base: tuple[list[int], list[float]], adapter: tuple[list[int], list[float]], tokenizer: Any
) -> Canary | None:
    (a, gap_a), (b, gap_b) = base, adapter
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:
        return None
    margin = min(gap_a[: at + 1] + gap_b[: at + 1])
    says = [tokenizer.decode(ids[: at + 1], skip_special_tokens=True).strip() for ids in (a, b)]
    # an answer that ends where the other goes on is a prefix of it: a server's text could not be told apart
    if margin < MARGIN or says[0].startswith(says[1]) or says[1].startswith(says[0]):
        return None
    return Canary(prompt, says[0], says[1], at + 1, margin)


def ask(endpoint: Endpoint, canaries: Sequence[Canary]) -> ServerReport:
    """Put the canaries to the server and weigh what it says."""
    report = _start(endpoint)
    for c in canaries:
        said = endpoint.complete(c.prompt, c.tokens + 4)[0].strip()  # a server may split a word otherwise than we do
        like = "adapter" if said.startswith(c.adapter) else "base" if said.startswith(c.base) else "neither"
        report.evidence.append({**asdict(c), "said": said, "like": like})
    return _weigh(report, "prompts on which base and adapter differ")


def ask_probes(endpoint: Endpoint, probes: Probes, tokenizer: Any) -> ServerReport:
    """The same from the manifest's probes alone: needs a server that gives log-probabilities, and no base here."""
    report = _start(endpoint)
    for prompt, base, adapter in zip(probes.prompts, probes.base, probes.adapter, strict=True):
        said, top = endpoint.complete(prompt, 1, logprobs=5)
        if top is None:
            report.reason = (
                "the server gives no log-probabilities to compare with the manifest's; name the base with --base"
            )
            return report
        texts = {i: tokenizer.decode([i]) for row in (base, adapter) for i in row["ids"]}
        alone = {text for text, count in Counter(texts.values()).items() if text and count == 1}  # bytes share one text
        rows = [{texts[i]: z for i, z in zip(row["ids"], row["logits"], strict=True)} for row in (base, adapter)]
        shared = [t for t in top if t in alone and all(t in row for row in rows)]
        if len(shared) < 2:
            continue
        far = [_distance([top[t] for t in shared], [row[t] for t in shared]) for row in rows]
        apart = _distance([rows[0][t] for t in shared], [rows[1][t] for t in shared])
        if apart < MARGIN:
            continue
        like = "base" if far[0] < apart / 4 else "adapter" if far[1] < apart / 4 else "neither"
        report.evidence.append(
            {"prompt": prompt, "said": said, "like": like, "apart": apart, "from_base": far[0], "from_adapter": far[1]}
        )
    return _weigh(report, "probe prompts whose logits differ")


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest difference after each has its mean taken off: log-probabilities and logits differ by a constant."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return max(abs((x - mean_a) - (y - mean_b)) for x, y in zip(a, b, strict=True))


def _start(endpoint: Endpoint) -> ServerReport:
    offered = endpoint.offered()
    if offered is not None and endpoint.model not in offered:
        hint = nearest(endpoint.model, offered)
        why = f"the server does not list {endpoint.model!r}.{hint}" if offered else "the server lists no models"
    else:
        why = ""
    return ServerReport(endpoint.url, endpoint.model, "cannot tell", why, offered)


def _weigh(report: ServerReport, what: str) -> ServerReport:
    votes = [e["like"] for e in report.evidence]
    n, on, off = len(votes), votes.count("adapter"), votes.count("base")
    unlisted = f"; {report.reason}" if report.reason else ""
    enough = max(1, math.ceil(0.75 * n))  # one of four may have met another kernel's rounding, but none the other model
    if n == 0:
        report.reason = f"there are no {what}" + unlisted
    elif on >= enough and off == 0:
        report.verdict, report.reason = "applied", f"{on} of {n} {what} are answered as the adapter answers"
    elif off >= enough and on == 0:
        report.verdict = "base is being served"
        report.reason = f"{off} of {n} {what} are answered as the base answers" + unlisted
    else:
        report.reason = f"of {n} {what}, {on} are answered as the adapter does, {off} as the base, "
        report.reason += f"{n - on - off} as neither" + unlisted
    return report
