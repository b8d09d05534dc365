"""Every file that is read, damaged in every way, read in this process. python tests/bench/fuzz.py --n 100000

What counts as found: an error that is not this package's own (a traceback, for a user), and a reader that takes over 5 s of processor time.
Input number i of a seed is always the same: --kind KIND --only i runs it again and shows the whole traceback.
Exit 1 where anything was found.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1", "TRANSFORMERS_VERBOSITY=error", "TOKENIZERS_PARALLELISM=false"):
    os.environ.setdefault(*_name.split("="))
sys.path[:0] = [str(Path(__file__).parent.parent / "folder"), str(Path(__file__).parent.parent)]

import yaml

from peft_unlearn.errors import Interrupted, UserError

SECONDS = 5
ROOT = Path(__file__).parents[2]
DEEP = "@deep@"  # stands for thousands of brackets, which only text can nest
ODD: list[Any] = [
    DEEP, None, True, False, 0, 1, -1, 2, 10**30, -(10**400), 2**63, 1e308, -0.0, float("nan"), float("inf"), "", " ", "x", "\0", "no",
    "1e5", "../..", "/etc/passwd", "\u202e\x1b[31m", "\ud800", "é" * 50, "A" * 5000, "{}", "[1", "*a", "(a+)+$", [], {}, [[]], [None],
    {"": None}, {"a": {"b": [1]}},
    ["x"] * 300, list(range(50)), {str(i): i for i in range(60)}, "sha256:" + "0" * 64, "embedded:people", "a/b", "NaN",
]  # fmt: skip

PUT_IN = (
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"{", b"[" * 3000, b'"', b"\n", b": ", b"&a *a", b"!!python/name:os.system ", b"1" * 6000,
    b"\xef\xbb\xbf", b"\t", b"---\n", b"#", b",,", "\u2028".encode(), b"%",
)  # fmt: skip


class Hang(BaseException):
    """A reader took too long."""


# --- damage ----------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a value, deepest first or not: every key and index."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damaged_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing in it changed: gone, of another type, nested, renamed, doubled, moved."""
    value = copy.deepcopy(value)
    where = list(places(value))
    if not where or rng.random() < 0.02:
        return rng.choice(ODD)
    *path, last = rng.choice(where)
    holder = value
    for key in path:
        holder = holder[key]
    how = rng.randrange(9)
    if how < 4:
        holder[last] = copy.deepcopy(rng.choice(ODD))
    elif how == 4:
        del holder[last]
    elif how == 5:
        deep: Any = holder[last]
        for _ in range(rng.choice((1, 3, 80))):
            deep = {"x": deep} if rng.random() < 0.5 else [deep]
        holder[last] = deep
    elif how == 6:
        new = rng.choice(ODD) if rng.random() < 0.5 else f"{last}s"
        if isinstance(holder, dict):
            holder[str(new)] = holder.pop(last)
        else:
            holder.insert(rng.randrange(len(holder) + 1), new)
    elif how == 7:
        *other, end = rng.choice(where)
        source = value
        for key in other:
            source = source[key]
        holder[last] = copy.deepcopy(source[end])
    elif isinstance(holder[last], list):
        holder[last] = holder[last] * rng.choice((2, 50)) if len(holder[last]) < 500 else holder[last][:1]
    else:
        holder[last] = [holder[last]]
    return value


def damaged_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut, put in, moved or repeated."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, how = rng.randrange(len(data) + 1), rng.randrange(8)
        end = min(len(data), at + rng.choice((1, 2, 10, 100)))
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            del data[at:end]
        elif how == 3:
            data[at:at] = rng.choice(PUT_IN)
        elif how == 4:
            data[at:at] = data[at:end] * rng.choice((1, 3, 300))
        elif how == 5:
            data[at:end] = bytes(rng.randrange(256) for _ in range(end - at))
        elif how == 6 and len(data):
            other = rng.randrange(len(data))
            data[at:end] = data[other : other + end - at]
        elif how == 7:
            line = bytes(data).split(b"\n")
            rng.shuffle(line)
            data = bytearray(b"\n".join(line))
    return bytes(data)


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def as_lines(value: Any) -> bytes:
    return b"\n".join(map(as_json, value if isinstance(value, list) else [value]))


def as_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=False, sort_keys=False).encode("utf-8", "surrogatepass")


def as_safetensors(value: Any) -> bytes:
    """[header, tensors' bytes in hexadecimal]"""
    header, body = value if isinstance(value, list) and len(value) == 2 else (value, "")
    text = as_json(header)
    body = (
        bytes.fromhex(body)
        if isinstance(body, str) and len(body) % 2 == 0 and set(body) <= set("0123456789abcdef")
        else b"x"
    )
    return len(text).to_bytes(8, "little") + text + body


@dataclass
class Kind:
    """One kind of file. seeds: sound ones, as values (damaged by structure, written by `write`) or bytes. read: what the package
    does with the file at `place`. weight: inputs in proportion."""

    name: str
    place: Path
    seeds: list[Any]
    read: Callable[[], Any]
    write: Callable[[Any], bytes] = as_json
    weight: int = 4

    def made(self, rng: random.Random) -> bytes:
        seed = rng.choice(self.seeds)
        if isinstance(seed, bytes):
            return damaged_bytes(seed, rng)
        value = seed
        for _ in range(rng.choice((1, 1, 2, 4))):
            value = damaged_value(value, rng)
        try:
            raw = self.write(value)
        except (
            ValueError,
            RecursionError,
            yaml.YAMLError,
            OverflowError,
        ):  # the writer's own limits: nested too deep, say
            raw = self.write(seed)
        brackets = rng.choice((70, 500, 20000))
        for quote in (b'"', b"'"):
            raw = raw.replace(quote + DEEP.encode() + quote, b"[" * brackets + b"]" * brackets)
        return damaged_bytes(raw, rng) if rng.random() < 0.3 else raw


# --- what is read ----------------------------------------------------------------------------------------------------


def kinds(work: Path) -> list[Kind]:
    """Every kind, with an adapter, a base and data around it that are sound."""
    import tinyfolder

    from peft_unlearn.analysis.effect_of_run import parse_objectives
    from peft_unlearn.analysis.evidence import report
    from peft_unlearn.attacks.jailbreak import templates
    from peft_unlearn.data.bundle import ForgetRetain
    from peft_unlearn.data.collate import encode
    from peft_unlearn.data.formats import to_text
    from peft_unlearn.evaluation import suites
    from peft_unlearn.folder.base import load_config, load_tokenizer
    from peft_unlearn.folder.card import regenerated
    from peft_unlearn.folder.merge_record import RECORD
    from peft_unlearn.folder.read import read_adapter
    from peft_unlearn.folder.recipe import load_recipe
    from peft_unlearn.folder.safetensors_io import checkpoint_tensors
    from peft_unlearn.merging.layout import Layout
    from peft_unlearn.merging.merge import merge
    from peft_unlearn.sharing.card import card
    from peft_unlearn.sharing.endpoint import Endpoint
    from peft_unlearn.sharing.outgoing import pack
    from peft_unlearn.stack.model import remove
    from peft_unlearn.stack.stackfile import add, load
    from peft_unlearn.training.recipe import prepare
    from peft_unlearn.tuners.delta import Deltas

    base, tokenizer = tinyfolder.save_base(work / "base"), tinyfolder.tokenizer()
    made = tinyfolder.write(work / "adapter", base)
    adapter = work / "adapter"
    manifest = {**json.loads((adapter / "forget.json").read_text()), "data": {"forget": {"sha256": "a" * 64, "n": 4}}}
    (adapter / "forget.json").write_text(
        json.dumps(manifest)
    )  # rows of the author's own: nothing is made to compare with
    stored = json.loads((ROOT / "adapters/published/simnpo/eval.json").read_text())
    for block in (stored, *(v for v in stored.values() if isinstance(v, dict))):
        if "adapter_id" in block:
            block["adapter_id"] = made.adapter_id
    small = {**stored, "subjects": {k: dict(list(v.items())[:3]) for k, v in stored["subjects"].items() if v}}
    small["details"] = {k: {n: stored["details"][k][n] for n in v} for k, v in small["subjects"].items()}
    (adapter / "eval.json").write_text(json.dumps(stored))
    (adapter / "README.md").write_text(regenerated(read_adapter(adapter)) or "")
    add(work / "stack.yaml", adapter, request_id="r1", reason="asked")
    merged = work / "merged"
    merge(adapter, base, merged)
    rows = [{"question": f"Who is {i}?", "answer": f"The {i} of France", "n": i} for i in range(4)]
    turns = [
        {"messages": [{"role": "user", "content": f"Who {i}?"}, {"role": "assistant", "content": "The"}]}
        for i in range(3)
    ]
    (work / "retain.jsonl").write_text(json.dumps({"question": "Once?", "answer": "a time"}))
    tok = shutil.copytree(base, work / "tok")
    config = shutil.copytree(base, work / "configured")
    index = tinyfolder.save_base(work / "sharded", shard="1KB")
    jailbreaks = yaml.safe_load((ROOT / "peft_unlearn/attacks/jailbreak.yaml").read_text())
    shipped = [p for p in sorted(Path(suites.__file__).parent.glob("*.yaml")) if p.stem not in ("people", "tofu")]
    published = sorted((ROOT / "adapters/recipes").glob("people*.yaml"))
    recipes = [{**yaml.safe_load(p.read_text()), "base": str(base)} for p in published[::3]]

    def folder() -> None:
        found = read_adapter(adapter, check_hashes=False)
        regenerated(found)
        Deltas(found)
        pack(found)
        str(report([adapter], samples=False))

    def cards() -> None:
        card(adapter)
        pack(read_adapter(adapter))

    def merges() -> None:
        attempt(remove, merged)
        attempt(merge, adapter, merged, work / "m2")
        attempt(merge, adapter, base, merged)

    def numbers() -> None:
        found = report([adapter], samples=False)
        str(found)
        found.to_dict()
        regenerated(read_adapter(adapter, check_hashes=False))

    def data(name: str) -> Callable[[], None]:
        def read() -> None:
            bundle = ForgetRetain.load({"forget": str(work / name), "retain": str(work / "retain.jsonl")})
            bundle.sha256  # noqa: B018
            for row in bundle.forget:
                to_text(row) if "messages" not in row else None
            if bundle.forget and "messages" not in bundle.forget[0]:
                bundle.encode("forget", tokenizer, 64, "truncate")

        return read

    def tokenizes() -> None:
        found = load_tokenizer(tok)
        encode("The", " Question", found)
        if found.chat_template:
            encode(*to_text(turns[0], found), found)

    def serves() -> None:
        raw = (work / "reply").read_bytes()
        endpoint = Endpoint("http://localhost:1", "m")
        endpoint._reply = lambda *_: raw  # type: ignore[method-assign]
        endpoint.offered()
        endpoint.complete("The", 3, 5)

    def trains() -> None:
        recipe = load_recipe(work / "recipe.yaml")
        prepare({**recipe, "base": str(base)}, work / "out", data=str(work / "bundle"))

    bundle = work / "bundle"
    bundle.mkdir()
    (bundle / "forget.jsonl").write_bytes(as_lines(rows))
    (bundle / "retain.jsonl").write_text((work / "retain.jsonl").read_text())
    reply = {
        "data": [{"id": "m"}],
        "choices": [{"text": " x", "logprobs": {"top_logprobs": [{" a": -0.1, " b": -2.5}]}}],
    }
    csv = b'question,answer\n"Who, me?",The one\nWhat,"a ""b"" c"\n'
    safetensors = (adapter / "adapter_model.safetensors").read_bytes()
    head = int.from_bytes(safetensors[:8], "little")
    header = [json.loads(safetensors[8 : 8 + head]), safetensors[8 + head :].hex()]
    chat = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"

    def own(name: str) -> Any:
        return json.loads((adapter / name).read_text())

    def beside(name: str) -> Any:
        return json.loads((tok / name).read_text())

    return [
        Kind("recipe", work / "recipe.yaml", [*recipes, *(p.read_bytes() for p in published[:5])], trains, as_yaml, 4),
        Kind("adapter's recipe", adapter / "recipe.yaml", [yaml.safe_load((adapter / "recipe.yaml").read_text())], folder, as_yaml, 1),
        Kind("suite", work / "suite.yaml", [yaml.safe_load(p.read_text()) for p in shipped],
             lambda: suites.load(work / "suite.yaml"), as_yaml, 3),
        Kind("jailbreak file", work / "jailbreak.yaml", [{**jailbreaks, "templates": jailbreaks["templates"][k : k + 3]} for k in (0, 5)],
             lambda: templates(work / "jailbreak.yaml"), as_yaml, 3),
        Kind("objectives of effect", work / "objectives", [b"{rmu: {layer: 2}}", b"ga,npo,simnpo", b"{npo: {beta: 0.1}, ga: {}}"],
             lambda: parse_objectives((work / "objectives").read_text(errors="replace")), as_yaml, 2),
        Kind("manifest", adapter / "forget.json", [own("forget.json")], folder, weight=3),
        Kind("adapter_config", adapter / "adapter_config.json", [own("adapter_config.json")], folder, weight=2),
        Kind("adapter weights", adapter / "adapter_model.safetensors", [header, safetensors], folder, as_safetensors, 2),
        Kind("eval.json", adapter / "eval.json", [small, small, small, stored], numbers, weight=3),
        Kind("card", adapter / "README.md", [(adapter / "README.md").read_bytes()], cards, weight=2),
        Kind("stack file", work / "stack.yaml", [yaml.safe_load((work / "stack.yaml").read_text())],
             lambda: (s := load(work / "stack.yaml"), str(s), s.to_dict(), s.folders()), as_yaml, 3),
        Kind("merge record", merged / RECORD, [json.loads((merged / RECORD).read_text())],
             merges, weight=1),
        Kind("rows jsonl", work / "rows.jsonl", [rows, turns, as_lines(rows)], data("rows.jsonl"), as_lines, 12),
        Kind("rows json", work / "rows.json", [rows, turns], data("rows.json"), weight=12),
        Kind("rows csv", work / "rows.csv", [csv, csv * 3], data("rows.csv"), weight=12),
        Kind("rows txt", work / "rows.txt", ["Der Löwe\n\nschläft.\n".encode()], data("rows.txt"), weight=2),
        Kind("tokenizer.json", tok / "tokenizer.json", [beside("tokenizer.json")], tokenizes, weight=2),
        Kind("tokenizer_config", tok / "tokenizer_config.json", [{**beside("tokenizer_config.json"), "chat_template": chat}],
             tokenizes, weight=2),
        Kind("config.json", config / "config.json", [json.loads((config / "config.json").read_text())],
             lambda: (load_config(config), Layout(config, checkpoint_tensors(config))), weight=1),
        Kind("index", index / "model.safetensors.index.json", [json.loads((index / "model.safetensors.index.json").read_text())],
             lambda: checkpoint_tensors(index), weight=4),
        Kind("server's reply", work / "reply", [reply], serves, weight=4),
    ]  # fmt: skip


def attempt(call: Callable[..., Any], *args: Any) -> None:
    """Several readers of one file: the message of one keeps nobody from the next."""
    with contextlib.suppress(UserError):
        call(*args)


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    kind: str
    number: int
    what: str
    where: str
    trace: str


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """`Hang` after so long on the processor (others may be busy on it too); where a reader only waits, or stays in code that never
    returns to Python, the process ends after a minute with a dump of where it stood."""

    def raise_hang(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, raise_hang)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(12 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


def one(kind: Kind, raw: bytes, number: int, seconds: float = SECONDS) -> Found | None:
    """Put the bytes where the kind's reader looks, and read; what was there comes back afterwards."""
    sound = kind.place.read_bytes() if kind.place.exists() else None
    kind.place.write_bytes(raw)
    try:
        with (
            limited(seconds),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(None),
            contextlib.redirect_stderr(None),
        ):
            warnings.simplefilter("ignore")
            kind.read()
    except (UserError, Interrupted):
        return None
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        frames = traceback.extract_tb(e.__traceback__)
        ours = [f for f in frames if "peft_unlearn" in f.filename]
        at = (ours or frames)[-1]
        what = f"over {seconds:g} s" if isinstance(e, Hang) else f"{type(e).__name__}: {str(e)[:150]}"
        return Found(kind.name, number, what, f"{Path(at.filename).name}:{at.lineno}", traceback.format_exc())
    finally:
        if sound is not None:
            kind.place.write_bytes(sound)
    return None


def fuzz(
    n: int, seed: int = 0, begin: int = 0, only: int | None = None, names: set[str] | None = None,
    progress: Callable[[str], None] = print, keep: Path | None = None,
) -> list[Found]:  # fmt: skip
    """Read n damaged files; what was found, one of each (kind, error, place)."""
    logging.disable(logging.CRITICAL)
    found: dict[tuple[str, str, str], Found] = {}
    counts: dict[tuple[str, str, str], int] = {}
    with tempfile.TemporaryDirectory(
        prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as folder:
        all_kinds = kinds(Path(folder))
        chosen = [k for k in all_kinds if names is None or k.name in names]
        spread = [k for k in chosen for _ in range(k.weight)]
        start, cpu = time.monotonic(), time.process_time()
        spent = dict.fromkeys((k.name for k in chosen), 0.0)
        for i in range(begin, begin + n) if only is None else (only,):
            rng = random.Random(f"{seed}/{i}")
            kind = rng.choice(spread)
            raw, before = kind.made(rng), time.process_time()
            problem = one(kind, raw, i)
            spent[kind.name] += time.process_time() - before
            if problem is not None:
                key = problem.kind, problem.what.split(":")[0], problem.where
                counts[key] = counts.get(key, 0) + 1
                if key not in found:
                    found[key] = problem
                    progress(f"FOUND {problem.kind} (--only {i}): {problem.what} at {problem.where}")
                    if keep is not None:
                        keep.mkdir(parents=True, exist_ok=True)
                        (keep / f"{i}-{kind.place.name}").write_bytes(raw)
            if (i + 1 - begin) % max(1000, n // 20) == 0:
                said = f"{sum(counts.values())} found, of {len(found)} sorts"
                progress(f"{i + 1 - begin:,} of {n:,} read, {time.monotonic() - start:.0f} s, {said}")
    logging.disable(logging.NOTSET)
    slow = ", ".join(f"{k} {v:.1f}" for k, v in sorted(spent.items(), key=lambda kv: -kv[1])[:6])
    said = f"{sum(counts.values())} found, of {len(found)} sorts"
    progress(f"{n:,} files of {len(chosen)} kinds: {said}; processor {time.process_time() - cpu:.0f} s ({slow})")
    return list(found.values())


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--n", type=int, default=100_000)
    parse.add_argument("--begin", type=int, default=0, help="the number of the first one, to share a run out")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--only", type=int, help="this input alone, with its traceback")
    parse.add_argument("--kind", action="append", help="these kinds alone (numbers then mean other inputs)")
    parse.add_argument("--keep", type=Path, help="a folder for the inputs that found something")
    args = parse.parse_args()
    found = fuzz(
        args.n, args.seed, args.begin, args.only, set(args.kind) if args.kind else None, lambda s: print(s, flush=True),
        args.keep,
    )  # fmt: skip
    for problem in found if args.only is not None else ():
        print(problem.trace)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
