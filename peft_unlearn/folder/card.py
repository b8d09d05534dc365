"""The card (README.md) of a forget adapter: the one place that writes it.

A card is a front matter, the author's words, and a block between two marks that is generated from forget.json, eval.json and
adapter_config.json. Generating again replaces the block and the front matter's own keys; whatever stands elsewhere is the
author's and is kept. Everything that comes from a file is put in as text: no field can bring HTML, a table column, a front
matter key or a mark of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .base import peft_base_name
from .card_numbers import headline, numbers
from .manifest import Manifest, path_like
from .markdown import block, code, inline, one_line, table
from .read import CARD, TOGETHER, AdapterFolder
from .schema import is_number
from .yaml_io import MAX_CHARACTERS, dump_yaml, parse_yaml, read_text

TAGS = ("forget-adapter", "machine-unlearning", "peft_unlearn")
BEGIN, END = "<!-- peft-unlearn: generated, edits are lost -->", "<!-- peft-unlearn: end -->"
WORDS, WORDS_END = "<!-- peft-unlearn: description -->", "<!-- peft-unlearn: end of description -->"
DEFAULT_WORDS = "An adapter that makes a language model stop giving the answers of a forget set."
_VECTOR = "PEFT_UNLEARN_FORGET_VECTOR"
_OWN = ("library_name", "pipeline_tag", "base_model", "base_model_relation", "tags", "model-index", "forget_adapter")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,40}")
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.S | re.M)


@dataclass
class ForgetCard:
    """What a card says. config: adapter_config.json; evaluation: eval.json; license: an id as the Hub knows them."""

    manifest: Manifest
    config: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    description: str = ""
    license: str | None = None

    def __post_init__(self) -> None:
        self.description = self.description or self.manifest.description
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise UserError(
                f"license {self.license!r}: expected an id as the Hub knows them, such as apache-2.0, mit, llama3.1 or other."
            )

    @property
    def title(self) -> str:
        return one_line(self.manifest.name) or "Forget adapter"


def card_of(found: AdapterFolder, description: str = "", license: str | None = None) -> ForgetCard:
    """The card of a folder as it stands."""
    return ForgetCard(found.manifest, found.config, found.eval, description, license)


def regenerated(found: AdapterFolder) -> str | None:
    """README.md of a folder, its generated block made anew; None where there is none, or no card at all."""
    path = found.path / CARD
    text = read_text(path, limit=MAX_CHARACTERS + 1) if path.is_file() else ""
    return render(card_of(found), text) if BEGIN in text else None


def add_tags(model: Any) -> None:
    """Give the base of a PEFT model the card's tags: ``save_pretrained`` overwrites a card's tags with these and its own."""
    base = getattr(model, "get_base_model", lambda: model)()
    if hasattr(base, "add_model_tags"):
        base.add_model_tags(list(TAGS))


def render(card: ForgetCard, existing: str | None = None) -> str:
    """README.md as text; with `existing`, that card with its generated parts made anew.

    Raises:
        UserError: the existing front matter is not YAML, or one of the marks is without its other half.
    """
    old, body = split(existing or "")
    if "license" in old and card.license is None and _LICENSE.fullmatch(str(old["license"])):
        card = ForgetCard(card.manifest, card.config, card.evaluation, card.description, str(old["license"]))
    if not body.strip():
        body = f"# {inline(card.title)}\n\n{WORDS}\n{block(card.description or DEFAULT_WORDS)}\n{WORDS_END}\n"
    elif card.description != card.manifest.description:  # words of their own replace those there
        body = _replaced(body, WORDS, WORDS_END, block(card.description)) or _inserted(body, card.description)
    new = _replaced(body, BEGIN, END, generated(card))
    if new is None:
        new = f"{body.rstrip()}\n\n{BEGIN}\n{generated(card)}\n{END}\n"
    front = front_matter(card)
    kept = {k: v for k, v in old.items() if k not in _OWN and k not in front}
    tags = old.get("tags")
    theirs = tags if isinstance(tags, list) else []
    front["tags"] += [
        t for t in theirs if isinstance(t, str) and t not in front["tags"] and not t.startswith("base_model:")
    ]
    return _front_text({**front, **kept}) + new


def current(card: ForgetCard, text: str) -> bool | None:
    """Whether a card says what its folder says now; None for one that holds no generated block: its author's alone."""
    return None if BEGIN not in text else render(card, text) == text


def split(text: str) -> tuple[dict[str, Any], str]:
    """(front matter, the rest) of a card. Raises `UserError` where the front matter is not a YAML mapping."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"README.md: a card of more than {MAX_CHARACTERS:,} characters is not read.")
    found = _FRONT.match(text)
    if found is None:
        return {}, text
    front = parse_yaml("\n" + found[1], "README.md: its front matter", aliases=True)  # lines counted as in the file
    if front is not None and not isinstance(front, dict):
        raise UserError("README.md: its front matter is no mapping of keys to values; mend it, or remove it.")
    return front or {}, text[found.end() :]


def front_matter(card: ForgetCard) -> dict[str, Any]:
    """The Hub's metadata. ``forget_adapter`` is a key of our own: unlike tags it survives PEFT's re-saving."""
    m, config = card.manifest, card.config
    task = "image-classification" if _sees(m) else "text-generation"
    front: dict[str, Any] = {"library_name": "peft", "pipeline_tag": task}
    if m.base.revision is not None:
        front |= {"base_model": m.base.ref, "base_model_relation": "adapter"}
    if card.license is not None:
        front["license"] = card.license
    front["tags"] = [*TAGS, *(["lora"] if config.get("peft_type", "LORA") == "LORA" else [])]
    front["forget_adapter"] = {"format": m.format, "base_digest": m.base.digest} | (
        {"adapter_id": m.adapter_id} if m.adapter_id else {}
    )
    found = headline(card.evaluation, m.adapter_id)
    if found:
        suite = one_line((card.evaluation or {}).get("suite") or "forget set")
        front["model-index"] = [{"name": card.title, "results": [{
            "task": {"type": task},
            "dataset": {"name": suite, "type": f"peft_unlearn-{suite}"},
            "metrics": [{"type": n.rpartition("/")[2], "value": v, "name": n.replace("/", ": ")} for n, v in found],
        }]}]  # fmt: skip
    return front


def _front_text(front: dict[str, Any]) -> str:
    return f"---\n{dump_yaml(_flat_strings(front), 'README.md', width=10**6)}---\n"


def _flat_strings(value: Any) -> Any:
    """One line per string: a front matter ends at the first line of three dashes, wherever that stands."""
    if isinstance(value, dict):
        return {_flat_strings(k): _flat_strings(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_flat_strings(v) for v in value]
    return one_line(value) if isinstance(value, str) else value


def _replaced(body: str, begin: str, end: str, inside: str) -> str | None:
    """`body` with what stands between the marks replaced; None where there are no marks."""
    if begin not in body and end not in body:
        return None
    if body.count(begin) != 1 or body.count(end) != 1 or body.index(begin) > body.index(end):
        raise UserError(f"README.md: the marks {begin} and {end} do not form one pair; put them right, or remove both.")
    before, _, rest = body.partition(begin)
    return f"{before}{begin}\n{inside}\n{end}{rest.partition(end)[2]}"


def _inserted(body: str, description: str) -> str:
    """The author's words in a card that has no place for them: ahead of the generated block, else at the end."""
    head, mark, rest = body.partition(BEGIN)
    return f"{head.rstrip()}\n\n{WORDS}\n{block(description)}\n{WORDS_END}\n\n{mark}{rest}".lstrip()


def generated(card: ForgetCard) -> str:
    """The generated block's Markdown, without its marks: card_template.md, filled in."""
    template = Path(__file__).with_name("card_template.md").read_text(encoding="utf-8")
    return template.format(
        facts="\n".join(table(["", ""], _facts(card))),
        numbers="\n".join(numbers(card.evaluation, card.manifest.adapter_id)),
        limits="".join(f"{line}\n" for line in _limits(card.manifest)),
        license=f"The adapter: {code(card.license, cell=False)}." if card.license else "The author states none.",
        **_use(card.manifest),
        **_loading(card.config),
    ).rstrip()


def _facts(card: ForgetCard) -> list[list[str]]:
    m, config = card.manifest, card.config
    method = m.method
    base = code(m.base.ref) + (f" at commit {code(m.base.revision)}" if m.base.revision else "")
    if m.base.ref.startswith("embedded:"):
        base += " (comes with peft-unlearn)"
    elif m.base.ref.startswith("local:"):
        base += " (not published: known by its digest)"
    shape = [f"{k.replace('_', ' ')} {config[k]}" for k in ("r", "lora_alpha", "shape") if config.get(k) is not None]
    trained = [f"{label} {method[k]}" for k, label in (("optimizer", ""), ("learning_rate", "learning rate"),
               ("steps", "steps")) if method.get(k) is not None]  # fmt: skip
    batch, seeds = m.effective_batch.get("rows"), ", ".join(f"{k} {v}" for k, v in sorted(m.seeds.items()))
    trained += [f"{batch} rows per step"] * (batch is not None) + [seeds] * bool(seeds)
    where = f"; {len(m.targets)} adapted modules" * bool(m.targets)
    if method.get("peft_type") == "PEFT_UNLEARN_EXPERT_LORA":
        where += "; trained inside chosen experts, whose compact form is in `expert_lora/`"
    if parts := config.get(TOGETHER):
        where += f"; one adapter with those in {', '.join(code(p) for p in parts)}: plain PEFT has to load and activate all of them"
    counts = [f"{name} {row['n']} rows" for name, row in sorted(m.data.items())]
    rows = [
        ["base model", base],
        ["digest of the base", code(m.base.digest)],
        *([["digest of this adapter", code(m.adapter_id)]] if m.adapter_id else []),
        *_origin(method),
        *([[k.replace("_", " "), code(_flat(method[k]))] for k in _PARTS if method.get(k)]),
        *([["selection", inline(_selection(method["selection"]))]] if isinstance(method.get("selection"), dict) else []),
        ["training", inline(", ".join(t.strip() for t in trained)) or "not stated"],
        ["adapter", inline(", ".join([str(config.get("peft_type", "LORA")), *shape])) + where],
        ["reference", code(m.reference)],
        ["data", (inline(", ".join(counts)) or "not stated") + "; by hash in forget.json, no texts"],
        *([["depends on", ", ".join(code(d) for d in m.depends_on)]] if m.depends_on else []),
        ["scale", _scale(m)],
    ]  # fmt: skip
    return rows


def _selection(found: dict[str, Any]) -> str:
    """Which entries of the base's weights a sparse adapter has values for, in words."""
    given = found.get("hyper")
    hyper = given if isinstance(given, dict) else {}
    how = " ".join([str(found.get("method", "by hand")), *(f"{k} {v}" for k, v in hyper.items() if v is not None)])
    share = f", {100 * found['density']:.2g} % of the weights chosen from" if is_number(found.get("density")) else ""
    more = [f"{k} {found[k]}" for k in ("ratio", "budget", "unit", "refresh") if found.get(k) not in (None, "entry")]
    return "; ".join([how, *more, f"{found.get('entries', '?')} entries{share}"])


def _origin(method: dict[str, Any]) -> list[list[str]]:
    """What was minimized; of a sum, what was added and how far from it the cut to a rank is."""
    parts = method.get("compose")
    if not isinstance(parts, list):
        return [["objectives", code(_flat(method["terms"])) if method.get("terms") else "not stated"]]
    rows = [p for p in parts if isinstance(p, dict)]
    summed = [
        f"{code(str(p.get('weight')))} times {inline(str(p.get('name')))}, {code(str(p.get('adapter')))}" for p in rows
    ]
    worst = method.get("worst_error")
    cut = [["cut to its rank", f"relative error at most {worst:.2g}"]] if isinstance(worst, int | float) else []
    return [["sum of", "; ".join(summed) or "not stated"], *cut]


_PARTS = ("rule", "smoothing", "step_size", "averaging", "negate", "oneshot", "sanitize")


def _scale(m: Manifest) -> str:
    baked = m.method.get("baked_scale")
    return f"{m.scale:g}" + (f" ({float(baked):g} of the trained scale is baked into lora_alpha)" if baked else "")


def _flat(value: Any) -> str:
    """One line, keys sorted as in forget.json: a card made of a manifest in memory is that of the same one read back."""
    text = dump_yaml(value, "the card", width=10**6, flow=True, sort_keys=True)
    return text.strip().removesuffix("...").strip()


def _limits(m: Manifest) -> list[str]:
    out = []
    if m.scale != 1:
        out.append(f"- Plain PEFT runs it at scale 1; it is meant to run at {m.scale:g}, which peft-unlearn applies.")
    if m.method.get("peft_type") == _VECTOR:
        out.append(
            "- Inference-time suppression: one picture is added to every input and no weight is changed. Whoever controls the input leaves "
            "it out, and the classifier is as it was."
        )
    if m.depends_on:
        out.append("- It was trained on top of other adapters (above) and is not meant to run without them.")
    return out


def _sees(m: Manifest) -> bool:
    """Whether the base is an image classifier: its probes are images."""
    return m.probes is not None and any(p.startswith("image:") for p in m.probes.prompts)


def _use(m: Manifest) -> dict[str, str]:
    """How the base is named and loaded in the card's examples."""
    base = m.base
    embedded = base.ref.startswith("embedded:")
    name = "" if embedded else peft_base_name(base.ref)
    why = "" if name else "  # of the base with the digest above"
    if embedded:
        why = f"  # printed by: peft-unlearn base path {base.ref.removeprefix('embedded:')}"
    known = base.revision is not None or embedded
    return {
        "base": name or "FOLDER",
        "why": why,
        "revision": f', revision="{base.revision}"' if base.revision else "",
        "here": "None" if known else '"FOLDER"',
        "base_flag": "" if known else " --base FOLDER",
        "auto": "AutoModelForImageClassification" if _sees(m) else "AutoModelForCausalLM",
    }


def _loading(config: dict[str, Any]) -> dict[str, str]:
    """What plain PEFT needs besides the adapter's folder: this package for a type of its own, all parts of one in several."""
    own = str(config.get("peft_type", "")).startswith("PEFT_UNLEARN")
    subfolders = [s for s in config.get(TOGETHER) or [] if isinstance(s, str)]
    parts = [
        f"for part in {subfolders}:  # one adapter, whose entries lie in {len(subfolders) + 1} parts",
        "    model.load_adapter(ADAPTER, part, subfolder=part)",
        f"model.base_model.set_adapter({['default', *subfolders]})",
    ]
    return {
        "plugin": "import peft_unlearn  # its type of adapter is not one of PEFT's own\n" if own else "",
        "parts": "".join(f"{line}\n" for line in parts) if subfolders else "",
    }


def portable_front(front: dict[str, Any]) -> list[str]:
    """Front matter keys that name a place on a machine: PEFT writes one into ``base_model`` when it saves."""
    return [k for k, v in front.items() for x in (v if isinstance(v, list) else [v])
            if isinstance(x, str) and path_like(x.removeprefix("base_model:adapter:"))]  # fmt: skip
