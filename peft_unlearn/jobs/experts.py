"""Which experts an adapter goes into: attribution on the run's own forget and retain rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..attribution.experts import Affinity, affinity
from ..data.bundle import ForgetRetain
from ..errors import UserError
from ..folder.base import load_base, load_tokenizer, resolve_base
from .run import load_data


def measure(model: Any, tokenizer: Any, data: ForgetRetain, token_budget: int = 100_000) -> Affinity:
    """Affinity of the model's experts for the forget set, beside the retain set."""
    if not data.retain:
        raise UserError("attribution shows affinity beside the retain set, and the data have none")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
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


def picture(found: Affinity, chosen: Mapping[int, list[int]], out: str | Path) -> Path:
    """Two matrices, layers by experts: affinity for the forget set, and its lift over the retain set; chosen experts framed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, columns = found.forget.shape
    fig, axes = plt.subplots(1, 2, figsize=(min(3 + 0.9 * columns, 22), 1.6 + 0.55 * rows), layout="constrained")
    lift = found.lift.clamp(0.05, 100)
    panels = (
        (axes[0], found.forget, "affinity for the forget set", "Blues", ".2f", None),
        (axes[1], lift, "lift: affinity / affinity for the retain set", "PuOr_r", ".1f", "log"),
    )
    for ax, matrix, title, colors, form, norm in panels:
        drawn = ax.imshow(
            matrix, cmap=colors, aspect="auto", norm=norm, **({"vmin": 0.05, "vmax": 20} if norm else {"vmin": 0})
        )
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("expert")
        ax.set_ylabel("block")
        ax.set_xticks(range(columns))
        ax.set_yticks(range(rows), [str(k) for k in found.layers])
        if columns <= 16:
            top = float(matrix.max())
            for i in range(rows):
                for j in range(columns):
                    value = float(matrix[i, j])
                    dark = value > 0.6 * top if norm is None else (value > 8 or value < 0.15)
                    ax.text(
                        j,
                        i,
                        format(value, form),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if dark else "black",
                    )
        for i, k in enumerate(found.layers):
            for e in chosen.get(k, ()):
                ax.add_patch(plt.Rectangle((e - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="#c1121f", linewidth=2))
        fig.colorbar(drawn, ax=ax, shrink=0.9)
    path = Path(out)
    if path.parent != Path():
        path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return path
