"""From adapter folders to one report that a reader without a terminal understands; nothing is written into the folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import embedded
from ..errors import UserError
from ..evaluation.plan import Progress
from ..evaluation.score import FORMAT, Subject, on_one_model, score
from ..evaluation.subjects import bundle_for, embedded_ref, embedded_retain_model, named_folders
from ..folder.manifest import Manifest
from ..folder.read import AdapterFolder
from ..folder.recipe import dump_recipe
from ..reporting import document as doc
from ..reporting import page as pages
from ..reporting import verdict as words
from ..reporting.document import DASH
from ..reporting.verdict import Evidence
from ..stack.model import ForgetModel
from .compare_job import check_out, save

SHOWN = {"forget": 4, "forget_other": 2, "forget_unseen": 2, "retain": 3}  # set -> rows whose answers are shown
ASKED = {
    "forget": "to be forgotten", "forget_other": "the same, in other words", "forget_unseen": "to be forgotten, never shown",
    "retain": "to be kept",
}  # fmt: skip
BLOCKS = {"attacks": "attack", "calibration": "calibrate"}  # of eval.json -> the command that makes it
MAPPINGS = ("subjects", "details", "versions", "attacks", "base_levels", "chosen", "as_trained", "retention")
KINDS = (".html", ".md", ".json")
MAX_ADAPTERS = 3  # whose answers still fit side by side


def report(
    folders: Sequence[str | Path],
    *,
    samples: bool = True,
    base: str | None = None,
    data: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Gather what is stored with the adapters, and ask the models for a few answers.

    samples: load the base, and the retain-only model where there is one, to show answers side by side. Where that cannot be done
    the report says why and holds the rest.
    Returns {"title", "parts", "verdicts": name -> paragraph, "missing": name -> sentences, "notes"}.
    """
    found = named_folders(folders)
    if not found:
        raise UserError("No adapter was given.")
    evidence = [evidence_of(name, folder) for name, folder in found.items()]
    notes = [f"{name}: {why}" for name, folder in found.items() for why in usable(folder)[1]]
    spread = seed_spread(next(iter(found.values())).manifest)
    said = None
    if samples:
        try:
            said = sample_table(found, base, data, progress)
        except UserError as e:
            notes.append(f"No sample answers: {e}")
    else:
        notes.append("No sample answers were asked for.")
    title = f"Forget adapter {evidence[0].name}" if len(evidence) == 1 else f"{len(evidence)} forget adapters"
    return {
        "title": title,
        "parts": pages.parts(evidence, said, spread, notes),
        "verdicts": {e.name: words.verdict(e, spread) for e in evidence},
        "missing": {e.name: words.missing(e) for e in evidence},
        "notes": notes,
    }


def write(found: Mapping[str, Any], out: str | Path) -> list[Path]:
    """Write it as .html or .md (pictures beside it), or both into a folder."""
    check_out(out, KINDS)
    shown = {k: found[k] for k in ("title", "verdicts", "missing", "notes")}
    return save(str(found["title"]), shown, found["parts"], out)


def evidence_of(name: str, folder: AdapterFolder) -> Evidence:
    """What a folder says of itself. Numbers of other weights than its own are left out."""
    manifest = folder.manifest
    evaluation = usable(folder)[0]
    sets = [f"{k} {about['n']} rows, sha256 {about['sha256']}" for k, about in manifest.data.items()]
    refs = sorted({str(about["ref"]) for about in manifest.data.values() if about.get("ref")})
    method = {k: v for k, v in manifest.method.items() if v is not None}
    versions = manifest.versions
    shape = {k: folder.config[k] for k in ("peft_type", "r", "lora_alpha", "target_modules") if folder.config.get(k)}
    about = [
        ("adapter", f"{folder.adapter_id}, {', '.join(f'{k} {v}' for k, v in shape.items())}"),
        ("description", manifest.description),
        ("base", f"{manifest.base.ref}, digest {manifest.base.digest}"),
        ("scale", f"{manifest.scale:g}"),
        ("data", ", ".join(refs) or "files of the author's own, known by their hashes"),
        *(("set", s) for s in sets),
        ("reference model of the losses", manifest.reference),
        ("method", json.dumps(method, ensure_ascii=False)),
        ("effective batch", ", ".join(f"{k} {v}" for k, v in manifest.effective_batch.items())),
        ("trained with", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("judged with", ", ".join(f"{k} {v}" for k, v in (evaluation.get("versions") or {}).items())),
    ]
    return Evidence(
        name=name,
        folder=folder.path.name,
        adapter_id=folder.adapter_id,
        base=manifest.base.ref,
        scale=float(manifest.scale),
        evaluation=evaluation,
        seed=manifest.seeds.get("seed"),
        forget_sha256=str(manifest.data.get("forget", {}).get("sha256", "")),
        about=[(label, text) for label, text in about if text],
        recipe=dump_recipe(folder.recipe),
    )


def usable(folder: AdapterFolder) -> tuple[dict[str, Any], list[str]]:
    """What of eval.json can be reported, and what is wrong with the rest: its file may be of other weights, of another version of
    this package, or edited by hand."""
    stored = folder.eval or {}
    blocks = {k: stored[k] for k in BLOCKS if stored.get(k)}
    suite = {k: v for k, v in stored.items() if k not in blocks}
    kept: dict[str, Any] = {}
    notes = []
    for name, block in [("suite", suite), *blocks.items()]:
        again = f"run peft-unlearn {BLOCKS.get(name, 'eval')} {folder.path.name} again"
        if not isinstance(block, Mapping) or any(not isinstance(block.get(k) or {}, Mapping) for k in MAPPINGS):
            notes.append(f"the {name} numbers of eval.json are not in a shape that can be read; {again}.")
        elif block.get("format", FORMAT) != FORMAT:
            notes.append(
                f"the {name} numbers of eval.json are of format {block['format']}, this version reads {FORMAT}; {again}."
            )
        elif (block.get("adapter_id") or stored.get("adapter_id")) not in (None, folder.adapter_id):
            notes.append(f"the {name} numbers of eval.json were measured on other weights; {again}.")
        else:
            kept |= suite if name == "suite" else {name: block}
    return kept, notes


def seed_spread(manifest: Manifest) -> dict[str, list[float]]:
    """Further retain-only models of an embedded base, trained with other seeds: "p" (forget quality against the shipped one) and
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
    found: Mapping[str, AdapterFolder], base: str | None, data: str | None, progress: Progress | None
) -> doc.Table:
    """Questions with the right answer and what each model says, greedily; rows evenly spaced, not picked."""
    if len(found) > MAX_ADAPTERS:
        raise UserError(f"answers of more than {MAX_ADAPTERS} adapters do not fit beside each other; report on fewer")
    first = next(iter(found.values()))
    bundle = bundle_for([first], data)
    for folder in found.values():
        if folder.manifest.data.get("forget") != first.manifest.data.get("forget"):
            raise UserError("these adapters forget different sets; report on one set's adapters")
    sets = {name: rows for name in SHOWN if (rows := bundle.extra.get(name) or getattr(bundle, name, None))}
    spaced = {
        name: [rows[i * len(rows) // SHOWN[name]] for i in range(min(SHOWN[name], len(rows)))]
        for name, rows in sets.items()
    }
    spaced = {name: [r for r in rows if r.get("question")] for name, rows in spaced.items()}
    if not any(spaced.values()):
        raise UserError("the forget set is plain text without questions")
    stack = ForgetModel.from_pretrained(base, {name: f.path for name, f in found.items()})
    subjects: dict[str, Subject | None] = {
        "base": stack.disabled,
        **on_one_model(stack.model, {n: stack.chain(n) for n in found}),
    }
    if never := embedded_retain_model(first.manifest.base.ref, bundle):
        subjects["retain-only"] = never
    spec = {
        "format": 1,
        "name": "samples",
        "generation": {"max_new_tokens": 48},
        "sets": {n: {"role": "forget", "metrics": ["value_accuracy"]} for n, rows in spaced.items() if rows},
    }
    said = score(subjects, spec, spaced, stack.tokenizer, progress=progress, template=bundle.template).said
    lines = []
    for name, rows in spaced.items():
        for k, row in enumerate(rows):
            answers = [said[s][name][k] if said[s].get(name) else DASH for s in subjects]
            lines.append(
                [ASKED[name], row["question"], str(row.get("answer", "")), *(a or "(nothing)" for a in answers)]
            )
    heads = (
        [f"{n} says" for n in subjects]
        if len(found) > 1
        else ["base says", "with adapter", *(["retain-only says"] if never else [])]
    )
    return doc.Table(["", "question", "right answer", *heads], lines, words=True)
