"""What the commands share: the app, the options that mean the same everywhere, and how a result is printed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn

import typer

if TYPE_CHECKING:
    from ..reporting.result import Result

app = typer.Typer(
    help="Forget adapters: train, judge, share, merge and remove small PEFT adapters that make a language model forget.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Folder = Annotated[str, typer.Argument(help="A forget adapter's folder.")]
Adapter = Annotated[str, typer.Argument(metavar="DIR", help="A forget adapter's folder, or its Hub id.")]
Base = Annotated[str | None, typer.Option("--base", help="Base model: a folder, a Hub id, or embedded:NAME.")]
BUNDLE = "Bundle: a folder with forget and retain files, or embedded:NAME."
Data = Annotated[str | None, typer.Option("--data", help=BUNDLE)]
Below = Annotated[
    list[str] | None,
    typer.Option("--below", metavar="DIR", help="What it was trained on top of, lowest first; repeat it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else there.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a recipe value.")]
Rows = Annotated[int | None, typer.Option("--n", min=1, help="At most so many rows of each set.")]
Document = Annotated[str | None, typer.Option("--out", help="A .html, .md, .json or .png file, or a folder.")]
SuiteName = Annotated[str | None, typer.Option("--suite", help="Suite: a name or a YAML file.")]
Metric = Annotated[str, typer.Option("--metric", help="What is read off both sets.")]
Floor = Annotated[float, typer.Option("--retain-floor", help="Share of the base's retain value that must be kept.")]
MaxScale = Annotated[float, typer.Option("--max-scale", help="Largest scale tried; 1 is as trained.")]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="float32, bfloat16, float16, or auto: the base's own if this machine is fast in it."),
]


def _choose(device: str) -> str:
    if device != "auto":
        from ..folder.device import choose

        choose(device)
    return device


Device = Annotated[
    str,
    typer.Option(
        "--device",
        callback=_choose,
        help="Where models are computed: auto (the accelerator if there is one), cpu, cuda:1, ..",
    ),
]
Cascade = Annotated[bool, typer.Option("--cascade", help="Also those that were trained on top of it.")]


def finish(result: Result, json: bool, out: str | None = None) -> NoReturn:
    """Print the result, write it as a document where `out` says, and leave with its exit code."""
    from ..reporting.text import printable

    for remark in result.remarks():
        print(printable(remark), file=sys.stderr)
    emit(result.to_dict()) if json else show(str(result))
    if out is not None:  # afterwards: what took its time is seen even where it cannot be written
        from ..folder.results import save

        save(result, out)
    raise typer.Exit(result.exit_code)


def emit(value: Any) -> None:
    """JSON on standard output; a number that JSON does not have is a defect and raises."""
    from ..reporting.text import json_text

    print(json_text(value))


def show(text: str) -> None:
    """Text on standard output; on a terminal, headings within tables stand out and answers have a color."""
    from ..reporting.text import printable

    text = printable(text)
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.highlighter import RegexHighlighter
    from rich.theme import Theme

    class Looks(RegexHighlighter):
        highlights: ClassVar = [
            r"(?m)^(?P<yes>yes)\b", r"(?m)^(?P<no>no|NO)\b", r"(?m)^(?P<within>-- .*)", r"(?m)^(?P<why>– .*)",
        ]  # fmt: skip

    theme = Theme({"yes": "green", "no": "bold red", "within": "bold", "why": "dim"})
    Console(theme=theme, highlighter=Looks()).print(text, markup=False, soft_wrap=True)


def recipe_of(path: str, sets: list[str] | None) -> dict[str, Any]:
    """A recipe file with the values of --set put in."""
    from ..folder.recipe import apply_overrides, load_recipe

    return apply_overrides(load_recipe(path), sets or [])
