"""`augment`: a few questions become the rows of a request, without training on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.formats import load_rows
from ..errors import UserError
from ..folder.base import load_base, load_config, load_tokenizer, resolve_base
from ..folder.device import placed
from ..folder.digest import digest_checkpoint
from ..folder.dtype import dtype_of
from ..training.train import to_stderr
from .ask import Asker, Generate, Progress
from .outcome import Forgotten
from .prepare import Row, as_questions, prepare


def augment(
    questions: str | Sequence[str] = (),
    *,
    base: str,
    out: str | Path = "request",
    file: str | Path | None = None,
    retain: str | Path | None = None,
    value: str | None = None,
    seed: int = 0,
    dtype: str = "auto",
    generate: Generate | None = None,
    log: Callable[[str], None] = to_stderr,
    progress: Progress | None = None,
) -> Forgotten:
    """Make the rows of a request: wordings in both directions, neighbors and neutral prompts with the base's own answers, and what judges.

    One .jsonl a set in the folder `out`, which is a bundle for recipes and for ``forget --file``; answers are kept in ``answers.json``
    beside them by hash, so that a second call asks only what is new.

    Args:
        file, retain, value, dtype: as of `forget`.
        generate: ``(prompts, max_new_tokens) -> answers``, another generator than the base itself; prompts come in the base's template.

    Raises:
        UserError: as of `forget`; or `out` has other files.
    """
    rows, kept = rows_of_request(questions, file, retain, value)
    out = Path(out).expanduser()
    if file is not None and Path(file).expanduser().is_dir():
        raise UserError(f"{file} has its rows already; edit them, and use it with `forget --file` or in a recipe")
    if out.exists() and not (out.is_dir() and all(p.suffix in (".jsonl", ".json") for p in out.iterdir())):
        raise UserError(f"{out} holds other things than rows; choose another --out")
    base_dir = resolve_base(base)
    loaded = load(base, base_dir, dtype_of(dtype, base_dir), log)
    made = prepare(rows, loaded.asker(out / "answers.json", progress, generate), value=value, kept=kept, seed=seed)
    made.write(out)
    return Forgotten(
        facts=[(f.question, f.value[0]) for f in made.facts], unknown=made.unknown, notes=made.notes, data=str(out),
        rows={n: len(r) for n, r in made.sets.items()},
    )  # fmt: skip


def rows_of_request(
    questions: str | Sequence[str], file: str | Path | None, retain: str | Path | None, value: str | None
) -> tuple[list[Row], list[Row]]:
    """(what is to be forgotten, what a user wants kept), as questions; the first is empty where `file` is a folder of finished rows.

    Raises:
        UserError: both or neither of questions and file; options that do not belong together; rows that are no questions.
    """
    asked = [questions] if isinstance(questions, str) else list(questions)
    prepared = file is not None and Path(file).expanduser().is_dir()
    if bool(asked) == (file is not None):
        raise UserError(
            "say what is to be forgotten: questions, or a file of them with --file" + (", not both" if asked else "")
        )
    if prepared and retain is not None:
        raise UserError(
            f"--retain belongs to making rows, and {file} has them already; put yours into kept.jsonl there"
        )
    if value is not None and len(asked) != 1:
        raise UserError("--value belongs to a single question; in a file each row has its own 'value'")
    rows = [{"question": q} for q in asked]
    if file is not None and not prepared:
        rows = as_questions(load_rows(str(file), "forget set"))
    return rows, as_questions(load_rows(str(retain), "retain set")) if retain is not None else []


@dataclass(frozen=True)
class Loaded:
    """A base in memory, and how it is asked."""

    model: Any
    tokenizer: Any
    template: str
    dtype: str
    blocks: int
    digest: str

    def asker(self, kept: Path, progress: Progress | None, generate: Generate | None = None) -> Asker:
        """Its answers, or those of `generate`, kept in that file."""
        kept.parent.mkdir(parents=True, exist_ok=True)
        return Asker(
            self.model, self.tokenizer, self.template, base=self.digest, kept=kept, progress=progress, generate=generate
        )


def load(base: str, base_dir: Path, dtype: str, log: Callable[[str], None]) -> Loaded:
    log(f"loading {base} in {dtype}")
    model, tokenizer = placed(load_base(base_dir, dtype)), load_tokenizer(base_dir)
    template = "chat" if getattr(tokenizer, "chat_template", None) else "qa"
    depth = load_config(base_dir).get_text_config().num_hidden_layers
    return Loaded(model, tokenizer, template, dtype, depth, digest_checkpoint(base_dir))
