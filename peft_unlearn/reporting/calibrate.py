"""A calibration for readers: its curve as text and as a picture, what was chosen, and what to know beside it.

Everything takes block "calibration" of eval.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import figure as kit
from .document import Heading, Part, Picture
from .document import Text as Paragraph
from .figure import FORGET, RETAIN, RETAIN_MODEL
from .tables import Table, to_text
from .text import interval, named, number, percent

SIDES = (("retain", RETAIN, "s"), ("forget", FORGET, "o"))
Block = Mapping[str, Any]


def text(block: Block) -> str:
    computed = f"\ncomputed in {block['dtype']}" if block.get("dtype") else ""
    return f"{to_text(_table(block))}\n{sentences(block)}{computed}"


def _table(block: Block) -> Table:
    n = block["n"]
    rows = [
        [f"{p['scale']:.3f}{' <' if p['scale'] == block['scale'] else ''}", *(number(p[s]["value"]) for s in n)]
        for p in block["curve"]
    ]
    return Table(["scale", *(f"{side} ({rows} rows)" for side, rows in n.items())], rows)


def sentences(block: Block) -> str:
    """What was found, conditions last."""
    metric = named(block["metric"])
    kept = f"floor {100 * block['floor']:g} % of the base's retain {metric}, {block['wanted']:.3f}"
    if block["scale"] is None:
        return f"no: {block['reason']} ({kept})"
    share, chosen = block["retention"], block["chosen"]
    return (
        f"scale {block['scale']:.4g} (weight on the original {block['weight_on_original']:.4g}): {block['how']}\n"
        f"{metric}: forget {chosen['forget']['value']:.3f}, retain {100 * share['value']:.1f} % of the base's"
        f"{interval(share['ci95'])}; {kept}"
    )


def caption(block: Block) -> str:
    """One paragraph, for a report."""
    if block.get("scale") is None:
        return f"No scale keeps the floor: {block.get('reason')}."
    out = (
        f"Scale {block['scale']:.3g} forgets most of those that keep {percent(block['floor'])} of the base's retain "
        f"{named(block['metric'])} ({block['how']})."
    )
    if block.get("baked"):
        out += " It is baked into lora_alpha: what is called scale 1 elsewhere here is that one."
    return out + ("" if block.get("monotone") else " The curves do not only fall, so a finer search was not possible.")


def remarks(block: Block) -> list[str]:
    """What a user should know beside the result."""
    out = []
    if not block["monotone"]:
        rise = max(block["rises"], key=lambda side: block["rises"][side])
        out.append(
            f"the curves do not only fall (the {rise} value rises by {block['rises'][rise]:.3f} from one grid point to the next): "
            "the best grid point was taken, not a bisected one"
        )
    if block["baked"]:
        out.append(
            f"lora_alpha was multiplied by {block['scale']:g}, so plain PEFT runs at the calibrated scale; forget.json says "
            "scale 1 and method.baked_scale"
        )
    if not block["stored"]:
        out.append("only some of the rows were read, or writing was switched off: nothing was stored")
    elif block["scale"] is not None and block["scale"] != block["scale_before"]:
        out.append("numbers stored in eval.json before were taken at the old scale; `peft-unlearn eval` renews them")
    return [f"note: {text}" for text in out]


def parts(block: Block) -> list[Part]:
    return [
        Paragraph(sentences(block), "verdict"),
        Picture(picture(block), "Forget and retain value over the scale", "calibration"), Heading("Numbers"), _table(block),
        *(Paragraph(note, "note") for note in remarks(block)),
    ]  # fmt: skip


# -- the picture ------------------------------------------------------------------------------------------------------


def picture(block: Block) -> bytes:
    """Forget and retain value over the scale, with 95 % bands, the floor, the point chosen and the retain model's level."""
    drawn = kit.figure(8.6, 4.5)
    axes = drawn.subplots()
    for side, color, marker in SIDES:
        kept = [p for p in block["curve"] if p[side]["value"] is not None]
        x, y = [p["scale"] for p in kept], [p[side]["value"] for p in kept]
        bands = [p[side]["ci95"] or [v, v] for p, v in zip(kept, y, strict=True)]
        axes.fill_between(x, [b[0] for b in bands], [b[1] for b in bands], color=color, alpha=0.15, lw=0)
        axes.plot(x, y, color=color, marker=marker, ms=4, lw=2, label=f"{side} set ({block['n'][side]} rows)")
    floor = f"floor: {100 * block['floor']:g} % of the base's retain value"
    axes.axhline(block["wanted"], color=RETAIN, ls="--", lw=1.2, label=floor)
    level = (block.get("retain_only") or {}).get("forget", {}).get("value")
    if level is not None:
        axes.axhline(level, color=RETAIN_MODEL, ls=":", lw=1.8, label="retain model, forget set")
    last, chosen = block["curve"][-1]["scale"], block.get("chosen")
    if chosen:
        _mark(
            axes, chosen, [0.0, 1.0, block["wanted"], *([] if level is None else [level])], chosen["scale"] < 0.6 * last
        )
    kit.title(
        axes,
        "How the scale trades forgetting for keeping" if chosen else f"No scale keeps the floor: {block['reason']}",
    )
    axes.set(xlabel="scale of the adapter (0: the base, 1: as trained)", ylabel=named(block["metric"]))
    axes.set_ylim(-0.04, 1.07)
    axes.set_xlim(-0.02 * last, 1.03 * last)
    kit.plain_axes(axes)
    kit.legend_below(drawn)
    return kit.png(drawn)


def _mark(axes: Any, chosen: Mapping[str, Any], levels: list[float], right: bool) -> None:
    """The point that was chosen; its label on the right or left of it, at a height where it hides no line."""
    scale, values = chosen["scale"], {side: chosen[side]["value"] for side, *_ in SIDES}
    axes.axvline(scale, color=kit.FAINT, lw=1, zorder=1)
    for side, color, _ in SIDES:
        axes.scatter(scale, values[side], s=120, color=color, edgecolor="white", lw=1.5, zorder=5)
    label = f"scale {scale:.3g}\nforget {values['forget']:.3f}\nretain {values['retain']:.3f}"
    kit.beside(
        axes, label, (scale, kit.widest_gap([*levels, *values.values()])), (9 if right else -9, 0), va="center",
        ha="left" if right else "right", fontsize=9.5, color=kit.DARK,
        bbox={"facecolor": "white", "alpha": 0.85, "lw": 0, "pad": 2}, zorder=6,
    )  # fmt: skip
