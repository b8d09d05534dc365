"""Which experts an adapter goes into: attribution on the run's own forget and retain rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.bundle import ForgetRetain
from ..data.collate import padding_id
from ..data.load import load_data
from ..errors import UserError
from ..folder.base import load_base, load_tokenizer, resolve_base
from .experts import Affinity, affinity


def measure(model: Any, tokenizer: Any, data: ForgetRetain, token_budget: int = 100_000) -> Affinity:
    """Affinity of the model's experts for the forget set, beside the retain set."""
    if not data.retain:
        raise UserError("attribution shows affinity beside the retain set, and the data have none")
    pad = padding_id(tokenizer)
    return affinity(model, data.encode("forget", tokenizer), data.encode("retain", tokenizer), pad, token_budget)


def choose(found: Affinity, options: Mapping[str, Any]) -> dict[int, list[int]]:
    """The experts that the options of ``experts: auto`` pick; one per layer unless they say otherwise."""
    per_layer = None if "top" in options else options.get("per_layer", 1)
    return found.choose(options.get("ranking", "affinity"), per_layer, options.get("top"), options.get("layers"))


def experts(base: str, data: str, token_budget: int = 100_000) -> Affinity:
    """Affinity on a base and a bundle by name: what ``peft-unlearn experts`` prints."""
    bundle = load_data(None, data)
    path = resolve_base(base)
    return measure(load_base(path), load_tokenizer(path), bundle, token_budget)


def describe(found: Affinity, chosen: Mapping[int, list[int]]) -> str:
    """What was picked and how far it can be trusted, in lines."""
    lines = ["chosen experts: affinity for the forget set, lift over the retain set"]
    for k, ids in chosen.items():
        row = found.layers.index(k)
        picks = (f"expert {e}: {found.forget[row, e]:.2f}, lift {found.lift[row, e]:.1f}" for e in ids)
        lines.append(f"  block {k}: " + "; ".join(picks))
    s = found.stability()
    lines.append(
        f"halves of the forget set: same top expert in {s['same_top']:.0%} of blocks, overlap of the six best {s['top6_overlap']:.2f}, "
        f"rank correlation {s['spearman']:.2f} (stability is not meaning: look at the lift)"
    )
    return "\n".join(lines + [f"warning: {w}" for w in found.warnings()])


def picture(
    found: Affinity,
    chosen: Mapping[int, list[int]],
    out: str | Path,
    planted: Mapping[str, Mapping[int, int]] | None = None,
) -> Path:
    """Two matrices, layers by experts: affinity for the forget set, and its lift over the retain set; chosen experts framed.

    planted: ``{domain: {layer: expert}}`` where the right answer is known (the embedded base): a third panel.
    """
    from matplotlib.figure import Figure  # the object, not pyplot: no backend is chosen and none is changed
    from matplotlib.patches import Rectangle

    rows, columns = found.forget.shape
    width = min(1.5 + 0.45 * columns, 11)
    n = 2 if planted is None else 3
    figure = Figure(figsize=(n * width, 1.6 + 0.55 * rows), layout="constrained")
    axes = figure.subplots(1, n)
    panels = (
        (axes[0], found.forget, "affinity for the forget set", "Blues", ".2f", {"vmin": 0}),
        (axes[1], found.lift.clamp(0.05, 100), "lift: affinity / affinity for the retain set", "PuOr_r", ".1f",
         {"vmin": 0.05, "vmax": 20, "norm": "log"}),
    )  # fmt: skip
    for ax, matrix, title, colors, form, scale in panels:
        norm = {"norm": _log(scale["vmin"], scale["vmax"])} if "norm" in scale else scale
        drawn = ax.imshow(matrix, cmap=colors, aspect="auto", **norm)
        ax.set_title(title, fontsize=10)
        top = float(matrix.max())
        for i in range(rows if columns <= 16 else 0):
            for j in range(columns):
                value = float(matrix[i, j])
                dark = (value > 8 or value < 0.15) if "norm" in scale else value > 0.6 * top
                color = "white" if dark else "black"
                ax.text(j, i, format(value, form), ha="center", va="center", fontsize=7, color=color)
        figure.colorbar(drawn, ax=ax, shrink=0.9)
    if planted is not None:
        axes[2].imshow([[1.0] * columns] * rows, cmap="Greys", vmin=0, vmax=20, aspect="auto")
        axes[2].set_title("planted when the base was made", fontsize=10)
        for domain, where in planted.items():
            for k, e in where.items():
                at = {"ha": "center", "va": "center", "fontsize": 7}
                axes[2].text(e, found.layers.index(k), domain, **at)
    for ax in axes:
        ax.set_xlabel("expert")
        ax.set_ylabel("block")
        ax.set_xticks(range(columns))
        ax.set_yticks(range(rows), [str(k) for k in found.layers])
        for i, k in enumerate(found.layers):
            for e in chosen.get(k, ()):
                ax.add_patch(Rectangle((e - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="#c1121f", linewidth=2))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _log(low: float, high: float) -> Any:
    from matplotlib.colors import LogNorm

    return LogNorm(low, high)
