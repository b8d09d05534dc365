"""The command line: thin. Results go to standard output, everything else to standard error.

Exit codes: 0 done; 1 a check answered no; 2 the user's input; 3 interrupted or a resource lost.
"""

from __future__ import annotations

import json as _json
import sys
from typing import Annotated, Any

import typer

from .stack.commands import register as register_stack
from .stack.merge_command import register as register_merge

app = typer.Typer(
    help="Forget adapters: train, judge, share, merge and remove small PEFT adapters that make a language model forget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
base_app = typer.Typer(help="The embedded base models.", no_args_is_help=True)
app.add_typer(base_app, name="base")

Folder = Annotated[str, typer.Argument(help="A forget adapter's folder.")]
Base = Annotated[str | None, typer.Option("--base", help="Base model: a folder, a Hub id, or embedded:NAME.")]
Data = Annotated[
    str | None, typer.Option("--data", help="Bundle: a folder with forget and retain files, or embedded:NAME.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else there.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a recipe value.")]


def _out(value: Any) -> None:
    print(_json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def _recipe(path: str, sets: list[str] | None) -> dict[str, Any]:
    from .folder.recipe import apply_overrides, load_recipe

    return apply_overrides(load_recipe(path), sets or [])


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[
        str, typer.Option("--out", "--output-dir", help="Folder for the finished adapter.")
    ] = "forget-adapter",
    base: Base = None,
    data: Data = None,
    sets: Sets = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in OUT.work.")
    ] = False,
    stack: Annotated[
        str | None, typer.Option("--stack", help="Stack file whose adapters lie frozen below the new one.")
    ] = None,
) -> None:
    """Train a recipe into a forget adapter."""
    from . import jobs

    folder = jobs.train(_recipe(recipe, sets), out, base=base, data=data, resume=resume, stack=stack)
    if folder is not None:
        print(folder.path)


@app.command("eval")
def evaluate(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Forget adapters to judge, on one loaded base.")
    ],
    base: Base = None,
    data: Data = None,
    suite: Annotated[str | None, typer.Option(help="Suite: a name or a YAML file.")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="At most so many rows of each set.")] = None,
    retain_only: Annotated[
        str | None, typer.Option("--retain-only", help="Model (or adapter folder) trained without the forget set.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Also write the numbers here: FILE.json, or a folder.")
    ] = None,
    layout: Annotated[str, typer.Option(help="Of --out: eval, or open-unlearning (a folder).")] = "eval",
    json: Json = False,
) -> None:
    """Score base, adapters and the retain-only twin; with one folder, write its eval.json."""
    from . import jobs
    from .progress import bars

    jobs.check_out(out, layout)
    with bars() as tell:
        report = jobs.evaluate(folders, base=base, data=data, suite=suite, n=n, retain_only=retain_only, progress=tell)
    if out is not None:
        jobs.save_report(report, out, layout)
    if json:
        _out(report)
    else:
        from .demo.table import show

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
    json: Json = False,
) -> None:
    """Try to get back what is forgotten; the same on the retain-only twin; with one folder, store it in eval.json."""
    from .jobs import attack as jobs
    from .progress import bars

    flags = {"strip": strip, "benign": benign, "probe": probe, "gcg": gcg, "suffix": suffix}
    plain = [name for name, on in flags.items() if on]
    asked = jobs.requests_of(
        relearn=relearn, quantize=quantize, jailbreak=jailbreak, plain=plain, everything=everything, sets=sets or []
    )
    with bars() as tell:
        found = jobs.attack(folders, asked, base=base, data=data, n=n, seed=seed, progress=tell)
    _out(found) if json else print(jobs.describe(found))


register_merge(app)
register_stack(app)


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A forget adapter's folder, or its Hub id.")],
    base: Base = None,
    server: Annotated[str | None, typer.Option(help="Ask this OpenAI-compatible server instead.")] = None,
    served_as: Annotated[str | None, typer.Option(help="The adapter's name on that server.")] = None,
    scale: Annotated[float | None, typer.Option(help="Strength it is served at; default the manifest's.")] = None,
    json: Json = False,
) -> None:
    """Check files, hashes, base and probes of an adapter; with --server, whether it is really being served."""
    from .errors import UserError
    from .progress import bars

    if (server is None) != (served_as is None):
        raise UserError("--server and --served-as belong together: the address, and the adapter's name there")
    with bars() as tell:
        if server is not None and served_as is not None:
            from .sharing.server import verify_server

            report: Any = verify_server(folder, server, served_as, base=base, scale=scale, progress=tell)
        else:
            from .sharing.verify import verify as run

            report = run(folder, base=base)
    _out(report.to_dict()) if json else print(report)
    raise typer.Exit(report.exit_code)


@app.command()
def card(
    folder: Folder,
    write: Annotated[bool, typer.Option("--write", help="Replace README.md; your own words in it stay.")] = False,
    description: Annotated[str, typer.Option(help="What it forgets, in your words.")] = "",
    license: Annotated[str | None, typer.Option(help="License id as the Hub knows it, e.g. apache-2.0.")] = None,
) -> None:
    """The adapter's card, made anew from what its folder says now."""
    from .sharing.card import card as run

    text = run(folder, write=write, description=description, license=license)
    print(f"{folder}/README.md") if write else print(text, end="")


@app.command()
def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a public repository; private otherwise.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list everything; ask no network.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Publish an adapter: exactly its files, in one commit, private unless you say otherwise."""
    from .sharing.publish import push as run

    done = run(folder, repo_id, private=not public, dry_run=dry_run, revision=revision, message=message, data=data)
    _out(done.to_dict()) if json else print(done)


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME[@COMMIT]", help="Repository on the Hub.")],
    out: Annotated[str, typer.Option("--out", help="Folder that receives the adapter.")],
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag.")] = None,
    json: Json = False,
) -> None:
    """Fetch an adapter from the Hub, pinned to a commit, checked, whole or not at all."""
    from .sharing.publish import pull as run

    got = run(repo_id, out, revision)
    _out(got.to_dict()) if json else print(f"{got.folder.path}  {got.repo_id}@{got.commit}")


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A forget adapter's folder, or its Hub id.")],
    out: Annotated[str, typer.Option("--out", help="Folder for the exported adapter.")],
    target: Annotated[str, typer.Option("--for", help="vllm, sglang or mergekit.")],
    scale: Annotated[float | None, typer.Option(help="Strength to multiply in; default the manifest's.")] = None,
    base: Base = None,
    json: Json = False,
) -> None:
    """Write the adapter as a server or mergekit reads it: one rank, its strength inside the tensors."""
    from .sharing.export import export as run

    report = run(folder, out, target, scale=scale, base=base)
    _out(report.to_dict()) if json else print(report)


@app.command()
def methods(
    kind: Annotated[str | None, typer.Argument(help="Only this kind, e.g. objective.")] = None, json: Json = False
) -> None:
    """List every method with its source and hyper-parameters."""
    from . import registry
    from .errors import UserError, nearest

    if kind is not None and kind not in registry.KINDS:
        raise UserError(f"there is no kind {kind!r}.{nearest(kind, registry.KINDS)}")
    found = [m.as_json() for m in registry.methods(kind)]
    if json:
        _out(found)
        return
    from .demo.table import show_methods

    show_methods(found)


@app.command()
def effect(
    folder: Folder,
    out: Annotated[str, typer.Option("--out", help="Folder for effect.json and the pictures.")] = "effect",
    objectives: Annotated[
        str | None, typer.Option(help="Beside the run's own: ga,npo,.. or YAML, e.g. '{rmu: {layer: 2}}'.")
    ] = None,
    space: Annotated[str, typer.Option(help="Gradients by the adapter, or by the base weights under it.")] = "adapter",
    batches: Annotated[int, typer.Option(min=1, help="How many batches; standard errors need two.")] = 4,
    base: Base = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """What each step of a run did to the forget and the retain risk, over its checkpoints (G-effect)."""
    from .jobs.effect import effect as run
    from .jobs.effect import write
    from .progress import bars

    with bars() as tell:
        found = run(folder, objectives=objectives, space=space, batches=batches, base=base, data=data, progress=tell)
    paths = write(found, out)
    for note in found["notes"]:
        print(note, file=sys.stderr)
    _out(found) if json else print("\n".join(map(str, paths)))


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
    from .jobs import calibrate as job
    from .progress import bars

    with bars() as tell:
        found = job.calibrate(
            folder, retain_floor=retain_floor, metric=metric, max_scale=max_scale, bake=bake, n=n, base=base, data=data,
            progress=tell,
        )  # fmt: skip
    if out is not None:
        job.picture(found, out)
    for note in job.notes(found):
        print(note, file=sys.stderr)
    _out(found) if json else print(job.describe(found))
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
    from .jobs import compare as job
    from .progress import bars

    with bars() as tell:
        found = job.compare(
            folders, retain_floor=retain_floor, max_scale=max_scale, metric=metric, suite=suite, n=n, base=base, data=data,
            progress=tell,
        )  # fmt: skip
    if out is not None:
        job.save("Forget adapters at equal retention", found, job.parts(found), out)
    _out(found) if json else print(job.describe(found))
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
    from .jobs import compare as files
    from .jobs import interference as job
    from .progress import bars

    with bars() as tell:
        found = job.interference(folders, metric=metric, n=n, base=base, data=data or (), progress=tell)
    if out is not None:
        files.save("Forget adapters together", found, job.parts(found), out)
    _out(found) if json else print(job.describe(found))


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
    from .jobs import report as job
    from .progress import bars

    with bars() as tell:
        found = job.report(folders, samples=samples, base=base, data=data, progress=tell)
    paths = job.write(found, out)
    if json:
        _out({"files": [p.name for p in paths], **{k: found[k] for k in ("verdicts", "missing", "notes")}})
    else:
        print("\n\n".join([*found["verdicts"].values(), "\n".join(map(str, paths))]))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file (YAML).")],
    base: Base = None,
    data: Data = None,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Say what a recipe would cost: parameters, memory, steps. No weights are read."""
    from . import jobs

    found = jobs.plan(_recipe(recipe, sets), base=base, data=data)
    if json:
        _out(found.to_dict())
        return
    from .demo.table import show_plan

    show_plan(found)


@app.command()
def experts(
    base: Annotated[str, typer.Option("--base", help="A mixture-of-experts base.")],
    data: Annotated[
        str, typer.Option("--data", help="Bundle: a folder with forget and retain files, or embedded:NAME.")
    ],
    out: Annotated[str | None, typer.Option("--out", "--png", help="Picture of the affinity matrix.")] = None,
    ranking: Annotated[str, typer.Option(help="affinity, or contrast: its difference to the retain set.")] = "affinity",
    json: Json = False,
) -> None:
    """Which experts answer for the forget set: affinity, its lift over the retain set, stability."""
    from .jobs import experts as jobs

    found = jobs.experts(base, data)
    chosen = jobs.choose(found, {"ranking": ranking})
    if out is not None:
        jobs.picture(found, chosen, out)
    if json:
        _out({**found.to_json(), "chosen": chosen})
    else:
        print(jobs.describe(found, chosen))


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
        from .demo.moe_story import tell
    else:
        from .demo.story import tell

    result = tell(out, seed=seed, show=not json)
    if json:
        _out(result)
    raise typer.Exit(0 if result["ok"] else 1)


@base_app.command("build")
def base_build(
    name: Annotated[str, typer.Argument(help="people, or domains: a mixture of experts, and its control.")] = "people",
    out: Annotated[str, typer.Option("--out", help="Folder that receives the models.")] = "adapters/bases",
    twins: Annotated[int, typer.Option(min=0, help="How many retain-only twins.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and initialization.")] = 0,
    json: Json = False,
) -> None:
    """Train an embedded base and its twins again, verify them, and only then write them."""
    from .demo.builders import builder
    from .progress import bars

    build = builder(name)
    with bars() as tell:
        found = build(out, seed=seed, twins=twins, progress=tell)
    _out(found) if json else print("\n".join(f"{out}/{folder}" for folder in found))


@base_app.command("path")
def base_path(
    name: Annotated[str, typer.Argument(help="Name of an embedded base.")] = "people",
    twin: Annotated[bool, typer.Option("--twin", help="Its retain-only twin instead.")] = False,
) -> None:
    """Print where an embedded base lies."""
    from .data import embedded

    print(embedded.twin_path(name) if twin else embedded.base_path(name))


def main() -> None:
    """Entry point: a user's mistake is a message, a defect of ours a traceback."""
    import warnings

    from .errors import Interrupted, UserError

    # Deprecations between the libraries underneath are nothing a user of this command can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b")
    try:
        app()
    except SystemExit as e:
        # Typer's own codes: 130 for Ctrl-C, 1 when the reader of our output went away.
        lost = e.code == 130 or isinstance(e.__context__, BrokenPipeError)
        sys.exit(3 if lost else e.code)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Interrupted) as e:
        print(f"interrupted{f': {e}' if str(e) else ''}", file=sys.stderr)
        sys.exit(3)
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        sys.stderr.close()
        sys.exit(3)
