"""Commands that publish, fetch, check and export."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import Adapter, Base, Below, Data, Folder, Json, app, finish

Ledger = Annotated[str | None, typer.Option("--stack", help="The ledger: a stack file.")]
Copies = Annotated[
    list[str] | None, typer.Option("--derived", metavar="DIR", help="A model that it was merged into; repeat it.")
]


@app.command()
def verify(
    folder: Adapter, base: Base = None, below: Below = None,
    server: Annotated[str | None, typer.Option(help="Check this OpenAI-compatible server instead.")] = None,
    served_as: Annotated[str | None, typer.Option(help="The adapter's name on that server.")] = None,
    base_as: Annotated[str | None, typer.Option(help="The base's own name on that server, which is asked too.")] = None,
    scale: Annotated[float | None, typer.Option(help="Scale it is served at; default the manifest's.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Check files, hashes, base and probes of an adapter; with --server, whether it is really being served."""
    from ..errors import UserError
    from ..progress import bars

    if (server is None) != (served_as is None):
        raise UserError("--server and --served-as belong together: the address, and the adapter's name there")
    if server is not None and below:
        raise UserError(
            "--below is for the check without --server: a server runs one adapter; compose makes one of all"
        )
    with bars() as progress:
        if server is not None and served_as is not None:
            from ..sharing.server import verify_server

            report: Any = verify_server(
                folder, server, served_as, base=base, scale=scale, progress=progress, base_as=base_as
            )
        else:
            from ..sharing.verify import verify as run

            report = run(folder, base, below or ())
    finish(report, json)


@app.command()
def card(
    folder: Folder,
    write: Annotated[bool, typer.Option("--write", help="Replace README.md; your own words in it stay.")] = False,
    description: Annotated[str, typer.Option(help="What it forgets, in your words.")] = "",
    license: Annotated[str | None, typer.Option(help="License id as the Hub knows it, e.g. apache-2.0.")] = None,
) -> None:  # fmt: skip
    """The adapter's card, made anew from what its folder says now."""
    from ..sharing.card import card as run

    finish(run(folder, write=write, description=description, license=license), json=False)


@app.command()
def push(
    folder: Folder, repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a public repository; private otherwise.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list everything; use no network.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None, data: Data = None, json: Json = False,
) -> None:  # fmt: skip
    """Publish an adapter: exactly its files, in one commit, private unless you say otherwise."""
    from ..sharing.publish import push as run

    done = run(folder, repo_id, private=not public, dry_run=dry_run, revision=revision, message=message, data=data)
    finish(done, json)


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME[@COMMIT]", help="Repository on the Hub.")],
    out: Annotated[str, typer.Option("--out", help="Folder that receives the adapter.")],
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag.")] = None, json: Json = False,
) -> None:  # fmt: skip
    """Fetch an adapter from the Hub, pinned to a commit, checked, whole or not at all."""
    from ..sharing.publish import pull as run

    got = run(repo_id, out, revision)
    finish(got, json)


@app.command()
def export(
    folder: Adapter, out: Annotated[str, typer.Option("--out", help="Folder for the exported adapter.")],
    target: Annotated[str, typer.Option("--for", help="vllm, sglang, mergekit or gguf (llama.cpp).")],
    scale: Annotated[float | None, typer.Option(help="Scale to multiply in; default the manifest's.")] = None,
    base: Base = None, json: Json = False,
) -> None:  # fmt: skip
    """Write the adapter as a server or mergekit reads it: one rank, its scale inside the tensors."""
    from ..sharing.export import export as run

    report = run(folder, out, target, scale=scale, base=base)
    finish(report, json)


@app.command()
def record(
    folder: Folder, key: Annotated[str, typer.Option("--key", metavar="PEM", help="Private elliptic key that signs.")],
    base: Base = None, data: Data = None, stack: Ledger = None,
    request: Annotated[list[str] | None, typer.Option("--request", metavar="ID", help="Request that it answers; repeat it.")] = None,
    derived: Copies = None,
    commitment: Annotated[str | None, typer.Option(metavar="SHA256", help="Of canaries, published before training.")] = None,
    alpha: Annotated[float, typer.Option(min=1e-6, max=0.5, help="What all bounds may be wrong with together.")] = 0.05,
    json: Json = False,
) -> None:  # fmt: skip
    """Sign an adapter and what is known of it: model.sig and erasure.intoto.jsonl."""
    from ..records.record import record as run

    done = run(
        folder, key, base=base, data=data, stack=stack, requests=request or (), derived=derived or (), commitment=commitment,
        alpha=alpha,
    )  # fmt: skip
    finish(done, json)


@app.command()
def audit(
    folder: Adapter,
    key: Annotated[str | None, typer.Option("--public-key", "--key", metavar="PEM", help="The signer's public key.")] = None,
    base: Base = None, data: Data = None, stack: Ledger = None, derived: Copies = None,
    retain_model: Annotated[
        list[str] | None, typer.Option("--retain-model", metavar="MODEL", help="Trained without the forget set; five or more.")
    ] = None,
    no_run: Annotated[bool, typer.Option("--no-run", help="Check signatures, files and probes; measure nothing again.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Check a signed record: what is confirmed here, what is only signed (exit code 5), what is contradicted (1)."""
    from ..progress import bars
    from ..records.audit import audit as run

    with bars() as progress:
        found = run(
            folder, key=key, base=base, data=data, stack=stack, derived=derived or (), retain_models=retain_model or (),
            rerun=not no_run, progress=progress,
        )  # fmt: skip
    finish(found, json)
