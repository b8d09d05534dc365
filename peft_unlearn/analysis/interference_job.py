"""From the adapter folders of a stack to what each still forgets, and costs, alone and all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.bundle import ForgetRetain
from ..errors import UserError
from ..evaluation.plan import Progress
from ..evaluation.subjects import bundle_of, matches, named_folders
from ..folder.read import AdapterFolder
from ..reporting import document as doc
from ..reporting import pictures
from ..reporting.document import interval, number
from ..stack.model import ForgetModel
from .compare_job import aligned
from .interference import METRICS
from .interference import interference as run

LEGEND = (
    "In brackets: 95 % bootstrap intervals over rows. A forget set that is forgotten is low, the lower the less of an answer "
    "follows by itself; the retain set should stay as the base has it."
)


def interference(
    folders: Sequence[str | Path],
    *,
    metric: str = METRICS[0],
    n: int | None = None,
    base: str | None = None,
    data: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge a stack, in the order given (that of training, where one was trained on top of another).

    data: bundles; each adapter takes the one whose forget set has the hash in its manifest. Adapters on embedded data find theirs.
    """
    found = named_folders(folders)
    if len(found) < 2:
        raise UserError("interference is between adapters: give at least two folders")
    given = [ForgetRetain.load(d) for d in data]
    bundles = {name: _bundle(f, given) for name, f in found.items()}
    stack = ForgetModel.from_pretrained(base, {name: f.path for name, f in found.items()})
    retain: dict[str, dict[str, Any]] = {}
    for bundle in bundles.values():
        rows = bundle.extra.get("retain") or bundle.retain or []
        retain |= {repr(sorted((k, str(v)) for k, v in row.items())): row for row in rows}
    result = run(
        stack,
        {name: b.forget for name, b in bundles.items()},
        list(retain.values()),
        metric=metric,
        template=next(iter(bundles.values())).template,
        n=n,
        progress=progress,
    )
    return {
        **result,
        "base": next(iter(found.values())).manifest.base.ref,
        "forget_sets": {name: b.sha256["forget"] for name, b in bundles.items()},
    }


def _bundle(folder: AdapterFolder, given: Sequence[ForgetRetain]) -> ForgetRetain:
    wanted = folder.manifest.data.get("forget", {}).get("sha256")
    for bundle in given:
        if bundle.sha256["forget"] == wanted:
            return bundle
    own, why = None, ""
    try:
        own = bundle_of(folder)
    except UserError as e:
        why = f" ({e})"
    if own is None or matches(own, folder.manifest) is False:
        raise UserError(
            f"{folder.path}: none of the data given is its forget set (sha256 {str(wanted)[:12]}); "
            f"name its bundle with --data, once for each set{why}"
        )
    return own


def table(found: Mapping[str, Any], intervals: bool = True) -> tuple[list[str], list[list[str]]]:
    head = ["", *(about["label"].replace("\n", " ") for about in found["sets"].values())]
    rows = [
        [found["labels"][s], *(number(c["value"]) + (interval(c["ci95"]) if intervals else "") for c in cells.values())]
        for s, cells in found["subjects"].items()
    ]
    return head, rows


def sentences(found: Mapping[str, Any]) -> str:
    scales = ", ".join(f"{name} at scale {value:g}" for name, value in found["scales"].items())
    return f"What is left, by {pictures.named(found['metric'])} ({scales}). {' '.join(found['notes']) or 'Nothing stands out.'}"


def parts(found: Mapping[str, Any]) -> list[doc.Part]:
    """The result as a document."""
    head, rows = table(found)
    made: list[doc.Part] = [
        doc.Text(sentences(found), "verdict"),
        doc.Picture(pictures.matrix(found), "What is left of each set under each adapter", "matrix"),
        doc.Heading("Numbers"),
        doc.Table(head, rows),
        doc.Text(LEGEND, "note"),
    ]
    for metric in METRICS:
        if metric != found["metric"]:
            cells = [
                [found["labels"][s], *(number(d[metric]["value"]) for d in sets.values())]
                for s, sets in found["details"].items()
            ]
            made += [doc.Text(f"The same by {pictures.named(metric)}:"), doc.Table(head, cells)]
    ids = [
        f"{name}: {sha}, forget set sha256 {found['forget_sets'][name]}" for name, sha in found["adapter_ids"].items()
    ]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    return [
        *made,
        doc.Heading("What was judged"),
        doc.Lines("\n".join([f"base: {found['base']}", *ids, f"versions: {versions}"])),
    ]


def describe(found: Mapping[str, Any]) -> str:
    head, rows = table(found, intervals=False)
    return aligned([head, *rows]) + "\n\n" + sentences(found)
