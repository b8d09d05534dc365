"""The story on the embedded models, and those models."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json, app, finish

base_app = typer.Typer(help="The embedded base models.", no_args_is_help=True)
app.add_typer(base_app, name="base")


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="Folder for the adapter, the merged model and report.html.")] = "demo-out",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
    moe: Annotated[bool, typer.Option("--moe", help="On the embedded mixture of experts: forget inside four experts.")] = False,
    vision: Annotated[bool, typer.Option("--vision", help="On images: a classifier of digits forgets one.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """The whole story on the embedded model, in under two minutes (three with --moe, one with --vision)."""
    from ..errors import UserError

    if moe and vision:
        raise UserError("demo: --moe and --vision are two stories; give one.")
    if vision:
        from ..demo import vision_story

        finish(vision_story.run(out, seed=seed), json)
    from ..demo import moe_story, people_story

    finish((moe_story if moe else people_story).run(out, seed=seed), json)


@base_app.command("path")
def base_path(
    name: Annotated[str, typer.Argument(help="Name of an embedded base.")] = "people",
    retain_model: Annotated[bool, typer.Option("--retain-model", "--twin", help="Its retain model instead.")] = False,
) -> None:
    """Print where an embedded base lies."""
    from ..data import embedded

    print(embedded.retain_model_path(name) if retain_model else embedded.base_path(name))
