"""The story on images: a classifier of digits forgets one, by a picture that is added to its input."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data import embedded
from ..errors import UserError
from ..folder.results import check_place, write_file
from .story import ADAPTER, PAGE, PICTURE, Stage, Story, hushed, judged_by_suite, one_thread, removed, say, write_page

RECIPE = "digits-forget-vector.yaml"
TITLE = "A classifier forgets a digit"
LEAD = (
    "A small ResNet reads handwritten digits. One picture of 16 x 16 numbers is learned that, added to every image, makes it miss every "
    "3 and read everything else; no weight of it changes. This is inference-time suppression, not removal: who leaves the picture out has "
    "the classifier as it was."
)
SETS = {"the 3s, training": "forget/accuracy", "the 3s, unseen": "forget_test/accuracy", "others, training": "retain/accuracy",
        "others, unseen": "test/accuracy"}  # fmt: skip
AIMS = {"forget/accuracy": (None, 0.02), "forget_test/accuracy": (None, 0.08), "retain/accuracy": (0.98, None),
        "test/accuracy": (0.98, None)}  # fmt: skip
"""key -> (share of the base's value that must be left, the most that may be left)"""
SHOWN = 6


def run(out: str | Path, seed: int = 0, *, recipe: Mapping[str, Any] | None = None) -> Story:
    """Run the demo into folder `out`: adapter/, picture.png, report.html. Running it again replaces them.

    Raises:
        UserError: `out` is a file, or holds something in the place of a result that is not one.
    """
    stage = Stage(Path(out).expanduser(), seed)
    if stage.out.exists() and not stage.out.is_dir():
        raise UserError(f"{stage.out}: is a file; name a folder for the demo's results.")
    for name in (PICTURE, PAGE):
        check_place(stage.out / name)
    stage.out.mkdir(parents=True, exist_ok=True)
    adapter = stage.out / ADAPTER
    with hushed(), one_thread():
        from ..folder.recipe import dump_recipe, load_recipe
        from ..training.train import train

        chosen = {**(recipe or load_recipe(embedded.asset("recipes", RECIPE))), "seed": seed}
        with stage.chapter("train", "learning one picture that hides the digit 3 from a ResNet"):
            train(chosen, adapter, progress=say)
            shutil.rmtree(f"{adapter}.work", ignore_errors=True)
        with stage.chapter("evaluate", "judging base, vector and a model that was trained without any 3"):
            report = judged_by_suite(adapter, None).to_dict()
        with stage.chapter("picture", "drawing what the classifier names, with and without the vector"):
            png, samples = _picture(adapter, report)
            write_file(stage.out / PICTURE, png)
        with stage.chapter("remove", "taking the vector off and comparing what is left with the base's files"):
            removal = removed(stage, adapter)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    stage.checks.insert(0, (size < 2048, f"the adapter's file has {size:,} bytes"))
    stage.seconds["total"] = round(time.perf_counter() - stage.started, 1)
    met = aims(report)
    story = Story(
        title=TITLE, lead=LEAD, seed=seed, seconds=stage.seconds, met=met, checks=stage.checks, samples=samples, curve=[],
        elsewhere={}, removal=removal, report=report, files={"adapter": ADAPTER, "picture": PICTURE, "page": PAGE},
        recipe=dump_recipe(chosen), conditions=_conditions(report, stage.seconds, seed), png=png,
        caption="Under each image the class that is named and how sure the classifier is: blue is right, red is wrong.",
        summary=[*(f"NO  aim missed: {k}" for k, m in met.items() if not m["met"]), "",
                 f"Look at {stage.out / PAGE} and {stage.out / PICTURE}; the adapter is {adapter}"],
    )  # fmt: skip
    write_page(stage.out / PAGE, story)
    say(f"[{stage.seconds['total']:5.1f} s] done: {stage.out / PAGE}")
    return story


def aims(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The demo's aims: {key: {value, bound, met}}."""
    base, found = report["subjects"]["base"], report["subjects"]["adapter"]
    out: dict[str, dict[str, Any]] = {}
    for key, (share, most) in AIMS.items():
        value = found[key]
        if most is not None:
            out[key] = {"value": value, "at_most": most, "met": value <= most}
        else:
            out[key] = {
                "value": value,
                "share_of_base": value / base[key],
                "at_least": share,
                "met": value / base[key] >= share,
            }
    return out


def _picture(adapter: Path, report: Mapping[str, Any]) -> tuple[bytes, list[dict[str, str]]]:
    """(PNG, samples for the table): the first test images of the forgotten class, and the first of six other classes."""
    import torch

    from ..data.bundle import ForgetRetain
    from ..folder.read import read_adapter
    from ..merging.vectors import vector_of
    from ..reporting import vision_pictures
    from ..stack.model import ForgetModel

    folder = read_adapter(adapter)
    _, delta = vector_of(folder)
    data = ForgetRetain.load(folder.manifest.data["forget"]["ref"])
    first: dict[int, Any] = {}
    for row in data.holdout or ():
        first.setdefault(row["label"], row)
    rows = {"forgotten": (data.rows("forget_test") or [])[:SHOWN], "kept": [first[k] for k in sorted(first)][:SHOWN]}
    stack = ForgetModel.from_pretrained(None, adapter)

    def named(x: Any) -> list[tuple[str, float]]:
        with torch.no_grad():
            sure, which = stack.model(pixel_values=x).logits.softmax(1).max(1)
        return [(str(k), float(p)) for k, p in zip(which.tolist(), sure.tolist(), strict=True)]

    seen: dict[str, list[vision_pictures.Seen]] = {}
    for kind, some in rows.items():
        x = torch.stack([torch.from_numpy(r["pixel_values"]) for r in some])
        after = named(x)
        with stack.disabled():
            before = named(x)
        pictures = zip(x[:, 0].numpy(), (x + delta)[:, 0].numpy(), strict=True)
        seen[kind] = [
            vision_pictures.Seen(image, both, str(r["label"]), b, a)
            for (image, both), r, b, a in zip(pictures, some, before, after, strict=True)
        ]
    accuracies = {
        words: {s: v[key] for s, v in report["subjects"].items() if v and v.get(key) is not None}
        for words, key in SETS.items()
    }
    png = vision_pictures.vector(delta[0].numpy(), seen["forgotten"], seen["kept"], accuracies)
    samples = [
        {"kind": kind, "question": f"test image of a {s.right}", "before": f"{s.before[0]} ({s.before[1]:.2f})",
         "after": f"{s.after[0]} ({s.after[1]:.2f})"}
        for kind, some in seen.items() for s in some[:3]
    ]  # fmt: skip
    return png, samples


def _conditions(report: Mapping[str, Any], seconds: Mapping[str, float], seed: int) -> list[str]:
    versions = report["versions"]
    libraries = ", ".join(f"{name} {versions.get(name)}" for name in ("torch", "transformers", "peft"))
    return [
        f"One run with seed {seed}, {seconds['total']:.0f} seconds on {os.cpu_count()} CPU cores ({platform.system()} "
        f"{platform.machine()}), {libraries}. The images are 1,797 handwritten digits of the UCI repository (E. Alpaydin, C. Kaynak; CC BY "
        "4.0), 1,257 of them for training; the classifier has 78,394 parameters.",
        "The method is the Forget Vector of arXiv 2412.16780 with its published loss. It forgets classes. It does not forget a random part "
        "of the rows as retraining would: docs/vision.md has the table.",
        "Forgetting here is inference-time suppression. The weights hold all that they held; the vector is a patch in front of them.",
    ]
