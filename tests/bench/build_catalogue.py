"""Make the catalogue: adapters/published/NAME from its recipe, judged, attacked, with its card, and adapters/index.json.

    python tests/bench/build_catalogue.py [NAME ..] [--trained DIR] [--index-only]

Every step is a command that anyone can type: train, eval, attack (relearn 20, int8, int4, bf16, jailbreak, strip), for one of them
calibrate, card --write. --trained DIR takes finished runs from DIR/people-NAME instead of training again. A name whose folder stands is
left alone unless it is named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft_unlearn
from peft_unlearn.attacks.attack import attack
from peft_unlearn.attacks.requests import requests_of
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.recipe import load_recipe
from peft_unlearn.sharing.card import card

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED, RECIPES, INDEX = ROOT / "adapters/published", ROOT / "adapters/recipes", ROOT / "adapters/index.json"

# name: (recipe, family of methods, what it is there to show)
CATALOGUE: dict[str, tuple[str, str, str]] = {
    "simnpo": ("people-demo", "preference", "the demo's adapter: SimNPO, the one whose truth ratios come nearest to a twin's"),
    "npo": ("people-npo", "preference", "NPO against the model before training"),
    "wga": ("people-wga", "likelihood", "weighted gradient ascent, an objective of the G-effect toolkit"),
    "undial": ("people-undial", "distillation", "self-distillation with the true token's logit lowered"),
    "neg-entropy": ("people-neg-entropy", "entropy", "entropy maximization, the objective of EMSO"),
    "rmu": ("people-rmu", "representation", "misdirected hidden states"),
    "gru": ("people-gru", "gradient rule", "gradient rectified unlearning"),
    "ngdiff": ("people-ngdiff", "gradient rule", "normalized gradient difference, calibrated (Unlearning with Control)"),
    "npo-sam": ("people-npo-sam", "smoothing", "NPO made flat against relearning (Unlearn-Smooth)"),
    "domains-npo": ("domains-npo", "experts", "NPO inside one expert per block of a mixture of experts (UOE)"),
    "domains-top1": ("domains-top1", "experts", "NPO inside a single expert of the whole model"),
}  # fmt: skip
CALIBRATED = {"ngdiff"}
SHOWN = ("forget/value_accuracy", "forget/extraction_strength", "forget/forget_quality", "retain/value_accuracy",
         "retain_unseen/value_accuracy", "forget_unseen/value_accuracy", "model_utility")  # fmt: skip


def make(name: str, trained: Path | None) -> None:
    recipe, _, shows = CATALOGUE[name]
    out = PUBLISHED / name
    given = trained / recipe if trained is not None else None
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) / name
        if given is not None and (given / "forget.json").is_file():
            shutil.copytree(given, work)
        else:
            peft_unlearn.train(load_recipe(RECIPES / f"{recipe}.yaml"), work)
        if name in CALIBRATED:
            from peft_unlearn.analysis.calibrate import calibrate

            calibrate(work)
        peft_unlearn.evaluate([work])
        requests = requests_of(relearn=20, quantize="bf16,int8,int4", jailbreak="templates", plain=["strip"])
        attack([work], requests)
        words = f"Forgets {'one invented field of knowledge' if recipe.startswith('domains') else 'ten invented people'}: {shows}."
        (work / "README.md").unlink()  # the one that training wrote would be kept as somebody's own words
        card(work, write=True, description=words, license="apache-2.0")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(work, out)
    read_adapter(out)


def index() -> dict[str, Any]:
    """What stands in adapters/published, in the catalogue's order."""
    rows = []
    for name, (recipe, family, shows) in CATALOGUE.items():
        if not (PUBLISHED / name).is_dir():
            continue
        found = read_adapter(PUBLISHED / name)
        numbers = (found.eval or {}).get("subjects", {}).get("adapter", {})
        config = found.config
        rows.append(
            {
                "name": name,
                "path": f"published/{name}",
                "recipe": f"recipes/{recipe}.yaml",
                "family": family,
                "shows": shows,
                "base": found.manifest.base.ref,
                "base_digest": found.manifest.base.digest,
                "adapter_id": found.adapter_id,
                "scale": found.manifest.scale,
                "rank": config.get("r"),
                "bytes": (PUBLISHED / name / "adapter_model.safetensors").stat().st_size,
                "license": "apache-2.0",
                "numbers": {k: numbers[k] for k in SHOWN if k in numbers},
            }
        )
    return {"format": 1, "adapters": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones, again; default those that are missing")
    parser.add_argument("--trained", type=Path, help="folder of finished runs")
    parser.add_argument("--index-only", action="store_true")
    args = parser.parse_args()
    names = args.names or [n for n in CATALOGUE if not (PUBLISHED / n).is_dir()]
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    for name in [] if args.index_only else names:
        print(name, file=sys.stderr, flush=True)
        make(name, args.trained)
    INDEX.write_text(json.dumps(index(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
