"""`merge` for the command line; importing it loads neither torch nor peft."""

from __future__ import annotations

import json as _json
import sys
from typing import Annotated, Any

import typer

from ..errors import UserError


def merge(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="DIR...", help="Adapters, in stacking order; their deltas are summed.")
    ] = None,
    out: Annotated[str, typer.Option("--out", "--to", help="Folder for the merged model.")] = "",
    base: Annotated[
        str | None, typer.Option("--base", help="Base model: a folder, a Hub id, or embedded:NAME.")
    ] = None,
    stack: Annotated[str | None, typer.Option(help="Instead of DIR: the active adapters of this stack file.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    scale: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]NUMBER", help="Strength; with several adapters, by name.")
    ] = None,
    rounding: Annotated[
        str, typer.Option(help="nearest, or stochastic: the change in the mean, with noise.")
    ] = "nearest",
    seed: Annotated[int, typer.Option(min=0, help="Of stochastic rounding.")] = 0,
    onto: Annotated[
        str | None, typer.Option(help="Other weights of the same architecture: the base after quantization, as floats.")
    ] = None,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Build the model instead of streaming its files.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the unmerged model on the probe prompts.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON to standard output, and nothing else there.")
    ] = False,
) -> None:
    """Write base plus adapters as a plain model; run again after an interruption, it goes on."""
    if bool(folders) == bool(stack):
        raise UserError("merge: name the adapters' folders, or a stack file with --stack.")
    from .merge import merge as run

    wanted: Any = stack or folders
    report = run(
        wanted, base, out, dtype=dtype, scale=parse_scales(scale), rounding=rounding, seed=seed, onto=onto,
        in_memory=in_memory, check=check, progress=_tell,
    )  # fmt: skip
    print(_json.dumps(report.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) if json else report)


def _tell(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


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


def register(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command()(merge)
