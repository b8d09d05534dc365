"""forget.json: what a forget adapter is, what it was trained on, and how to recognise it. Format version 1.

Nothing in it names a machine: a base is a Hub id with its commit, ``embedded:NAME`` or ``local:<first 12 digits of its
digest>``; data is named by hash and count, never by its texts. Importing this module loads neither torch nor peft.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import Errors, UserError
from . import schema as s
from .yaml_io import parse_json

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
NEUTRAL_PROMPTS = ("The", "Question: What is the capital of France?\nAnswer:", "Once upon a time", "1 2 3 4")
"""Prompts about nothing in particular: a probe must not carry the forget set into a published file."""
PROMPT_POOL = (
    *NEUTRAL_PROMPTS, "Hello, my name is", "The weather today", "Question: How many days does a week have?\nAnswer:", "a b c d e",
    "In the beginning", "Red, green, blue and", "10 9 8 7", "Dear Sir or Madam,", "Question: Which color has the sky?\nAnswer:",
    "It was a dark night", "x = 1", "North, east, south and",
)  # fmt: skip
"""`NEUTRAL_PROMPTS` first; the others stand in for those that a forget set holds itself."""
PROBE_TOP = 16
MAX_PROMPTS, MAX_PROMPT, MAX_ROW = 64, 2000, 1024  # of a manifest: probe prompts, characters of one, logits of one

_EMBEDDED = re.compile(r"embedded:[A-Za-z0-9_.-]+(\?[A-Za-z0-9_=&.-]*)?")
_LOCAL = re.compile(r"local:[0-9a-f]{12}")
_HUB = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def path_like(text: str) -> bool:
    """True for anything that reads as a place on somebody's machine: absolute, home, dotted, drive, or a file URL."""
    return bool(
        re.match(r"(/|~$|~[\w.-]*/|\.\.?(/|\\|$)|\\\\|file:|[A-Za-z]:[\\/])", text)
        or "/../" in text
        or text.endswith("/..")
    )


def check_base_ref(ref: str, revision: str | None) -> str | None:
    """Why `ref` (with `revision`) is not a portable name of a base, or None when it is one."""
    if path_like(ref):
        return f"base.ref is a path ({ref!r}); use a Hub id with its commit, embedded:NAME or local:<digest12>"
    if _EMBEDDED.fullmatch(ref) or _LOCAL.fullmatch(ref):
        return None
    if not _HUB.fullmatch(ref):
        return f"base.ref {ref!r} is neither a Hub id, embedded:NAME nor local:<first 12 digits of the digest>"
    if revision is None or not _COMMIT.fullmatch(revision):
        return f"base.revision must be the 40-digit commit of the Hub model {ref!r}, not {revision!r}"
    return None


@dataclass
class BaseRef:
    """The base: `ref`, for a Hub id `revision` (commit); its digest, and that of the weights under the adapter."""

    ref: str
    digest: str
    revision: str | None = None
    digest_targeted: str | None = None


@dataclass
class Probes:
    """Per prompt, at its last position: the `PROBE_TOP` largest logits (float32, descending) and their token ids.

    `base` with every adapter off, `adapter` with it on at scale 1; each a list of {"ids": [..], "logits": [..]}.
    """

    prompts: list[str]
    base: list[dict[str, list[Any]]]
    adapter: list[dict[str, list[Any]]]


@dataclass
class Manifest:
    """forget.json, field by field.

    `method`: every hyper-parameter of terms, rule, smoothing and so on, resolved. `data`: set name -> {"sha256", "n",
    and where it has them "ref", "revision", "format", "template_args" (what its chat template was given)}. `depends_on`:
    ids ("sha256:..") of adapters that must be active below this one. `files`: file name -> sha256, None for files that may be
    edited afterwards (card, evaluation); filled by the writer.
    """

    base: BaseRef
    method: dict[str, Any]
    data: dict[str, dict[str, Any]]
    reference: str = "before"
    effective_batch: dict[str, int] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    depends_on: list[str] = field(default_factory=list)
    scale: float = 1.0
    probes: Probes | None = None
    targets: list[str] = field(default_factory=list)
    files: dict[str, str | None] = field(default_factory=dict)
    name: str = ""
    description: str = ""
    format: int = FORMAT

    @property
    def adapter_id(self) -> str | None:
        """ "sha256:" and the hash of adapter_model.safetensors, once the writer has filled `files`."""
        sha = self.files.get("adapter_model.safetensors")
        return f"sha256:{sha}" if sha else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """The text of forget.json, keys sorted: equal manifests are equal bytes. Raises `UserError` if invalid."""
        self.check("forget.json")
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_text(cls, text: str, where: str = "forget.json") -> Manifest:
        """Read and check. `where` names the file in messages."""
        raw = parse_json(text, where)
        version = raw.get("format")
        if version is None:
            raise UserError(f"{where}: no `format` field; this is not the manifest of a forget adapter.")
        if version != FORMAT or isinstance(version, bool):
            raise UserError(
                f"{where}: manifest format {version!r} is unknown to this version, which reads format {FORMAT}; "
                "a newer peft-unlearn wrote it (pip install -U peft-unlearn)."
            )
        _check(raw, where)
        probes = raw.get("probes")
        return cls(**{**raw, "base": BaseRef(**raw["base"]), "probes": None if probes is None else Probes(**probes)})

    def check(self, where: str = "forget.json") -> None:
        """Raise one `UserError` naming every field of a wrong type, every path, every number that is not finite."""
        _check(self.to_dict(), where)


_SHA = s.matching("[0-9a-f]{64}", "64 hexadecimal digits")
_DATA = {
    "sha256": _SHA, "n": s.shape("the number of rows", s.is_whole), "ref": s.ANY, "revision": s.ANY, "format": s.ANY,
    "template_args": s.MAPPING,
}  # fmt: skip
_TOKEN = s.shape("a token id", lambda v: s.is_whole(v) and v >= 0)
_PROMPT = s.shape(f"text of at most {MAX_PROMPT:,} characters", lambda v: isinstance(v, str) and len(v) <= MAX_PROMPT)
_ROW = {"ids": s.few(_TOKEN, MAX_ROW), "logits": s.few(s.NUMBER, MAX_ROW)}
_ROWS = s.few(s.record(_ROW, ("ids", "logits")), MAX_PROMPTS)
_MANIFEST = s.record(
    {
        "base": s.record(
            {"ref": s.TEXT, "digest": _SHA, "revision": s.ANY, "digest_targeted": s.maybe(_SHA)},
            required=("ref", "digest"),
        ),
        "method": s.MAPPING,
        "data": s.mapping_of(s.record(_DATA, ("sha256", "n"), unknown=": hashes and counts only, never texts")),
        "reference": s.TEXT,
        "effective_batch": s.mapping_of(s.WHOLE),
        "seeds": s.mapping_of(s.WHOLE),
        "versions": s.MAPPING,
        "depends_on": s.list_of(s.matching("sha256:[0-9a-f]{64}", "an adapter id (sha256:..)")),
        "scale": s.NUMBER,
        "probes": s.maybe(
            s.record(
                {"prompts": s.few(_PROMPT, MAX_PROMPTS), "base": _ROWS, "adapter": _ROWS},
                ("prompts", "base", "adapter"),
            )
        ),
        "targets": s.LIST,
        "files": s.mapping_of(s.maybe(_SHA)),
        "name": s.TEXT,
        "description": s.TEXT,
        "format": s.WHOLE,
    },
    required=("base", "method", "data", "reference", "scale"),
)


def _check(raw: dict[str, Any], where: str) -> None:
    """`Manifest.check` of its fields as plain values."""
    errors = Errors()
    stored: dict[str, Any] = raw.get("probes") or {}
    _MANIFEST(raw, "", errors)
    if not errors.messages:  # of the right shape, so that what the fields mean together can be looked at
        _check_base(raw["base"], errors)
        for side in ("base", "adapter") if stored else ():
            _check_probe_rows(side, stored[side], stored["prompts"], errors)
    for place, value in _leaves(raw, ""):
        if isinstance(value, float) and not math.isfinite(value):
            errors.add(f"{place} is {value}; numbers must be finite")
        elif isinstance(value, str) and path_like(value) and not place.startswith(("probes.prompts", "base.ref")):
            errors.add(f"{place} holds a path ({value!r}); a published manifest must not name a machine")
        elif not isinstance(value, str | int | float | bool | None):
            errors.add(f"{place} holds {s.shown(value)}, which JSON cannot")
    errors.raise_if_any(where)


def _check_base(base: dict[str, Any], errors: Errors) -> None:
    if problem := check_base_ref(base["ref"], base.get("revision")):
        errors.add(problem)
    elif base["ref"].startswith("local:") and not base["digest"].startswith(base["ref"][6:]):
        errors.add(f"base.ref {base['ref']!r} is not the start of base.digest")


def _check_probe_rows(side: str, rows: list[dict[str, Any]], prompts: list[str], errors: Errors) -> None:
    if len(rows) != len(prompts):
        errors.add(f"probes.{side} must be a list with one entry per prompt")
    for i, row in enumerate(rows):
        if len(row["ids"]) != len(row["logits"]):
            errors.add(f"probes.{side}[{i}] must hold `ids` and `logits` of one length")


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{place}[{i}]")
    else:
        yield place, value


def plain_words(text: str) -> str:
    """Lower-case words of a text, everything else a space: two texts that read alike are equal then."""
    return " ".join(re.sub(r"[\W_]+", " ", text).casefold().split())


def neutral_prompts(forget: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """As many prompts as `NEUTRAL_PROMPTS` has, none of which a row to be forgotten asks or answers: its logits would tell of it."""
    texts = {plain_words(v) for row in forget for _, v in _leaves(row, "") if isinstance(v, str)} - {""}

    def free(prompt: str) -> bool:
        words = plain_words(prompt.removeprefix("Question: ").removesuffix("\nAnswer:"))
        return not any(words == t or (" " in words and words in t) or (t.count(" ") >= 2 and t in words) for t in texts)

    return tuple([p for p in PROMPT_POOL if free(p)][: len(NEUTRAL_PROMPTS)]) or NEUTRAL_PROMPTS[:1]


def neutral_images(channels: int, height: int, width: int) -> tuple[str, ...]:
    """Probe prompts of an image classifier: waves that anybody can draw again from their name, of images that size."""
    return tuple(f"image:waves-{k}:{channels}x{height}x{width}" for k in range(1, 5))


def _drawn(prompt: str) -> Any:
    """(1, channels, height, width) float32: the image that a prompt of `neutral_images` names."""
    import torch

    found = re.fullmatch(r"image:waves-(\d{1,2}):(\d{1,4})x(\d{1,5})x(\d{1,5})", prompt)
    if found is None:
        raise UserError(f"probe prompt {prompt!r} names no image that this version draws")
    k, *shape = (int(n) for n in found.groups())
    c, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    return torch.sin(0.37 * k * y + 0.61 * x + 1.3 * c + k)[None].float()


def probe_logits(model: nn.Module, tokenizer: Any, prompts: list[str] | tuple[str, ...]) -> Any:
    """(len(prompts), vocab) float32, CPU: logits at each prompt's last position, one prompt at a time (no padding); of an image
    classifier those of the images that the prompts name."""
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows = []
    try:
        with torch.no_grad():
            for prompt in prompts:
                if prompt.startswith("image:"):
                    rows.append(model(pixel_values=_drawn(prompt).to(device)).logits[0].float().cpu())
                    continue
                ids = tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id or tokenizer.eos_token_id or 0]
                rows.append(
                    model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1].float().cpu()
                )
    finally:
        model.train(was_training)
    return torch.stack(rows)


def probe_rows(logits: Any) -> list[dict[str, list[Any]]]:
    """The `PROBE_TOP` largest logits of each row, as the manifest holds them."""
    top = logits.topk(min(PROBE_TOP, logits.shape[-1]), dim=-1)
    return [{"ids": i.tolist(), "logits": v.tolist()} for i, v in zip(top.indices, top.values, strict=True)]


def probes(model: Any, tokenizer: Any, prompts: tuple[str, ...] | list[str] = NEUTRAL_PROMPTS) -> Probes:
    """Probe a PeftModel with its adapters off, then on. Runs `len(prompts)` short forwards in each state.

    The trainable flags are put back: PEFT turns them on for every active adapter when it re-enables them.
    """
    on = probe_rows(probe_logits(model, tokenizer, prompts))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with model.disable_adapter():
        off = probe_rows(probe_logits(model, tokenizer, prompts))
    for n, p in model.named_parameters():
        p.requires_grad_(flags[n])
    return Probes(prompts=list(prompts), base=off, adapter=on)


def n_values(rows: list[dict[str, list[Any]]]) -> int:
    """How many logits probe rows hold."""
    return sum(len(row["ids"]) for row in rows)


def probe_difference(
    model: nn.Module, tokenizer: Any, prompts: list[str], rows: list[dict[str, list[Any]]]
) -> float | None:
    """Largest |logit now - logit stored| over the stored ids, infinite where a logit is no number.

    None where nothing can be compared: no logit is stored, or the vocabulary no longer holds their tokens.
    """
    import torch

    if not n_values(rows):
        return None
    worst = 0.0
    for now, row in zip(probe_logits(model, tokenizer, prompts), rows, strict=True):
        if row["ids"] and max(row["ids"]) >= now.shape[0]:
            return None
        gap = (now[torch.tensor(row["ids"], dtype=torch.long)] - torch.tensor(row["logits"])).abs()
        worst = max(worst, gap.nan_to_num(math.inf, math.inf).max().item() if gap.numel() else 0.0)
    return worst
