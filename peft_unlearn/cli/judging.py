"""Commands that turn an adapter into numbers and pages."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import (
    Base,
    Below,
    Data,
    Device,
    Document,
    Dtype,
    Floor,
    Folder,
    Json,
    MaxScale,
    Metric,
    Rows,
    SuiteName,
    app,
    finish,
)  # fmt: skip


@app.command("eval")
def evaluate(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Forget adapters to judge, on one loaded base.")],
    base: Base = None,
    data: Data = None,
    suite: SuiteName = None,
    n: Rows = None,
    retain_model: Annotated[
        str | None,
        typer.Option(
            "--retain-model", "--retain-only", help="Model (or adapter folder) trained without the forget set."
        ),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Also write the numbers here: FILE.json, or a folder.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks or YAML files, by commas.")] = None,
    layout: Annotated[str, typer.Option(help="Of --out: eval, or open-unlearning (a folder).")] = "eval",
    below: Below = None,
    dtype: Dtype = "auto", device: Device = "auto",
    json: Json = False,
) -> None:  # fmt: skip
    """Score base, adapters and the retain model; with one folder, write its eval.json."""
    from ..evaluation import evaluate as job
    from ..progress import bars

    job.check_out(out, layout)
    with bars() as progress:
        report = job.evaluate(
            folders, base=base, data=data, suite=suite, n=n, retain_model=retain_model, below=below or (), dtype=dtype,
            brief=True, progress=progress, tasks=[t.strip() for t in tasks.split(",")] if tasks else None,
        )  # fmt: skip
    if out is not None:
        job.save_report(report, out, layout)
    finish(report, json)


@app.command()
def attack(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Forget adapters to attack, on one loaded base.")],
    base: Base = None,
    data: Data = None,
    relearn: Annotated[int | None, typer.Option(min=1, help="Fine-tune on so many forget rows.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Round the merged weights: int8, int4, nf4, bf16.")] = None,
    jailbreak: Annotated[str | None, typer.Option(help="Other prompts: `templates`, or a YAML file of them.")] = None,
    strip: Annotated[bool, typer.Option("--strip", help="Take the adapter off.")] = False,
    benign: Annotated[bool, typer.Option("--benign", help="Fine-tune on unrelated rows.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Read the facts off hidden states.")] = False,
    gcg: Annotated[bool, typer.Option("--gcg", help="Search a suffix of tokens.")] = False,
    suffix: Annotated[bool, typer.Option("--suffix", help="Optimize a suffix of embeddings.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every attack there is.")] = False,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="ATTACK.NAME=C", help="Set an option.")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Score at most so many rows.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which rows are shown, and the attacks' own draws.")] = 0,
    below: Below = None,
    dtype: Dtype = "auto", device: Device = "auto",
    json: Json = False,
) -> None:  # fmt: skip
    """Try to get back what is forgotten; the same on the retain model; with one folder, store it in eval.json."""
    from ..attacks.attack import attack as run
    from ..attacks.requests import requests_of
    from ..progress import bars

    flags = {"strip": strip, "benign": benign, "probe": probe, "gcg": gcg, "suffix": suffix}
    plain = [name for name, on in flags.items() if on]
    requests = requests_of(
        relearn=relearn, quantize=quantize, jailbreak=jailbreak, plain=plain, everything=everything, sets=sets or []
    )
    with bars() as progress:
        found = run(
            folders, requests, base=base, data=data, n=n, seed=seed, below=below or (), dtype=dtype, progress=progress
        )
    finish(found, json)


@app.command()
def calibrate(
    folder: Folder,
    retain_floor: Floor = 0.95,
    metric: Metric = "extraction_strength",
    max_scale: MaxScale = 1.0,
    kl: Annotated[float | None, typer.Option("--kl", help="Instead of the floor: a budget in nats a token of KL from the base.")] = None,
    on: Annotated[str, typer.Option("--on", help="The set that the KL is taken on.")] = "retain",
    bake: Annotated[bool, typer.Option("--bake", help="Into lora_alpha, so that plain PEFT runs at it.")] = False,
    out: Annotated[str | None, typer.Option("--out", "--png", help="The curve: a .png, .html, .md or .json file, or a folder.")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="So many rows of each set, nothing stored.")] = None,
    base: Base = None,
    data: Data = None,
    dtype: Dtype = "auto", device: Device = "auto",
    json: Json = False,
) -> None:  # fmt: skip
    """Find the scale that forgets most and keeps the retain set; write it into forget.json."""
    from ..analysis import calibrate as job
    from ..folder.results import check_out
    from ..progress import bars

    check_out(out)
    with bars() as progress:
        found = job.calibrate(
            folder, retain_floor=retain_floor, metric=metric, max_scale=max_scale, bake=bake, n=n, base=base, data=data,
            dtype=dtype, progress=progress, kl=kl, on=on,
        )  # fmt: skip
    finish(found, json, out)


@app.command()
def sanitize(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A forget adapter's folder, or that of any LoRA that PEFT saved.")],
    out: Annotated[str, typer.Option("--out", help="Folder for the sanitized adapter.")],
    strength: Annotated[float, typer.Option(help="Of the projection, in units of the mean eigenvalue.")] = 0.1,
    on: Annotated[str, typer.Option("--on", help="The set whose activations are left alone.")] = "retain",
    n: Rows = None, base: Base = None, data: Data = None, json: Json = False,
) -> None:  # fmt: skip
    """Take out of an adapter what acts on dominant retain activations; a new folder, with numbers before and after."""
    from ..analysis import sanitize as job
    from ..progress import bars

    with bars() as progress:
        found = job.sanitize(folder, out, strength=strength, on=on, n=n, base=base, data=data, progress=progress)
    finish(found, json)


@app.command()
def compare(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Forget adapters of one forget set.")],
    retain_floor: Floor = 0.95, metric: Metric = "extraction_strength", max_scale: MaxScale = 1.0, suite: SuiteName = None,
    n: Rows = None, out: Document = None, base: Base = None, data: Data = None, dtype: Dtype = "auto", device: Device = "auto",
    json: Json = False,
) -> None:  # fmt: skip
    """Adapters side by side at equal retention, each at its own scale; nothing is written into them."""
    from ..analysis import compare as job
    from ..folder.results import check_out
    from ..progress import bars

    check_out(out)
    with bars() as progress:
        found = job.compare(
            folders, retain_floor=retain_floor, max_scale=max_scale, metric=metric, suite=suite, n=n, base=base, data=data,
            dtype=dtype, progress=progress,
        )  # fmt: skip
    finish(found, json, out)


@app.command()
def interference(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="The adapters of a stack, in its order.")],
    metric: Metric = "extraction_strength", n: Rows = None, out: Document = None, base: Base = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="A bundle; once for each forget set.")] = None,
    dtype: Dtype = "auto", device: Device = "auto", json: Json = False,
) -> None:  # fmt: skip
    """What each adapter of a stack still forgets, and costs, alone and all together."""
    from ..analysis import interference as job
    from ..folder.results import check_out
    from ..progress import bars

    check_out(out)
    with bars() as progress:
        found = job.interference(
            folders, metric=metric, n=n, base=base, data=data or (), dtype=dtype, progress=progress
        )
    finish(found, json, out)


@app.command()
def report(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Forget adapters to report on.")],
    out: Annotated[str, typer.Option("--out", "--html", help="A .html or .md file, or a folder.")] = "report.html",
    samples: Annotated[bool, typer.Option(help="Let the models answer a few prompts, to show them.")] = True, base: Base = None,
    data: Data = None, dtype: Dtype = "auto", device: Device = "auto", json: Json = False,
) -> None:  # fmt: skip
    """One page on what an adapter forgets, what that costs and what brings it back, from what is stored with it."""
    from ..analysis import evidence as job
    from ..folder.results import check_out
    from ..progress import bars

    check_out(out, job.FILES)
    with bars() as progress:
        found = job.report(folders, samples=samples, base=base, data=data, dtype=dtype, progress=progress)
    found.write(out)
    finish(found, json)
