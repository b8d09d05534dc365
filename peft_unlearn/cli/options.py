"""What the commands share: the app, the options that mean the same everywhere, and how a result is printed."""

from __future__ import annotations

import json as _json
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Forget adapters: train, judge, share, merge and remove small PEFT adapters that make a language model forget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[str, typer.Argument(help="A forget adapter's folder.")]
Base = Annotated[str | None, typer.Option("--base", help="Base model: a folder, a Hub id, or embedded:NAME.")]
Data = Annotated[
    str | None, typer.Option("--data", help="Bundle: a folder with forget and retain files, or embedded:NAME.")
]
Below = Annotated[
    list[str] | None,
    typer.Option("--below", metavar="DIR", help="What it was trained on top of, lowest first; repeat it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else there.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a recipe value.")]


def emit(value: Any) -> None:
    """JSON on standard output; a number that JSON does not have is a defect and raises."""
    print(_json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def recipe_of(path: str, sets: list[str] | None) -> dict[str, Any]:
    """A recipe file with the values of --set put in."""
    from ..folder.recipe import apply_overrides, load_recipe

    return apply_overrides(load_recipe(path), sets or [])
