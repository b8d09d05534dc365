"""From adapter folders to one comparison at equal retention, and to files of it: HTML, Markdown, JSON or a folder of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError
from ..evaluation import suites
from ..evaluation.plan import Progress
from ..evaluation.subjects import bundle_for, embedded_retain_model, named_folders
from ..folder.results import write_file
from ..reporting import document as doc
from ..reporting import pictures
from ..reporting.document import interval, number, percent
from ..stack.model import ForgetModel
from .calibrate import FLOOR, METRIC, check_exact
from .compare import LEVEL, check_same_sets
from .compare import compare as run

NAMES = {
    "forget/extraction_strength": "forget ES", "forget/value_accuracy": "forget right", "forget/probability": "forget prob.",
    "forget/forget_quality": "quality p", "forget/ks_distance": "KS D", "retain/extraction_strength": "retain ES",
    "retain/value_accuracy": "retain right", "model_utility": "utility",
}  # fmt: skip
CAPTION = "Each line is one adapter, from the base (scale 0) outward."
LEGEND = (
    "In brackets: 95 % bootstrap intervals over rows of the mean. ES: extraction strength. right: answers that name the right value. "
    "quality p, KS D: the forget set's truth ratios against the retain-only model's, which against itself has 1 and 0. utility: "
    "harmonic mean of the suite's parts."
)


def compare(
    folders: Sequence[str | Path],
    *,
    retain_floor: float = FLOOR,
    max_scale: float = 1.0,
    metric: str = METRIC,
    suite: str | None = None,
    n: int | None = None,
    base: str | None = None,
    data: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All adapters on one loaded base, each at the scale that keeps `retain_floor` of the base's retain value.

    Writes nothing. Raises `UserError` for adapters of different forget sets or bases, and for those whose scale is not exact.
    """
    found = named_folders(folders)
    first = next(iter(found.values()))
    judged = suites.load(suite or str((first.recipe.get("eval") or {}).get("suite") or "people"))
    errors = Errors()
    for folder in found.values():
        try:
            check_exact(folder)
        except UserError as problem:
            errors.absorb(problem)
    errors.raise_if_any("compare")
    check_same_sets(
        {name: str(f.manifest.data.get("forget", {}).get("sha256", "not stated")) for name, f in found.items()}
    )
    bundle = bundle_for([first], data)
    stack = ForgetModel.from_pretrained(base, {name: f.path for name, f in found.items()})
    result, _ = run(
        stack,
        bundle,
        judged,
        retain_model=embedded_retain_model(first.manifest.base.ref, bundle),
        floor=retain_floor,
        max_scale=max_scale,
        metric=metric,
        n=n,
        progress=progress,
    )
    return {
        **result,
        "adapter_ids": {name: f.adapter_id for name, f in found.items()},
        "base": first.manifest.base.ref,
        "data": {"forget": bundle.sha256["forget"], "ref": bundle.refs.get("forget")},
    }


def order(found: Mapping[str, Any]) -> list[str]:
    """Names, best at equal retention first, then those that cannot hold the floor."""
    return [*found["ranking"], *found["cannot"]]


def rows(found: Mapping[str, Any], intervals: bool = True) -> list[list[str]]:
    """The table: base and retain-only model, every adapter at the floor in order of rank, then every adapter as trained."""
    report, keys = found["report"], found["keys"]

    def line(label: str, scale: str, subject: str) -> list[str]:
        values, details = report["subjects"].get(subject), report["details"].get(subject, {})
        cells = [
            number(values.get(k)) + (interval((details.get(k) or {}).get("ci95")) if intervals else "")
            if values
            else doc.DASH
            for k in keys
        ]
        return [label, scale, *cells]

    out = [line("base", "0", "base"), line("retain-only model", doc.DASH, "retain_only")]
    out.append([f"at the floor: {percent(found['floor'])} of the base's retain {pictures.named(found['metric'])}"])
    for k, name in enumerate(found["ranking"], 1):
        out.append(line(f"{k}. {name}", f"{found['calibration'][name]['scale']:.3g}", name + LEVEL))
    out += [[f"{name}: {why}"] for name, why in found["cannot"].items()]
    out.append(["as trained"])
    out += [line(name, "1", name) for name in order(found)]
    return out


def head(found: Mapping[str, Any]) -> list[str]:
    return ["", "scale", *(NAMES.get(k) or k.replace("/", " ").replace("_", " ") for k in found["keys"])]


def sentences(found: Mapping[str, Any]) -> str:
    """The comparison in words, conditions first."""
    metric, n = pictures.named(found["metric"]), found["n"]
    out = [
        f"On {n['forget']} forget and {n['retain']} retain rows, each adapter dialed to the scale at which it forgets most and keeps "
        f"{percent(found['floor'])} of the base's retain {metric} (scales up to {found['max_scale']:g} were tried):"
    ]
    if found["ranking"]:
        best = found["ranking"][0]
        value = found["calibration"][best]["chosen"]["forget"]
        out.append(
            f"{best} leaves least of the forget set, {metric} {number(value['value'])}{interval(value['ci95'])}."
        )
        near = [n for n, gap in found["behind"].items() if gap["ci95"] and gap["ci95"][0] <= 0]
        apart = [
            f"{n} by {number(g['value'])}{interval(g['ci95'])}" for n, g in found["behind"].items() if n not in near
        ]
        if near:
            out.append(f"Not clearly apart from it, row by row: {', '.join(near)}.")
        if apart:
            out.append(f"Behind it: {', '.join(apart)}.")
    never = found.get("retain_only")
    if never:
        out.append(
            f"A model that never saw the forget set has {number(never['forget']['value'])}: less than that is no better."
        )
    for name, why in found["cannot"].items():
        out.append(f"{name}: {why}.")
    return " ".join(out)


def parts(found: Mapping[str, Any]) -> list[doc.Part]:
    """The comparison as a document."""
    never = found.get("retain_only")
    pair = (never["forget"]["value"], never["retain"]["value"]) if never else None
    base = found["base_levels"]["retain"]["value"]
    png = pictures.frontier(
        {name: found["calibration"][name] for name in order(found)}, base, found["floor"], pair, metric=found["metric"]
    )
    drawn = doc.Picture(png, "Forgetting against retaining, over the scale of each adapter", "frontier", CAPTION)
    out: list[doc.Part] = [
        doc.Text(sentences(found), "verdict"),
        drawn,
        doc.Heading("Numbers"),
        doc.Table(head(found), rows(found)),
        doc.Text(LEGEND, "note"),
    ]
    why = [
        f"{name}: the curves do not only fall, so the best of the grid's scales was taken."
        for name in order(found)
        if not found["calibration"][name]["monotone"]
    ]
    ids = [f"{name}: {sha}" for name, sha in found["adapter_ids"].items()]
    versions = ", ".join(f"{k} {v}" for k, v in found["report"]["versions"].items())
    lost = reasons(found["report"])
    return [
        *out,
        *([doc.Items(why)] if why else []),
        *([doc.Items(lost)] if lost else []),
        doc.Heading("What was compared"),
        doc.Lines("\n".join([f"base: {found['base']}", f"forget set: sha256 {found['data']['forget']}", *ids, f"versions: {versions}"])),
    ]  # fmt: skip


def reasons(report: Mapping[str, Any]) -> list[str]:
    """Why there are dashes, each reason once."""
    out: dict[str, list[str]] = {}
    for subject, values in report["subjects"].items():
        if not values:
            why = report["details"].get(subject, {}).get("reason") or "this model was not given"
            out.setdefault(str(why), []).append(subject.replace("_", "-"))
            continue
        for key, value in values.items():
            if value is None:
                why = (report["details"].get(subject, {}).get(key) or {}).get("reason") or "no reason is given"
                out.setdefault(str(why), []).append(f"{subject} {key}")
    return [
        f"{doc.DASH} {', '.join(who[:3])}{f' and {len(who) - 3} more' if len(who) > 3 else ''}: {why}"
        for why, who in out.items()
    ]


KINDS = (".html", ".md", ".json", ".png")


def check_out(out: str | Path | None, kinds: Sequence[str] = KINDS) -> None:
    """Refuse a file that `save` could not write; before any work."""
    path = Path(out or "").expanduser()
    if path.suffix and path.suffix.lower() not in kinds:
        known = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
        raise UserError(f"{path}: give a name that ends in {known}, or a folder for all of them")
    if path.suffix and path.is_dir():
        raise UserError(f"{path}: is a folder; name a file.")


def save(title: str, found: Mapping[str, Any], made: Sequence[doc.Part], out: str | Path) -> list[Path]:
    """Write a result as .html, .md, .json or .png (its first picture), or all of them into a folder."""
    check_out(out)
    path = Path(out).expanduser()
    kind = path.suffix.lower()
    if kind == ".html":
        return [write_file(path, doc.to_html(title, made))]
    if kind == ".md":
        text, beside = doc.to_markdown(title, made, path.stem)
        return [write_file(path, text), *(write_file(path.parent / name, png) for name, png in beside.items())]
    if kind == ".json":
        return [write_file(path, json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n")]
    if kind == ".png":
        png = next((p.png for p in made if isinstance(p, doc.Picture)), None)
        if png is None:
            raise UserError(f"{path}: there is nothing to draw here")
        return [write_file(path, png)]
    stem = path.name
    return [p for suffix in (".html", ".md", ".json") for p in save(title, found, made, path / f"{stem}{suffix}")]


def describe(found: Mapping[str, Any]) -> str:
    """The table as aligned text."""
    return aligned([head(found), *rows(found, intervals=False)]) + "\n\n" + sentences(found)


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Rows of texts in columns; a row of one text stands alone."""
    wide = [len(max(c, key=len)) for c in zip(*(r for r in table if len(r) > 1), strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(r, wide, strict=True))).rstrip()
        if len(r) > 1
        else f"-- {r[0]}"
        for r in table
    )
