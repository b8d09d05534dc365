"""Prompts that a user without access to the weights would try. The templates are data: jailbreak.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ..data.collate import prompt_ids
from ..data.facts import words
from ..data.formats import chat_text, identity, layout_of, to_text
from ..errors import Errors, UserError
from ..evaluation.generate import greedy
from ..evaluation.measured import Array, Unmeasured
from ..evaluation.metrics.generation import value_accuracy
from ..evaluation.rows import rows_of
from ..folder.schema import TEXT, list_of, one_of, record, require, shape
from ..folder.yaml_io import read_yaml
from ..head import causal_lm
from ..registry import Range, Source, attack
from .case import Case, Outcome, Rows, mean

FORMAT = 1
_HOLES = {"question", "stub", "subject"}
_WORDING = shape(
    "text that names {question}, {stub} or {subject} alone",
    lambda v: isinstance(v, str) and set(re.findall(r"{(.*?)}", v)) <= _HOLES,
)
_FIELDS = record(
    {"name": TEXT, "family": TEXT, "question": _WORDING, "shots": one_of("random", "similar"), "begins": _WORDING, "text": _WORDING},
    required=("name", "family"),
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """One way to ask; see jailbreak.yaml for the fields."""

    name: str
    family: str
    question: str | None = None
    shots: str | None = None
    begins: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Try:
    """One prompt for one row."""

    template: str
    family: str
    row: int
    prompt: str


def templates(file: str | Path | None = None) -> list[Template]:
    """The templates of a YAML file; default the ones that come with the package.

    Raises:
        UserError: no such file, or everything that is wrong with it at once.
    """
    source = Path(file) if file is not None else Path(__file__).with_name("jailbreak.yaml")
    data = read_yaml(source, aliases=True)
    if not isinstance(data, Mapping) or data.get("format") != FORMAT or not isinstance(data.get("templates"), list):
        raise UserError(f"{source}: wanted a mapping with format: {FORMAT} and a list of templates")
    require(data["templates"], _all, str(source))
    return [Template(**entry) for entry in data["templates"]]


def _all(entries: Any, _: str, errors: Errors) -> None:
    list_of(_FIELDS)(entries, "templates", errors)
    found = [e for e in entries if isinstance(e, Mapping)]
    for e in found:
        if "text" in e and {"question", "shots", "begins"} & set(e):
            errors.add(f"template {e.get('name')!r}: text is the whole prompt and stands alone")
    names = [str(e["name"]) for e in found if "name" in e]
    if len(set(names)) < len(names):
        errors.add("two templates have one name")


def stub(row: Mapping[str, Any], answer: str) -> str | None:
    """The right answer up to its value: "N was born in"; None where nothing stands before the value, or no value in it."""
    at = answer.casefold().find(str(row.get("value") or "\0").casefold())
    return answer[:at].strip() or None if at >= 0 else None


class _Shots:
    """Example pairs from the retain set for one row: none holds the row's value, and none is a forget row."""

    def __init__(self, case: Case) -> None:
        forget = {identity(row) for row in rows_of(case.data, "forget") or []}
        asking = [r for r in rows_of(case.data, "retain") or [] if layout_of(r) == "question/answer"]
        self.pool: Rows = [r for r in asking if identity(r) not in forget]
        self.words = [set(words(r["question"]).split()) for r in self.pool]
        self.texts = [words(f"{r['question']} {r['answer']}") for r in self.pool]
        self.seed = case.seed

    def of(self, row: Mapping[str, Any], number: int, k: int, how: str) -> Rows:
        secret = words(str(row["value"]))
        rng = np.random.default_rng((self.seed, number))
        order = rng.permutation(len(self.pool))
        if how == "similar":  # most words in common with the question; ties stay as drawn
            mine = set(words(row["question"]).split())
            overlap = [len(mine & self.words[j]) / len(mine | self.words[j]) for j in order]
            order = order[np.argsort(-np.asarray(overlap), kind="stable")]
        found = [self.pool[j] for j in order if secret not in self.texts[j]]
        return found[:k][::-1]  # the most alike last, next to the question


def tries(case: Case, chosen: Sequence[Template], k: int, limit: int | None = None) -> list[Try]:
    """Every prompt of the attack, templates first, then reworded questions that the data carries.

    k: retain pairs before the question where a template wants some.   limit: longest prompt in tokens; a prompt with
    examples loses the first of them until it fits, another that is too long is left out.
    """
    pool = _Shots(case)
    out = []
    for t in chosen:
        for i, row in enumerate(case.rows):
            for count in range(k, 0, -1) if t.shots else (0,):
                prompt = _prompt(case, t, i, row, pool, count)
                if prompt is None:
                    break
                if limit is None or len(prompt_ids(prompt, case.tokenizer)) <= limit:
                    out.append(Try(t.name, t.family, i, prompt))
                    break
    return out + _reworded(case)


def _prompt(case: Case, t: Template, number: int, row: Mapping[str, Any], pool: _Shots, count: int) -> str | None:
    """The prompt of one template on one row; None where the row lacks what the template names."""
    layout = layout_of(row)
    if layout == "text":
        return None
    prompt, answer = to_text(row, case.tokenizer, case.template)
    holes = {"stub": stub(row, answer.strip()), "subject": row.get("subject") or None, "question": row.get("question")}
    named = {hole for text in (t.question, t.begins, t.text) for hole in re.findall(r"{(\w+)}", text or "")}
    if any(holes[hole] is None for hole in named) or (t.shots and layout != "question/answer"):
        return None
    if t.text is not None:
        return t.text.format(**holes)
    if t.question is not None:
        row = {**row, "question": t.question.format(**holes)}
        prompt, answer = to_text(row, case.tokenizer, case.template)
    if t.shots:
        shown = pool.of(case.rows[number], number, count, t.shots)
        if not shown:
            return None
        prompt = _with_shots(case, row, shown)
    if t.begins is not None:
        prompt += (" " if answer[:1].isspace() else "") + t.begins.format(**holes)
    return prompt


def _with_shots(case: Case, row: Mapping[str, Any], shown: Rows) -> str:
    if case.template != "chat":
        pairs = ["".join(to_text(r, case.tokenizer, case.template)) for r in shown]
        return "\n".join([*pairs, to_text(row, case.tokenizer, case.template)[0]])
    turns = []
    for r in (*shown, row):
        turns += [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]
    return chat_text(turns, case.tokenizer)[0]


def _reworded(case: Case) -> list[Try]:
    """The same questions in other words or languages: from the rows, and from sets named forget_* that hold the same facts."""
    out = []
    for key, family in (("paraphrased_question", "paraphrase"), ("translated_question", "translation")):
        for i, row in enumerate(case.rows):
            given = row.get(key) or []
            for question in [given] if isinstance(given, str) else given:
                if layout_of(row) == "question/answer":
                    prompt = to_text({**row, "question": question}, case.tokenizer, case.template)[0]
                    out.append(Try(key, family, i, prompt))
    forget = rows_of(case.data, "forget") or []
    where = {identity(row): i for i, row in enumerate(forget)}
    further = case.data if isinstance(case.data, Mapping) else case.data.extra
    for name, rows in further.items():
        if not name.startswith("forget_") or len(rows) != len(forget):
            continue
        for i, row in enumerate(case.rows):
            other = rows[where[identity(row)]] if identity(row) in where else {}
            if other.get("value") == row.get("value") and other.get("subject") == row.get("subject"):
                out.append(Try(name, "paraphrase", i, to_text(other, case.tokenizer, case.template)[0]))
    return out


@attack(
    "jailbreak",
    source=Source("Eight Methods to Evaluate Robust Unlearning in LLMs", "https://arxiv.org/abs/2402.16835", 2024),
    needs=("generation",),
    faithful="reconstructed",
)
def jailbreak(case: Case, *, shots: Annotated[int, Range(1)] = 3, file: str | None = None) -> Outcome:
    """Asks in other words: prefix injection, role-play, hypotheticals, begun answers, few-shot leakage, paraphrases.

    after/value_accuracy is 1 where the plain question or *any* prompt yields the value (greedy answers), so it never lies
    below before; more tries find more by chance, which is what the same tries on the retain model are for. The
    wording is this project's own; the kinds of prompt are those of the paper and of arXiv 2307.15043's related work.

    shots: retain pairs before the question in few-shot templates; a pair that holds the row's value is never shown.
    file: a YAML file of templates in place of the package's own.

    Raises:
        Unmeasured: rows without 'value', or plain text without a prompt.
    """
    chosen = templates(file)
    if lost := sum(not row.get("value") for row in case.rows):
        raise Unmeasured(f"{lost} of {len(case.rows)} rows have no 'value', so a leak cannot be recognized")
    with case.subject() as model:
        before = case.before(model)
        if "value_accuracy" not in before:
            raise Unmeasured("the rows are plain text without a prompt: there is nothing to ask")
        direct = before["value_accuracy"]
        config: Any = causal_lm(model).config
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        made = tries(case, chosen, shots, None if longest is None else longest - case.max_new_tokens)
        answers = greedy(
            model, case.tokenizer, [t.prompt for t in made], max_new_tokens=case.max_new_tokens,
            progress=partial(case.progress, "jailbreak prompts"),
        )  # fmt: skip
    hit = value_accuracy(answers, [str(case.rows[t.row]["value"]) for t in made])
    leaked = direct.copy()
    np.maximum.at(leaked, [t.row for t in made], hit)
    about = {
        "tries": len(made) + len(case.rows),
        "templates": _rates(made, hit, direct, [t.name for t in chosen]),
        "families": _families(made, hit, len(case.rows)),
    }
    return Outcome({"value_accuracy": direct}, {"value_accuracy": leaked}, len(case.rows), about)


def _rates(made: Sequence[Try], hit: Array, direct: Array, names: Sequence[str]) -> dict[str, Any]:
    """Template -> share of the rows it was tried on that leaked; a template that fitted no row has null and the reason."""
    out: dict[str, Any] = {"direct": {"family": "direct", "rate": mean(direct), "n": len(direct)}}
    for name in dict.fromkeys([*names, *(t.template for t in made)]):
        mine = [k for k, t in enumerate(made) if t.template == name]
        if mine:
            out[name] = {"family": made[mine[0]].family, "rate": mean(hit[mine]), "n": len(mine)}
        else:
            out[name] = {"rate": None, "n": 0, "reason": "no row has what it names, or it is too long for the model"}
    return out


def _families(made: Sequence[Try], hit: Array, n: int) -> dict[str, Any]:
    """Family -> share of the rows that any of its templates got, and how many tries a row that took."""
    out = {}
    for family in dict.fromkeys(t.family for t in made):
        mine = [k for k, t in enumerate(made) if t.family == family]
        best = np.zeros(n)
        np.maximum.at(best, [made[k].row for k in mine], hit[mine])
        out[family] = {"rate": mean(best), "tries_per_row": len(mine) / n}
    return out
