"""The story on the embedded mixture of experts: find the experts, forget inside them, look, load elsewhere, remove, report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data import embedded
from ..errors import UserError
from ..reporting import tables as table
from . import page
from .story import (
    ADAPTER,
    PAGE,
    PICTURE,
    _elsewhere,
    _evaluate,
    _hushed,
    _one_thread,
    _point,
    _remove,
    _say,
    _watch,
    print_story,
)
from .story import pick_samples as _pick

RECIPE, AFFINITY = "domains-npo.yaml", "affinity.png"
KINDS = {
    "forget": "forgotten", "forget_unseen": "forgotten, never shown", "retain_unseen_people": "kept: people",
    "retain_unseen_code": "kept: code", "retain_unseen_lang": "kept: language", "retain_unseen_geo": "kept: geography",
}  # fmt: skip
AT_MOST, AT_LEAST = 0.05, 0.93
LEAD = (
    "A small mixture-of-experts model knows five invented fields. A forget adapter inside one expert of every block makes it lose "
    "the chemistry and keep the other four; the base model's own weights never change."
)


def tell(
    out: str | Path, seed: int = 0, *, recipe: Mapping[str, Any] | None = None, n: int | None = None, show: bool = True
) -> dict[str, Any]:
    """Run the demo into folder `out`: adapter/, affinity.png, picture.png, report.html. Running it again replaces them.

    Args:
        seed: of the run: the adapter's start and the pairing of rows. Data and base are the embedded ones.
        recipe: another recipe than domains-npo.yaml.
        n: at most so many rows of each set in the evaluation (tests; such numbers are not stored with the adapter).
        show: print the tables to standard output.

    Returns:
        The final numbers, JSON-ready: seconds, `report` (eval.json), `attribution`, `overlap`, `met` (accuracies against their
        bounds), samples, `checks`, and `ok`: every check held (the bounds are no check: another seed may miss one).

    Raises:
        UserError: `out` is a file.
    """
    started = time.perf_counter()
    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the demo's results.")
    out.mkdir(parents=True, exist_ok=True)
    with _hushed(), _one_thread():
        from ..attribution import experts_job as experts
        from ..folder.recipe import dump_recipe, load_recipe
        from ..training.train import train

        chosen = dict(recipe) if recipe is not None else load_recipe(embedded.asset("recipes", RECIPE))
        chosen |= {"seed": seed, "eval": {"every": 10, "n": 60, **chosen.get("eval", {})}}
        seconds: dict[str, float] = {}

        @contextmanager
        def chapter(name: str, text: str) -> Iterator[None]:
            _say(f"[{time.perf_counter() - started:5.1f} s] {text}")
            at = time.perf_counter()
            yield
            seconds[name] = round(time.perf_counter() - at, 1)

        with chapter("attribution", "which experts answer for chemistry: affinity, and its lift over the other fields"):
            found = experts.experts(chosen["base"], str(chosen["data"]["bundle"]))
            picked = experts.choose(found, {})
            known = planted()
            experts.picture(found, picked, out / AFFINITY, known)
            right = sum(known["chem"].get(k) in ids for k, ids in picked.items())
            _say(experts.describe(found, picked))
            kept = {k: v for k, v in chosen["adapter"].items() if k not in ("experts", "per_layer")}
            chosen["adapter"] = {**kept, "experts": {str(k): v for k, v in picked.items()}}
        watch, shift = _watch("retain_unseen"), _selection()
        with chapter("train", "training a forget adapter inside those experts; routers and all else stay as they are"):
            folder = train(chosen, out / ADAPTER, callbacks=[watch, shift], say=_say)
        assert folder is not None  # one process
        shutil.rmtree(f"{out / ADAPTER}.work", ignore_errors=True)
        with chapter("evaluate", "judging base, adapter and the twin that never saw chemistry"):
            report = _evaluate(out / ADAPTER, n)
        samples = _pick(report, KINDS)
        prompts = [s["prompt"] for s in samples]
        with chapter("elsewhere", "loading the folder with plain PEFT in a process that has no peft_unlearn"):
            elsewhere = _elsewhere(out / ADAPTER, prompts)
        with chapter("remove", "taking the adapter off and comparing what is left with the base's files"):
            removal = _remove(out / ADAPTER)
        checks = [
            (right == len(picked), f"attribution picked the planted expert in {right} of {len(picked)} blocks"),
            elsewhere.pop("held"),
            (removal.ok, "after removal every tensor is the base's, bit for bit"),
        ]
        curve = watch.curve(folder.manifest.method.get("best_step"))
        ends = (_point({"subjects": {s: _seen(report, s)}}, s) for s in ("base", "retain_only", "adapter"))
        png = page.picture(curve, *ends, labels=("chemistry, shown", "other fields, never shown"))
        (out / PICTURE).write_bytes(png)
        seconds["total"] = round(time.perf_counter() - started, 1)
        sections = [
            page.Section(
                "Which experts", experts_text(found, picked), (out / AFFINITY).read_bytes(),
                "Framed: chosen. The right panel is the answer that attribution is checked against.",
            ),
            page.Section("Which experts tokens get now", OVERLAP, lines=overlap_lines(shift.last)),
        ]  # fmt: skip
        html = page.page(
            report, samples, checks, str(removal), dump_recipe(chosen), conditions(report, seconds, seed), png,
            "Points on the lines: 60 rows of each set, looked at while training. Marks on the right: all rows.",
            title="Forgetting chemistry inside four experts", lead=LEAD, more=sections,
        )  # fmt: skip
        page.write(out / PAGE, html)
    result = {
        "format": 1, "seed": seed, "seconds": seconds, "ok": all(held for held, _ in checks), "met": bounds(report),
        "checks": [{"held": held, "what": what} for held, what in checks], "samples": samples, "curve": curve,
        "attribution": {**found.to_json(), "chosen": picked, "planted": known["chem"]}, "overlap": shift.last,
        "elsewhere": elsewhere, "removal": removal.to_dict(), "report": dict(report),
        "files": {"adapter": ADAPTER, "affinity": AFFINITY, "picture": PICTURE, "report": PAGE},
    }  # fmt: skip
    if show:
        console = print_story(report, samples, checks)
        missed = [name for name, b in result["met"].items() if not b["met"]]
        said = f"[bold red]NO[/]  all aims met: missed {', '.join(missed)}" if missed else "[green]yes[/]  all aims met"
        console.print(f"{said} (bounds in report.html)", highlight=False)
        console.print(f"\nLook at {out / PAGE}; the adapter is {out / ADAPTER}", highlight=False)
    _say(f"[{seconds['total']:5.1f} s] done: {out / PAGE}")
    return result


def planted() -> dict[str, dict[int, int]]:
    """{domain: {layer: expert}} of the embedded base, as drawn when it was made."""
    text = (embedded.base_path("domains") / "planted.json").read_text(encoding="utf-8")
    return {name: {int(k): e for k, e in where.items()} for name, where in json.loads(text).items()}


def _selection() -> Any:
    from transformers import TrainerCallback

    class Selection(TrainerCallback):
        """Keeps the last selection overlap: {set: {block: share}}."""

        def __init__(self) -> None:
            self.last: dict[str, dict[int, float]] = {}

        def on_selection(self, history: list[dict[str, Any]]) -> None:
            self.last = history[-1]["overlap"]

    return Selection()


def _seen(report: table.Report, subject: str) -> dict[str, float | None]:
    """The subject's values, with the fields that unlearning never saw in the place of the retain set."""
    values = report["subjects"].get(subject) or {}
    return {**values, "retain/value_accuracy": values.get("retain_unseen/value_accuracy")}


def bounds(report: table.Report) -> dict[str, Any]:
    """The demo's aims: {set: {value, bound, met}}; a value that cannot be measured has not met its bound."""
    base, found = report["subjects"]["base"], report["subjects"]["adapter"]
    out: dict[str, Any] = {}
    for name in ("forget", "forget_other", "forget_unseen"):
        value = found.get(f"{name}/value_accuracy")
        out[name] = {"value": value, "at_most": AT_MOST, "met": value is not None and value <= AT_MOST}
    value, own = (x.get("retain_unseen/value_accuracy") for x in (found, base))
    share = None if value is None or not own else value / own
    met = share is not None and share >= AT_LEAST
    out["retain_unseen"] = {"value": value, "share_of_base": share, "at_least": AT_LEAST, "met": met}
    return out


def experts_text(found: Any, picked: Mapping[int, list[int]]) -> str:
    s = found.stability()
    lifts = [float(found.lift[found.layers.index(k), e]) for k, ids in picked.items() for e in ids]
    return (
        "Affinity is the router's weight of an expert, where the expert is among a token's chosen, averaged over tokens and then over "
        "rows (SEUF, 2025). By itself it also picks experts that serve everything, so it stands beside its lift: affinity on the forget "
        f"set over affinity on the retain set, {min(lifts):.1f} to {max(lifts):.1f} here; below 3 there would be a warning. Halves of "
        f"the forget set agree on the top expert in {s['same_top']:.0%} of blocks. High affinity is not proof that the knowledge lies "
        "there."
    )


OVERLAP = (
    "The share of a token's two experts that are those the base chose. Up to the first adapted block it is 1 by construction; behind it "
    "the router, itself unchanged, sees other inputs."
)


def overlap_lines(last: Mapping[str, Mapping[int, float]]) -> str:
    return "\n".join(
        f"{name:<8}" + "   ".join(f"block {k}  {v:.3f}" for k, v in by.items()) for name, by in last.items()
    )


def conditions(report: table.Report, seconds: Mapping[str, float], seed: int) -> list[str]:
    """What the numbers mean and what they do not, in sentences."""
    versions = report["versions"]
    missed = [name for name, b in bounds(report).items() if not b["met"]]
    out = [
        "The fixture shows the method when experts specialize, it is no evidence that they do. Experts of so small a model do not "
        "specialize by themselves: in the first 30 % of the base's pre-training every router was pushed to send a field's tokens to an "
        "expert drawn for it, and not after that. The same recipe without the push (embedded:domains-natural) gives experts that serve "
        "everything; attribution warns there, and one expert is not enough (docs/methods/uoe.md).",
        f"One run with seed {seed}, {seconds.get('total', 0):.0f} seconds, torch {versions.get('torch')}, transformers "
        f"{versions.get('transformers')}, peft {versions.get('peft')}.",
        "Unlearning saw one phrasing of every second compound, and every second entity of the other fields. Sets called _unseen ask "
        "about the rest, _other about the same compounds in another phrasing; all of it was trained into the base. The twin was "
        "trained from nothing without chemistry.",
    ]
    if missed:
        out.append(
            f"Aims missed in this run: {', '.join(missed)} (forget sets at most {AT_MOST:g}; other fields at least {AT_LEAST:g} of "
            "the base)."
        )
    out.append(
        "The adapter suppresses: the knowledge is still in the base model's weights, as taking it off shows, and fine-tuning or other "
        "questions may bring some of it back. An adapter that answers less often than the twin guesses has not erased more, it "
        "answers with something else."
    )
    return out


__all__ = ["bounds", "conditions", "tell"]
