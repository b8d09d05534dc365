"""TOFU in its own layout: a folder with its file names, or the data set on the Hub.

``FOLDER``, ``FOLDER?split=forget05``, ``locuslab/TOFU?split=forget01``; a Hub id may carry ``@revision``. The default split is
forget10. What is forgotten and retained is the same whether the perturbed files are there or not; they add the paraphrased
and wrong answers that truth ratios need.
Paper: https://arxiv.org/abs/2401.06121
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from .bundle import SETS, ForgetRetain
from .chat import Template
from .files import find_file, hub_rows
from .formats import identity, load_rows

SPLITS = {f"forget{n:02}": (f"retain{100 - n}", f"holdout{n:02}") for n in (10, 5, 1)}
# further sets of the suite, by the file each comes from
EXTRA = {
    "retain_perturbed": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
_HUB = re.compile(r"^[\w.-]+/TOFU(@[\w.-]+)?$", re.IGNORECASE)


def recognizes(spec: str | Path) -> bool:
    """Whether this names TOFU: a folder that holds a forget split and no plain ``forget`` file, or a Hub id of that name."""
    folder = str(spec).partition("?")[0]
    path = Path(folder).expanduser()
    if path.is_dir():
        return not find_file(path, "forget") and any(_forget_file(path, s) for s in SPLITS)
    return bool(_HUB.match(folder)) and not path.exists()


def load(spec: str | Path, template: Template = "qa") -> ForgetRetain:
    """The bundle of one split.

    forget: the split, with its paraphrased and wrong answers where the perturbed file is there.   retain: everything else
    (retain90, ..), or the 400 rows of retain_perturbed where that file is missing.   holdout: authors that no model saw.
    extra: retain_perturbed, real_authors, world_facts, each where its file is there.
    Raises UserError: no such split, no forget file, or rows that stand in the forget and in the retain set.
    """
    where, _, query = str(spec).partition("?")
    path = Path(where).expanduser()
    local = path.is_dir()
    split = _split(query, (lambda s: bool(_forget_file(path, s))) if local else lambda s: True, where)
    get = _from_folder(path) if local else _from_hub(where)
    retain_name, holdout_name = SPLITS[split]
    plain, perturbed = get(split), get(f"{split}_perturbed")
    forget = perturbed if perturbed is not None and _same_rows(plain, perturbed, split) else plain
    if forget is None:
        raise UserError(f"data: {where} holds no {split} rows")
    extra = {name: rows for name, file in EXTRA.items() if (rows := get(file)) is not None}
    retain = get(retain_name)
    if retain is None and "retain_perturbed" in extra:
        retain = extra["retain_perturbed"]
    holdout = get(holdout_name)
    if holdout is None and (larger := get("holdout10")) is not None:
        holdout = larger[: len(forget)]  # any authors that nobody saw will do
    refs: dict[str, str] = {} if local else dict.fromkeys(SETS, f"{where}?split={split}")
    return ForgetRetain(forget, retain, holdout, extra=extra, refs=refs, template=template)


def _split(query: str, there: Callable[[str], bool], where: str) -> str:
    if query:
        key, _, split = query.partition("=")
        if key != "split" or split not in SPLITS:
            raise UserError(f"data: {where}?{query}: after the ? stands split=NAME.{nearest(split, SPLITS)}")
        return split
    return next((s for s in SPLITS if there(s)), "forget10")


def _same_rows(plain: list[dict[str, Any]] | None, perturbed: list[dict[str, Any]], split: str) -> bool:
    """The perturbed file holds the split's own rows; else its answers would be judged by other questions' wrong ones."""
    if plain is None or list(map(identity, plain)) == list(map(identity, perturbed)):
        return True
    if len(plain) != len(perturbed):
        what = f"{len(plain)} and {len(perturbed)} rows"
    else:
        differ = [i for i, (a, b) in enumerate(zip(plain, perturbed, strict=True)) if identity(a) != identity(b)]
        what = f"{len(differ)} rows differ, first row {differ[0]}"
    raise UserError(
        f"data: {split} and {split}_perturbed are not the same questions and answers ({what}); take one copy of TOFU"
    )


def _forget_file(folder: Path, split: str) -> Path | None:
    return find_file(folder, split, f"{split}_perturbed")


def _from_folder(folder: Path) -> Callable[[str], list[dict[str, Any]] | None]:
    return lambda name: [_question_answer(r) for r in load_rows(f)] if (f := find_file(folder, name)) else None


def _question_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Some copies call the fields of the forget splits prompt and response; the rows are the same."""
    if "question" not in row and {"prompt", "response"} <= set(row):
        rest = {k: v for k, v in row.items() if k not in ("prompt", "response")}
        return {"question": row["prompt"], "answer": row["response"], **rest}
    return row


def _from_hub(ref: str) -> Callable[[str], list[dict[str, Any]] | None]:
    repo, _, revision = ref.partition("@")
    return lambda name: load_rows(hub_rows(f"{ref} {name}", repo, name, revision), name=f"{ref} {name}")
