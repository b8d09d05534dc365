"""`forget` on real models, judged on rows that it never saw: the table of docs/your-model.md.

    python tests/bench/real.py MODEL --question "What is the capital of France?" --budget 15m --out docs/real.json
    python tests/bench/real.py MODEL --request DIR --seeds 0,1 --budget 15m --out docs/real.json

DIR holds forget.jsonl and, for judging alone, any of heldout_wordings, reversed, neighbors_seen, neighbors_unseen and general. Nothing of
DIR but forget.jsonl (and neighbors_seen, with --retain) is given to `forget`. A run is added to the file; figures of other runs stay.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch

from peft_unlearn.data.neutral import CODE
from peft_unlearn.evaluation.score import on_one_model, score
from peft_unlearn.folder.dtype import fast_dtype
from peft_unlearn.folder.versions import installed_versions
from peft_unlearn.request.forget import forget
from peft_unlearn.stack.model import ForgetModel

SOURCES = {
    "forget": "forget", "wordings": "heldout_wordings", "reversed": "reversed", "retain": "neighbors_seen",
    "neighbors_unseen": "neighbors_unseen", "general_unseen": "general",
}  # fmt: skip


def _answered(row: dict[str, Any]) -> dict[str, Any]:
    """Rows for judging alone may say the value and no answer."""
    value = row.get("value", "")
    return {"answer": value if isinstance(value, str) else value[0], **row}


def judged(model: str, adapter: str, request: Path, dtype: str) -> dict[str, Any]:
    """Suite `own` on the request's own rows: subject -> key -> value."""
    rows: dict[str, Any] = {
        name: [_answered(json.loads(line)) for line in (request / f"{file}.jsonl").read_text("utf-8").splitlines()]
        for name, file in SOURCES.items()
        if (request / f"{file}.jsonl").is_file()
    }
    rows["code"] = [{"question": q, "answer": "def"} for q in CODE]
    stack = ForgetModel.from_pretrained(model, {"adapter": adapter}, dtype=dtype)
    template = "chat" if stack.tokenizer.chat_template else "qa"
    subjects = on_one_model(stack.model, {"base": None, "adapter": "adapter"})
    report = score(subjects, "own", rows, stack.tokenizer, template=template, brief=True)
    wanted = ("/value_accuracy", "/python_parses")
    return {
        s: {k: v for k, v in (found or {}).items() if k.endswith(wanted)}
        for s, found in report.subjects.items()
        if found
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--question")
    parser.add_argument("--request", type=Path)
    parser.add_argument("--retain", action="store_true", help="give neighbors_seen as the retain set")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--budget", default="15m")
    parser.add_argument("--work", type=Path, default=Path("real-runs"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for seed in map(int, args.seeds.split(",")):
        name = f"{Path(args.model).name}-{args.request.name if args.request else 'question'}-{seed}"
        adapter, began = args.work / name, time.process_time()
        found = forget(
            args.question or (), file=args.request and args.request / "forget.jsonl", base=args.model, out=adapter, seed=seed,
            retain=args.request / "neighbors_seen.jsonl" if args.retain else None, budget=args.budget,
        )  # fmt: skip
        print(found)
        run = {
            "model": Path(args.model).name, "request": args.question or args.request.name, "seed": seed, "budget": args.budget,
            "dtype": fast_dtype(args.model), "threads": torch.get_num_threads(), "machine": platform.machine(),
            "wall_s": round(found.seconds), "cpu_s": round(time.process_time() - began),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "before": found.before, "after": found.after,
            "lacking": found.lacking, "runs": [{k: r[k] for k in ("settings", "steps", "seconds", "ended")} for r in found.runs],
            "versions": installed_versions(),
        }  # fmt: skip
        if args.request:
            run["judged"] = judged(args.model, str(adapter), args.request, fast_dtype(args.model))
        known = json.loads(args.out.read_text()) if args.out.is_file() else {"runs": []}
        known["runs"].append(run)
        args.out.write_text(json.dumps(known, indent=1) + "\n")
        print(json.dumps(run.get("judged"), indent=1))


if __name__ == "__main__":
    main()
