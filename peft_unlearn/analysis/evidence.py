"""From adapter folders to one report that a reader without a terminal understands; nothing is written into the folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data import embedded
from ..data.bundle import ForgetRetain
from ..errors import UserError
from ..evaluation.plan import Progress
from ..evaluation.score import Subject, on_one_model, score
from ..evaluation.subjects import bundle_for, embedded_ref, embedded_retain_model, named_folders
from ..folder.eval_json import not_measured_here, usable
from ..folder.manifest import Manifest
from ..folder.read import AdapterFolder
from ..folder.recipe import dump_recipe
from ..folder.results import check_out, save
from ..reporting import page, verdict
from ..reporting.document import Part
from ..reporting.result import Result
from ..reporting.tables import Table
from ..reporting.text import DASH
from ..reporting.verdict import Evidence
from ..stack.identity import CONFIG, TOKENIZER, OtherBase
from ..stack.model import ForgetModel

SHOWN = {"forget": 4, "forget_other": 2, "forget_unseen": 2, "retain": 3}  # set -> rows whose answers are shown
KINDS = {
    "forget": "to be forgotten", "forget_other": "the same, in other words", "forget_unseen": "to be forgotten, never shown",
    "retain": "to be kept",
}  # fmt: skip
FILES = (".html", ".md", ".json")
MAX_ADAPTERS = 3  # whose answers still fit side by side


@dataclass
class EvidenceReport(Result):
    """What is known of adapters.

    evidence: what is stored with each.   samples: answers side by side, None where there are none.   spread: of further retain
    models, see `seed_spread`.   notes: what could not be used or done, and why.   files: where `write` put it.
    """

    evidence: list[Evidence]
    samples: Table | None
    spread: dict[str, list[float]]
    notes: list[str]
    files: list[Path] = field(default_factory=list)

    @property
    def title(self) -> str:  # type: ignore[override]
        return (
            f"Forget adapter {self.evidence[0].name}"
            if len(self.evidence) == 1
            else f"{len(self.evidence)} forget adapters"
        )

    @property
    def verdicts(self) -> dict[str, str]:
        """A paragraph on each adapter."""
        return {e.name: verdict.verdict(e, self.spread) for e in self.evidence}

    @property
    def missing(self) -> dict[str, list[str]]:
        """What was not measured of each, and by which command it is."""
        return {e.name: verdict.missing(e) for e in self.evidence}

    def to_dict(self) -> dict[str, Any]:
        """The words of the report: with its title before it is written, with the names of its files afterwards."""
        what = {"files": [p.name for p in self.files]} if self.files else {"title": self.title}
        return {**what, "verdicts": self.verdicts, "missing": self.missing, "notes": self.notes}

    def __str__(self) -> str:
        return "\n\n".join([*self.verdicts.values(), "\n".join(map(str, self.files))]).rstrip()

    def parts(self) -> list[Part]:
        return page.parts(self.evidence, self.samples, self.spread, self.notes)

    def write(self, out: str | Path) -> list[Path]:
        """Write it as .html, .md (pictures beside it) or .json, or all into a folder."""
        check_out(out, FILES)
        self.files = []
        self.files = save(self, out)
        return self.files


def report(
    folders: Sequence[str | Path], *, samples: bool = True, base: str | None = None, data: str | None = None, dtype: str = "auto",
    progress: Progress | None = None,
) -> EvidenceReport:  # fmt: skip
    """Gather what is stored with the adapters, and decode a few answers.

    Args:
        samples: load the base, and the retain model where there is one, to show answers side by side. Where that cannot be done
            the report says why and holds the rest.
        dtype: what the models answer in, see `ForgetModel`.

    Raises:
        OtherBase: the base is not the one of the adapters.
    """
    found = named_folders(folders)
    if not found:
        raise UserError("No adapter was given.")
    evidence = [evidence_of(name, folder) for name, folder in found.items()]
    notes = [f"{name}: {why}" for name, folder in found.items() for why in _usable(folder)[1]]
    table = None
    if samples:
        try:
            table = sample_table(found, base, data, progress, dtype)
        except OtherBase:  # as everywhere: what is said of an adapter on another base is said of nothing
            raise
        except UserError as e:
            notes.append(f"No sample answers: {e}")
    else:
        notes.append("No sample answers were asked for.")
    return EvidenceReport(evidence, table, seed_spread(next(iter(found.values())).manifest), notes)


def evidence_of(name: str, folder: AdapterFolder) -> Evidence:
    """What a folder says of itself. Numbers of other weights than its own are left out."""
    manifest, evaluation = folder.manifest, _usable(folder)[0]
    refs = sorted({str(about["ref"]) for about in manifest.data.values() if about.get("ref")})
    method = {k: v for k, v in manifest.method.items() if v is not None and k not in (CONFIG, TOKENIZER)}
    shape = {k: folder.config[k] for k in ("peft_type", "r", "lora_alpha", "target_modules") if folder.config.get(k)}
    about = [
        ("adapter", f"{folder.adapter_id}, {_pairs(shape)}"), ("description", manifest.description),
        ("base", f"{manifest.base.ref}, digest {manifest.base.digest}"), ("scale", f"{manifest.scale:g}"),
        ("data", ", ".join(refs) or "files of the author's own, known by their hashes"),
        *(("set", f"{k} {about['n']} rows, sha256 {about['sha256']}") for k, about in manifest.data.items()),
        ("reference model of the losses", manifest.reference), ("method", json.dumps(method, ensure_ascii=False)),
        ("effective batch", _pairs(manifest.effective_batch)), ("trained with", _pairs(manifest.versions)),
        ("judged with", _pairs(evaluation.get("versions") or {})),
    ]  # fmt: skip
    return Evidence(
        name=name, folder=folder.path.name, adapter_id=folder.adapter_id, base=manifest.base.ref, scale=float(manifest.scale),
        evaluation=evaluation, seed=manifest.seeds.get("seed"),
        forget_sha256=str(manifest.data.get("forget", {}).get("sha256", "")),
        about=[(label, text) for label, text in about if text], recipe=dump_recipe(folder.recipe),
        theirs=not_measured_here({"adapter_id": folder.adapter_id, **evaluation}) if evaluation else (),
    )  # fmt: skip


def _usable(folder: AdapterFolder) -> tuple[dict[str, Any], list[str]]:
    return usable(folder.eval, folder.adapter_id, folder.path.name)


def _pairs(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in found.items())


def seed_spread(manifest: Manifest) -> dict[str, list[float]]:
    """Further retain models of an embedded base, trained with other seeds: "p" (forget quality against the shipped one) and
    "model_utility", one value for each; empty where none are on record, or for another forget set than theirs."""
    base, data = manifest.base.ref, embedded_ref(manifest)
    if not embedded.is_embedded(base) or data is None:
        return {}
    try:
        if embedded.resolve(data.partition("#")[0]) != embedded.resolve(base):
            return {}
        path = embedded.asset("bases", f"{embedded.parse(base)[0]}-twins.json")
    except UserError:
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {key: [float(v) for v in stored[key]] for key in ("p", "model_utility") if stored.get(key)}


def sample_table(
    found: Mapping[str, AdapterFolder],
    base: str | None,
    data: str | None,
    progress: Progress | None,
    dtype: str = "auto",
) -> Table:
    """Questions with the right answer and what each model answers, greedily; rows evenly spaced, not picked."""
    if len(found) > MAX_ADAPTERS:
        raise UserError(f"answers of more than {MAX_ADAPTERS} adapters do not fit beside each other; report on fewer")
    first = next(iter(found.values()))
    bundle = bundle_for([first], data)
    if any(f.manifest.data.get("forget") != first.manifest.data.get("forget") for f in found.values()):
        raise UserError("these adapters forget different sets; report on one set's adapters")
    rows = _spaced_rows(bundle)
    if not any(rows.values()):
        raise UserError("the forget set is plain text without questions")
    stack = ForgetModel.from_pretrained(base, {name: f.path for name, f in found.items()}, dtype=dtype)
    subjects: dict[str, Subject | None] = {
        "base": stack.disabled,
        **on_one_model(stack.model, {n: stack.chain(n) for n in found}),
    }
    if retain_model := embedded_retain_model(first.manifest.base.ref, bundle, stack.dtype):
        subjects["retain model"] = retain_model
    spec = {
        "format": 1, "name": "samples", "generation": {"max_new_tokens": 48},
        "sets": {n: {"role": "forget", "metrics": ["value_accuracy"]} for n, some in rows.items() if some},
    }  # fmt: skip
    answers = score(subjects, spec, rows, stack.tokenizer, progress=progress, template=bundle.template).answers
    lines = []
    for name, some in rows.items():
        for k, row in enumerate(some):
            given = [answers[s][name][k] if answers[s].get(name) else DASH for s in subjects]
            lines.append([KINDS[name], row["question"], str(row.get("answer", "")), *(a or "(nothing)" for a in given)])
    heads = [*subjects] if len(found) > 1 else ["base", "with adapter", *(["retain model"] if retain_model else [])]
    return Table(["", "question", "right answer", *heads], lines, words=True)


def _spaced_rows(bundle: ForgetRetain) -> dict[str, list[dict[str, Any]]]:
    out = {}
    for name, n in SHOWN.items():
        if rows := bundle.extra.get(name) or getattr(bundle, name, None):
            some = [rows[i * len(rows) // n] for i in range(min(n, len(rows)))]
            out[name] = [r for r in some if r.get("question")]
    return out
