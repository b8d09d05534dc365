"""Does a server that claims to serve an adapter serve it? Servers are known to accept an adapter and to answer with the base.

Two kinds of evidence, both from prompts about nothing in particular, never from the forget set. With the base: prompts are
sought (neutral sentences, then seeded random words of the vocabulary) on which base and adapter part company in greedy
decoding by a margin that other kernels and half precision do not bridge, and the server continues them. Without it, where
the server gives log-probabilities: its most probable first tokens against the logits that the manifest stored.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError, nearest
from ..folder.manifest import NEUTRAL_PROMPTS, Probes
from ..reporting.result import Result, fields_of
from ..reporting.text import printable
from .endpoint import Endpoint

Scores = Mapping[str, float]  # by token text
Continuation = tuple[list[int], list[float]]  # token ids, and at each the gap to the second best
Served = Literal["applied", "base is being served", "neither", "cannot tell"]
SAME: Served = "base is being served"
MARGIN = 0.25
"""Smallest gap, in logits, between the best and the second best token for a prompt to count: bfloat16 was seen to move logits by .08."""
TOKENS, WANTED, TRIED, ROUND = 16, 6, 96, 8
SHOWN = 300  # characters of a server's answer in the report


@dataclass(frozen=True)
class Canary:
    """A prompt with the two models' different answers. margin: the least gap of best over second best token on the way there."""

    prompt: str
    base: str
    adapter: str
    tokens: int
    margin: float


@dataclass(frozen=True)
class Evidence:
    """One prompt. answer: the server's; like: whose it resembles; facts: what it was compared with."""

    prompt: str
    answer: str
    like: Literal["adapter", "base", "neither"]
    facts: dict[str, str | int | float]

    def to_dict(self) -> dict[str, Any]:
        return {"prompt": self.prompt, **self.facts, "said": self.answer, "like": self.like}


@dataclass
class ServerReport(Result):
    """Whether the adapter is served, and the evidence. offered: the names that the server lists. beside: the same for the base's own
    name, which must be answered as the base answers: engines are known that perturb it once adapters are enabled."""

    url: str
    served_as: str
    verdict: Served
    reason: str
    offered: list[str] | None = None
    evidence: list[Evidence] = field(default_factory=list)
    beside: ServerReport | None = None

    @property
    def exit_code(self) -> int:
        return 0 if self.verdict == "applied" and (self.beside is None or self.beside.verdict == SAME) else 1

    def to_dict(self) -> dict[str, Any]:
        return fields_of(self)

    def __str__(self) -> str:
        lines = [f"{self.served_as} at {self.url}: {self.verdict} ({self.reason})"]
        lines += [f"  {e.like:<8} {e.prompt!r} -> {e.answer!r}" for e in self.evidence]
        return "\n".join([*lines, *([str(self.beside)] if self.beside else [])])


def verify_server(
    folder: str | Path,
    url: str,
    served_as: str,
    base: str | Path | None = None,
    scale: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    base_as: str | None = None,
) -> ServerReport:
    """Whether the model `served_as` of the server at `url` is the base with the adapter in `folder`.

    Args:
        base: folder, Hub id or ``embedded:NAME``, default the manifest's; where it is not available the manifest's
            probes are compared instead.
        scale: at which the adapter should be served, default the manifest's (plain PEFT serves at 1).
        base_as: the base's own name on that server, which is then asked the same.

    Raises:
        UserError: a folder that is no adapter, a wrong base, a server that cannot be reached or refuses.
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
            raise UserError(f"{folder}: neither its base nor probes are available; name the base with --base") from None
        return _both(
            endpoint, base_as, partial(check_probes, probes=found.manifest.probes, tokenizer=load_tokenizer(folder))
        )
    endpoint.complete(NEUTRAL_PROMPTS[0], 1)  # a server that is not there is reported before a model is loaded
    stack = ForgetModel.from_pretrained(base, folder, scales=None if scale is None else [scale])
    canaries = find_canaries(stack.disabled, lambda: nullcontext(stack.model), stack.tokenizer, progress=progress)
    return _both(endpoint, base_as, partial(check_canaries, canaries=canaries))


def _both(endpoint: Endpoint, base_as: str | None, check: Callable[[Endpoint], ServerReport]) -> ServerReport:
    report = check(endpoint)
    if base_as is not None:
        report.beside = check(Endpoint(endpoint.url, base_as))
    return report


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


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int = TOKENS) -> Continuation:
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
        made = (_canary(*row, tokenizer) for row in zip(batch, without, on, strict=True))
        found += [c for c in made if c is not None]
        if progress is not None:
            progress("looking for prompts on which they differ", min(start + ROUND, len(prompts)), len(prompts))
        if len(found) >= wanted:
            break
    return sorted(found, key=lambda c: -c.margin)[:wanted]


def _canary(prompt: str, base: Continuation, adapter: Continuation, tokenizer: Any) -> Canary | None:
    (a, gap_a), (b, gap_b) = base, adapter
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:
        return None
    margin = min(gap_a[: at + 1] + gap_b[: at + 1])
    without, on = (tokenizer.decode(ids[: at + 1], skip_special_tokens=True).strip() for ids in (a, b))
    # an answer that ends where the other goes on is a prefix of it: a server's text could be either
    if margin < MARGIN or without.startswith(on) or on.startswith(without):
        return None
    return Canary(prompt, without, on, at + 1, margin)


def check_canaries(endpoint: Endpoint, canaries: Sequence[Canary]) -> ServerReport:
    """Let the server continue the canaries, and weigh whose answers it gives."""
    report = _start(endpoint)
    for c in canaries:
        answer = endpoint.complete(c.prompt, c.tokens + 4)[0].strip()  # a server may split a word otherwise than we do
        like = "adapter" if answer.startswith(c.adapter) else "base" if answer.startswith(c.base) else "neither"
        facts = {k: v for k, v in asdict(c).items() if k != "prompt"}
        report.evidence.append(Evidence(c.prompt, printable(answer[:SHOWN]), like, facts))
    return _weigh(report, "prompts on which base and adapter differ")


def check_probes(endpoint: Endpoint, probes: Probes, tokenizer: Any) -> ServerReport:
    """The same from the manifest's probes alone: needs a server that gives log-probabilities, and no base here."""
    report = _start(endpoint)
    for prompt, base, adapter in zip(probes.prompts, probes.base, probes.adapter, strict=True):
        answer, top = endpoint.complete(prompt, 1, logprobs=5)
        if top is None:
            report.reason = (
                "the server gives no log-probabilities to compare with the manifest's; name the base (--base)"
            )
            return report
        if facts := _distances(top, *_by_text((base, adapter), tokenizer)):
            near = facts["apart"] / 4
            like = "base" if facts["from_base"] < near else "adapter" if facts["from_adapter"] < near else "neither"
            report.evidence.append(Evidence(prompt, printable(answer[:SHOWN]), like, {**facts}))
    return _weigh(report, "probe prompts whose logits differ")


def _by_text(rows: Sequence[Mapping[str, list[Any]]], tokenizer: Any) -> list[dict[str, float]]:
    """Token text -> logit of each row, without texts that several tokens share, as parts of a character do."""
    texts = {i: tokenizer.decode([i]) for row in rows for i in row["ids"]}
    alone = {text for text, count in Counter(texts.values()).items() if text and count == 1}
    pairs = ([(texts[i], z) for i, z in zip(row["ids"], row["logits"], strict=True)] for row in rows)
    return [{text: z for text, z in found if text in alone} for found in pairs]


def _distances(top: Scores, base: Scores, adapter: Scores) -> dict[str, float] | None:
    """How far the server's first tokens are from either model's, and these from each other; None where they are too alike."""
    shared = [t for t in top if t in base and t in adapter]
    if len(shared) < 2:
        return None
    server, without, on = ([row[t] for t in shared] for row in (top, base, adapter))
    apart = _distance(without, on)
    found = {"apart": apart, "from_base": _distance(server, without), "from_adapter": _distance(server, on)}
    return None if apart < MARGIN else found


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest difference after each has its mean taken off: log-probabilities and logits differ by a constant."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return max(abs((x - mean_a) - (y - mean_b)) for x, y in zip(a, b, strict=True))


def _start(endpoint: Endpoint) -> ServerReport:
    offered, why = endpoint.offered(), ""
    if offered is not None and endpoint.model not in offered:
        hint = nearest(endpoint.model, offered)
        why = f"the server does not list {endpoint.model!r}.{hint}" if offered else "the server lists no models"
    return ServerReport(endpoint.url, endpoint.model, "cannot tell", why, offered)


def _weigh(report: ServerReport, what: str) -> ServerReport:
    votes = [e.like for e in report.evidence]
    n, on, off = len(votes), votes.count("adapter"), votes.count("base")
    unlisted = f"; {report.reason}" if report.reason else ""
    enough = max(1, math.ceil(0.75 * n))  # one of four may have met another kernel's rounding, but none the other model
    if n == 0:
        report.reason = f"there are no {what}" + unlisted
    elif on >= enough and off == 0:
        report.verdict, report.reason = "applied", f"{on} of {n} {what} are answered as the adapter answers"
    elif off >= enough and on == 0:
        report.verdict = SAME
        report.reason = f"{off} of {n} {what} are answered as the base answers" + unlisted
    elif n - on - off >= enough:
        report.verdict = "neither"
        why = "another model or scale, or an engine that perturbs the base"
        report.reason = f"{n - on - off} of {n} {what} are answered as neither: {why}{unlisted}"
    else:
        split = f"{on} are answered as the adapter does, {off} as the base, {n - on - off} as neither"
        report.reason = f"of {n} {what}, {split}{unlisted}"
    return report
