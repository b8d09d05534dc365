"""Publishing an adapter on the Hub, and fetching one.

A push is one commit: the Hub shows all of it or nothing of it. ``HfApi.upload_folder`` may split a slow upload into several
commits (huggingface_hub 2 with Xet), so the commit is made by ``create_commit``, which does not. Large files are sent before
it and are kept by the Hub: a push that was interrupted sends only what is missing when it is repeated.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Interrupted, UserError
from ..folder.atomic import staged
from ..folder.fetch import commit_of, cut_off, resolve_adapter, split_reference
from ..folder.manifest import Manifest
from ..folder.read import CARD, EVAL, MANIFEST, RECORDED, WEIGHTS, AdapterFolder, file_sha256, read_adapter
from ..folder.safetensors_io import plain_name
from ..folder.write import why_not_replaceable
from ..folder.yaml_io import MAX_JSON, parse_json, read_text
from ..reporting.result import Result
from .outgoing import pack

_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")
_PASSIVE = re.compile(r"\.git\w+|readme(\.md)?|licen[cs]e(\.\w+)?|notice(\.\w+)?", re.I)  # in a repository of any kind


@dataclass
class Publication(Result):
    """What a push sends, or would send. files: (name, bytes). commit and url: None for a dry run."""

    folder: str
    repo_id: str
    private: bool
    adapter_id: str
    files: list[tuple[str, int]]
    left_behind: list[str]
    notes: list[str] = field(default_factory=list)
    revision: str | None = None
    deleted: list[str] = field(default_factory=list)
    unchanged: bool = False
    commit: str | None = None
    url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        files = [{"name": n, "bytes": size} for n, size in self.files]
        return {"format": 1, **self.__dict__, "files": files, "dry_run": self.commit is None}

    def __str__(self) -> str:
        where = f"{self.repo_id} ({'private' if self.private else 'PUBLIC'}{f', branch {self.revision}' if self.revision else ''})"
        rows = [*self.files, ("total", sum(size for _, size in self.files))]
        width = max(len(n) for n, _ in self.files)
        lines = [f"{n:<{width}}  {size:>12,} bytes" for n, size in rows]
        lines += [f"stays here: {n}" for n in self.left_behind] + [f"removed there: {n}" for n in self.deleted]
        lines += [f"note: {n}" for n in self.notes]
        if self.commit is None:
            return "\n".join([f"would go to {where}, nothing was sent:", *lines])
        state = "is there already" if self.unchanged else "published"
        return "\n".join([f"{state}: {where}", *lines, f"{self.url} at commit {self.commit}"])


@dataclass(frozen=True)
class Pulled(Result):
    """An adapter as it was fetched: from which commit, to which folder."""

    folder: AdapterFolder
    repo_id: str
    commit: str

    def to_dict(self) -> dict[str, Any]:
        found = {"path": str(self.folder.path), "repo_id": self.repo_id, "commit": self.commit}
        return {"format": 1, **found, "adapter_id": self.folder.adapter_id}

    def __str__(self) -> str:
        return f"{self.folder.path}  {self.repo_id}@{self.commit}"


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = True,
    dry_run: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
    data: Any = None,
) -> Publication:
    """Publish the adapter in `folder` as `repo_id`, in one commit; with dry_run only say what would be sent.

    Args:
        repo_id: OWNER/NAME, or NAME under the token's own account.
        private: of a repository that this makes; one that is there already keeps what it is. Refused if that is public
            and private is wanted.
        revision: branch; made where there is none.
        token: default the environment's HF_TOKEN, or that of ``hf auth login``.
        data: bundle whose forget texts must stand in none of the files; an embedded one is found by itself.

    Raises:
        UserError: the folder, its card or the repository will not do, or the Hub refuses.
        Interrupted: the Hub could not be reached, or somebody else wrote there meanwhile. Nothing is half published.
    """
    if not _ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith((".git", "-", ".")):
        raise UserError(f"{repo_id!r}: not the name of a repository; it is OWNER/NAME in letters, digits, . _ and -.")
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(f"revision {revision}: is a commit; a push goes to a branch.")
    found = read_adapter(folder)
    files, left, notes = pack(found, data)
    out = Publication(str(folder), repo_id, private, found.adapter_id, files, left, notes, revision)
    if dry_run:
        return out
    from huggingface_hub import HfApi, get_token

    token = token or get_token()
    if token is None:
        raise UserError("push: no access token. Log in with `hf auth login`, or set HF_TOKEN to one that may write.")
    with _hub(repo_id):
        _commit(HfApi(token=token), found, out, message)
    return out


def _commit(api: Any, found: AdapterFolder, out: Publication, message: str | None) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if "/" not in out.repo_id:
        out.repo_id = f"{api.whoami()['name']}/{out.repo_id}"
    head = _prepare(api, out)
    names = [name for name, _ in out.files]
    out.deleted = _leftovers(api, out, head, names)
    operations: list[Any] = [CommitOperationDelete(n) for n in out.deleted]
    operations += [CommitOperationAdd(n, str(found.path / n)) for n in names]
    title = message or f"Forget adapter {found.adapter_id[:19]}"
    info = api.create_commit(
        out.repo_id, operations, commit_message=title, revision=out.revision, parent_commit=head.sha
    )
    out.unchanged, out.commit, out.url = info.oid == head.sha, info.oid, f"{api.endpoint}/{out.repo_id}"
    _compare(api, found, out)


def _prepare(api: Any, out: Publication) -> Any:
    """The repository's state, made where it is not there; refuses one that is public unawares, or holds something else."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(out.repo_id)
    except RepositoryNotFoundError:
        api.create_repo(out.repo_id, private=out.private, exist_ok=True)
        info = api.model_info(out.repo_id)
    if out.private and not info.private:
        raise UserError(f"{out.repo_id}: is there already and is public; name --public to publish in it.")
    if not out.private and info.private:
        out.private = True
        out.notes.append("the repository is private and stays so; its settings page makes it public")
    if out.revision is not None:
        try:
            info = api.model_info(out.repo_id, revision=out.revision)
        except RevisionNotFoundError:
            api.create_branch(out.repo_id, branch=out.revision, exist_ok=True)
            info = api.model_info(out.repo_id, revision=out.revision)
    there = [s.rfilename for s in info.siblings or []]
    foreign = [n for n in there if not _PASSIVE.fullmatch(n)]
    if foreign and MANIFEST not in there:
        what = ", ".join(foreign[:3])
        raise UserError(
            f"{out.repo_id}: holds something that is not a forget adapter ({what}); name another repository."
        )
    return info


def _leftovers(api: Any, out: Publication, head: Any, names: list[str]) -> list[str]:
    """Files of the adapter that was there before and that this one has not: they would be taken for its own."""
    there = {s.rfilename for s in head.siblings or []}
    if MANIFEST not in there:
        return []
    path = api.hf_hub_download(out.repo_id, MANIFEST, revision=head.sha)
    try:
        manifest = parse_json(read_text(Path(path), limit=MAX_JSON + 1), MANIFEST)
        old, ref = manifest["files"], str(manifest["base"]["ref"])
    except (UserError, KeyError, TypeError):
        why = "cannot be read, so what belongs to it is not known; remove it there first"
        raise UserError(f"{out.repo_id}: its {MANIFEST} {why}.") from None
    before = f"sha256:{old.get(WEIGHTS)}"
    if before != out.adapter_id:
        out.notes.append(f"replaces the adapter {before[:19]} of the base {ref}, which the history there keeps")
    return sorted(({*old, EVAL, *RECORDED} & there) - {*names, CARD})


def _compare(api: Any, found: AdapterFolder, out: Publication) -> None:
    """What lies there now against what lies here, by the hashes the Hub gives."""
    tree = {e.path: e for e in api.list_repo_tree(out.repo_id, recursive=True, revision=out.commit)}
    for name, _ in out.files:
        entry, path = tree.get(name), found.path / name
        if entry is not None:
            lfs = getattr(entry, "lfs", None)
            same = lfs.sha256 == file_sha256(path) if lfs else entry.blob_id == _git_hash(path.read_bytes())
        if entry is None or not same:
            raise Interrupted(f"{out.repo_id} at {out.commit}: {name} there is not the file here; push again")


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pull(repo_id: str, out: str | Path, revision: str | None = None) -> Pulled:
    """Fetch a forget adapter from the Hub into the folder `out`, whole or not at all, and check it.

    repo_id may carry its commit (``me/x@commit``). A branch or tag is resolved to a commit first, and all files are of that
    one. Only the files that the manifest lists are taken (`folder.fetch.FILES` are ever downloaded); never pickles or code.

    Raises:
        UserError: no such repository or revision, no forget adapter in it, a file that is not what the manifest says, or
            something else at `out`.
    """
    hub_id, at = split_reference(repo_id)
    if at is not None and revision is not None and at != revision:
        raise UserError(f"{repo_id}: two revisions are given, {at} and {revision}.")
    if not _ID.fullmatch(hub_id) or "/" not in hub_id:
        raise UserError(f"{hub_id!r}: not the id of a repository (OWNER/NAME).")
    commit = _newest(hub_id, at or revision)
    source = resolve_adapter(hub_id, commit or at or revision)
    commit = commit or commit_of(source) or ""
    with staged(out, why_not_replaceable) as stage:
        manifest = Manifest.from_text(read_text(source / MANIFEST, limit=MAX_JSON + 1), f"{hub_id}: {MANIFEST}")
        for name in sorted({*manifest.files, MANIFEST, CARD, EVAL, *RECORDED}):
            if plain_name(name) and (source / name).is_file():  # other names are read_adapter's to refuse
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, stage / name)
        try:
            read_adapter(stage)
        except UserError as e:
            raise UserError(f"{hub_id} at {commit}: {str(e).replace(str(stage), 'its folder')}") from None
    return Pulled(read_adapter(out), hub_id, commit)


def _newest(hub_id: str, revision: str | None) -> str | None:
    """The commit that a revision is now, and a refusal of what is no adapter before anything is downloaded. None: offline."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    with _hub(hub_id):
        info = HfApi().model_info(hub_id, revision=revision)
    there = {s.rfilename for s in info.siblings or []}
    if MANIFEST not in there:
        what = "a PEFT adapter, but not a forget adapter" if "adapter_config.json" in there else "not a forget adapter"
        raise UserError(f"{hub_id} at {info.sha}: {what} (it holds no {MANIFEST}).")
    return info.sha


@contextmanager
def _hub(repo_id: str) -> Iterator[None]:
    """The Hub's and the network's errors as messages; defects of ours stay what they are."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (UserError, Interrupted):
        raise
    except HFValidationError as e:
        raise UserError(f"{repo_id}: {e}") from None
    except Exception as e:
        message = _as_message(repo_id, e)
        if message is None:
            raise
        raise message from e


def _as_message(repo_id: str, e: BaseException) -> Exception | None:
    """What to raise in place of an error of the Hub or the network, or of what caused it; None for any other."""
    from huggingface_hub import errors as hub

    known = {  # a gated repository is a kind of one that is not found
        hub.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, so the Hub is not reached; unset it.",
        hub.GatedRepoError: "is gated; request access on its page, and use a token that has it.",
        hub.RevisionNotFoundError: "has no such revision.",
        hub.RepositoryNotFoundError: "there is no such repository, or it is private and this token may not see it.",
    }
    if text := next((text for kind, text in known.items() if isinstance(e, kind)), None):
        return UserError(f"{repo_id}: {text}")
    again = "run the same command again, it goes on where it stopped"
    if isinstance(e, hub.HfHubHTTPError):
        return _refused(repo_id, e, again)
    if cut_off(e) or isinstance(e, ConnectionError | TimeoutError):
        return Interrupted(f"the connection to the Hub was lost ({type(e).__name__}); {again}")
    if isinstance(e, ValueError) and "README.md" in str(e):
        return UserError(f"{repo_id}: the Hub refuses the card. {e}")
    return _as_message(repo_id, e.__cause__) if e.__cause__ is not None else None


def _refused(repo_id: str, e: Any, again: str) -> Exception:
    """By the HTTP status of the Hub's answer."""
    status = e.response.status_code if e.response is not None else 0
    why = e.server_message or str(e).splitlines()[0]
    if status == 412:
        return Interrupted(f"{repo_id} was changed by somebody else meanwhile; nothing was published, push again")
    if status == 429 or status >= 500:
        return Interrupted(f"the Hub answered {status} for {repo_id}; {again}")
    texts = {
        401: "the Hub does not accept the token (401). Log in with `hf auth login`, or set HF_TOKEN.",
        403: f"the token may not write there (403: {why}). Use a token with write access to it.",
    }
    return UserError(f"{repo_id}: {texts.get(status, f'the Hub refuses ({status}: {why}).')}")
