"""eval.json as it comes with an adapter: which of its numbers may be shown, and whose they are.

It may be edited by hand, damaged, of another adapter, of another version, or a stranger's invention. Numbers are shown only if they
say that they are of these weights, have the shape that `eval`, `attack` and `calibrate` write, and lie where such numbers can lie.
That does not make them true: what this installation did not measure itself is called the author's. What it did measure is known by
hash, in a file of the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import Errors
from ..registry import within
from . import schema as s

FORMAT = 1
BLOCKS = {"attacks": "attack", "calibration": "calibrate"}  # of eval.json -> the command that makes it
SUITE = "suite"

_VALUE = s.maybe(s.FINITE)
_FLAG = s.shape("true or false", lambda v: isinstance(v, bool))
_INTERVAL = s.maybe(
    s.shape("two numbers", lambda v: isinstance(v, list) and len(v) == 2 and all(map(_finite, v)) and v[0] <= v[1])
)
_COUNT = s.shape("a number of rows", lambda v: s.is_whole(v) and 0 <= v < 10**12)
_ABOUT = {"n": s.maybe(_COUNT), "ci95": _INTERVAL, "reason": s.maybe(s.TEXT)}
_NUMBER = s.record({"value": _VALUE, **_ABOUT}, more=True)
_SCALE = s.shape("a scale", lambda v: _finite(v) and abs(v) < 1e6)
_POINT = s.record({"scale": _SCALE, "forget": _NUMBER, "retain": _NUMBER}, ("scale", "forget", "retain"), more=True)
_DETAIL = s.record(_ABOUT, more=True)
_MEANS = s.mapping_of(_VALUE)
_ATTACK = s.record(
    {
        "attack": s.TEXT, "settings": s.MAPPING, "n": _COUNT, "about": s.MAPPING, "reasons": s.mapping_of(s.TEXT),
        "subjects": s.mapping_of(s.maybe(s.record({"before": _MEANS, "after": _MEANS}, more=True))),
        "recovery": s.mapping_of(s.maybe(s.mapping_of(_NUMBER))),
    },
    more=True,
)  # fmt: skip
_SHAPES = {
    SUITE: s.record(
        {
            "suite": s.maybe(s.TEXT), "subjects": s.mapping_of(s.maybe(_MEANS)), "base": s.maybe(s.TEXT),
            "details": s.mapping_of(s.maybe(s.record({"reason": s.maybe(s.TEXT)}, rest=s.maybe(_DETAIL)))),
            "metrics": s.mapping_of(s.record({"better": s.maybe(s.MAPPING)}, more=True)), "versions": s.MAPPING,
            "scale": lambda *a: (s.mapping_of(s.FINITE) if isinstance(a[0], Mapping) else s.FINITE)(*a),
        },
        more=True,
    ),
    "attacks": s.record(
        {"attacks": s.mapping_of(_ATTACK), "scale": s.maybe(s.mapping_of(s.FINITE)), "versions": s.MAPPING}, ("attacks",), more=True
    ),
    "calibration": s.record(
        {
            "metric": s.TEXT, "floor": s.FINITE, "wanted": s.FINITE, "scale": _VALUE, "curve": s.list_of(_POINT),
            "chosen": s.maybe(_POINT), "retention": s.maybe(_NUMBER),
            "n": s.record({"forget": _COUNT, "retain": _COUNT}, ("forget", "retain")),
            "retain_only": s.maybe(s.mapping_of(_NUMBER)), "as_trained": s.maybe(_POINT), "how": s.maybe(s.TEXT),
            "reason": s.maybe(s.TEXT), "max_scale": _SCALE, "baked": _FLAG, "monotone": _FLAG,
        },
        ("scale",), more=True,
    ),
}  # fmt: skip


def _finite(value: Any) -> bool:
    return s.is_number(value) and abs(value) < float("inf")


def usable(
    stored: Mapping[str, Any] | None, adapter_id: str | None, folder: str = "FOLDER"
) -> tuple[dict[str, Any], list[str]]:
    """(what of eval.json may be shown, what is wrong with the rest and the command that mends it)."""
    kept: dict[str, Any] = {}
    notes: list[str] = []
    if not stored:
        return kept, notes
    for name, block in blocks_of(stored).items():
        what = f"the {name} numbers of eval.json"
        again = f"run peft-unlearn {BLOCKS.get(name, 'eval')} {folder} again"
        of = (block.get("adapter_id") if isinstance(block, Mapping) else None) or stored.get("adapter_id")
        if isinstance(block, Mapping) and block.get("format", FORMAT) != FORMAT:
            notes.append(f"{what} are of format {s.shown(block['format'])}, this version reads {FORMAT}; {again}.")
        elif problem := next(iter(_problems(name, block)), None):
            notes.append(f"{what} are not in a shape that can be read ({problem}); {again}.")
        elif of is None:
            notes.append(f"{what} do not say which weights they were measured on; {again}.")
        elif adapter_id is not None and of != adapter_id:
            notes.append(f"{what} belong to another adapter: they were measured on other weights; {again}.")
        else:
            kept |= block if name == SUITE else {name: block}
    return kept, notes


def blocks_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of eval.json that are measured by one command each; those that are there."""
    blocks = {k: stored[k] for k in BLOCKS if stored.get(k)}
    suite = {k: v for k, v in stored.items() if k not in BLOCKS}
    return ({SUITE: suite} if suite.get("subjects") or not blocks else {}) | blocks


def _problems(name: str, block: Any) -> list[str]:
    errors = Errors()
    _SHAPES[name](block, "", errors)
    if not errors.messages:
        _RULES[name](block, errors)
    return errors.messages


def _check_suite(block: Mapping[str, Any], errors: Errors) -> None:
    for subject, values in (block.get("subjects") or {}).items():
        details = (block.get("details") or {}).get(subject) or {}
        for key, value in (values or {}).items():
            _check_range(key, value, details.get(key), f"subjects.{subject}", errors)


def _check_attacks(block: Mapping[str, Any], errors: Errors) -> None:
    for label, one in block["attacks"].items():
        subjects = one.get("subjects") or {}
        for subject, ends in subjects.items():
            for when in ("before", "after"):
                for measure, value in ((ends or {}).get(when) or {}).items():
                    _check_range(measure, value, None, f"attacks.{label}.{subject}.{when}", errors)
        for subject, found in (one.get("recovery") or {}).items():
            for measure, share in (found or {}).items():
                value = share.get("value")
                if value is not None and abs(value) > 1.5 and not _recovered(subjects, subject, measure, value):
                    errors.add(
                        f"attacks.{label}: {subject}, {measure} has a recovery of {value:g}, which the values beside it do not give"
                    )


def _recovered(subjects: Mapping[str, Any], subject: str, measure: str, value: float) -> bool:
    """Whether a recovery is (after - before) / (base - before) of what is stored with it; far beyond 1 it has to be."""
    try:
        before, after = (subjects[subject][when][measure] for when in ("before", "after"))
        gap = subjects["base"]["before"][measure] - before
        return abs(value * gap - (after - before)) <= 1e-3 * max(1.0, abs(value))
    except (KeyError, TypeError):
        return False


def _check_calibration(block: Mapping[str, Any], errors: Errors) -> None:
    if "curve" not in block:
        return
    if missing := [k for k in ("metric", "floor", "wanted", "n") if block.get(k) is None]:
        errors.add(f"{', '.join(missing)} is missing")
        return
    points = [*block["curve"], *(block[k] for k in ("chosen", "as_trained", "retain_only") if block.get(k))]
    for point in points:
        for side in ("forget", "retain"):
            about = point.get(side) or {}
            _check_range(block["metric"], about.get("value"), about, f"the {side} set", errors)
    if not block["curve"] or (block["scale"] is None) != (block.get("chosen") is None):
        errors.add("curve, scale and chosen do not belong together")
    elif block["scale"] is None and "reason" not in block:
        errors.add("there is no scale and no reason why")
    elif block["scale"] is not None and None in (block["chosen"][side].get("value") for side in ("forget", "retain")):
        errors.add("the point that was chosen has no value")


_RULES = {SUITE: _check_suite, "attacks": _check_attacks, "calibration": _check_calibration}


def _check_range(key: str, value: float | None, about: Any, place: str, errors: Errors) -> None:
    """A value where such values can lie, and its interval not far from it."""
    low, high = within(key.rpartition("/")[2])
    bottom, top = -math.inf if low is None else low, math.inf if high is None else high
    interval = (about.get("ci95") if isinstance(about, Mapping) else None) or []
    found = [(value, 1e-6), *((end, 0.05) for end in interval)]
    if odd := next((v for v, slack in found if v is not None and not bottom - slack <= v <= top + slack), None):
        errors.add(f"{place}: {key} is {odd:g}, and lies within [{bottom}, {top}]")


# -- whose numbers ----------------------------------------------------------------------------------------------------


def parts_of(stored: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, hash) of everything measured in an eval.json: the suite, the calibration, and each attack. The scale that it was
    measured at is no part of it: calibrating states that anew."""
    for name, block in blocks_of(stored).items():
        if not isinstance(block, Mapping):
            continue
        of = block.get("adapter_id") or stored.get("adapter_id")
        found = block.get("attacks") if name == "attacks" else {"": {k: v for k, v in block.items() if k != "scale"}}
        for label, value in found.items() if isinstance(found, Mapping) else ():
            text = json.dumps([of, name, label, value], sort_keys=True)
            yield label or name, hashlib.sha256(text.encode()).hexdigest()


def record_measured(stored: Mapping[str, Any], names: Iterable[str]) -> None:
    """Note that this installation measured the parts `names` of an eval.json, so that a report can say whose numbers they are."""
    wanted = set(names)
    lines = "".join(f"{sha}\n" for name, sha in parts_of(stored) if name in wanted)
    with suppress(OSError):  # without a place for it the numbers count as the author's, which claims less
        path = _ledger()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)


def not_measured_here(stored: Mapping[str, Any]) -> list[str]:
    """The parts of an eval.json that this installation did not measure."""
    try:
        known = set(_ledger().read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        known = set()
    return [name for name, sha in parts_of(stored) if sha not in known]


def cache_dir() -> Path:
    """Where this installation keeps what it knows of its own doing; need not exist."""
    own, home = os.environ.get("PEFT_UNLEARN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(home) if home else Path.home() / ".cache") / "peft-unlearn"


def _ledger() -> Path:
    return cache_dir() / "measured"
