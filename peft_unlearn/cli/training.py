"""Commands that train, and those that say beforehand or afterwards what training does."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import BUNDLE, Base, Data, Device, Folder, Json, Rows, Sets, app, emit, finish, recipe_of, show


@app.command()
def forget(
    questions: Annotated[list[str] | None, typer.Argument(help="What the model must no longer answer, in your words.")] = None,
    base: Annotated[str, typer.Option("--base", help="Base model: a folder, a Hub id, or embedded:NAME.")] = ...,  # type: ignore[assignment]
    out: Annotated[str, typer.Option("--out", help="Folder for the finished adapter; rows and runs go to OUT.work.")] = "forget-adapter",
    file: Annotated[str | None, typer.Option("--file", help="Rows with questions, or a folder that --prepare-only made.")] = None,
    retain: Annotated[str | None, typer.Option("--retain", help="Rows to be kept, with their right answers.")] = None,
    value: Annotated[str | None, typer.Option("--value", help="What is to be forgotten in the answer of a single question.")] = None,
    budget: Annotated[str, typer.Option("--budget", help="Time for asking, training and judging, e.g. 90s, 10m.")] = "15m",
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = "auto",
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Write the rows to OUT.work/data and stop.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Make a model forget what it answers to a question: rows, settings, training and judging by themselves."""
    from ..progress import bars
    from ..request.forget import forget as run

    with bars() as progress:
        found = run(
            questions or (), base=base, out=out, file=file, retain=retain, value=value, budget=budget, seed=seed, dtype=dtype,
            prepare_only=prepare_only, progress=progress,
        )  # fmt: skip
    finish(found, json)


@app.command()
def augment(
    questions: Annotated[list[str] | None, typer.Argument(help="What the model must no longer answer, in your words.")] = None,
    base: Annotated[str, typer.Option("--base", help="Base model: a folder, a Hub id, or embedded:NAME.")] = ...,  # type: ignore[assignment]
    out: Annotated[str, typer.Option("--out", help="Folder for the rows, one .jsonl a set.")] = "request",
    file: Annotated[str | None, typer.Option("--file", help="Rows with questions.")] = None,
    retain: Annotated[str | None, typer.Option("--retain", help="Rows to be kept, with their right answers.")] = None,
    value: Annotated[str | None, typer.Option("--value", help="What is to be forgotten in the answer of a single question.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = "auto",
    json: Json = False,
) -> None:  # fmt: skip
    """Make the rows of a request from a few questions: wordings, reversed questions, neighbors, neutral prompts."""
    from ..progress import bars
    from ..request.augment import augment as run

    with bars() as progress:
        found = run(
            questions or (), base=base, out=out, file=file, retain=retain, value=value, seed=seed, dtype=dtype, progress=progress
        )  # fmt: skip
    finish(found, json)


@app.command()
def tune(
    recipe: Annotated[str, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[str, typer.Option("--out", help="Folder for the finished adapter; runs go to OUT.work.")] = "forget-adapter",
    base: Base = None,
    data: Data = None,
    sets: Sets = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Time for all runs, e.g. 10m; default tune.budget, or 15m.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Runs at most; default 4.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Find a recipe's learning rate, steps, forget weight and scale on your own model and data, and save the best adapter."""
    from ..request.tune import tune as run

    finish(run(recipe_of(recipe, sets), out, base=base, data=data, budget=budget, trials=trials), json)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[str, typer.Option("--out", "--output-dir", help="Folder for the finished adapter.")] = "forget-adapter",
    base: Base = None,
    data: Data = None,
    sets: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in OUT.work.")] = False,
    stack: Annotated[str | None, typer.Option("--stack", help="Stack file whose adapters lie frozen below the new one.")] = None,
) -> None:  # fmt: skip
    """Train a recipe into a forget adapter."""
    from ..training.train import train as run

    folder = run(recipe_of(recipe, sets), out, base=base, data=data, resume=resume, stack=stack)
    if folder is not None:
        print(folder.path)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file (YAML).")], base: Base = None, data: Data = None, sets: Sets = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Say what a recipe would cost: parameters, memory, steps. No weights are read."""
    from ..training.cost import plan as run

    found = run(recipe_of(recipe, sets), base=base, data=data)
    finish(found, json)


@app.command()
def methods(
    kind: Annotated[str | None, typer.Argument(help="Only this kind, e.g. objective.")] = None, json: Json = False
) -> None:
    """List every method with its source and hyper-parameters."""
    from .. import registry
    from ..errors import UserError, nearest

    if kind is not None and kind not in registry.KINDS:
        raise UserError(f"there is no kind {kind!r}.{nearest(kind, registry.KINDS)}")
    from ..reporting.tables import methods_text

    found = [m.to_dict() for m in registry.methods(kind)]
    emit(found) if json else show(methods_text(found))


@app.command()
def experts(
    base: Annotated[str, typer.Option("--base", help="A mixture-of-experts base.")],
    data: Annotated[str, typer.Option("--data", help=BUNDLE)],
    out: Annotated[str | None, typer.Option("--out", "--png", help="Picture of the affinity matrix.")] = None,
    ranking: Annotated[str, typer.Option(help="affinity, or contrast: its difference to the retain set.")] = "affinity",
    device: Device = "auto",
    json: Json = False,
) -> None:  # fmt: skip
    """Which experts answer for the forget set: affinity, its lift over the retain set, stability."""
    from ..attribution.experts import experts as run
    from ..folder.results import check_out, write_file

    check_out(out, (".png",))
    found = run(base, data, ranking=ranking)  # type: ignore[arg-type]
    if out is not None:
        write_file(out, found.picture())
    finish(found, json)


@app.command()
def attribute(
    base: Annotated[str, typer.Option("--base", help="Base model: a folder, a Hub id, or embedded:NAME.")],
    data: Annotated[str, typer.Option("--data", help=BUNDLE)],
    method: Annotated[str, typer.Option(help="Selection method: see `methods selection`.")] = "wagle",
    ratio: Annotated[float, typer.Option(help="Share of the weights that may move, above 0 and at most 1.")] = 0.005,
    out: Annotated[str, typer.Option("--out", help="Folder for selection.safetensors, .json and .png.")] = "selection",
    budget: Annotated[str, typer.Option(help="The share of all weights together: global, or of each: module.")] = "global",
    unit: Annotated[str, typer.Option(help="What stands or falls together: entry, row, column, module.")] = "entry",
    targets: Annotated[list[str] | None, typer.Option("--target", help="Modules or expert weights by name; repeat it.")] = None,
    objective: Annotated[str | None, typer.Option("--forget", help="Objective of the forget gradient; default the method's.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=C", help="Set a hyper-parameter.")] = None,
    n: Rows = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random scores.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = "auto",
    accumulators: Annotated[str, typer.Option(help="Of the summed gradients: float32 or bfloat16.")] = "float32",
    on_cpu: Annotated[bool, typer.Option("--on-cpu", help="Keep the summed gradients in host memory.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Choose which weights a sparse adapter may move: scores on the frozen base, exactly the share that was asked for."""
    from ..attribution import attribute as job
    from ..progress import bars

    job.check_out(out)
    with bars() as progress:
        found = job.attribute(
            base, data, method=method, ratio=ratio, hyper=job.hyper_of(sets or []), budget=budget, unit=unit,
            target_modules=targets or "all-linear", forget=objective, n=n, seed=seed, dtype=dtype, accumulators=accumulators,
            on_cpu=on_cpu, progress=progress,
        )  # fmt: skip
    found.write(out)
    finish(found, json)


@app.command()
def effect(
    folder: Folder,
    out: Annotated[str, typer.Option("--out", help="Folder for effect.json and the pictures.")] = "effect",
    objectives: Annotated[str | None, typer.Option(help="Beside the run's own: ga,npo,.. or YAML, e.g. '{rmu: {layer: 2}}'.")] = None,
    space: Annotated[str, typer.Option(help="Gradients by the adapter, or by the base weights under it.")] = "adapter",
    batches: Annotated[int, typer.Option(min=1, help="How many batches; standard errors need two.")] = 4,
    base: Base = None,
    data: Data = None,
    json: Json = False,
) -> None:  # fmt: skip
    """What each step of a run did to the forget and the retain risk, over its checkpoints (G-effect)."""
    from ..analysis.effect_of_run import check_out
    from ..analysis.effect_of_run import effect as run
    from ..progress import bars

    check_out(out)
    with bars() as progress:
        found = run(
            folder, objectives=objectives, space=space, batches=batches, base=base, data=data, progress=progress
        )
    found.write(out)
    finish(found, json)
