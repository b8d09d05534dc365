"""kill -9 at random moments of every command that writes; the same call then ends with the same bytes. python tests/bench/kills.py --n 300

After each kill what stands at the destination is nothing, the old or the new, and is read without complaint; the next run (for a
training with --resume, where there is a checkpoint) gives the bytes of a run that nobody disturbed, and leaves nothing else beside
them. Exit 1 where that is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1", "TRANSFORMERS_VERBOSITY=error", "TOKENIZERS_PARALLELISM=false"):
    os.environ.setdefault(*_name.split("="))
sys.path[:0] = [str(Path(__file__).parent.parent)]

import forking
import tiny
import torch

from peft_unlearn.errors import UserError
from peft_unlearn.folder.read import read_adapter

torch.set_num_threads(1)
forking.bars_of_its_own()
DATE = datetime(2026, 1, 1, tzinfo=timezone.utc)


@dataclass
class Job:
    """A command. start: puts into a folder what is there before. work: runs it there, again after a kill. sound: raises where what
    stands there cannot be read. beside: what may stay beside the result, of every run."""

    name: str
    start: Callable[[Path], None]
    work: Callable[[Path], Any]
    sound: Callable[[Path], Any]
    wanted: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    kills: int = 0
    wrong: list[str] = field(default_factory=list)


def contents(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file, without working folders, whose bytes are of no one run."""
    files = [p for p in folder.rglob("*") if p.is_file() and ".work" not in p.relative_to(folder).parts[0]]
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if not p.name.endswith(".lock")
    }


def jobs(root: Path) -> list[Job]:
    from peft_unlearn.analysis.calibrate import calibrate
    from peft_unlearn.analysis.evidence import report
    from peft_unlearn.attacks.attack import attack
    from peft_unlearn.attacks.requests import requests_of
    from peft_unlearn.evaluation.evaluate import evaluate
    from peft_unlearn.folder.results import save
    from peft_unlearn.merging.compose import compose
    from peft_unlearn.merging.merge import merge
    from peft_unlearn.sharing.card import card
    from peft_unlearn.sharing.export import export
    from peft_unlearn.stack.stackfile import add, load, revoke
    from peft_unlearn.training.checkpoints import last_checkpoint
    from peft_unlearn.training.train import train

    base = root / "base"
    tiny.llama().save_pretrained(base, max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(base)
    for name, n, seed in (("forget", 4, 1), ("retain", 6, 2)):
        rows = tiny.rows(n, name[0], seed)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = {
        "name": "test", "base": str(base), "data": {n: str(root / f"{n}.jsonl") for n in ("forget", "retain")},
        "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}, "seed": 3,
        "terms": {"forget": {"npo": {"beta": 0.5}}, "retain": {"nll": {}}},
        "train": {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 0.01, "save_steps": 2, "disable_tqdm": True},
    }  # fmt: skip
    train(recipe, root / "a")
    train({**recipe, "seed": 4}, root / "b")
    first, second = root / "a", root / "b"
    suite = {
        "format": 1,
        "sets": {k: {"role": k, "metrics": ["extraction_strength", "probability"]} for k in ("forget", "retain")},
    }
    (root / "suite.yaml").write_text(json.dumps(suite))
    given: dict[str, Any] = {"base": str(base), "data": str(root), "suite": str(root / "suite.yaml")}

    def trained(at: Path) -> None:
        resume = last_checkpoint(at / "out.work") is not None if (at / "out.work").is_dir() else False
        train(recipe, at / "out", resume=resume)

    def judged(at: Path) -> None:
        evaluate([at / "a"], **given)

    def attacked(at: Path) -> None:
        wanted = requests_of(plain=["strip"], sets=[])
        attack([at / "a"], wanted, base=given["base"], data=given["data"])

    def calibrated(at: Path) -> None:
        calibrate(at / "a", retain_floor=0.5, base=given["base"], data=given["data"], metric="probability", bake=False)

    def stacked(at: Path) -> None:
        file = at / "stack.yaml"
        names = {e.name: e for e in load(file).entries} if file.exists() else {}
        for name, folder in (("a", first), ("b", second)):
            if name not in names:
                add(file, folder, request_id=name, reason="asked", name=name, date=DATE)
        if names.get("a") is None or names["a"].revoked is None:
            revoke(file, "a", "again", date=DATE)

    def copied(at: Path) -> None:
        shutil.copytree(first, at / "a")

    def reads(name: str) -> Callable[[Path], Any]:
        return lambda at: read_adapter(at / name) if (at / name).exists() else None

    def once(write: Callable[[Path], Any]) -> Callable[[Path], Any]:
        """For what never replaces anything: done is done."""
        return lambda at: None if (at / "out").exists() else write(at)

    def nothing(at: Path) -> None:
        pass

    return [
        Job("train", nothing, trained, reads("out")),
        Job("merge", nothing, lambda at: merge(first, base, at / "out", dtype="bfloat16", min_cosine=-1), nothing),
        Job("merge --in-memory", nothing, lambda at: merge(first, base, at / "out", in_memory=True), nothing),
        Job("compose", nothing, lambda at: compose([(first, 1.0), (second, -0.5)], at / "out", base=base), reads("out")),
        Job("calibrate", copied, calibrated, reads("a")),
        Job("eval", copied, judged, reads("a")),
        Job("attack", copied, attacked, reads("a")),
        Job("card --write", copied, lambda at: card(at / "a", write=True, description="Other words."), reads("a")),
        Job("stack", nothing, stacked, lambda at: load(at / "stack.yaml") if (at / "stack.yaml").exists() else None),
        Job("export", nothing, once(lambda at: export(first, at / "out", "vllm", base=base)), nothing),
        Job("report --out", copied, lambda at: save(report([at / "a"], samples=False), at / "page.html"), nothing),
    ]  # fmt: skip


def undisturbed(job: Job, root: Path) -> None:
    """What a run gives, how long it takes, and that a second one gives the same."""
    for _ in range(2):
        at = root / "try" / "here"
        at.mkdir(parents=True)
        job.start(at)
        start = time.perf_counter()
        job.work(at)
        job.seconds = time.perf_counter() - start
        found = contents(at)
        if job.wanted and found != job.wanted:
            odd = [n for n in {*found, *job.wanted} if found.get(n) != job.wanted.get(n)]
            job.wrong.append(f"two runs that nobody disturbed differ: {', '.join(sorted(odd)[:5])}")
        job.wanted = found
        shutil.rmtree(root / "try")


def try_once(job: Job, root: Path, rng: random.Random) -> None:
    """One destination: kills, one to three, then the run that ends it."""
    at = root / "try" / "here"
    at.mkdir(parents=True)
    job.start(at)
    before, moments = contents(at), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        moments.append(round(rng.uniform(0, 1.1 * job.seconds), 4))
        was = forking.killed(lambda: job.work(at), moments[-1])
        if was is None:
            job.wrong.append(f"after kills at {moments[:-1]} a run failed")
            break
        job.kills += was
        try:
            job.sound(at)
        except UserError as e:
            job.wrong.append(f"after kills at {moments}: {e}")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            job.work(at)
    except Exception as e:
        job.wrong.append(f"after kills at {moments} the last run failed: {type(e).__name__}: {e}")
    found = contents(at)
    if found != job.wanted:
        odd = [n for n in {*found, *job.wanted} if found.get(n) != job.wanted.get(n)]
        new = [n for n in found if n not in job.wanted and n not in before]
        job.wrong.append(f"after kills at {moments}: other bytes in {', '.join(sorted(odd)[:5])}; left over: {new[:5]}")
    shutil.rmtree(root / "try")


def run(
    n: int, seed: int = 0, names: set[str] | None = None, seconds: float = 1e9, progress: Callable[[str], None] = print
) -> list[Job]:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rng, start = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        root = Path(folder)
        (root / "given").mkdir()
        every = [j for j in jobs(root / "given") if names is None or j.name in names]
        for job in every:
            undisturbed(job, root)
            progress(f"{job.name}: {job.seconds:.2f} s undisturbed, {len(job.wanted)} files")
        said = 0
        while sum(j.kills for j in every) < n and time.monotonic() - start < seconds:
            job = min(every, key=lambda j: (j.kills, rng.random()))
            known = len(job.wrong)
            try_once(job, root, rng)
            for text in job.wrong[known:]:
                progress(f"WRONG {job.name}: {text}")
            if (kills := sum(j.kills for j in every)) >= said + max(1, n // 10):
                said = kills
                progress(
                    f"{kills} of {n} kills, {time.monotonic() - start:.0f} s, {sum(len(j.wrong) for j in every)} wrong"
                )
    for job in every:
        progress(f"{job.name}: {job.kills} kills, {len(job.wrong)} wrong")
    return every


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--n", type=int, default=300, help="kills, over all commands alike")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--job", action="append", help="these alone")
    parse.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    args = parse.parse_args()
    every = run(args.n, args.seed, set(args.job) if args.job else None, args.seconds, lambda s: print(s, flush=True))
    return 1 if any(j.wrong for j in every) else 0


if __name__ == "__main__":
    sys.exit(main())
