"""Expert adapters on the embedded mixture of experts, measured with the product: docs/methods/uoe.json and the tables of uoe.md.

    python tests/bench/moe_table.py [--part accept,seeded,natural] [--seeds 0,1,2] [--bases DIR]    measure what is missing
    python tests/bench/moe_table.py --write                                                         tables into docs/methods/uoe.md

Attribution on both bases; then one run after the other, each as its recipe in adapters/recipes says plus what the table below
changes, through the parts that `peft-unlearn train` is made of (nothing is saved). The file is written after every run, and what
stands there for the same recipe is not measured again. --bases: a folder with domains/ and domains-natural/ (default: embedded).

Value accuracy is teacher-forced: every token of the value is the arg-max given the gold text before it. "Hit" is the first of the
looks (every five steps, two for ascent) at which at most 5 % of the forget facts, in both phrasings, are right.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import TrainerCallback, set_seed

from peft_unlearn.attribution.experts import attribute as attribute_experts
from peft_unlearn.attribution.selection import SelectionOverlap
from peft_unlearn.data import domains, embedded
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.collate import pad
from peft_unlearn.data.formats import to_text
from peft_unlearn.folder.base import load_base, load_tokenizer
from peft_unlearn.folder.recipe import load_recipe
from peft_unlearn.training.adapt import get_forget_model
from peft_unlearn.training.recipe import CHOOSING, prepare
from peft_unlearn.training.train import quiet
from peft_unlearn.training.trainer import UnlearnTrainer

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs" / "methods" / "uoe.json", ROOT / "docs" / "methods" / "uoe.md"
HIT = 0.05

Change = dict[str, Any]
KEEP: Change = {"terms": {"retain": {"nll": {"weight": 1.0}, "router_keep": {"weight": 10.0}}}}
ANCHORED: Change = {"terms": {"forget": {"npo": {"beta": 0.1}, "router_anchor": {"weight": 1.0}}}}
ASCENT: Change = {"terms": {"forget": {"ga": {}}, "retain": None}}


def weight(value: float) -> Change:
    return {"terms": {"retain": {"nll": {"weight": value}}}}


def train(**values: Any) -> Change:
    return {"train": values}


FULL: Change = {"adapter": {"train_router": "full"}}
LONGER = train(max_steps=80)
# name -> (recipe, changes); "expert": "random" names another expert for every seed
SEEDED: dict[str, tuple[str, list[Change]]] = {
    "npo per-layer": ("domains-npo", []),
    "npo top1": ("domains-top1", []),
    "npo random": ("domains-random-expert", [{"expert": "random"}]),
    "npo lora-all": ("domains-lora-all", []),
    "npo lora-all w5": ("domains-lora-all", [weight(5.0), LONGER]),
    "npo target-parameters": ("domains-target-parameters", []),
    "npo top3": ("domains-top3", []),
    "npo routers-only": ("domains-routers-only", []),
    "uoe npo": ("domains-uoe-npo", []),
    "uoe npo, router 3e-4": ("domains-uoe-npo", [train(router_learning_rate=3e-4)]),
    "uoe npo, keep 10": ("domains-uoe-npo", [KEEP]),
    "uoe npo random": ("domains-uoe-npo", [{"expert": "random"}]),
    "uoe npo per-layer": ("domains-npo", [ANCHORED, FULL, train(router_learning_rate=3e-3)]),
    "ga top1": ("domains-top1", [ASCENT, train(max_steps=60)]),
    "ga random": ("domains-random-expert", [ASCENT, {"expert": "random"}, train(max_steps=60)]),
    "ga lora-all": ("domains-lora-all", [ASCENT, train(max_steps=60)]),
    "uoe ga": ("domains-uoe-ga", []),
    "npo per-layer w5": ("domains-npo", [weight(5.0), LONGER]),
}
NATURAL: dict[str, tuple[str, list[Change]]] = {
    "npo per-layer": ("domains-npo", [LONGER]),
    "npo top1": ("domains-top1", [LONGER]),
    "uoe npo": ("domains-uoe-npo", [LONGER]),
    "uoe npo, block 2": ("domains-uoe-npo", [{"adapter": {"layers": [2]}}, LONGER]),
    "npo lora-all": ("domains-lora-all", [LONGER]),
    "npo lora-all w5": ("domains-lora-all", [weight(5.0), train(max_steps=100)]),
    "uoe npo w5": ("domains-uoe-npo", [weight(5.0), LONGER]),
    "uoe npo, keep 10": ("domains-uoe-npo", [KEEP, LONGER]),
    "uoe npo random": ("domains-uoe-npo", [{"expert": "random"}, LONGER]),
    "uoe npo per-layer, 1e-3 routers": ("domains-npo", [ANCHORED, FULL, train(router_learning_rate=1e-3), LONGER]),
    "npo target-parameters": ("domains-target-parameters", [LONGER]),
    "uoe ga": ("domains-uoe-ga", []),
    "ga lora-all": ("domains-lora-all", [ASCENT, train(max_steps=60)]),
}


def changed(recipe: dict[str, Any], change: Change) -> dict[str, Any]:
    """Mappings merge one level down; None takes a key away."""
    out = copy.deepcopy(recipe)
    for key, value in change.items():
        if isinstance(value, dict):
            out[key] = {k: v for k, v in {**out.get(key, {}), **value}.items() if v is not None}
        else:
            out[key] = value
    return out


def draw(seed: int, domain: str) -> dict[int, list[int]]:
    """One expert that was not planted for `domain`; another one for every seed."""
    planted = json.loads((embedded_base("domains") / "planted.json").read_text(encoding="utf-8"))[domain]
    free = [(k, e) for k in range(4) for e in range(8) if planted[str(k)] != e]
    drawn: list[tuple[int, int]] = []
    for s in range(seed + 1):
        rng = random.Random(s)
        while (pick := rng.choice(free)) in drawn:
            pass
        drawn.append(pick)
    k, e = drawn[-1]
    return {k: [e]}


def recipe_for(stem: str, changes: list[Change], domain: str, seed: int) -> dict[str, Any]:
    recipe = load_recipe(embedded.asset("recipes", f"{stem}.yaml"))
    for change in changes:
        recipe = changed(recipe, change)
    if recipe.pop("expert", None):
        kept = {k: v for k, v in recipe["adapter"].items() if k not in CHOOSING}
        recipe["adapter"] = {**kept, "experts": draw(seed, domain)}
    recipe |= {"seed": seed, "data": {"bundle": f"embedded:domains?forget={domain}"}}
    recipe.pop("eval", None)  # the looks here take its place
    return recipe


def fingerprint(recipe: dict[str, Any]) -> str:
    content = {k: v for k, v in recipe.items() if k not in ("name", "description")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


# --- scoring ------------------------------------------------------------------------------------------------------------


class Scorer:
    """Teacher-forced value accuracy of sets of rows."""

    def __init__(self, rows: dict[str, list[dict[str, Any]]], tokenizer: Any) -> None:
        self.pad = tokenizer.pad_token_id
        self.sets = {name: [self._encoded(r, tokenizer) for r in part] for name, part in rows.items()}

    @staticmethod
    def _encoded(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        prompt, answer = to_text(row)
        first = len(prompt) + answer.rindex(row["value"])
        last = first + len(row["value"])
        found = tokenizer(prompt + answer, return_offsets_mapping=True)
        ids = list(found["input_ids"])
        of_value = [a < last and b > first for a, b in found["offset_mapping"]]
        return {"input_ids": ids, "labels": [i if v else -100 for i, v in zip(ids, of_value, strict=True)]}

    @torch.no_grad()
    def __call__(self, model: Any, *names: str) -> dict[str, float]:
        training = model.training
        model.eval()
        out = {}
        for name in names:
            right: list[float] = []
            order = sorted(self.sets[name], key=lambda r: len(r["input_ids"]))
            for at in range(0, len(order), 80):
                batch = pad(order[at : at + 80], self.pad)
                said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
                wanted = batch["labels"][:, 1:]
                right += ((said.argmax(-1) == wanted) | (wanted == -100)).all(1).float().tolist()
            out[name] = sum(right) / len(right)
        model.train(training)
        return out


class Look(TrainerCallback):
    """CPU seconds inside optimizer steps alone; what stands at the first hit and at the end."""

    def __init__(self, scorer: Scorer, every: int, stop: bool) -> None:
        self.scorer, self.every, self.stop = scorer, every, stop
        self.cpu, self._start = 0.0, 0.0
        self.hit: dict[str, Any] | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.cpu += time.process_time() - self._start
        if self.hit is not None or state.global_step % self.every:
            return
        seen = self.scorer(model, "forget", "forget_other")
        if (seen["forget"] + seen["forget_other"]) / 2 <= HIT:
            self.hit = {"step": state.global_step, "cpu": round(self.cpu, 1), **everything(model, self.scorer)}
            control.should_training_stop |= self.stop

    # Trainer calls on_train_end before the loop returns; the last numbers are taken by `measure`.


def everything(model: Any, scorer: Scorer) -> dict[str, Any]:
    found = {k: round(v, 4) for k, v in scorer(model, *scorer.sets).items()}
    kept = {k.removeprefix("retain_unseen_"): v for k, v in found.items() if k.startswith("retain_unseen_")}
    gone = {k: v for k, v in found.items() if k not in {f"retain_unseen_{d}" for d in kept}}
    return {**gone, "retain_unseen": round(sum(kept.values()) / len(kept), 4), "by_domain": kept}


# --- runs ---------------------------------------------------------------------------------------------------------------

BASES: Path | None = None


def embedded_base(name: str) -> Path:
    return BASES / name if BASES is not None else embedded.base_path(name)


_affinities: dict[tuple[str, str], Any] = {}


def affinity(base: str, domain: str) -> Any:
    if (base, domain) not in _affinities:
        path = embedded_base(base)
        data = ForgetRetain.load(f"embedded:domains?forget={domain}")
        _affinities[base, domain] = attribute_experts(load_base(path), load_tokenizer(path), data, {}).affinity
    return _affinities[base, domain]


def attribute(base: str) -> dict[str, Any]:
    """{domain: what attribution says}, and in how many cells the planted expert has the highest affinity of its block."""
    planted = json.loads((embedded_base("domains") / "planted.json").read_text(encoding="utf-8"))
    out: dict[str, Any] = {}
    for domain in domains.DOMAINS:
        found = affinity(base, domain)
        tops = found.forget.argmax(1).tolist()
        lifts = [round(float(found.lift[i, e]), 3) for i, e in enumerate(tops)]
        layer = int(found.forget.max(1).values.argmax())
        out[domain] = {
            "top": tops,
            "affinity": [round(float(found.forget[i, e]), 3) for i, e in enumerate(tops)],
            "lift": lifts,
            "top1": [layer, tops[layer]],
            "top1_lift": lifts[layer],
            "planted_found": sum(planted[domain][str(k)] == e for k, e in enumerate(tops)),
            "stability": {k: round(v, 3) for k, v in found.stability().items()},
            "warnings": len(found.warnings()),
        }
    return out


def measure(recipe: dict[str, Any], base: str, domain: str) -> dict[str, Any]:
    """One run: its row."""
    path = embedded_base(base)
    with tempfile.TemporaryDirectory() as scratch:
        run = prepare(recipe, Path(scratch, "out"), base=str(path))
        model, tokenizer = load_base(path), load_tokenizer(path)
        if run.auto is not None:
            run.adapter.experts = {str(k): v for k, v in affinity(base, domain).choose(**run.auto).items()}
        set_seed(run.config.seed)
        model = get_forget_model(model, run.adapter)
        rows = {
            k: v
            for k, v in embedded.rows(recipe["data"]["bundle"]).items()
            if k.startswith(("forget", "retain_unseen_"))
        }
        scorer = Scorer(rows, tokenizer)
        ascent = "ga" in recipe["terms"]["forget"]
        look = Look(scorer, 2 if ascent else 5, stop=ascent)
        trainer = UnlearnTrainer(model, run.config, data=run.data, processing_class=tokenizer, callbacks=[look])
        quiet(trainer)
        sets = {k: run.data.encode(k, tokenizer) for k in ("forget", "retain")}
        shift = SelectionOverlap(sets, trainer.pad_id)
        trainer.add_callback(shift)
        trainer.train()
    experts = getattr(run.adapter, "experts", None)
    return {
        "experts": experts,
        "trainable": sum(p.numel() for p in trainer.bare.parameters() if p.requires_grad),
        "hit": look.hit,
        "end": {"step": trainer.state.global_step, "cpu": round(look.cpu, 1), **everything(trainer.bare, scorer)},
        "overlap": {s: [round(v, 3) for v in by.values()] for s, by in shift.history[-1]["overlap"].items()},
    }


def cells(parts: list[str], seeds: list[int]) -> Iterator[tuple[str, str, str, list[Change], str, int]]:
    """(base, variant, recipe, changes, domain, seed), the acceptance runs first, then seed by seed."""
    for seed in seeds:
        for part, base, table, names in (
            ("accept", "domains", {k: SEEDED[k] for k in ("npo per-layer", "npo top1")}, ("chem", "lang", "geo")),
            ("seeded", "domains", SEEDED, ("chem",)),
            ("natural", "domains-natural", NATURAL, ("chem",)),
        ):
            for domain in names if part in parts else ():
                for variant, (stem, changes) in table.items():
                    yield base, variant, stem, changes, domain, seed


def write(results: dict[str, Any], path: Path) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def main() -> None:
    global BASES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="accept,seeded,natural")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="variants whose name has this in it")
    parser.add_argument("--bases", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--write", action="store_true", help="measure nothing; write the tables into docs/methods/uoe.md"
    )
    args = parser.parse_args()
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"runs": {}}
    if args.write:
        import moe_pages

        moe_pages.write(PAGE, results)
        return
    BASES = args.bases
    torch.set_num_threads(1)
    if "attribution" not in results:
        results["attribution"] = {b: attribute(b) for b in ("domains", "domains-natural")}
        write(results, args.out)
    for base, variant, stem, changes, domain, seed in cells(
        args.part.split(","), [int(s) for s in args.seeds.split(",")]
    ):
        recipe = recipe_for(stem, changes, domain, seed)
        key, mark = f"{base}|{variant}|{domain}|{seed}", fingerprint(recipe)
        if results["runs"].get(key, {}).get("recipe") == mark or (args.only and args.only not in variant):
            continue
        try:
            row = measure(recipe, base, domain)
        except Exception as e:  # the others are still worth having; what failed stays in, with its message
            row = {"failed": f"{type(e).__name__}: {e}"[:400]}
        results["runs"][key] = {"recipe": mark, **row}
        write(results, args.out)
        end, hit = row.get("end") or {}, row.get("hit") or {}
        print(
            key, row.get("failed", ""), row.get("experts"), row.get("trainable"), "hit", hit.get("step"), hit.get("retain_unseen"),
            "end", end.get("step"), end.get("cpu"), "F", end.get("forget"), end.get("forget_other"), "R", end.get("retain_unseen"),
            row.get("overlap", {}).get("retain"), flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
