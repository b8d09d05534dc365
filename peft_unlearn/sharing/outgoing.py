"""What may leave this machine: the files of an adapter and no others, and nothing in them that is nobody's business."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..data.bundle import ForgetRetain
from ..data.embedded import is_embedded
from ..errors import Errors, UserError
from ..folder.card import card_of, current, portable_front, split
from ..folder.manifest import PROMPT_POOL, path_like, plain_words
from ..folder.read import CARD, CONFIG, EVAL, MANIFEST, RECIPE, RECORDED, WEIGHTS, AdapterFolder
from ..folder.safetensors_io import plain_name
from ..folder.yaml_io import parse_yaml, read_text
from ..reporting.text import printable

SUFFIXES = (".safetensors", ".json", ".yaml", ".md", ".txt", ".jinja", ".model", *RECORDED)
_TEXTS = (CARD, EVAL, RECIPE, MANIFEST, "tokenizer_config.json")  # and every adapter_config.json
_ROOTS = ("home", "Users", "root", "tmp", "private", "var/tmp", "var/folders", "mnt", "media", "Volumes", "scratch",
          "workspace", "work", "content", "kaggle", "opt", "srv", "data", "gpfs", "lustre", "dbfs", "nfs")  # fmt: skip
_PLACE = re.compile(
    r"(?<![\w./:-])(?:file:/|~[\w-]*/|/(?:" + "|".join(_ROOTS) + r")/)[\w./-]+"
    r"|(?<![A-Za-z])[A-Za-z]:(?:\\\\?|/)(?:Users|home|tmp|temp|data|work|Projects|Documents|Windows)\b"
)
_SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"  # GitHub, GitLab
    r"|sk-[A-Za-z0-9_-]{20,}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"  # OpenAI and alike, Stripe
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|ya29\.[\w-]{20,}"  # AWS, Google
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[\w-]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{40,}|dckr_pat_[\w-]{20,}"  # Slack, registries
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,})"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_ACTIVE = re.compile(
    r"<\s*/?\s*(?:script|iframe|object|embed|form|style|meta|link|base)\b|<[^>]*\son\w+\s*=|javascript:", re.I
)


class Parcel(NamedTuple):
    """files: (name, bytes) in order, all that goes along; left: what lies in the folder besides; notes: for the user."""

    files: list[tuple[str, int]]
    left: list[str]
    notes: list[str]


def pack(found: AdapterFolder, data: Any = None) -> Parcel:
    """Check everything that would be sent. data: the bundle, to compare with its forget texts; embedded ones are known.

    Raises:
        UserError: one message with every file that is missing, no file of an adapter, or says what it should not.
    """
    errors = Errors()
    root = found.path.resolve()
    names = sorted({*found.manifest.files, MANIFEST, *(n for n in (CARD, EVAL, *RECORDED) if (root / n).is_file())})
    names = [n for n in names if (root / n).is_file()]  # read_adapter has refused what may not be missing
    for name in names:
        if not plain_name(name) or not name.endswith(SUFFIXES):
            errors.add(f"{name}: not a kind of file that an adapter holds ({', '.join(SUFFIXES)})")
        elif not (root / name).resolve().is_relative_to(root):
            errors.add(f"{name}: is a link that leads out of the folder")
    for name in (CONFIG, WEIGHTS, RECIPE):
        if found.manifest.files.get(name) is None:
            errors.add(f"{MANIFEST} gives no hash of {name}, so it cannot be checked")
    errors.raise_if_any(f"{found.path}")
    notes = _check_card(found, errors)
    texts = {n: read_text(root / n) for n in names if n in _TEXTS or Path(n).name == CONFIG}
    for name, text in texts.items():
        for problem in leaks(text, root):
            errors.add(f"{name} {problem}")
    for name in (n for n in names if n not in texts and not n.endswith(".safetensors")):
        # vocabularies: what looks like a place may be a word of theirs, a key is none
        for problem in secrets_in((root / name).read_bytes().decode("latin-1")):
            errors.add(f"{name} {problem}")
    texts |= {n: _added_tokens(root / n) for n in names if n == "tokenizer.json"}
    for name in (n for n in texts if n == RECIPE or Path(n).name == CONFIG):
        for place, value in _leaves(parse_yaml(texts[name], name) if name == RECIPE else json.loads(texts[name])):
            if path_like(value):
                errors.add(f"{name} holds a path ({place}: {value!r})")
    for name in (n for n in names if n.endswith(".safetensors")):
        for problem in leaks(_metadata(root / name), root):
            errors.add(f"{name}: its header {problem}")
    notes += _check_texts(found, texts, data, errors)
    errors.raise_if_any(f"{found.path}: not fit to be published")
    left = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() or p.is_symlink())
    return Parcel([(n, (root / n).stat().st_size) for n in names], [n for n in left if n not in names], notes)


def leaks(text: str, folder: Path | None = None) -> list[str]:
    """What in a text names a place on a machine or gives away a key."""
    out = []
    places = [Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *([folder] if folder else [])]
    names = (str(p) for p in places if len(p.parts) > 1)
    here = next((n for n in names if re.search(rf"(?<![\w./-]){re.escape(n)}(?![\w-]|\.\w)", text)), None)
    if hit := _PLACE.search(text):
        out.append(f"names a place on a machine ({hit[0]!r}); take it out")
    elif here:
        out.append(f"names a place on this machine ({here!r}); take it out")
    return out + secrets_in(text)


def secrets_in(text: str) -> list[str]:
    hit = _SECRET.search(text)
    return [f"holds what looks like a secret key ({hit[0][:6]}..); take it out, and revoke it"] if hit else []


def _check_card(found: AdapterFolder, errors: Errors) -> list[str]:
    path = found.path / CARD
    mend = f"run `peft-unlearn card {found.path} --write`"
    if not path.is_file():
        errors.add(f"{CARD} is missing; {mend}")
        return []
    text = read_text(path)
    try:
        front, _ = split(text)
        state = current(card_of(found), text)
    except UserError as e:
        errors.absorb(e)
        return []
    for key in portable_front(front):
        errors.add(f"{CARD}: `{key}` in its front matter holds a path (saving with PEFT writes one there); {mend}")
    if printable(words := text.removeprefix("\ufeff")) != words:
        errors.add(f"{CARD} holds control characters, which steer a terminal or hide what is written; take them out")
    if hit := _ACTIVE.search(text):
        errors.add(f"{CARD} holds active HTML ({hit[0]!r}); take it out")
    if state is False:
        errors.add(f"{CARD} does not say what the folder says now; {mend}")
    return [] if state is not None else [f"{CARD} is all your own: its numbers are not compared with eval.json"]


def _check_texts(found: AdapterFolder, texts: dict[str, str], data: Any, errors: Errors) -> list[str]:
    about = found.manifest.data.get("forget") or {}
    spec = data if data is not None else about.get("ref") if is_embedded(about.get("ref")) else None
    if spec is None:
        return ["not compared with the forget texts, which are not here (--data compares)"]
    bundle = ForgetRetain.load(spec)
    if about.get("sha256") and bundle.sha256["forget"] != about["sha256"]:
        errors.add("data: this forget set is not the one the adapter was trained on; nothing was compared with it")
        return []
    phrases = sorted(_phrases(bundle.forget), key=len, reverse=True)
    for name, text in texts.items():
        plain = plain_words(_without_probes(text) if name == MANIFEST else text)
        if hit := next((p for p in phrases if p in plain), None):
            errors.add(f"{name} holds a text of the forget set ({hit[:40]!r}..); take it out")
    return []


def _without_probes(manifest: str) -> str:
    """The manifest without the prompts that this package chose itself: that a row is one of them tells nothing of the row."""
    found = json.loads(manifest)
    if isinstance(probes := found.get("probes"), dict):
        probes["prompts"] = [p for p in probes["prompts"] if p not in PROMPT_POOL]
    return json.dumps(found, ensure_ascii=False)


def _added_tokens(path: Path) -> str:
    """What was added to a vocabulary, which may hold names of the forget set."""
    try:
        return json.dumps(json.loads(read_text(path))["added_tokens"], ensure_ascii=False)
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""  # no tokenizer.json of a fast tokenizer, which loading it will say


def _phrases(rows: Iterable[dict[str, Any]]) -> set[str]:
    """Questions, answers and documents; not what is as short as ordinary words."""
    out = {plain_words(v) for row in rows for v in row.values() if isinstance(v, str)}
    return {p for p in out if len(p) >= 16 and p.count(" ") >= 2}


def _metadata(path: Path) -> str:
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return json.dumps(header.get("__metadata__") or {})


def _leaves(value: Any, place: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [x for k, v in value.items() for x in _leaves(v, f"{place}.{k}".lstrip("."))]
    if isinstance(value, list):
        return [x for i, v in enumerate(value) for x in _leaves(v, f"{place}[{i}]")]
    return [(place, value)] if isinstance(value, str) else []
