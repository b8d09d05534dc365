"""From what a user calls an adapter (a folder, or a Hub id with or without its commit) to a folder of plain files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..errors import Interrupted, UserError
from .manifest import path_like

FILES: tuple[str, ...] = (
    "adapter_config.json", "adapter_model.safetensors", "forget.json", "recipe.yaml", "eval.json", "README.md",
    "model.sig", "erasure.intoto.jsonl",
    *(f"{place}/{name}" for place in ("expert_lora", "sparse", "shira_r*")
      for name in ("adapter_config.json", "adapter_model.safetensors")),
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What is ever downloaded: no code, no pickles, no checkpoints."""

_NEEDED = ("adapter_config.json", "adapter_model.safetensors", "forget.json")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def split_reference(ref: str) -> tuple[str, str | None]:
    """("me/x", commit or None) of ``me/x`` or ``me/x@commit``; a folder's name comes back as it is."""
    head, at, tail = ref.rpartition("@")
    return (head, tail) if at and _ID.fullmatch(head) else (ref, None)


def is_hub_id(ref: str | Path) -> bool:
    """Whether `ref` means a repository on the Hub: no folder of that name lies here, and it is spelt as one."""
    text = str(ref)
    if path_like(text) or there(Path(text)):
        return False
    return _ID.fullmatch(split_reference(text)[0]) is not None


def there(path: Path) -> bool:
    """Whether something is at a path; nothing is at one that no file system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def resolve_adapter(ref: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter: `ref` itself where it is one, else the files of a Hub repository in the local cache.

    Args:
        ref: a folder, a Hub id, or ``id@commit``.
        revision: commit, branch or tag of a Hub id; the folder that comes back is always that of one commit
            (`commit_of`). Default the newest one known here, else the newest there.

    Raises:
        UserError: no such folder, not a name, not to be had, or a repository without adapter weights in safetensors.
    """
    text = str(ref)
    folder = Path(text).expanduser()
    if there(folder) or path_like(text):
        if revision is not None:
            raise UserError(f"adapter {text}: is a folder, and a folder has no revision {revision!r}.")
        if not folder.is_dir():
            raise UserError(f"{text}: {'is a file, not an adapter folder' if there(folder) else 'no such folder'}.")
        return folder
    hub_id, commit = split_reference(text)
    if not _ID.fullmatch(hub_id):
        raise UserError(f"{text}: no such folder, and not a Hub id (OWNER/NAME, or OWNER/NAME@COMMIT) either.")
    if commit is not None and revision is not None and commit != revision:
        raise UserError(f"adapter {text}: two revisions are given, {commit} and {revision}.")
    revision = commit or revision
    # What an interrupted download left is a folder too: whole only if nothing that is needed is missing.
    found = _pinned(snapshot("adapter", hub_id, revision, FILES, lambda f: not _missing(f)), revision)
    if missing := _missing(found):
        raise UserError(
            f"adapter {hub_id} at {commit_of(found)}: holds no {' and no '.join(missing)}: not a forget adapter "
            "(pickled weights are never downloaded)."
        )
    return found


def _missing(folder: Path) -> list[str]:
    return [n for n in _NEEDED if not (folder / n).is_file()]


def commit_of(folder: str | Path) -> str | None:
    """The 40-digit commit of a folder that lies in the Hub's cache, or None for any other."""
    parts = Path(folder).parts
    if len(parts) > 1 and parts[-2] == "snapshots" and _COMMIT.fullmatch(parts[-1]):
        return parts[-1]
    return None


def snapshot(
    what: str,
    hub_id: str,
    revision: str | None,
    patterns: Sequence[str],
    whole: Callable[[Path], bool] = lambda _: True,
    hint: str = "",
) -> Path:
    """The files of a repository: from the local cache where they are `whole` there or the network is off, else from the Hub.

    Args:
        what: names the repository's part in messages ("adapter"); hint: ends them.

    Raises:
        UserError: not a Hub id, or neither cached nor given by the Hub.
        Interrupted: the connection was lost again and again; what was downloaded is kept.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    get = partial(snapshot_download, hub_id, revision=revision, allow_patterns=list(patterns))
    try:
        with suppress(*(() if offline else (LocalEntryNotFoundError,))):
            found = Path(get(local_files_only=True))
            if offline or whole(found):
                return found
        return Path(_patiently(get))
    except HFValidationError:
        raise UserError(f"{what} {hub_id!r}: neither a folder nor a Hub id{hint}.") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        at = f" at {revision}" if revision else ""
        raise UserError(
            f"{what} {hub_id!r}{at}: no such folder here, not in the local Hub cache, and the Hub could not give it "
            f"({type(e).__name__}){hint}."
        ) from None


def cut_off(e: BaseException) -> bool:
    """Whether an error is of the wire: huggingface_hub 1 speaks through httpx, 2 through httpx2."""
    return any(c.__name__ == "TransportError" and c.__module__.startswith("httpx") for c in type(e).__mro__)


def _patiently(get: Callable[[], str], tries: int = 3) -> str:
    """Download, going on where a connection was cut: huggingface_hub 1 gives up at the first cut inside a file."""
    try:
        return get()
    except Exception as e:
        if not cut_off(e):
            raise
        if tries > 1:
            return _patiently(get, tries - 1)
        again = "run the same command again, it goes on where it stopped"
        raise Interrupted(f"the connection to the Hub was lost ({type(e).__name__}); {again}") from e


def _pinned(found: Path, revision: str | None) -> Path:
    commit = commit_of(found)
    if commit is None or (revision is not None and _COMMIT.fullmatch(revision) and commit != revision):
        raise UserError(f"{found.name}: the Hub's cache did not give the commit that was asked for ({revision}).")
    return found
