"""From adapter folders to numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data import embedded
from ..data.bundle import ForgetRetain
from ..errors import UserError
from ..evaluation.score import Report, on_one_model, score
from ..folder.base import load_base
from ..folder.manifest import Manifest
from ..folder.read import AdapterFolder, read_adapter
from ..folder.write import update_eval
from ..stack.model import ForgetModel
from .run import load_data

Progress = Callable[[str, int, int], None]


def evaluate(
    folders: Sequence[str | Path],
    *,
    base: str | None = None,
    data: str | None = None,
    suite: str | None = None,
    n: int | None = None,
    progress: Progress | None = None,
    write: bool = True,
) -> Report:
    """Score base, adapters and, where there is one, the retain-only twin on one suite; one loaded base, adapters swapped in place.

    With one folder the result is also written into it as eval.json.
    """
    found = [read_adapter(f) for f in folders]
    manifest = found[0].manifest
    names = _subject_names(found)
    spec = data or _data_of(manifest)
    bundle = load_data(found[0].recipe.get("data"), data) if data or not _data_of(manifest) else ForgetRetain.load(spec)
    check_data(bundle, manifest)
    stack = ForgetModel.from_pretrained(base, dict(zip(names, [f.path for f in found], strict=True)))
    subjects: dict[str, Any] = on_one_model(stack.model, {"base": None, **_as_subjects(names)})
    subjects["retain_only"] = _twin(manifest.base.ref, bundle.refs.get("forget"))
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
    if write and len(found) == 1 and n is None:
        update_eval(found[0].path, dict(report))
    return report


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
    wanted = manifest.data.get("forget", {}).get("sha256")
    if wanted and bundle.sha256["forget"] != wanted:
        raise UserError(
            "data: this forget set is not the one the adapter was trained on (sha256 "
            f"{bundle.sha256['forget'][:12]}, the manifest says {wanted[:12]}); give the right one with --data"
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
