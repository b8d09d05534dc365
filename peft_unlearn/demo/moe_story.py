"""The story on the embedded mixture of experts: find the experts, forget inside them, look, load elsewhere, remove, report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import embedded
from ..folder.results import write_file
from ..reporting.document import Heading, Lines, Part, Picture, Text
from .story import PAGE, PICTURE, SUPPRESSES, Script, Stage, Story, say
from .story import run as tell

AFFINITY = "affinity.png"
FRAMED = "Framed: chosen. The right panel is the answer that attribution is checked against."
FIXTURE = (
    "The fixture shows the method when experts specialize, it is no evidence that they do. Experts of so small a model do not "
    "specialize by themselves: in the first 30 % of the base's pre-training every router was pushed to send a field's tokens to an "
    "expert drawn for it, and not after that. The same recipe without the push (embedded:domains-natural) gives experts that serve "
    "everything; attribution warns there, and one expert is not enough (docs/methods/uoe.md)."
)
SETS = (
    "Unlearning saw one phrasing of every second compound, and every second entity of the other fields. Sets called _unseen hold "
    "the rest, _other the same compounds in another phrasing; all of it was trained into the base. The retain model was "
    "trained from nothing without chemistry."
)
OVERLAP = (
    "The share of a token's two experts that are those the base chose. Up to the first adapted block it is 1 by construction; behind it "
    "the router, itself unchanged, sees other inputs."
)


def run(out: str | Path, seed: int = 0, *, recipe: Mapping[str, Any] | None = None, n: int | None = None) -> Story:
    """Run the demo into folder `out`: adapter/, affinity.png, picture.png, report.html; see `story.run`."""
    return tell(SCRIPT, out, seed, recipe=recipe, n=n)


def choose_experts(stage: Stage, recipe: dict[str, Any]) -> Sequence[Any]:
    """Find the experts and put them into the recipe; a callback that keeps the selection overlap."""
    from ..attribution.experts import experts

    recipe["eval"] = {"every": 10, "n": 60, **recipe.get("eval", {})}
    with stage.chapter("attribution", "the experts that serve chemistry: affinity, and its lift over the other fields"):
        found, known = experts(recipe["base"], str(recipe["data"]["bundle"])), planted()
        write_file(stage.out / AFFINITY, found.picture(known))
        say(str(found))
    right = sum(known["chem"].get(k) in ids for k, ids in found.chosen.items())
    what = f"attribution picked the planted expert in {right} of {len(found.chosen)} blocks"
    stage.checks.append((right == len(found.chosen), what))
    stage.more["attribution"] = {**found.to_dict(), "planted": known["chem"]}
    kept = {k: v for k, v in recipe["adapter"].items() if k not in ("experts", "per_layer")}
    recipe["adapter"] = {**kept, "experts": {str(k): v for k, v in found.chosen.items()}}
    return [_selection(stage)]


def sections(stage: Stage) -> Sequence[Part]:
    png = (stage.out / AFFINITY).read_bytes()
    return [
        Heading("Which experts"), Text(experts_text(stage.more["attribution"])),
        Picture(png, "Affinity of all experts, and its lift", "affinity", FRAMED), Heading("Which experts tokens get now"),
        Text(OVERLAP), Lines(overlap_lines(stage.more["overlap"])),
    ]  # fmt: skip


def summary(report: Mapping[str, Any], missed: Sequence[str]) -> list[str]:
    met = f"NO  all aims met: missed {', '.join(missed)}" if missed else "yes all aims met"
    return [f"{met} (bounds in report.html)"]


def conditions(report: Mapping[str, Any], seconds: Mapping[str, float], seed: int, missed: Sequence[str]) -> list[str]:
    """What the numbers mean and what they do not, in sentences."""
    versions = report["versions"]
    libraries = ", ".join(f"{name} {versions.get(name)}" for name in ("torch", "transformers", "peft"))
    out = [FIXTURE, f"One run with seed {seed}, {seconds.get('total', 0):.0f} seconds, {libraries}.", SETS]
    if missed:
        bounds = f"forget sets at most {SCRIPT.at_most:g}; other fields at least {SCRIPT.kept['retain_unseen']:g} of the base"
        out.append(f"Aims missed in this run: {', '.join(missed)} ({bounds}).")
    less = "An adapter that answers less often than the retain model guesses has not erased more, it answers with something else."
    return [*out, f"{SUPPRESSES} {less}"]


def planted() -> dict[str, dict[int, int]]:
    """{domain: {layer: expert}} of the embedded base, as drawn when it was made."""
    text = (embedded.base_path("domains") / "planted.json").read_text(encoding="utf-8")
    return {name: {int(k): e for k, e in where.items()} for name, where in json.loads(text).items()}


def _selection(stage: Stage) -> Any:
    from transformers import TrainerCallback

    class Selection(TrainerCallback):
        """Keeps the last selection overlap: {set: {block: share}}."""

        def on_selection(self, history: list[dict[str, Any]]) -> None:
            stage.more["overlap"] = history[-1]["overlap"]

    stage.more["overlap"] = {}
    return Selection()


def experts_text(found: Mapping[str, Any]) -> str:
    """found: `Experts.to_dict`."""
    lifts = [found["lift"][found["layers"].index(k)][e] for k, ids in found["chosen"].items() for e in ids]
    return (
        "Affinity is the router's weight of an expert, where the expert is among a token's chosen, averaged over tokens and then over "
        "rows (SEUF, 2025). By itself it also picks experts that serve everything, so it stands beside its lift: affinity on the forget "
        f"set over affinity on the retain set, {min(lifts):.1f} to {max(lifts):.1f} here; below 3 there would be a warning. Halves of "
        f"the forget set agree on the top expert in {found['stability']['same_top']:.0%} of blocks. High affinity is not proof that "
        "the knowledge lies there."
    )


def overlap_lines(last: Mapping[str, Mapping[int, float]]) -> str:
    return "\n".join(
        f"{name:<8}" + "   ".join(f"block {k}  {v:.3f}" for k, v in by.items()) for name, by in last.items()
    )


SCRIPT = Script(
    recipe="domains-npo.yaml",
    title="Forgetting chemistry inside four experts",
    lead="A small mixture-of-experts model knows five invented fields. A forget adapter inside one expert of every block makes it lose "
    "the chemistry and keep the other four; the base model's own weights never change.",
    training="training a forget adapter inside those experts; routers and all else stay as they are",
    unseen="chemistry",
    kinds={
        "forget": "forgotten", "forget_unseen": "forgotten, never shown", "retain_unseen_people": "kept: people",
        "retain_unseen_code": "kept: code", "retain_unseen_lang": "kept: language", "retain_unseen_geo": "kept: geography",
    },
    labels=("chemistry, shown", "other fields, never shown"),
    files={"affinity": AFFINITY, "picture": PICTURE, "report": PAGE},
    forgotten=("forget", "forget_other", "forget_unseen"),
    kept={"retain_unseen": 0.93},
    conditions=conditions,
    summary=summary,
    watched="retain_unseen",  # fields that unlearning never saw stand in the place of the retain set
    before=choose_experts,
    sections=sections,
)  # fmt: skip
