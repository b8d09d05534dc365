"""Commands on several adapters at once, and on the weights under them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import UserError
from .options import Base, Cascade, Data, Json, SuiteName, app, finish

stack_app = typer.Typer(help="The adapters of one deployment: a ledger and a lock file.", no_args_is_help=True)
app.add_typer(stack_app, name="stack")

File = Annotated[str, typer.Argument(metavar="STACK", help="The stack file, or the folder with a forget-stack.yaml.")]


@app.command()
def merge(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="DIR...", help="Adapters, in stacking order; their deltas are summed.")
    ] = None,
    out: Annotated[str, typer.Option("--out", "--to", help="Folder for the merged model.")] = "",
    base: Base = None,
    stack: Annotated[str | None, typer.Option(help="Instead of DIR: the active adapters of this stack file.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the base's own.")] = "auto",
    scale: Annotated[list[str] | None, typer.Option(metavar="[NAME=]NUMBER", help="Scale; with several adapters, by name.")] = None,
    rounding: Annotated[str, typer.Option(help="nearest, or stochastic: the change in the mean, with noise.")] = "nearest",
    seed: Annotated[int, typer.Option(min=0, help="Of stochastic rounding.")] = 0,
    onto: Annotated[
        str | None, typer.Option(help="Other weights of the same architecture: the base after quantization, as floats.")
    ] = None,
    in_memory: Annotated[bool, typer.Option("--in-memory", help="Build the model instead of streaming its files.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Judge the merged model even where no layer lost much: the suite, else the probe prompts.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write it even if rounding undoes the forgetting.")] = False,
    data: Data = None,
    suite: SuiteName = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Write base plus adapters as a plain model that still forgets; run again after an interruption, it goes on."""
    if bool(folders) == bool(stack):
        raise UserError("merge: name the adapters' folders, or a stack file with --stack.")
    from ..analysis.merged import merge as run
    from ..progress import bars

    wanted: Any = stack or folders
    with bars() as progress:
        report = run(
            wanted, base, out, dtype=dtype, scale=parse_scales(scale), rounding=rounding, seed=seed, onto=onto,
            in_memory=in_memory, check=check, force=force, data=data, suite=suite, progress=progress,
        )  # fmt: skip
    finish(report, json)


def parse_scales(given: list[str] | None) -> float | dict[str, float] | None:
    """``["2"]`` or ``["a=1", "b=-0.5"]``. Raises `UserError` for a mixture and for what is no number."""
    if not given:
        return None
    named: dict[str, float] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            raise UserError(f"--scale {text!r}: expected a number, or name=number.") from None
        if not equals and len(given) > 1:
            raise UserError(f"--scale {text!r}: with several scales say whose each is, name=number.")
        if name in named:
            raise UserError(f"--scale: {name} is given twice.")
        if not equals:
            return number
        named[name] = number
    return named


@app.command()
def compose(
    parts: Annotated[list[str], typer.Argument(metavar="DIR:WEIGHT...", help="Adapters with weights, e.g. A:1 B:-0.5.")],
    out: Annotated[str, typer.Option("--out", "--to", help="Folder for the sum.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Cut to this rank; default the exact sum.")] = None,
    base: Base = None,
    no_probes: Annotated[bool, typer.Option("--no-probes", help="Do not load the base.")] = False,
    name: Annotated[str, typer.Option(help="Name of the result.")] = "",
    learn: Annotated[bool, typer.Option("--learn", help="Learn the weights of forget vectors on --data: a new request.")] = False,
    data: Data = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Add adapters with signs and weights: the result is one stock adapter."""
    from ..merging.compose import compose as run
    from ..merging.compose import parse_part

    if learn or data is not None:
        if not (learn and data is not None) or rank is not None or no_probes:
            raise UserError(
                "compose: --learn goes with --data, the request to learn on, and without --rank and --no-probes."
            )
        from ..progress import bars
        from ..training.coefficients import learn_sum

        with bars() as progress:
            learned = learn_sum(parts, data, out, base=base, name=name, progress=progress)
        finish(learned, json)
    found = run([parse_part(p) for p in parts], out, rank=rank, base=base, probe=not no_probes, name=name)
    finish(found, json)


@app.command()
def remove(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A forget adapter's folder, or a stack file.")],
    base: Base = None, name: Annotated[str | None, typer.Option(help="Only this adapter of a stack file.")] = None,
    cascade: Cascade = False, json: Json = False,
) -> None:  # fmt: skip
    """Put the adapter on its base, take it off again, and prove that the base is bit for bit what its files say."""
    from ..stack.model import remove as run

    report = run(folder, base, name, cascade)
    finish(report, json)


@stack_app.command("add")
def stack_add(
    stack: File, adapter: Annotated[str, typer.Argument(metavar="DIR", help="Adapter: a folder, a Hub id, or id@commit.")],
    request_id: Annotated[str, typer.Option("--request-id", help="Id of the request that it answers.")],
    reason: Annotated[str, typer.Option("--reason", help="Why it was asked for.")],
    scale: Annotated[float | None, typer.Option(help="Its scale; default the adapter's own.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name in the stack; default its folder's.")] = None, json: Json = False,
) -> None:  # fmt: skip
    """Put an adapter on top of a stack."""
    from ..stack.stackfile import add

    found = add(stack, adapter, request_id=request_id, reason=reason, scale=scale, name=name)
    finish(found, json)


@stack_app.command("list")
def stack_list(stack: File, json: Json = False) -> None:
    """Show the ledger: every adapter with its request, date and status."""
    from ..stack.stackfile import load

    found = load(stack)
    finish(found, json)


@stack_app.command("revoke")
def stack_revoke(
    stack: File, name: Annotated[str, typer.Argument(help="The adapter's name in the stack.")],
    reason: Annotated[str, typer.Option("--reason", help="Why it goes.")] = "", cascade: Cascade = False, json: Json = False,
) -> None:  # fmt: skip
    """Mark an adapter as revoked: the stack loads as if it had never been there."""
    from ..stack.stackfile import revoke

    found = revoke(stack, name, reason, cascade=cascade)
    finish(found, json)
