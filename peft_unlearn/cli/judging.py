"""Commands that turn an adapter into numbers and pages."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .options import Base, Below, Data, Folder, Json, app, emit


@app.command("eval")
def evaluate(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Forget adapters to judge, on one loaded base.")
    ],
    base: Base = None,
    data: Data = None,
    suite: Annotated[str | None, typer.Option(help="Suite: a name or a YAML file.")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="At most so many rows of each set.")] = None,
    retain_model: Annotated[
        str | None,
        typer.Option(
            "--retain-model", "--retain-only", help="Model (or adapter folder) trained without the forget set."
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Also write the numbers here: FILE.json, or a folder.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks or YAML files, by commas.")] = None,
    layout: Annotated[str, typer.Option(help="Of --out: eval, or open-unlearning (a folder).")] = "eval",
    below: Below = None,
    json: Json = False,
) -> None:
    """Score base, adapters and the retain-only twin; with one folder, write its eval.json."""
    from ..evaluation import evaluate as job
    from ..progress import bars

    job.check_out(out, layout)
    with bars() as tell:
        report = job.evaluate(
            folders, base=base, data=data, suite=suite, n=n, retain_model=retain_model, below=below or (), progress=tell,
            tasks=[t.strip() for t in tasks.split(",")] if tasks else None,
        )  # fmt: skip
    if out is not None:
        job.save_report(report, out, layout)
    if json:
        emit(report)
    else:
        from ..reporting.tables import show

        show(report)


@app.command()
def attack(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Forget adapters to attack, on one loaded base.")
    ],
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
    json: Json = False,
) -> None:
    """Try to get back what is forgotten; the same on the retain-only twin; with one folder, store it in eval.json."""
    from ..attacks import attack as job
    from ..progress import bars

    flags = {"strip": strip, "benign": benign, "probe": probe, "gcg": gcg, "suffix": suffix}
    plain = [name for name, on in flags.items() if on]
    asked = job.requests_of(
        relearn=relearn, quantize=quantize, jailbreak=jailbreak, plain=plain, everything=everything, sets=sets or []
    )
    with bars() as tell:
        found = job.attack(folders, asked, base=base, data=data, n=n, seed=seed, below=below or (), progress=tell)
    emit(found) if json else print(job.describe(found))


@app.command()
def calibrate(
    folder: Folder,
    retain_floor: Annotated[float, typer.Option(help="Share of the base's retain value that must be kept.")] = 0.95,
    metric: Annotated[str, typer.Option(help="What is read off both sets.")] = "extraction_strength",
    max_scale: Annotated[float, typer.Option(help="Largest scale tried; 1 is as trained.")] = 1.0,
    bake: Annotated[bool, typer.Option("--bake", help="Into lora_alpha, so that plain PEFT runs at it.")] = False,
    out: Annotated[str | None, typer.Option("--out", "--png", help="Picture of the curve.")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="So many rows of each set, nothing stored.")] = None,
    base: Base = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Find the scale that forgets most and keeps the retain set; write it into forget.json."""
    from ..analysis import calibrate_job as job
    from ..progress import bars

    with bars() as tell:
        found = job.calibrate(
            folder, retain_floor=retain_floor, metric=metric, max_scale=max_scale, bake=bake, n=n, base=base, data=data,
            progress=tell,
        )  # fmt: skip
    if out is not None:
        job.picture(found, out)
    for note in job.notes(found):
        print(note, file=sys.stderr)
    emit(found) if json else print(job.describe(found))
    raise typer.Exit(1 if found["scale"] is None else 0)


@app.command()
def compare(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Forget adapters of one forget set.")],
    retain_floor: Annotated[float, typer.Option(help="Share of the base's retain value that all must keep.")] = 0.95,
    metric: Annotated[str, typer.Option(help="What retention and rank are read off.")] = "extraction_strength",
    max_scale: Annotated[float, typer.Option(help="Largest scale tried; 1 is as trained.")] = 1.0,
    suite: Annotated[str | None, typer.Option(help="Suite: a name or a YAML file.")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="At most so many rows of each set.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="A .html, .md, .json or .png file, or a folder.")] = None,
    base: Base = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Adapters side by side at equal retention, each at its own scale; nothing is written into them."""
    from ..analysis import compare_job as job
    from ..progress import bars

    job.check_out(out)
    with bars() as tell:
        found = job.compare(
            folders, retain_floor=retain_floor, max_scale=max_scale, metric=metric, suite=suite, n=n, base=base, data=data,
            progress=tell,
        )  # fmt: skip
    if out is not None:
        job.save("Forget adapters at equal retention", found, job.parts(found), out)
    emit(found) if json else print(job.describe(found))
    raise typer.Exit(0 if found["ranking"] else 1)


@app.command()
def interference(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="The adapters of a stack, in its order.")],
    metric: Annotated[str, typer.Option(help="What the matrix shows.")] = "extraction_strength",
    n: Annotated[int | None, typer.Option("--n", min=1, help="At most so many rows of each set.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="A .html, .md, .json or .png file, or a folder.")] = None,
    base: Base = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="A bundle; once for each forget set.")] = None,
    json: Json = False,
) -> None:
    """What each adapter of a stack still forgets, and costs, alone and all together."""
    from ..analysis import compare_job as files
    from ..analysis import interference_job as job
    from ..progress import bars

    files.check_out(out)
    with bars() as tell:
        found = job.interference(folders, metric=metric, n=n, base=base, data=data or (), progress=tell)
    if out is not None:
        files.save("Forget adapters together", found, job.parts(found), out)
    emit(found) if json else print(job.describe(found))


@app.command()
def report(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Forget adapters to report on.")],
    out: Annotated[str, typer.Option("--out", "--html", help="A .html or .md file, or a folder.")] = "report.html",
    samples: Annotated[bool, typer.Option(help="Ask the models for a few answers to show.")] = True,
    base: Base = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """One page on what an adapter forgets, what that costs and what brings it back, from what is stored with it."""
    from ..analysis import evidence as job
    from ..progress import bars

    job.check_out(out, job.KINDS)
    with bars() as tell:
        found = job.report(folders, samples=samples, base=base, data=data, progress=tell)
    paths = job.write(found, out)
    if json:
        emit({"files": [p.name for p in paths], **{k: found[k] for k in ("verdicts", "missing", "notes")}})
    else:
        print("\n\n".join([*found["verdicts"].values(), "\n".join(map(str, paths))]))
