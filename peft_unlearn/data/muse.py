"""MUSE in its own layout: a folder with ``knowmem``, ``verbmem`` and ``privleak``, as the authors' repository has one for each corpus.

    knowmem/forget_qa.json, forget_qa_icl.json, retain_qa.json, retain_qa_icl.json    {question, answer}
    verbmem/forget.json                                                              {prompt, gt}
    privleak/forget.json, retain.json, holdout.json                                  a list of texts

The retain files may also be called retain2; jsonl, csv and parquet do as well. Nothing of it comes with this package: the texts
are news articles and novels. A file that is missing leaves its set out; the suite then says so.
Paper: https://arxiv.org/abs/2407.06460
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .bundle import ForgetRetain
from .chat import Template
from .files import find_file, read_file
from .formats import load_rows

# set of the suite -> the file's places, first found
FILES = {
    "knowmem_forget": ("knowmem/forget_qa",),
    "knowmem_forget_icl": ("knowmem/forget_qa_icl",),
    "knowmem_retain": ("knowmem/retain_qa", "knowmem/retain2_qa"),
    "knowmem_retain_icl": ("knowmem/retain_qa_icl", "knowmem/retain2_qa_icl"),
    "verbmem_forget": ("verbmem/forget",),
    "privleak_forget": ("privleak/forget",),
    "privleak_retain": ("privleak/retain", "privleak/retain2"),
    "privleak_holdout": ("privleak/holdout",),
}
FORGET = ("privleak_forget", "verbmem_forget", "knowmem_forget")
# Of a verbatim text only the first 128 tokens are compared; no tokenizer gets further than this many words with them
WORDS = 512


def recognizes(spec: str | Path) -> bool:
    """Whether this is a folder in MUSE's layout."""
    path = Path(spec).expanduser()
    return path.is_dir() and any(find_file(path, *places) for places in FILES.values())


def load(spec: str | Path, template: Template = "qa") -> ForgetRetain:
    """The bundle: every set of `FILES` that is there in `extra`.

    forget: the texts of privleak/forget, else the verbatim prompts, else the questions; holdout: privleak/holdout. Retain is
    left empty: the retained texts of privleak stand in `extra`, since MUSE's retain sets are no training set here.
    Raises UserError: nothing of the forget corpus, or malformed rows with file, row and field.
    """
    folder = Path(spec).expanduser()
    sets = {name: _rows(file, name) for name, places in FILES.items() if (file := find_file(folder, *places))}
    forget = next((sets[name] for name in FORGET if name in sets), None)
    if forget is None:
        raise UserError(
            f"data: {spec} holds nothing of the forget corpus: {', '.join(f'{FILES[n][0]}.json' for n in FORGET)}"
        )
    return ForgetRetain(forget, None, sets.get("privleak_holdout"), extra=sets, template=template)


def _rows(file: Path, name: str) -> list[dict[str, Any]]:
    rows = [row for _, row in read_file(file)]
    if name == "verbmem_forget":
        rows = [_verbatim(row) for row in rows]
    return load_rows(rows, name=str(file))


def _verbatim(row: Any) -> Any:
    """{prompt, gt} -> {prompt, completion}; anything else goes on to the check that names what is wrong."""
    if not isinstance(row, Mapping) or "gt" not in row:
        return row
    text = row["gt"]
    if isinstance(text, str) and len(words := text.split(" ")) > WORDS:
        text = " ".join(words[:WORDS])
    return {"prompt": row.get("prompt"), "completion": text}
