"""Whom a command judges, and on what: adapter folders, their data, and the retain model beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data import embedded
from ..data.bundle import ForgetRetain
from ..data.load import load_data
from ..errors import UserError
from ..folder.base import load_base, load_tokenizer, resolve_base
from ..folder.device import placed
from ..folder.manifest import Manifest
from ..folder.read import MANIFEST, AdapterFolder, read_adapter
from ..stack.below import over
from ..stack.model import ForgetModel
from ..tuners.peft_type import FORGET_VECTOR
from .score import on_one_model

RETAIN_MODEL = "retain-only"  # the name on a stack of an adapter that is the retain model


def named_folders(folders: Sequence[str | Path]) -> dict[str, AdapterFolder]:
    """Folders by their own name, as PEFT allows it; `UserError` where two are called the same, or as the retain model is."""
    out: dict[str, AdapterFolder] = {}
    for folder in folders:
        found = read_adapter(folder)
        name = re.sub(r"[^A-Za-z0-9_-]", "_", found.path.resolve().name)
        if name in out:
            raise UserError(f"two adapter folders are called {name}; adapters are told apart by folder name")
        if name == RETAIN_MODEL:
            raise UserError(
                f"{folder}: {RETAIN_MODEL} is what the retain model is called in the results; give the folder another name"
            )
        out[name] = found
    return out


def judged_folders(folders: Sequence[str | Path]) -> dict[str, AdapterFolder]:
    """As `named_folders`; one folder alone is called "adapter", so that the results of all adapters have one shape."""
    if len(folders) == 1:
        return {"adapter": read_adapter(folders[0])}
    return named_folders(folders)


def subject_of(names: Sequence[str]) -> dict[str, str]:
    """Subject of a report -> adapter on the stack."""
    return {"adapter": "adapter"} if list(names) == ["adapter"] else {f"adapter:{n}": n for n in names}


def stack_of(
    adapters: Mapping[str, AdapterFolder],
    base: str | None = None,
    below: Sequence[str | Path] = (),
    dtype: str = "auto",
) -> ForgetModel:
    """Base and adapters, loaded. below: what one of them was trained on top of, lowest first; it runs at the scale of that training.
    dtype: of the base, see `ForgetModel`.

    Raises:
        UserError: a wrong base, a dependency that is not given, or something under `below` that none of them needs.
    """
    whole = over(adapters, below)
    paths = {n: f.path for n, f in whole.folders.items()}
    return ForgetModel.from_pretrained(base, paths, scales=whole.scales, dtype=dtype)


def subjects_on(stack: ForgetModel, names: Sequence[str]) -> dict[str, Any]:
    """Base and each adapter of a stack as subjects, every adapter together with what it was trained on top of."""
    return on_one_model(stack.model, {"base": None, **{s: stack.chain(n) for s, n in subject_of(names).items()}})


def embedded_ref(manifest: Manifest) -> str | None:
    """The embedded bundle that all of a manifest's sets came from."""
    refs = {str(about.get("ref")) for about in manifest.data.values()}
    return next(iter(refs)) if len(refs) == 1 and embedded.is_embedded(next(iter(refs))) else None


def work_data(adapter: Path) -> Path:
    """Where `forget` leaves the rows of an adapter that it makes: beside it, private."""
    return adapter.with_name(f"{adapter.name}.work") / "data"


def bundle_of(found: AdapterFolder, data: str | None = None) -> ForgetRetain:
    """The data given, or those that the adapter was trained on, unchecked."""
    own, spec = embedded_ref(found.manifest), found.recipe.get("data")
    if data is None and own:
        return ForgetRetain.load(own)
    if data is None and isinstance(spec, Mapping) and (beside := work_data(found.path)).is_dir():
        data = str(beside)  # hashes are compared, so that another run's rows are not taken for these
    return load_data(spec, data)


def bundle_for(found: Sequence[AdapterFolder], data: str | None = None) -> ForgetRetain:
    """The data given, or those of the first adapter; every adapter must have been trained to forget its forget set."""
    bundle = bundle_of(found[0], data)
    for folder in found:
        check_data(bundle, folder.manifest)
    return bundle


def matches(bundle: ForgetRetain, manifest: Manifest) -> bool | None:
    """Whether the bundle's forget set is the adapter's own; None where the manifest does not say."""
    wanted = manifest.data.get("forget", {}).get("sha256")
    return None if not wanted else bundle.sha256["forget"] == wanted


def check_data(bundle: ForgetRetain, manifest: Manifest) -> None:
    """Refuse a bundle whose forget set is not the one the adapter was trained to forget."""
    if matches(bundle, manifest) is False:
        raise UserError(
            "data: this forget set is not the one the adapter was trained on (sha256 "
            f"{bundle.sha256['forget'][:12]}, the manifest says {manifest.data['forget']['sha256'][:12]}); give the right one with --data"
        )


def retain_model_folder(base_ref: str, bundle: ForgetRetain) -> Path | None:
    """The retain model of an embedded base, where it is one for this forget set; other bases have none unless someone
    trained it. Rows in the user's own files must each name somebody whom that model never saw: of anybody else it knows the
    facts, and every comparison with it would mislead.
    """
    path = embedded.retain_model_for(base_ref, ref := bundle.refs.get("forget"))
    if path is None or embedded.is_embedded(ref or ""):
        return path
    unseen = {str(row["subject"]) for row in ForgetRetain.load(base_ref).forget if row.get("subject")}
    texts = [" ".join(str(v) for v in row.values()) for row in bundle.forget]
    return path if all(any(name in text for name in unseen) for text in texts) else None


def embedded_retain_model(base_ref: str, bundle: ForgetRetain, dtype: str = "float32") -> Callable[[], Any] | None:
    """`retain_model_folder` as a subject, in the dtype of the others."""
    path = retain_model_folder(base_ref, bundle)
    return None if path is None else _loading(path, dtype)


def named_retain_model(given: str | None) -> AdapterFolder | Path | None:
    """What --retain-model names: an adapter, or the folder of a model."""
    if given is None:
        return None
    if embedded.is_embedded(given):
        return embedded.retain_model_path(embedded.parse(given)[0])
    if (Path(given).expanduser() / MANIFEST).is_file():
        return read_adapter(given)
    try:
        return resolve_base(given)
    except UserError as e:
        raise UserError(f"--retain-model: {e}") from None


def suite_of(folder: AdapterFolder) -> str:
    """The suite that an adapter's recipe names, else the one for what it reads: images or text."""
    named = (folder.recipe.get("eval") or {}).get("suite")
    return str(named or ("classes" if folder.config.get("peft_type") == FORGET_VECTOR else "people"))


def loaded_retain_model(path: Path, tokenizer: Any, dtype: str = "float32") -> Callable[[], Any]:
    """A model of its own as a subject, in the dtype of the others; it must read the same tokens."""
    try:
        own = load_tokenizer(path)
    except UserError:  # a folder of weights alone
        own = None
    if own is not None and hasattr(own, "get_vocab") and own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--retain-model {path.name}: its tokenizer is not the base's, so its probabilities are not of the same tokens; it must "
            "be trained from the same base"
        )
    return _loading(path, dtype)


def _loading(path: Path, dtype: str) -> Callable[[], Any]:
    """A subject that is loaded when its turn comes and let go afterwards."""

    @contextmanager
    def subject() -> Iterator[Any]:
        yield placed(load_base(path, dtype))

    return subject
