"""The card: true to its folder, kept by hand where written by hand, and deaf to what stands in the fields it is made of."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tinyfolder
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from peft import PeftModel
from typer.testing import CliRunner

from peft_unlearn.cli import app
from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.card import (
    BEGIN,
    END,
    TAGS,
    WORDS,
    ForgetCard,
    add_tags,
    card_of,
    current,
    front_matter,
    generated,
    render,
    split,
)
from peft_unlearn.folder.manifest import BaseRef, Manifest
from peft_unlearn.folder.markdown import block, code, inline, one_line
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.write import update_eval
from peft_unlearn.sharing.card import card
from peft_unlearn.sharing.publish import push
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.training.adapt import get_forget_model

ID = "sha256:" + "e" * 64
MD = MarkdownIt("commonmark", {"html": True}).enable("table")
PLAIN_TAGS = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "ul", "li", "strong"}
_PIECES = [*"ab<>|`*_[]()#~!&;\\\"'-=:$ .1+/\n\r\t\x00\x85\u2028\u202e", "---", "\n\n", "\n---\n", "<script>x</script>", "-->", "<!-- ",
           "![x](y)", "\n| a | b |\n", "\n```\n", "**", "1. ", "&lt;", "\\|"]  # fmt: skip
SIGNS = st.lists(st.sampled_from(_PIECES), max_size=14).map("".join)


def manifest(**over: Any) -> Manifest:
    fields: dict[str, Any] = {
        "base": BaseRef("org/model", "b" * 64, "c" * 40),
        "method": {"terms": {"forget": {"npo": {"beta": 0.1}}}, "rule": {"sum": {}}, "optimizer": "adamw", "steps": 3},
        "data": {"forget": {"sha256": "a" * 64, "n": 100}},
        "files": {"adapter_model.safetensors": "d" * 64},
        "name": "made-up",
    }
    return Manifest(**{**fields, **over})


EVAL: dict[str, Any] = {
    "format": 1,
    "suite": "people",
    "subjects": {
        "base": {"forget/value_accuracy": 1.0, "forget/probability": 0.99, "retain/value_accuracy": 1.0},
        "adapter": {"forget/value_accuracy": 0.02, "forget/probability": None, "retain/value_accuracy": 0.98},
        "retain_only": None,
    },
    "details": {
        "adapter": {
            "forget/value_accuracy": {"n": 100, "ci95": [0.0, 0.05], "reason": None},
            "forget/probability": {"n": 100, "ci95": None, "reason": "the logits were NaN"},
        }
    },
    "metrics": {"value_accuracy": {"better": {"forget": "lower", "retain": "higher"}}},
    "adapter_id": "sha256:" + "d" * 64,
    "attacks": {
        "format": 1,
        "attacks": {
            "quantize:int4": {
                "attack": "quantize",
                "settings": {"format": "int4", "group": 64},
                "n": 80,
                "subjects": {"adapter": {"before": {"value_accuracy": 0.01}, "after": {"value_accuracy": 0.4}}},
                "recovery": {"adapter": {"value_accuracy": {"value": 0.39, "ci95": [0.3, 0.5], "reason": None}}},
            },
            "relearn": {"attack": "relearn", "settings": {"steps": 20}, "n": 80, "subjects": {"adapter": None},
                        "reasons": {"adapter": "out of memory"}},
        },
    },
    "calibration": {"scale": 0.75},
}  # fmt: skip


class Page(html.parser.HTMLParser):
    """Tags, comments, and cells of each table row of a rendered card."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[Any] = []
        self.comments: list[str] = []
        self.rows: list[list[str]] = []
        self.seen = ""
        self.cell: str | None = None
        self.feed(MD.render(split(text)[1]))
        self.rows = [[c.strip() for c in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [a for a in attrs if a[0] not in ("class", "style")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.seen += data
        if self.tags and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data.strip())

    def row(self, name: str) -> list[str]:
        return next(r for r in self.rows if r and r[0] == name)


def test_what_a_card_says() -> None:
    text = render(
        ForgetCard(manifest(description="Forgets what was made up."), {"r": 8, "lora_alpha": 16}, EVAL, license="mit")
    )
    page, (front, _) = Page(text), split(text)
    assert (
        front["base_model"] == "org/model" and front["base_model_relation"] == "adapter" and front["license"] == "mit"
    )
    assert front["library_name"] == "peft" and set(TAGS) < set(front["tags"])
    assert page.row("base model")[1] == f"org/model at commit {'c' * 40}"
    assert page.row("digest of the base")[1] == "b" * 64 and "d" * 64 in page.row("digest of this adapter")[1]
    assert "npo: {beta: 0.1}" in page.row("objectives")[1] and "r 8, lora alpha 16" in page.row("adapter")[1]
    for said in ("Forgets what was made up.", "removable by design", "suppresses behavior", "Intended use", "License",
                 f'revision="{"c" * 40}"', "peft-unlearn verify", "peft-unlearn remove"):  # fmt: skip
        assert said in page.seen, said
    assert not re.search("delete|erases", page.seen)


def test_the_table_of_numbers() -> None:
    page = Page(render(ForgetCard(manifest(), {}, EVAL)))
    head = next(r for r in page.rows if "recovered" in r)
    assert head == ["", "forget: value accuracy ↓", "forget: probability", "retain: value accuracy ↑", "recovered"]
    rows = {r[0]: r[1:] for r in page.rows if len(r) == 5}
    assert rows["base model"] == ["1", "0.99", "1", ""]
    assert rows["with this adapter"] == ["0.02 (0 to 0.05)", "–", "0.98", ""]
    assert rows["merged, int4"] == ["0.4", "", "", "0.39 (0.3 to 0.5)"]
    assert rows["merged, bfloat16"][0] == "not measured: peft-unlearn attack FOLDER --quantize bf16"
    assert rows["merged, int8"][0].endswith("--quantize int8")
    assert rows["relearned"][0] == "not measured: out of memory"
    assert rows["retain model"][0].startswith("not measured")
    assert "the logits were NaN" in page.seen and "80 rows that the attacker did not see" in page.seen
    assert "scale chose 0.75" in page.seen
    none = Page(render(ForgetCard(manifest())))
    assert "Not measured. Run peft-unlearn eval" in none.seen
    other = Page(render(ForgetCard(manifest(), {}, {**EVAL, "adapter_id": "sha256:" + "e" * 64})))
    assert "belong to another adapter" in other.seen and "0.02" not in other.seen
    alone = {k: EVAL[k] for k in ("format", "attacks", "adapter_id")} | {"subjects": {}}
    only = Page(render(ForgetCard(manifest(), {}, alone)))
    assert {r[0]: r[1:] for r in only.rows if len(r) == 3}["merged, int4"] == ["0.4", "0.39 (0.3 to 0.5)"]


def test_the_commands_that_a_card_names_exist() -> None:
    """What a reader is told to run has to run."""
    text = render(ForgetCard(manifest(), {}, {**EVAL, "attacks": {}})) + render(ForgetCard(manifest()))
    named = set(re.findall(r"peft-unlearn ([a-z]+)", split(text)[1])) - {"FOLDER"}
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback} | {
        g.name for g in app.registered_groups
    }
    assert {"attack", "eval", "card", "pull", "verify", "remove"} <= named <= known | {"generated", "description"}
    options = {o for c in app.registered_commands if c.callback and c.callback.__name__ == "attack"
               for o in c.callback.__annotations__}  # fmt: skip
    assert {"quantize", "relearn"} <= options


def test_no_numbers_that_are_not_there(tmp_path: Path, folder: Path) -> None:
    """A card follows eval.json by itself, and is current until something else changes."""
    found = read_adapter(folder)
    text = (folder / "README.md").read_text()
    assert "Not measured" in text and current(card_of(found), text)
    update_eval(folder, {**EVAL, "adapter_id": found.adapter_id})
    text = (folder / "README.md").read_text()
    assert "0.02 (0 to 0.05)" in text and current(card_of(read_adapter(folder)), text)
    (folder / "eval.json").write_text(json.dumps({**EVAL, "adapter_id": found.adapter_id, "subjects": {"adapter": {}}}))
    assert current(card_of(read_adapter(folder)), text) is False


def test_own_words_are_kept(folder: Path) -> None:
    path = folder / "README.md"
    text = path.read_text()
    front, body = split(text)
    front |= {"language": ["en"], "license": "mit", "tags": [*front["tags"], "names"]}
    before, after = "\n## Why\n\nBecause <b>I</b> was asked.\n\n", "\n## Thanks\n\nTo all.\n"
    own = "---\n" + yaml.safe_dump(front) + "---\n" + body.replace(BEGIN, before + BEGIN) + after
    path.write_text(own.replace("| scale | 1 |", "| scale | 7 |"))
    new = card(folder, write=True).text
    assert before in new and new.endswith(after) and "| scale | 1 |" in new and "scale | 7" not in new
    kept = split(new)[0]
    assert kept["language"] == ["en"] and kept["license"] == "mit" and "names" in kept["tags"]
    assert card(folder).text == new == path.read_text()
    # the author's description, given anew, takes the old one's place; the rest stays
    text = card(folder, write=True, description="First.\n\nSecond <i>one</i>.", license="apache-2.0").text
    assert "First.\n\nSecond &lt;i&gt;one&lt;/i&gt;." in text and before in text
    assert "Forgets what was made up." not in text
    assert split(text)[0]["license"] == "apache-2.0" and card(folder).text == text
    # a card without any of it keeps all of its text
    path.write_text("# Mine\n\nAll of it.\n")
    assert card(folder).text.split("---\n", 2)[2].startswith(f"# Mine\n\nAll of it.\n\n{BEGIN}")


def test_words_given_for_a_card_without_a_place_for_them(folder: Path) -> None:
    path = folder / "README.md"
    for there in ("# Mine\n\nMy words.\n", f"# Mine\n\n{BEGIN}\nold\n{END}\n"):
        path.write_text(there)
        card(folder, write=True, description="Forgets *this*.")
        text = path.read_text()
        assert text.index("# Mine") < text.index(WORDS) < text.index("Forgets \\*this\\*.") < text.index(BEGIN)
        again = card(folder, write=True, description="Forgets that.").text
        assert again.count(WORDS) == 1 and "*this" not in again and "# Mine" in again


def test_a_card_that_is_no_text(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"\xff\xfe")
    for do in (lambda: card(folder, write=True), lambda: push(folder, "me/x", dry_run=True)):
        with pytest.raises(UserError, match=r"README\.md: not UTF-8 text"):
            do()
    update_eval(folder, {**EVAL, "adapter_id": read_adapter(folder).adapter_id})  # the numbers are safe
    assert (folder / "README.md").read_bytes() == b"\xff\xfe"


def test_a_sum_says_what_was_added() -> None:
    parts = [{"adapter": ID, "name": "a|b", "weight": -0.5, "scale": 1.0}]
    said = generated(ForgetCard(manifest(method={"compose": parts, "worst_error": 0.617})))
    assert f"| sum of | `-0.5` times a\\|b, `{ID}` |" in said and "relative error at most 0.62" in said
    assert "null" not in said and "objectives" not in said


def test_tags_survive_a_save_of_a_loaded_or_trained_model(base_dir: Path, folder: Path, tmp_path: Path) -> None:
    """Nobody has to call `add_tags`."""
    models = (
        ForgetModel.from_pretrained(base_dir, folder).model,
        get_forget_model(load_base(base_dir), {"r": 2, "target_modules": ["q_proj"]}),
    )
    for i, model in enumerate(models):
        model.save_pretrained(str(tmp_path / str(i)))
        assert set(TAGS) <= set(split((tmp_path / str(i) / "README.md").read_text())[0]["tags"])


def test_marks_and_front_matter_that_cannot_be_read(folder: Path) -> None:
    path = folder / "README.md"
    text = path.read_text()
    for broken, words in (
        (text.replace(END, ""), "do not form one pair"),
        (text + text, "do not form one pair"),
        ("---\na: b: c\n---\n# x\n", "front matter: line 2, column 5: not valid YAML"),
        ("---\n- a\n---\n# x\n", "no mapping"),
    ):
        path.write_text(broken)
        with pytest.raises(UserError, match=words):
            card(folder, write=True)
        assert path.read_text() == broken
    path.unlink()
    with pytest.raises(UserError, match="names a place"):
        card(folder, write=True, description="Trained in /home/ann/x.")
    with pytest.raises(UserError, match="expected an id"):
        card(folder, license="mine: all\nmine")
    assert not path.exists()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIGNS, SIGNS, SIGNS, SIGNS)
def test_no_field_is_anything_but_text(name: str, description: str, method: str, reason: str) -> None:
    """Whatever stands in the fields: the same page, row by row and tag by tag; the words in it; no key of its own above."""
    evaluation = json.loads(json.dumps(EVAL))
    evaluation["details"]["adapter"]["forget/probability"]["reason"] = f"x{reason}"
    evaluation["suite"] = f"s{reason}"
    evaluation["attacks"]["attacks"]["relearn"]["reasons"]["adapter"] = f"y{reason}"
    evaluation["attacks"]["attacks"]["quantize:int4"]["settings"]["note"] = reason
    m = manifest(name=f"n{name}", description=f"d{description}", reference=f"r{method}",
                 method={"terms": {f"forget{method}": {method: 1}}, "optimizer": method, "rule": {"sum": {"s": method}}})  # fmt: skip
    made = ForgetCard(m, {"peft_type": "LORA", "r": 8}, evaluation)
    text = render(made)
    plain = Page(render(ForgetCard(manifest(description="d", method={"terms": {"forget": {}}, "optimizer": "o", "rule": {"sum": {}}}),
                                   {"peft_type": "LORA", "r": 8}, EVAL)))  # fmt: skip
    page = Page(text)
    assert set(page.tags) <= PLAIN_TAGS and page.attributes == []
    assert page.comments == plain.comments
    assert [len(r) for r in page.rows] == [len(r) for r in plain.rows]
    assert [t for t in page.tags if t != "p"] == [t for t in plain.tags if t != "p"]
    # cell by cell the words as they were given: a bar or a backtick neither ends a cell nor eats the rest of it
    assert page.row("relearned")[1] == one_line(f"not measured: y{reason}")
    assert page.row("reference")[1] == one_line(f"r{method}") and page.row("training")[1].startswith(one_line(method))
    assert one_line(f"d{description}").replace(" ", "") in page.seen.replace(" ", "").replace("\n", "")
    front, body = split(text)
    assert set(front) == set(front_matter(made)) and front == yaml.safe_load(yaml.safe_dump(front))
    assert front["model-index"][0]["name"] == ForgetCard(m).title
    assert body.startswith("# n") and render(made, text) == text
    assert ModelCard(text).data.to_dict()["tags"] == front["tags"]  # as the Hub's own client reads it


@settings(max_examples=100, deadline=None)
@given(SIGNS)
def test_text_comes_out_as_it_went_in(text: str) -> None:
    letters = ["A", *(c for c in text if c.isalnum()), "B"]
    for made in (f"A{inline(text)}B", code(f"A{text}B", cell=False), block(f"A {text} B"), block(f"{text}A") + "B"):
        page = Page(made)
        assert set(page.tags) <= {"p", "code"} and not page.comments, made
        assert sorted(c for c in page.seen if c.isalnum()) == sorted(letters), made


def test_peft_saves_again_and_what_is_left(base_dir: Path, folder: Path, tmp_path: Path) -> None:
    """PEFT overwrites tags and base_model of a card when it saves beside it: by `add_tags` ours are among them."""
    update_eval(folder, {**EVAL, "adapter_id": read_adapter(folder).adapter_id})
    for tagged in (False, True):
        out = Path(shutil.copytree(folder, tmp_path / str(tagged)))
        model = PeftModel.from_pretrained(load_base(base_dir), str(out))
        if tagged:
            add_tags(model)
        model.save_pretrained(str(out))
        front, body = split((out / "README.md").read_text())
        assert (set(TAGS) <= set(front["tags"])) is tagged
        # what identifies it survives in any case, and so does every word of the card
        assert front["forget_adapter"]["adapter_id"] == read_adapter(folder).adapter_id and "model-index" in front
        assert split((folder / "README.md").read_text())[1].strip() in body
        # PEFT wrote the base's local folder into it; that does not get out, and one command puts it right
        assert front["base_model"] == str(base_dir)
        shutil.copy(folder / "adapter_config.json", out)
        with pytest.raises(UserError, match=r"base_model.*PEFT writes one there"):
            push(out, "me/x", dry_run=True)
        card(out, write=True)
        push(out, "me/x", dry_run=True)
        again = split((out / "README.md").read_text())[0]
        assert set(TAGS) <= set(again["tags"]) and again["base_model"] == "me/base"
        assert not [t for t in again["tags"] if "/" in t]


def test_new_adapters_are_born_with_it(folder: Path, base_dir: Path, tmp_path: Path) -> None:
    """One writer: what `write_adapter` wrote is what `card` would write; a local base is not named."""
    assert card(folder).text == (folder / "README.md").read_text()
    local = tinyfolder.write(tmp_path / "local", base_dir)
    assert card(local.path).text == (local.path / "README.md").read_text()
    unsorted = {"terms": {"retain": {"nll": {"weight": 2.0, "batch": "retain"}}, "forget": {"npo": {"beta": 0.1}}}}
    there = generated(ForgetCard(manifest(method=unsorted)))
    assert there == generated(ForgetCard(manifest(method=json.loads(json.dumps(unsorted, sort_keys=True)))))
    front = split((local.path / "README.md").read_text())[0]
    assert "base_model" not in front and "known by its digest" in (local.path / "README.md").read_text()
    assert str(base_dir) not in (local.path / "README.md").read_text()
    text = render(ForgetCard(replace(local.manifest, base=BaseRef("embedded:people", "b" * 64), scale=0.5)))
    assert "peft-unlearn base path people" in text and "meant to run at 0.5" in text


def test_the_command(folder: Path) -> None:
    run = CliRunner().invoke
    shown = run(app, ["card", str(folder), "--description", "Mine."])
    assert shown.exit_code == 0 and "\nMine.\n" in shown.stdout and "Mine." not in (folder / "README.md").read_text()
    written = run(app, ["card", str(folder), "--write", "--license", "mit"])
    assert written.exit_code == 0 and "license: mit" in (folder / "README.md").read_text()
    done = run(app, ["push", str(folder), "me/x", "--dry-run", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["private"] is True
