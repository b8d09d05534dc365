"""Which weights may move, measured on the embedded people: masks at equal density and one budget, each at its own learning rate.

    python tests/bench/selection.py [--only TEXT ..] [--seeds 0 1 2] [--rates 3] [--relearn] [--out docs/selection.json] [--scratch DIR]
    python tests/bench/selection.py table                     # docs/selection.json as the tables of docs/selection.md

Every run is a recipe through `peft-unlearn train`; a mask is attributed once for all its rates and seeds (random: once a seed). After
each run its figures are appended to the JSON, and what is there already is not run again. A mask's rate is the one with the highest
retain value among those that forget to at most .05 in all three phrasings, by the first seed; the other seeds run at that one.
--relearn attacks the runs at that rate.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[2]
SETS = ("forget", "forget_other", "forget_heldout", "retain", "retain_other", "retain_heldout", "general")
FORGOTTEN = 0.05
# (with a retain loss, LoRA) -> learning rates, the likeliest first
RATES = {
    (True, True): (2e-3, 1e-3, 4e-3), (True, False): (1e-2, 2e-2, 4e-3), (False, True): (2e-4, 1e-4, 5e-4),
    (False, False): (1e-3, 5e-4, 2e-3),
}  # fmt: skip

NPO = {"forget": {"npo": {"beta": 0.1}}, "retain": {"nll": {"weight": 5.0}}}
ENTROPY = {"forget": {"neg_entropy": {}}}
ASCENT = {"forget": {"ga": {}}}
LORA = {"type": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def sparse(method: str, ratio: float, **more: Any) -> dict[str, Any]:
    return {"method": method, "ratio": ratio, **more}


# name -> (terms, selection or None for LoRA)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "npo, lora r16": (NPO, None),
    **{f"npo, {m} 0.5 %": (NPO, sparse(m, 0.005)) for m in ("wagle", "random", "contrast_retain", "snip", "magnitude")},
    "npo, wagle 0.5 % per module": (NPO, sparse("wagle", 0.005, budget="module")),
    **{f"npo, {m} 2 %": (NPO, sparse(m, 0.02)) for m in ("wagle", "random")},
    **{f"npo, {m} 10 %": (NPO, sparse(m, 0.1)) for m in ("wagle", "random")},
    "entropy, lora r16": (ENTROPY, None),
    "ascent, lora r16": (ASCENT, None),
    **{f"entropy, {m} 5 %": (ENTROPY, sparse(m, 0.05)) for m in ("contrast_retain", "random", "emso")},
}  # fmt: skip


def recipe(case: str, rate: float, seed: int, file: Path | None) -> dict[str, Any]:
    """The short recipe: 80 steps of 32 + 32 rows; without a retain loss a run ends where the forget rows are forgotten."""
    terms, selection = CASES[case]
    adapter = (
        {"adapter": LORA} if selection is None else {"adapter": {"type": "sparse"}, "selection": {"file": str(file)}}
    )
    looks = {} if "retain" in terms else {"eval": {"suite": "people", "every": 4, "n": 50, "stop_below": 0.02}}
    return {
        "name": "selection", "base": "embedded:people", "data": {"bundle": "embedded:people"}, **adapter, "terms": terms,
        "train": {
            "learning_rate": rate, "max_steps": 80, "per_device_train_batch_size": 32, "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 5, "save_strategy": "no",
        },
        "seed": seed, **looks,
    }  # fmt: skip


def suite() -> dict[str, Any]:
    sets = {
        s: {"source": s, "role": s.split("_")[0] if s != "general" else "retain", "metrics": ["value_accuracy"]}
        for s in SETS
    }
    return {"format": 1, "name": "selection", "generation": {"max_new_tokens": 32}, "sets": sets}


class Bench:
    """The masks and the figures that are there, base and plan loaded once."""

    def __init__(self, out: Path, scratch: Path) -> None:
        self.out, self.scratch = out, scratch
        self.runs: list[dict[str, Any]] = json.loads(out.read_text())["runs"] if out.exists() else []

    def mask(self, case: str, seed: int) -> Path | None:
        """The selection of a case, made with the package's own function at the first call."""
        from peft_unlearn import attribute

        _, selection = CASES[case]
        if selection is None:
            return None
        of = seed if selection["method"] == "random" else 0
        folder = self.scratch / f"{case.partition(', ')[2].replace(' ', '-')}-{of}"
        if not (folder / "selection.safetensors").exists():
            began = time.process_time()
            found = attribute("embedded:people", "embedded:people", seed=of, **selection)
            found.write(folder)
            print(
                f"{folder.name}: {found.selection.count} entries, {time.process_time() - began:.0f} CPU s", flush=True
            )
        return folder / "selection.safetensors"

    def run(self, case: str, rate: float, seed: int) -> None:
        import peft_unlearn
        from peft_unlearn.errors import UserError

        if any((r["case"], r["rate"], r["seed"]) == (case, rate, seed) for r in self.runs):
            return
        folder = self.scratch / f"{case.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
        began = time.process_time()
        row: dict[str, Any] = {"case": case, "rate": rate, "seed": seed}
        try:
            done = peft_unlearn.train(recipe(case, rate, seed, self.mask(case, seed)), folder, progress=lambda *_: None)
            assert done is not None
            row["steps"] = done.manifest.method["steps"]
            row["figures"] = figures(folder)
        except UserError as e:
            row["failed"] = str(e)
        row["cpu_seconds"] = round(time.process_time() - began)
        self.keep(row)

    def keep(self, row: dict[str, Any]) -> None:
        self.runs.append(row)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps({"runs": self.runs}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.out)
        print(json.dumps(row), flush=True)

    def relearn(self, case: str) -> None:
        """What 20 forget rows bring back, of every seed at the case's rate."""
        import peft_unlearn

        for r in at_best(self.runs, case):
            folder = self.scratch / f"{case.replace(', ', '-').replace(' ', '-')}-{r['rate']:g}-{r['seed']}"
            if "relearn" in r or not folder.exists():
                continue
            found = peft_unlearn.attack([str(folder)], [("relearn", {})]).to_dict()
            r["relearn"] = found
            self.runs.remove(r)
            self.keep(r)


def figures(folder: Path) -> dict[str, float | None]:
    """Value accuracy on every set, of at most 100 rows each."""
    from peft_unlearn.data import embedded
    from peft_unlearn.data.bundle import ForgetRetain
    from peft_unlearn.evaluation.score import on_one_model, score
    from peft_unlearn.folder.base import load_tokenizer
    from peft_unlearn.stack.model import ForgetModel

    stack = ForgetModel.from_pretrained(None, {"adapter": folder})
    subjects = on_one_model(stack.model, {"adapter": "adapter"})
    tokenizer = load_tokenizer(embedded.base_path("people"))
    found = score(subjects, suite(), ForgetRetain.load("embedded:people"), tokenizer, n=100)
    return {s: found.subjects["adapter"][f"{s}/value_accuracy"] for s in SETS}  # type: ignore[index]


def rates(case: str, n: int) -> Iterator[float]:
    terms, selection = CASES[case]
    yield from RATES["retain" in terms, selection is None][:n]


def at_best(runs: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    """All seeds of a case at its rate; none where no rate forgets."""
    mine = [r for r in runs if r["case"] == case and "figures" in r]
    forgets = [r for r in mine if r["seed"] == mine[0]["seed"] and max(r["figures"][s] for s in SETS[:3]) <= FORGOTTEN]
    best = max(forgets, key=lambda r: r["figures"]["retain"], default=None)
    return [r for r in mine if best is not None and r["rate"] == best["rate"]]


def table(runs: list[dict[str, Any]]) -> str:
    """One row a case, at its rate; where no rate forgets enough, the run that forgets most, marked."""
    lines = [
        "| run | rate (tried) | seeds | forget 1 / 2 / 3 | retain 1 / 2 / 3 | general | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        mine = [r for r in runs if r["case"] == case and "figures" in r]
        if not mine:
            continue
        some, mark = at_best(runs, case), ""
        if not some:
            some, mark = (
                [min(mine, key=lambda r: max(r["figures"][s] for s in SETS[:3]))],
                f", not forgotten to {FORGOTTEN:g}",
            )
        cells = [
            " / ".join(spread([r["figures"][s] for r in some]) for s in sets)
            for sets in (SETS[:3], SETS[3:6], SETS[6:])
        ]
        tried = ", ".join(f"{t:g}" for t in sorted({r["rate"] for r in mine}))
        steps = ", ".join(sorted({str(r["steps"]) for r in some}))
        lines.append(f"| {case}{mark} | {some[0]['rate']:g} ({tried}) | {len(some)} | {' | '.join(cells)} | {steps} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean}±{statistics.pstdev(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "table"), default="run")
    parser.add_argument("--only", nargs="+", default=[], help="cases by name, or with this text in it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rates", type=int, default=3, help="how many learning rates are tried")
    parser.add_argument("--relearn", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "selection.json")
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="selection-"))
    bench = Bench(args.out, scratch)
    if args.what == "table":
        print(table(bench.runs))
        return
    try:
        for case in (
            c
            for c in CASES
            if not args.only or any(text == c or (text in c and text not in CASES) for text in args.only)
        ):
            first, *others = args.seeds
            for rate in rates(case, args.rates):
                bench.run(case, rate, first)
            for r in at_best([r for r in bench.runs if r["seed"] == first], case):
                for seed in others:
                    bench.run(case, r["rate"], seed)
            if args.relearn:
                bench.relearn(case)
    finally:
        if args.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)
    print(table(bench.runs), file=sys.stderr)


if __name__ == "__main__":
    main()
