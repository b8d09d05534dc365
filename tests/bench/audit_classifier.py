"""Is an audit a good classifier? Honest records must not be contradicted, dishonest ones must be.

    python tests/bench/audit_classifier.py [--good npo,simnpo,..] [--bad dead,half,..] [--out FILE.json]

Good: published adapters with the numbers that were measured of them. Bad: records that a careful forger would make of `npo`: the
weights are others, and manifest, probes and every signature are made anew, so that only what is measured again can betray
them; and records that were changed after they were signed. Needs cryptography; about a minute of a processor for each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "adapters" / "published"
sys.path.insert(0, str(ROOT / "tests" / "record"))

import torch
from safetensors.torch import load_file, save_file

from peft_unlearn.errors import UserError
from peft_unlearn.folder.manifest import probes
from peft_unlearn.folder.read import CONFIG, EVAL, MANIFEST, WEIGHTS, file_sha256
from peft_unlearn.records.audit import audit
from peft_unlearn.records.claims import CONTRADICTED
from peft_unlearn.records.record import record
from peft_unlearn.records.statements import BUNDLE
from peft_unlearn.stack.model import ForgetModel

GOOD = ("npo", "simnpo", "undial", "gru", "ngdiff", "npo-sam", "rmu", "neg-entropy")


def forged(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path, Path], None]:
    """npo's folder with other weights: hashes, ids and probes are those of the new ones, the numbers are npo's."""

    def make(folder: Path, key: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
        told = json.loads((folder / MANIFEST).read_text())
        sha = told["files"][WEIGHTS] = file_sha256(folder / WEIGHTS)
        told["files"][CONFIG] = file_sha256(folder / CONFIG)
        (folder / MANIFEST).write_text(json.dumps(told))
        stack = ForgetModel.from_pretrained(None, folder)
        found = probes(stack.model, stack.tokenizer, told["probes"]["prompts"])
        told["probes"] = {"prompts": found.prompts, "base": found.base, "adapter": found.adapter}
        (folder / MANIFEST).write_text(json.dumps(told))
        text = (folder / EVAL).read_text()
        (folder / EVAL).write_text(text.replace(json.loads(text)["adapter_id"], f"sha256:{sha}"))
        record(folder, key)

    return make


def times(factor: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda t: {k: v * factor if "lora_B" in k else v for k, v in t.items()}


def rounded(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Most of each B rounded away, as by a merge in too few bits."""
    return {k: torch.where(v.abs() < v.abs().quantile(0.9), 0.0, v) if "lora_B" in k else v for k, v in t.items()}


def other_layers(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The right tensors under the wrong layers."""
    swap = {"layers.0.": "layers.3.", "layers.3.": "layers.0."}
    return {next((k.replace(a, b) for a, b in swap.items() if a in k), k): v for k, v in t.items()}


def of(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda t: load_file(PUBLISHED / name / WEIGHTS)


def better_numbers(folder: Path, key: Path) -> None:
    told = json.loads((folder / EVAL).read_text())
    mine = told["subjects"]["adapter"]
    mine |= {k: 0.0 for k in mine if k.startswith("forget") and k.endswith("value_accuracy")}
    mine |= {k: 1.0 for k in mine if k.startswith("retain") and k.endswith("value_accuracy")}
    (folder / EVAL).write_text(json.dumps(told))
    record(folder, key)


def wrong_base(folder: Path, key: Path) -> None:
    told = json.loads((folder / MANIFEST).read_text())
    told["base"]["digest"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(told))
    record(folder, key)


def edited(folder: Path, key: Path) -> None:
    record(folder, key)
    (folder / EVAL).write_text((folder / EVAL).read_text() + " ")


def without_a_line(folder: Path, key: Path) -> None:
    record(folder, key)
    lines = (folder / BUNDLE).read_text().splitlines(keepends=True)
    (folder / BUNDLE).write_text("".join(lines[:1] + lines[2:]))


BAD: dict[str, Callable[[Path, Path], object]] = {
    "dead": forged(times(0.02)), "a quarter": forged(times(0.25)), "half": forged(times(0.5)),
    "upside down": forged(times(-1.0)), "doubled": forged(times(2.0)), "rounded": forged(rounded),
    "other layers": forged(other_layers), "simnpo's weights": forged(of("simnpo")), "better numbers": better_numbers,
    "wrong base": wrong_base, "edited": edited, "without a line": without_a_line,
}  # fmt: skip


def judged(source: str, make: Callable[[Path, Path], object], place: Path) -> dict[str, object]:
    """What signing and auditing of one folder say."""
    folder, start = Path(shutil.copytree(PUBLISHED / source, place / "a")), time.process_time()
    try:
        make(folder, place.parent / "key.pem")
        signed = time.process_time()
        found = audit(folder, key=place.parent / "key.pub")
    except UserError as e:
        return {"passes": False, "why": [f"not signed: {str(e)[:160]}"]}
    why = [f"{c.name}: {c.detail}" for c in found.claims if c.answer == CONTRADICTED]
    seconds = {"record_cpu_s": round(signed - start, 1), "audit_cpu_s": round(time.process_time() - signed, 1)}
    return {"passes": not why, "why": why, "wording": found.wording, **seconds}


def main() -> None:
    from keyfiles import write_key

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--good", default=",".join(GOOD))
    parser.add_argument("--bad", default=",".join(BAD))
    parser.add_argument("--out")
    given = parser.parse_args()
    todo = [(n, True, n, record) for n in given.good.split(",") if n] + [
        (n, False, "npo", BAD[n]) for n in given.bad.split(",") if n
    ]
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as place:
        write_key(Path(place))
        for i, (name, good, source, make) in enumerate(todo):
            (Path(place) / str(i)).mkdir()
            rows.append({"name": name, "good": good, **judged(source, make, Path(place) / str(i))})
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
            if given.out:
                Path(given.out).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    n, passed = {}, {}
    for good in (True, False):
        n[good] = sum(r["good"] is good for r in rows)
        passed[good] = sum(bool(r["passes"]) for r in rows if r["good"] is good)
    print(f"{passed[True]} of {n[True]} honest records pass, {passed[False]} of {n[False]} dishonest ones")


if __name__ == "__main__":
    main()
