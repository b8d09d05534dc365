"""The search behind the demo's recipe, so that anybody can run it again or go on with it.

    python tests/bench/search_demo.py run --base BASE --retain-model MODEL [--retain-model OTHER ..] [--only NAME ..] [--seeds 0 1 2]
    python tests/bench/search_demo.py twins --retain-model MODEL [--retain-model OTHER ..]      # measures further retain models
    python tests/bench/search_demo.py table          # docs/search.json -> docs/search.md, adapters/bases/people-twins.json

`run` trains every candidate of CANDIDATES with the package's own trainer, evaluates it with the whole people suite, and
appends one line of figures to docs/search.json at once; what is there already is not run again. Failures stay in.
The first --retain-model is the one that ships; further retain models (same data, other seeds:
`python adapters/bases/build people --retain-models N`) say
what a p of forget quality can mean at all: the p of each against the first is written beside.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, TABLE = Path(os.environ.get("SEARCH_JSON", ROOT / "docs" / "search.json")), ROOT / "docs" / "search.md"
SPREAD = ROOT / "adapters" / "bases" / "people-twins.json"

START: dict[str, Any] = {
    "base": "embedded:people",
    "data": {"bundle": "embedded:people", "per_anchor": 2},
    "adapter": {"type": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "terms": {"forget": {"simnpo": {"beta": 1.0}}, "retain": {"nll": {"weight": 2.0}}},
    "train": {
        "learning_rate": 1e-3, "max_steps": 200, "per_device_train_batch_size": 32,
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 5,
    },
    "eval": {"suite": "people", "every": 20, "n": 50},
}  # fmt: skip


def simnpo(beta: float = 1.0, weight: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"terms": {"forget": {"simnpo": {"beta": beta}}, "retain": {"nll": {"weight": weight}}}, **more}


def npo(beta: float = 0.1, weight: float = 5.0, **more: Any) -> dict[str, Any]:
    return {"terms": {"forget": {"npo": {"beta": beta}}, "retain": {"nll": {"weight": weight}}}, **more}


def steps(n: int, lr: float = 1e-3) -> dict[str, Any]:
    return {"train": {"max_steps": n, "learning_rate": lr}}


ATTENTION = {"adapter": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}}
MLP = {"adapter": {"target_modules": ["gate_proj", "up_proj", "down_proj"]}}
BEST = {"eval": {"keep_best": True, "retain_floor": 0.98}}
NARROW = {"data": {"per_anchor": 1}}
KL = {"forget": {"simnpo": {"beta": 1.0}}, "retain": {"nll": {"weight": 1.0}, "kl": {"weight": 1.0}}}
NPO_KL = {"forget": {"npo": {"beta": 0.1}}, "retain": {"kl": {"weight": 5.0}}}

# name -> what differs from START. w: weight of the retain loss, b: beta, 32+32: rows of forget and retain in a step.
CANDIDATES: dict[str, dict[str, Any]] = {
    "simnpo b1 w2, 160 steps": simnpo(**steps(160)),
    "npo b0.1 w5, 160 steps": npo(**steps(160)),
    "simnpo b1 w2": simnpo(),
    "simnpo b1 w5, 160 steps": simnpo(weight=5.0, **steps(160)),
    "simnpo b1 w2, lr 5e-4, 160 steps": simnpo(**steps(160, 5e-4)),
    "simnpo b1 w2, best of floor .98, 160 steps": simnpo(**steps(160), **BEST),
    "simnpo b1 w2, MLP only, 160 steps": simnpo(**steps(160), **MLP),
    "simnpo b1 w2, attention only, 160 steps": simnpo(**steps(160), **ATTENTION),
    "simnpo b1 nll 1 + kl 1, 160 steps": {"terms": KL, **steps(160)},
    "simnpo b2.5 w5, 32+32, 160 steps": simnpo(2.5, 5.0, **steps(160), **NARROW),
    "npo b0.1 w5, 32+32, 120 steps": npo(**steps(120), **NARROW),
    "npo b0.1 kl 5, 160 steps": {"terms": NPO_KL, **steps(160)},
    "npo b0.1 w5, lr 5e-4, 160 steps": npo(**steps(160, 5e-4)),
    "simnpo b1 w2, 240 steps": simnpo(**steps(240)),
    "simnpo b2 w2": simnpo(2.0, 2.0),
    "simnpo b1.5 w2": simnpo(1.5, 2.0),
    "simnpo b2 w2, lr 2e-3, 160 steps": simnpo(2.0, 2.0, **steps(160, 2e-3)),
    "simnpo b1 w2, lr 2e-3, 160 steps": simnpo(**steps(160, 2e-3)),
    "simnpo b2 w5, lr 2e-3": simnpo(2.0, 5.0, **steps(200, 2e-3)),
    "simnpo b1 w2, r 32": simnpo(**{"adapter": {"r": 32, "lora_alpha": 64}}),
    "simnpo b1 w3, lr 1.5e-3": simnpo(1.0, 3.0, **steps(200, 1.5e-3)),
    "simnpo b1.5 w3, lr 1.5e-3": simnpo(1.5, 3.0, **steps(200, 1.5e-3)),
    "npo b0.5 w5": npo(0.5),
    "npo b1 w5": npo(1.0),
    "simnpo b1 w2, lr 7e-4": simnpo(**steps(200, 7e-4)),
    "simnpo b1 w2, phrasing 2 retained too": simnpo(retain_sets=["retain", "retain_other", "general"]),
}


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it, section by section; terms are replaced whole."""
    out = copy.deepcopy(base)
    for key, value in change.items():
        inner = isinstance(value, dict) and isinstance(out.get(key), dict) and key != "terms"
        out[key] = merged(out[key], value) if inner else copy.deepcopy(value)
    return out


def quick_curve(trainer: Any) -> list[list[float]]:
    """[step, forget value accuracy, retain value accuracy] of every evaluation while training."""
    return [
        [h["step"], round(h["eval_forget/value_accuracy"], 3), round(h["eval_retain/value_accuracy"], 3)]
        for h in trainer.state.log_history
        if "eval_forget/value_accuracy" in h
    ]


class Bench:
    """Base, retain models and their figures, loaded and measured once."""

    def __init__(self, base: str, retain_models: list[str]) -> None:
        from peft_unlearn.data.bundle import ForgetRetain
        from peft_unlearn.evaluation import suites
        from peft_unlearn.evaluation.feed import Reading, feed
        from peft_unlearn.evaluation.numbers import numbers_of, whole_of
        from peft_unlearn.evaluation.plan import make_plan, measure
        from peft_unlearn.folder.base import load_base, load_tokenizer

        self.base = base
        self.data = ForgetRetain.load("embedded:people")
        suite = suites.load("people")
        self.plan = make_plan(suite, self.data, load_tokenizer(base))
        self.retain_models = [measure(load_base(t), self.plan) for t in retain_models]

        def figures(measured: Any) -> dict[str, Any]:
            found = numbers_of(self.plan, measured, self.retain_models[0], ci=False)
            found.update(whole_of(suite, found))
            wanted = ("value_accuracy", "forget_quality", "ks_distance", "model_utility")
            out = {k: v.value for k, v in found.items() if k.rpartition("/")[2] in wanted}
            out["forget/probability"] = found["forget/probability"].value
            out["forget/truth_ratio"] = found["forget/truth_ratio"].value
            forget = self.plan.sets["forget"]
            ratio = feed("log_ratio", Reading(forget, measured, forget.chosen))
            return {**{k: float(f"{v:.4g}") for k, v in out.items()}, "log_ratio": [round(float(x), 4) for x in ratio]}

        self.figures = lambda model: figures(measure(model, self.plan))
        self.of_base = self.figures(load_base(base))
        self.of_twins = [figures(t) for t in self.retain_models]


def run_one(bench: Bench, change: dict[str, Any], seed: int) -> dict[str, Any]:
    from transformers import set_seed

    from peft_unlearn.evaluation.quick import make_score
    from peft_unlearn.folder.base import load_base, load_tokenizer
    from peft_unlearn.training.adapt import get_forget_model
    from peft_unlearn.training.recipe import prepare
    from peft_unlearn.training.train import quiet, score_callbacks
    from peft_unlearn.training.trainer import UnlearnTrainer

    change = dict(change)
    pool = change.pop("retain_sets", None)  # other retain rows than the bundle's own
    recipe = merged(START, {**change, "seed": seed})
    with tempfile.TemporaryDirectory() as scratch:
        run = prepare(recipe, Path(scratch, "out"), base=bench.base)
        run.config.disable_tqdm = True
        if pool:
            sets = {**run.data.extra, "retain": [r for r in run.data.retain or [] if r["subject"]]}
            run.data.retain = [r for name in pool for r in sets[name]]
        tokenizer = load_tokenizer(run.base_dir)
        set_seed(run.config.seed)
        model = get_forget_model(load_base(run.base_dir), run.adapter)
        ev = recipe["eval"]
        scorer = make_score(run.data, tokenizer, suite=ev["suite"], n=ev.get("n"))
        callbacks = score_callbacks(ev, scorer, model)
        trainer = UnlearnTrainer(
            model, run.config, data=run.data, processing_class=tokenizer, score=scorer, callbacks=callbacks
        )
        quiet(trainer)
        cpu, wall = time.process_time(), time.perf_counter()
        trainer.train()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        trainer.bare.eval()
        out = {
            "seed": seed,
            "change": {**change, **({"retain_sets": pool} if pool else {})},
            "cpu_seconds": round(cpu, 1),
            "wall_seconds": round(wall, 1),
        }
        out |= {"best_step": trainer.state.best_global_step, "curve": quick_curve(trainer)}
        return {**out, **bench.figures(trainer.bare)}


LOW = ("forget", "forget_other", "forget_heldout")
HIGH = {"retain": 0.97, "retain_other": 0.97, "general": 0.97, "retain_heldout": 0.85}


def passes(found: dict[str, Any], base: dict[str, Any]) -> bool:
    """All accuracies that issue 2 asks for (forget quality stands beside, it is not part of this)."""
    key = "{}/value_accuracy".format
    return all(found[key(s)] <= 0.05 for s in LOW) and all(
        found[key(s)] >= share * base[key(s)] for s, share in HIGH.items()
    )


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}


def save(stored: dict[str, Any]) -> None:
    """One line per run, so that a further run is one line of difference."""
    lines = ",\n".join(json.dumps(r) for r in stored["runs"])
    rest = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in stored.items() if k != "runs")
    RESULTS.write_text("{" + rest + ',\n"runs": [\n' + lines + "\n]}\n")


def measure_twins(base: str, retain_models: list[str]) -> None:
    """Replace the retain models' figures: the first stays the one that ships."""
    stored = load()
    bench = Bench(base, retain_models)
    save(stored | {"base": bench.of_base, "twins": bench.of_twins})


def search(base: str, retain_models: list[str], only: list[str], seeds: list[int]) -> None:
    import torch

    torch.set_num_threads(1)
    stored = load()
    bench = Bench(base, retain_models)
    key = "retain_heldout/value_accuracy"
    if stored.get("base", bench.of_base)[key] != bench.of_base[key]:
        raise SystemExit(f"{RESULTS.name} was measured on another base; move it away first")
    stored |= {"base": bench.of_base, "twins": bench.of_twins, "start": START}
    done = {(r["name"], r["seed"]) for r in stored["runs"]}
    for seed, (name, change) in itertools.product(seeds, CANDIDATES.items()):
        if (name, seed) in done or (only and name not in only):
            continue
        found = {"name": name, **run_one(bench, change, seed)}
        stored["runs"].append(found)
        save(stored)
        print(row(found, bench.of_base, bench.of_twins), flush=True)


def p_by_twin(r: dict[str, Any], retain_models: list[dict[str, Any]]) -> list[float]:
    """Exact KS p of the truth ratios of a run against each retain model."""
    import numpy as np

    from peft_unlearn.evaluation.metrics.quality import ks_two_sample

    return [ks_two_sample(np.array(r["log_ratio"]), np.array(t["log_ratio"])).p for t in retain_models]


def row(r: dict[str, Any], base: dict[str, Any], retain_models: list[dict[str, Any]]) -> str:
    def va(*sets: str) -> str:
        return " / ".join(f"{r[f'{s}/value_accuracy']:.3f}" for s in sets)

    best = f", kept {r['best_step']}" if r.get("best_step") and r["change"].get("eval", {}).get("keep_best") else ""
    count = r["change"].get("train", {}).get("max_steps", START["train"]["max_steps"])
    ok = "yes" if passes(r, base) else "no"
    ps = ", ".join(f"{p:.2g}" for p in p_by_twin(r, retain_models))
    share = r["retain_heldout/value_accuracy"] / base["retain_heldout/value_accuracy"]
    return (
        f"| {r['name']} | {r['seed']} | {count}{best} | {r['cpu_seconds']:.0f} | {va(*LOW)} | "
        f"{va('retain', 'retain_other', 'retain_heldout')} ({share:.2f}) | {va('general')} | {ps} | "
        f"{r['model_utility']:.3f} | {ok} |"
    )


HEAD = """\
| candidate | seed | steps | CPU-s | forget 1 / 2 / 3 | retain 1 / 2 / 3 (share of base) | general | p by retain model | MU | meets |
|---|---|---|---|---|---|---|---|---|---|
"""
TEXT = """\
# The search for the demo's recipe

Generated by `python tests/bench/search_demo.py table` from [search.json](search.json), which
`python tests/bench/search_demo.py run` wrote; every run is here, the ones that failed too. One thread of a 2-core machine
shared with other work: read CPU-s as an order of magnitude, it covers training and the looks during it.

What is asked of a recipe, as value accuracy (the answer names the right value): forget sets at most .05 in all three
phrasings; retain phrasings 1 and 2 and the general questions at least .97 of the base's own; retain phrasing 3, which was
trained for neither these people nor the forgotten ones, at least .85 of the base's own. *meets* says whether all of that
holds. Forget quality, the p of an exact two-sided Kolmogorov-Smirnov test on 100 truth ratios each, stands beside; it is
given against {n_twins} retain models, the shipped one first. Unlearning sees phrasing 1 of the forget people; the retain
pool is phrasing 1 of the retain people and the general questions unless the row says otherwise.

Unless a row says otherwise: {start}

| model | forget 1 / 2 / 3 | retain 1 / 2 / 3 | general | p by retain model | MU |
|---|---|---|---|---|---|
{models}

What p can mean: retain models are what exact unlearning would give and differ by their seed alone. Against the
shipped one the others have p = {null}. That is what "cannot be told from retraining" looks like here; .05 is the customary
bound and a weaker one.

## Runs

{runs}

In the script and not run, for the time-box of 25 CPU-minutes: {left}.
{prose}"""


def table() -> None:
    """docs/search.json -> docs/search.md, and the spread over retain models that ships with the base."""
    stored = load()
    base, retain_models = stored["base"], stored["twins"]

    def model(name: str, r: dict[str, Any]) -> str:
        def va(*sets: str) -> str:
            return " / ".join(f"{r[f'{s}/value_accuracy']:.3f}" for s in sets)

        ps = ", ".join(f"{p:.2g}" for p in p_by_twin(r, retain_models))
        high = va("retain", "retain_other", "retain_heldout")
        return f"| {name} | {va(*LOW)} | {high} | {va('general')} | {ps} | {r['model_utility']:.3f} |"

    names = ["retain model (shipped)", *(f"retain model, seed {k}" for k in range(2, len(retain_models) + 1))]
    null = [float(f"{p_by_twin(t, retain_models[:1])[0]:.3g}") for t in retain_models[1:]]
    start = ", ".join(f"{k} `{json.dumps(v)}`" for k, v in stored["start"].items() if k not in ("base", "eval"))
    text = TEXT.format(
        n_twins=len(retain_models),
        start=start,
        models="\n".join([model("base", base), *(model(n, t) for n, t in zip(names, retain_models, strict=True))]),
        null=", ".join(f"{p:.2g}" for p in null),
        runs=HEAD + "\n".join(row(r, base, retain_models) for r in stored["runs"]),
        prose=f"\n{FINDINGS.strip()}\n",
        left=", ".join(n for n in CANDIDATES if n not in {r["name"] for r in stored["runs"]}) or "none",
    )
    TABLE.write_text(text, encoding="utf-8")
    spread = {
        "what": "further retain-only twins, same data, other seeds: forget quality p against people-retain, and their own numbers",
        "seeds": list(range(2, len(retain_models) + 1)),
        "p": null,
        **{
            key: [retain_model[key] for retain_model in retain_models[1:]]
            for key in ("model_utility", "forget/probability")
        },
    }
    SPREAD.write_text(json.dumps(spread) + "\n", encoding="utf-8")


FINDINGS = """
## What it says

- **Everything can be met, on each of three seeds**, by SimNPO with beta 1, retain weight 3, rate 1.5e-3 and 200 steps: that is
  adapters/recipes/people-demo.yaml. With rate 1e-3 and weight 2 the accuracies hold on three seeds too, phrasing 2 of the
  retain people by a hair, and p falls under .05 on one of them. Beta 2 keeps phrasings 2 and 3 of the retain people better
  still and is told from a retain model more easily: pushing harder moves the truth ratios towards that one's and costs the phrasings
  that the retain pool does not hold.
- **p is a coarse instrument.** It moved between .006 and .21 over three seeds of one recipe (.078 to .28 with the default's),
  and by a factor of 20 between 160 and 200 steps. Retain models against each other give .47 to .91, which no run reaches: the
  adapter's truth ratios spread wider than the retain models' and its forget answers are far less probable (.02 against .37). It
  over-forgets.
- **The small learning rate is the worst idea**: at 5e-4 the dip is not recovered from in 160 steps. So is adapting the MLP
  alone. A larger retain weight by itself changes little.
- **NPO at beta .1** forgets as well and loses a quarter of phrasing 2 of the people it should keep.
- **Phrasing 2 in the retain pool** keeps phrasing 2, as it must, and does not lift phrasing 3.
- Every run dips before it recovers (retain accuracy of 50 rows down to .78-1.00 with SimNPO, .52 with NPO, within 60 steps), so a
  stop at the first low forget value would stop inside the dip. From step 100-120 on the quick look says 0 and 1 throughout and
  cannot rank checkpoints, which is why the last one is taken rather than a best one.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "twins", "table"])
    parser.add_argument("--base", default=str(ROOT / "adapters" / "bases" / "people"))
    parser.add_argument("--retain-model", "--twin", action="append", help="default: the one that ships")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    a = parser.parse_args()
    retain_models = a.retain_model or [str(ROOT / "adapters" / "bases" / "people-retain")]
    if a.what == "run":
        search(a.base, retain_models, a.only, a.seeds)
    elif a.what == "twins":
        measure_twins(a.base, retain_models)
    else:
        table()


if __name__ == "__main__":
    main()
