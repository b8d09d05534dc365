"""From adapter folders to numbers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data import embedded
from ..data.bundle import ForgetRetain
from ..errors import UserError, nearest
from ..evaluation import open_unlearning
from ..evaluation.score import Report, on_one_model, score
from ..folder.atomic import write_text
from ..folder.base import load_base, load_tokenizer, resolve_base
from ..folder.manifest import Manifest
from ..folder.read import MANIFEST, AdapterFolder, read_adapter
from ..folder.write import update_eval
from ..stack.model import ForgetModel
from .run import load_data

Progress = Callable[[str, int, int], None]
LAYOUTS = ("eval", "open-unlearning")


def evaluate(
    folders: Sequence[str | Path],
    *,
    base: str | None = None,
    data: str | None = None,
    suite: str | None = None,
    n: int | None = None,
    retain_only: str | None = None,
    progress: Progress | None = None,
    write: bool = True,
) -> Report:
    """Score base, adapters and, where there is one, the retain-only model on one suite; one loaded base, adapters swapped in place.

    suite, data: default the recipe's own. Both given, the data may be another forget set than the adapter's: the report then says
    ``"data_matches_manifest": false``, and an embedded base's own twin is no reference.
    retain_only: a model trained without the forget set (a folder, a Hub id, ``embedded:NAME`` for the twin of that base), or a
    folder of a forget adapter on the same base. Default the embedded base's twin.
    With one folder the result on its own forget set is also written into it as eval.json.
    """
    found = [read_adapter(f) for f in folders]
    manifest = found[0].manifest
    names = _subject_names(found)
    bundle = _bundle(found[0], data, foreign=suite is not None)
    foreign = [f.path.resolve().name for f in found if matches(bundle, f.manifest) is False]
    if foreign:
        if suite is None or data is None:
            check_data(bundle, next(f.manifest for f in found if matches(bundle, f.manifest) is False))
        warnings.warn(
            f"data: this is not the forget set of {', '.join(foreign)}: the numbers say what these adapters do to other rows, and "
            "no eval.json is written",
            stacklevel=2,
        )
    twin = _check_retain_only(retain_only)
    adapters = dict(zip(names, [f.path for f in found], strict=True))
    if isinstance(twin, AdapterFolder):
        adapters[_TWIN] = twin.path
    stack = ForgetModel.from_pretrained(base, adapters)
    subjects: dict[str, Any] = on_one_model(stack.model, {"base": None, **_as_subjects(names)})
    if isinstance(twin, AdapterFolder):
        subjects |= on_one_model(stack.model, {"retain_only": _TWIN})
    elif twin is not None:
        subjects["retain_only"] = _loaded(twin, stack.tokenizer)
    else:
        subjects["retain_only"] = None if foreign else _twin(manifest.base.ref, bundle.refs.get("forget"))
    report = score(
        subjects,
        suite or str((found[0].recipe.get("eval") or {}).get("suite") or "people"),
        bundle,
        stack.tokenizer,
        progress=progress,
        n=n,
        adapter_id=manifest.adapter_id if len(found) == 1 else None,
        base=manifest.base.ref,
    )
    if any(matches(bundle, f.manifest) is not None for f in found):
        report["data_matches_manifest"] = not foreign
    if write and len(found) == 1 and n is None and not foreign:
        update_eval(found[0].path, dict(report))
    return report


def save_report(report: Report, out: str | Path, layout: str = "eval") -> list[Path]:
    """Write a report where the user asked for it. layout: "eval" (eval.json's own; a file, or a folder for ``eval.json``), or
    "open-unlearning" (a folder with its two files for each model)."""
    check_out(out, layout)
    if layout == "open-unlearning":
        return open_unlearning.save(report, out)
    path = Path(out).expanduser()
    path = path if path.suffix == ".json" else path / "eval.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(dict(report), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    return [path]


def check_out(out: str | Path | None, layout: str) -> None:
    """Refuse an --out and --layout that do not go together; before any work."""
    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout}: there is no such layout.{nearest(layout, LAYOUTS)}")
    if layout == "open-unlearning" and (out is None or Path(out).suffix == ".json"):
        raise UserError("--layout open-unlearning: two files for each model are written; name a folder with --out")


_TWIN = "retain-only"  # an adapter's name on the stack


def _bundle(first: AdapterFolder, data: str | None, foreign: bool) -> ForgetRetain:
    """The data to judge on. foreign: the hashes that the recipe knows need not hold for what is given."""
    own = _data_of(first.manifest)
    if data is None:
        return ForgetRetain.load(own) if own else load_data(first.recipe.get("data"), None)
    if not foreign:
        return load_data(first.recipe.get("data"), data)
    spec = first.recipe.get("data")
    template = spec.get("template") if isinstance(spec, Mapping) else None
    return ForgetRetain.load(data, template=str(template or "qa"))


def matches(bundle: ForgetRetain, manifest: Manifest) -> bool | None:
    """Whether the bundle's forget set is the adapter's own; None where the manifest does not say."""
    wanted = manifest.data.get("forget", {}).get("sha256")
    return None if not wanted else bundle.sha256["forget"] == wanted


def _check_retain_only(given: str | None) -> AdapterFolder | Path | None:
    """What --retain-only names: an adapter, or the folder of a model."""
    if given is None:
        return None
    if embedded.is_embedded(given):
        return embedded.twin_path(embedded.parse(given)[0])
    if (Path(given).expanduser() / MANIFEST).is_file():
        return read_adapter(given)
    try:
        return resolve_base(given)
    except UserError as e:
        raise UserError(f"--retain-only: {e}") from None


def _loaded(path: Path, tokenizer: Any) -> Callable[[], Any]:
    """A model of its own as a subject; it must read the same tokens."""
    try:
        own = load_tokenizer(path)
    except UserError:  # a folder of weights alone
        own = None
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--retain-only {path.name}: its tokenizer is not the base's, so its probabilities are not of the same tokens; it must "
            "be trained from the same base"
        )

    @contextmanager
    def subject() -> Iterator[Any]:
        yield load_base(path)

    return subject


def _subject_names(found: Sequence[AdapterFolder]) -> list[str]:
    if len(found) == 1:
        return ["adapter"]
    names = [f.path.resolve().name for f in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(
            f"several adapter folders are called {', '.join(twice)}; subjects are told apart by folder name"
        )
    return names


def _as_subjects(names: Sequence[str]) -> dict[str, str]:
    return {"adapter": "adapter"} if list(names) == ["adapter"] else {f"adapter:{n}": n for n in names}


def _data_of(manifest: Manifest) -> str | None:
    """The embedded bundle that all of a manifest's sets came from."""
    refs = {str(about.get("ref")) for about in manifest.data.values()}
    return next(iter(refs)) if len(refs) == 1 and embedded.is_embedded(next(iter(refs))) else None


def check_data(bundle: ForgetRetain, manifest: Manifest) -> None:
    """Refuse a bundle whose forget set is not the one the adapter was trained to forget."""
    if matches(bundle, manifest) is False:
        raise UserError(
            "data: this forget set is not the one the adapter was trained on (sha256 "
            f"{bundle.sha256['forget'][:12]}, the manifest says {manifest.data['forget']['sha256'][:12]}); give the right one with --data"
        )


def _twin(base_ref: str, data_ref: str | None) -> Callable[[], Any] | None:
    """The retain-only model of an embedded base; other bases have none unless someone trained it."""
    path = embedded.twin_for(base_ref, data_ref)
    if path is None:
        return None

    @contextmanager
    def twin() -> Iterator[Any]:
        yield load_base(path)

    return twin
