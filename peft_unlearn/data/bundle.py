"""A bundle: the forget set, the retain set, and what evaluation needs beside them."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError, nearest
from . import embedded
from .chat import Template, parse_template, template_args
from .collate import encode
from .facts import accepted, spans_of
from .files import SUFFIXES
from .formats import LAYOUTS, identity, load_rows, target_of, to_text

SETS = ("forget", "retain", "holdout")
TARGETS = ("answer", "value")
_TABLES = (".jsonl", ".csv", ".parquet")  # a folder's .json and .txt beside the named sets are mostly something else
FIELDS = tuple(dict.fromkeys(f for fields in LAYOUTS.values() for f in fields))
# modules of this room that know a benchmark's own layout: recognizes(spec) -> bool, load(spec, template) -> ForgetRetain
LAYOUT_MODULES = ("tofu", "muse", "mcq", "images")


@dataclass
class ForgetRetain:
    """Forget set, retain set, optional holdout set (rows the base never saw) and further sets, to train on or to judge by.

    target: what losses look at in forget rows that have a ``value``: the whole "answer", or the "value" in it.

    The same example in forget and retain is refused; near-duplicates are warned about.

    Raises:
        UserError: an empty set, malformed rows, or overlap.
    """

    forget: list[dict[str, Any]]
    retain: list[dict[str, Any]] | None = None
    holdout: list[dict[str, Any]] | None = None
    extra: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    template: Template = "qa"
    target: str = "answer"

    def __post_init__(self) -> None:
        parse_template(self.template)
        check_target(self.target)
        for name in SETS:
            if (rows := getattr(self, name)) is not None:
                setattr(self, name, load_rows(rows, name=f"{name} set"))
        self._check_overlap()

    @classmethod
    def load(cls, spec: Any, template: Template = "qa", fields: Mapping[str, str] | None = None) -> ForgetRetain:
        """A bundle from ``embedded:people``, a folder with forget, retain and holdout files, a benchmark in its own layout
        (`tofu`), or a mapping of sources; names of one's own beside forget, retain and holdout become further sets (`extra`).

        fields: as in `formats.load_rows`."""
        if isinstance(spec, ForgetRetain):
            return spec
        named = True
        if isinstance(spec, str) and spec.startswith("embedded:"):
            return cls._from_embedded(spec, template)
        if isinstance(spec, (str, Path)):
            for name in LAYOUT_MODULES:
                module = importlib.import_module(f".{name}", __package__)
                if module.recognizes(spec):
                    return module.load(spec, template)
            spec, named = _folder(Path(spec).expanduser()), False
        if not isinstance(spec, Mapping):
            raise UserError(
                f"data: a {type(spec).__name__} is no bundle; give a folder, embedded:NAME, or forget and retain"
            )
        errors = Errors()
        for name in spec if named else ():  # a name of one's own is a further set; a misspelt one is not
            if name not in SETS and difflib.get_close_matches(str(name), SETS, n=1, cutoff=0.8):
                errors.add(f"there is no set {name!r}.{nearest(str(name), SETS)}")
        for name in fields or ():
            if name not in FIELDS:
                errors.add(f"data.fields: there is no field {name!r}.{nearest(str(name), FIELDS)}")
        if spec.get("forget") is None:
            errors.add("the forget set is missing")
        errors.raise_if_any("data")
        sets, refs = {}, {}
        for name, source in spec.items():
            if source is None:
                continue
            if isinstance(source, str) and source.startswith("embedded:"):
                base, _, which = source.partition("#")
                found = embedded.rows(base)
                which = which or name
                if which not in found:
                    raise UserError(f"data.{name}: {base} has no set {which!r}.{nearest(which, found)}")
                sets[name], refs[name] = found[which], source
            else:
                sets[name] = load_rows(source, f"{name} set", fields)
                if isinstance(source, str) and not Path(source).expanduser().exists():
                    refs[name] = source  # a Hub id; local files are known by their hash alone
        known = {name: sets.pop(name) for name in SETS if name in sets}
        return cls(**known, extra=sets, refs=refs, template=template)

    @classmethod
    def _from_embedded(cls, spec: str, template: Template) -> ForgetRetain:
        name, options = embedded.resolve(spec)  # what a manifest names says its seed
        found = embedded.rows(spec)
        # Retaining only people would leave everything else the base knows unguarded: the general questions go in too.
        retain = found["retain"] + found.get("general", [])
        extra = {k: v for k, v in found.items() if k not in ("forget", "holdout")}
        portable = f"embedded:{name}?" + "&".join(f"{k}={v}" for k, v in sorted(options.items()))
        refs: dict[str, str] = {k: portable for k in SETS}  # noqa: C420
        if name == "digits":
            return importlib.import_module(".images", __package__).bundle_of(found, refs)
        return cls(found["forget"], retain, found["holdout"], extra=extra, refs=refs, template=template)

    def sets(self) -> dict[str, list[dict[str, Any]]]:
        """The sets there are, by name."""
        return {name: rows for name in SETS if (rows := getattr(self, name)) is not None}

    def rows(self, name: str) -> list[dict[str, Any]] | None:
        """The set of that name, one of one's own included; None where there is none."""
        return getattr(self, name) if name in SETS else self.extra.get(name)

    def names(self) -> list[str]:
        """Names of all sets there are."""
        return [*self.sets(), *self.extra]

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Digest of each set: order does not matter, multiplicity does."""
        return {name: digest(rows) for name, rows in self.sets().items()}

    def describe(self, trained: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """What a manifest records: counts and digests, never texts. trained: further sets that a run reads."""
        own = {name: rows for name in trained if name not in SETS and (rows := self.rows(name)) is not None}
        return {
            name: {"n": len(rows), "sha256": digest(rows), "ref": self.refs.get(name), **self._worded(rows)}
            for name, rows in {**self.sets(), **own}.items()
        }

    def _worded(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """``template_args`` with what the chat template is given for these rows; nothing where none words them."""
        name, args = parse_template(self.template)
        if name != "chat" and not any("messages" in row for row in rows[:1]):
            return {}
        return {"template_args": {k: str(v) if k == "date" else v for k, v in template_args(args).items()}}

    def encode(
        self, name: str, tokenizer: Any, max_length: int | None = None, on_overflow: str = "error", rows: Any = None
    ) -> list[dict[str, Any]]:
        """Token rows of one set; see `collate.encode`. Every row that fails is named with its number (up to ten)."""
        errors, out = Errors(), []
        values = name == "forget" and self.target == "value" and rows is None  # winner answers hold no value
        for i, row in enumerate((self.rows(name) or ()) if rows is None else rows):
            try:
                text = to_text(row, tokenizer, self.template)
                spans = _value_spans(row, text[1]) if values else None
                out += encode(*text, tokenizer, max_length, on_overflow, spans=spans)
            except UserError as e:
                if len(errors.messages) < 10:
                    errors.add(f"row {i} {e}")
        errors.raise_if_any(f"{name} set")
        return out

    def _check_overlap(self) -> None:
        if not self.retain:
            return
        shared = {row_key(r) for r in self.forget} & {row_key(r) for r in self.retain}
        if shared:
            rows = [i for i, r in enumerate(self.retain) if row_key(r) in shared]
            raise UserError(
                f"data: {len(shared)} example(s) stand in the forget set and in the retain set (retain rows "
                f"{', '.join(map(str, rows[:10]))}{', ..' if len(rows) > 10 else ''}); a model cannot do both: take them out of one"
            )
        if near := near_duplicates(self.forget, self.retain):
            show = ", ".join(f"forget {f} ~ retain {r}" for f, r, _ in near[:5])
            warnings.warn(
                f"data: {len(near)} forget row(s) have a near-duplicate in the retain set ({show}); what is retained there "
                "works against forgetting",
                stacklevel=4,
            )


def digest(rows: list[dict[str, Any]]) -> str:
    """Of a set's rows: order does not matter, multiplicity does."""
    digests = sorted(hashlib.sha256(identity(r).encode()).digest() for r in rows)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _value_spans(row: dict[str, Any], answer: str) -> list[tuple[int, int]] | None:
    """Where the row's value stands in its worded answer; None for a row without one, whose whole answer is the target.

    Raises:
        UserError: the value does not stand there.
    """
    if not row.get("value"):
        return None
    if found := spans_of(answer, accepted(row)):
        return found
    raise UserError(f"has the value {row['value']!r}, which does not stand in its answer {target_of(row)!r}")


def check_target(target: Any) -> str:
    """`target` itself, if it is one of `TARGETS`."""
    if target not in TARGETS:
        raise UserError(f"data.target: {target!r} is not one of {', '.join(TARGETS)}")
    return target


def _folder(path: Path) -> dict[str, Path]:
    if not path.is_dir():
        raise UserError(
            f"data: {path} is no folder; a bundle is a folder with forget and retain files, or embedded:NAME"
        )
    found: dict[str, Path] = {}
    own = {f.stem for f in path.iterdir() if f.suffix in _TABLES and re.fullmatch(r"[a-z][a-z0-9_]*", f.stem)}
    for name in (*SETS, *sorted(own - {*SETS})):
        files = [path / f"{name}{s}" for s in SUFFIXES if (path / f"{name}{s}").is_file()]
        if len(files) > 1:
            raise UserError(f"data: {path} holds {' and '.join(f.name for f in files)}; keep one of them")
        if files:
            found[name] = files[0]
    if "forget" not in found:
        raise UserError(f"data: {path} holds no forget file (forget{', forget'.join(SUFFIXES)})")
    return found


def row_key(row: dict[str, Any]) -> str:
    """Two rows are one example when their texts differ in case and white space only ("3+4" and "3-4" are two)."""
    return re.sub(r'\s*(?<!\\)"\s*', '"', " ".join(identity(row).casefold().split()))


def normal(text: str) -> str:
    """Words alone, in lower case."""
    return re.sub(r"\W+", " ", text.casefold()).strip()


def near_duplicates(
    forget: list[dict[str, Any]], retain: list[dict[str, Any]], threshold: float = 0.8
) -> list[tuple[int, int, float]]:
    """(forget row, retain row, similarity) with a Jaccard similarity of word 3-grams >= threshold.

    Candidates share a 3-gram that few retain rows have, so templated data does not compare all pairs.
    """

    def grams(row: dict[str, Any]) -> frozenset[tuple[str, ...]]:
        words = normal(identity(row)).split()
        return frozenset(zip(*(words[i:] for i in range(3)), strict=False))

    kept = [grams(r) for r in retain]
    where: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for j, g in enumerate(kept):
        for gram in g:
            where[gram].append(j)
    out = []
    for i, row in enumerate(forget):
        mine = grams(row)
        rare = [where[g] for g in mine if 0 < len(where.get(g, ())) <= 50]
        for j, _ in Counter(j for js in rare for j in js).most_common(20):
            similarity = len(mine & kept[j]) / max(1, len(mine | kept[j]))
            if similarity >= threshold:
                out.append((i, j, similarity))
                break
    return out
