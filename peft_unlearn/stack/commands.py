"""The commands of this room for the command line; importing it loads neither torch nor peft."""

from __future__ import annotations

import json as _json
from typing import Annotated, Any

import typer

stack_app = typer.Typer(help="The adapters of one deployment: a ledger and a lock file.", no_args_is_help=True)

File = Annotated[str, typer.Argument(metavar="STACK", help="The stack file, or the folder with a forget-stack.yaml.")]
Base = Annotated[str | None, typer.Option("--base", help="Base model: a folder, a Hub id, or embedded:NAME.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else there.")]


def _show(value: Any, text: str, json: bool) -> None:
    print(_json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) if json else text)


@stack_app.command("add")
def stack_add(
    stack: File,
    adapter: Annotated[str, typer.Argument(metavar="DIR", help="Adapter: a folder, a Hub id, or id@commit.")],
    request_id: Annotated[str, typer.Option("--request-id", help="Id of the request that it answers.")],
    reason: Annotated[str, typer.Option("--reason", help="Why it was asked for.")],
    scale: Annotated[float | None, typer.Option(help="Strength; default the adapter's own.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name in the stack; default its folder's.")] = None,
    json: Json = False,
) -> None:
    """Put an adapter on top of a stack."""
    from .stackfile import add

    found = add(stack, adapter, request_id=request_id, reason=reason, scale=scale, name=name)
    _show(found.to_dict(), found.table(), json)


@stack_app.command("list")
def stack_list(stack: File, json: Json = False) -> None:
    """Show the ledger: every adapter with its request, date and status."""
    from .stackfile import load

    found = load(stack)
    _show(found.to_dict(), found.table(), json)


@stack_app.command("revoke")
def stack_revoke(
    stack: File,
    name: Annotated[str, typer.Argument(help="The adapter's name in the stack.")],
    reason: Annotated[str, typer.Option("--reason", help="Why it goes.")] = "",
    cascade: Annotated[bool, typer.Option("--cascade", help="Also those that were trained on top of it.")] = False,
    json: Json = False,
) -> None:
    """Mark an adapter as revoked: the stack loads as if it had never been there."""
    from .stackfile import revoke

    found, _ = revoke(stack, name, reason, cascade=cascade)
    _show(found.to_dict(), found.table(), json)


def compose(
    parts: Annotated[
        list[str], typer.Argument(metavar="DIR:WEIGHT...", help="Adapters with weights, e.g. A:1 B:-0.5.")
    ],
    out: Annotated[str, typer.Option("--out", "--to", help="Folder for the sum.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Cut to this rank; default the exact sum.")] = None,
    base: Base = None,
    no_probes: Annotated[bool, typer.Option("--no-probes", help="Do not load the base.")] = False,
    name: Annotated[str, typer.Option(help="Name of the result.")] = "",
    json: Json = False,
) -> None:
    """Add adapters with signs and weights: the result is one stock adapter."""
    from .compose import compose as run
    from .compose import parse_part

    found = run([parse_part(p) for p in parts], out, rank=rank, base=base, probe=not no_probes, name=name)
    _show(found.to_dict(), str(found), json)


def remove(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A forget adapter's folder, or a stack file.")],
    base: Base = None,
    name: Annotated[str | None, typer.Option(help="Only this adapter of a stack file.")] = None,
    cascade: Annotated[bool, typer.Option("--cascade", help="Also those that were trained on top of it.")] = False,
    json: Json = False,
) -> None:
    """Put the adapter on its base, take it off again, and prove that the base is bit for bit what its files say."""
    from .remove import remove as run

    report = run(folder, base, name, cascade)
    _show(report.to_dict(), str(report), json)
    raise typer.Exit(report.exit_code)


def register(app: typer.Typer) -> None:
    """Put the commands into the program."""
    app.add_typer(stack_app, name="stack")
    app.command()(compose)
    app.command()(remove)
