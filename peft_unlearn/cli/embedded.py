"""The story on the embedded models, and those models."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json, app, emit

base_app = typer.Typer(help="The embedded base models.", no_args_is_help=True)
app.add_typer(base_app, name="base")


@app.command()
def demo(
    out: Annotated[
        str, typer.Option("--out", help="Folder for the adapter, the merged model and report.html.")
    ] = "demo-out",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
    moe: Annotated[
        bool, typer.Option("--moe", help="On the embedded mixture of experts: forget inside four experts.")
    ] = False,
    json: Json = False,
) -> None:
    """The whole story on the embedded model, in under two minutes (three with --moe)."""
    if moe:
        from ..demo.moe_story import tell
    else:
        from ..demo.story import tell

    result = tell(out, seed=seed, show=not json)
    if json:
        emit(result)
    raise typer.Exit(0 if result["ok"] else 1)


@base_app.command("path")
def base_path(
    name: Annotated[str, typer.Argument(help="Name of an embedded base.")] = "people",
    retain_model: Annotated[bool, typer.Option("--retain-model", "--twin", help="Its retain model instead.")] = False,
) -> None:
    """Print where an embedded base lies."""
    from ..data import embedded

    print(embedded.retain_model_path(name) if retain_model else embedded.base_path(name))
