"""The table of docs/vision.md: forget vectors on the embedded digits beside retrained models, over seeds of base, vector and request.

python tests/bench/vision.py --base digits-resnet --seeds 0,1,2 --out docs/vision.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "adapters" / "bases" / "build"))

import torch
from build_digits import RECIPES, make_classifier, train_classifier

from peft_unlearn.data import digits
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.evaluation.score import score
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.recipe import load_recipe
from peft_unlearn.merging.compose import compose
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.training.coefficients import learn_sum
from peft_unlearn.training.train import train

RECIPE = Path(__file__).parents[2] / "adapters" / "recipes" / "digits-forget-vector.yaml"
KEYS = ("forget/accuracy", "forget_test/accuracy", "retain/accuracy", "test/accuracy", "forget/mia_efficacy")


def numbers(model: Any, data: str) -> dict[str, float | None]:
    """The suite's numbers of one model on one request."""
    report = score({"adapter": lambda: nullcontext(model)}, "classes", ForgetRetain.load(data), None)
    found = report.subjects["adapter"] or {}
    return {k: found.get(k) for k in KEYS}


def of_folder(folder: Path, base: Path, data: str) -> dict[str, float | None]:
    return numbers(ForgetModel.from_pretrained(base, folder).model, data)


def made(name: str, seed: int, rows: Any) -> Any:
    model = make_classifier(name, seed)
    train_classifier(model, rows, RECIPES[name], seed)
    return model


def one_seed(name: str, seed: int, classes: list[int], work: Path, note: Any, recipe: dict[str, Any]) -> dict[str, Any]:
    """Everything of one seed: {row: numbers}."""
    out: dict[str, Any] = {}
    base = work / "base"
    made(name, seed, digits.rows(True)).save_pretrained(base)

    def request(forget: str) -> str:
        return f"embedded:digits?forget={forget}" + (f"&seed={seed}" if forget.startswith("random") else "")

    def vector(forget: str, label: str, **over: Any) -> Path:
        folder = work / label
        started = time.process_time()
        changed = {**recipe, "seed": seed, **over}
        train(changed, folder, base=str(base), data=request(forget), progress=lambda _: None)
        out.setdefault("cpu_seconds", []).append(round(time.process_time() - started, 1))
        note(f"{name} seed {seed}: {label} ({out['cpu_seconds'][-1]} s)")
        return folder

    def weights(k: float) -> dict[str, Any]:
        terms = {**recipe["terms"], "forget": {"margin": {**recipe["terms"]["forget"]["margin"], "weight": k}}}
        return {"terms": terms}

    for forget in ("3", "3,5", "random10"):
        data = request(forget)
        out[f"base {forget}"] = numbers(load_base(base), data)
        out[f"retrained {forget}"] = numbers(made(name, seed, ForgetRetain.load(data).retain), data)
    folders = {k: vector(str(k), f"vector {k}") for k in classes}
    for k, folder in folders.items():
        out[f"vector {k}"] = of_folder(folder, base, request(str(k)))
    out["pair trained"] = of_folder(vector("3,5", "pair"), base, request("3,5"))
    pair = [folders[3], folders[5]]
    total = compose([(f, 1.0) for f in pair], work / "sum", base=base)
    out["pair summed"] = of_folder(total.folder.path, base, request("3,5"))
    for label, parts in (("pair by 2 scalars", pair), (f"pair by {len(folders)} scalars", list(folders.values()))):
        found = learn_sum(parts, request("3,5"), work / label, base=base, seed=seed)
        out[label] = of_folder(found.folder.path, base, request("3,5"))
        out[f"{label}: weights"] = [round(p["weight"], 2) for p in found.terms]
    for k in (0.3, 1.0, 3.0):
        out[f"random10 weight {k:g}"] = of_folder(
            vector("random10", f"random {k}", **weights(k)), base, request("random10")
        )
    return out


COLUMNS = ("forget, training", "forget, unseen", "others, training", "others, unseen", "MIA efficacy")


def table(found: dict[str, Any]) -> str:
    """The Markdown table of docs/vision.md: means over seeds (and classes), in brackets the range."""
    lines = ["| model, request | " + " | ".join(COLUMNS) + " |", "|---" * 6 + "|"]
    for name, seeds in found.items():
        rows: dict[str, list[dict[str, Any]]] = {}
        for numbers in seeds.values():
            for key, value in numbers.items():
                if isinstance(value, dict):
                    rows.setdefault("vector, one class" if key.startswith("vector ") else key, []).append(value)
        for label, values in rows.items():
            cells = []
            for key in KEYS:
                got = [v[key] for v in values if v[key] is not None]
                cells.append(f"{sum(got) / len(got):.3f} [{min(got):.2f}, {max(got):.2f}]" if got else "–")
            lines.append(f"| {name.removeprefix('digits-')} ({len(values)}): {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="digits-resnet", choices=RECIPES)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--classes", default="0,1,2,3,4,5,6,7,8,9")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE)
    found = json.loads(given.out.read_text()) if given.out.is_file() else {}
    for seed in map(int, given.seeds.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            classes = [int(c) for c in given.classes.split(",")]
            numbers = one_seed(
                given.base, seed, classes, Path(scratch), lambda t: print(t, file=sys.stderr, flush=True), recipe
            )
        found.setdefault(given.base, {})[str(seed)] = numbers
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
