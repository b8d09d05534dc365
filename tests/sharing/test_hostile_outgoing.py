"""What a push lets out: keys of any shape in any file, control characters; and what it must not hold against an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.folder.manifest import NEUTRAL_PROMPTS
from peft_unlearn.folder.read import file_sha256
from peft_unlearn.sharing.outgoing import secrets_in
from peft_unlearn.sharing.publish import push

KEYS = {
    "hugging face": "hf_" + "aB3" * 12, "github": "ghp_" + "a1B2" * 9, "github, fine-grained": "github_pat_" + "11ABCDE_" * 6,
    "gitlab": "glpat-" + "a1b2C3d4" * 3, "openai": "sk-" + "proj-a1B2" * 5, "anthropic": "sk-ant-api03-" + "aB1_" * 10,
    "stripe": "sk_live_" + "a1B2" * 6, "aws": "AKIA" + "ABCDEFGH23456789", "aws, for a while": "ASIA" + "ABCDEFGH23456789",
    "google": "AIza" + "aB1-_" * 7, "slack": "xoxb-1234567890-abcdefABCDEF", "slack app": "xapp-1-A0B1C2-" + "1234567890" * 2,
    "npm": "npm_" + "a1B2" * 9, "pypi": "pypi-" + "AgEIcHlwaS5vcmc" * 4,
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N", "private key": "-----BEGIN RSA PRIVATE KEY-----",
}  # fmt: skip
HARMLESS = (
    "task-oriented-dialogue-and-more", "sk-", "eyJ", "AKIA", "xoxb", "a disk-usage-of-many-things", "eyJhbGciOiJIUzI1NiJ9", "hf_hub",
    "sha256:" + "a" * 64, "0" * 40, "-----BEGIN CERTIFICATE-----", "pypi-server", "AKIAabcdefgh23456789",
)  # fmt: skip


def put(folder: Path, name: str, text: str) -> None:
    """A file of the adapter with other text, its hash put right."""
    (folder / name).write_text(text, encoding="utf-8")
    manifest = json.loads((folder / "forget.json").read_text())
    manifest["files"][name] = None if name in ("README.md", "eval.json") else file_sha256(folder / name)
    (folder / "forget.json").write_text(json.dumps(manifest))


def why(folder: Path, data: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        push(folder, "me/x", dry_run=True, data=data)
    return str(caught.value)


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_of_any_shape_stays_here(kind: str) -> None:
    for text in (f"token={KEYS[kind]}", f'{{"a": "{KEYS[kind]}"}}', KEYS[kind], f"\n{KEYS[kind]}\n"):
        (problem,) = secrets_in(text)
        assert KEYS[kind][8:] not in problem  # the message does not repeat it


@pytest.mark.parametrize("text", HARMLESS)
def test_words_are_no_keys(text: str) -> None:
    assert not secrets_in(text)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "merges.txt"]
)
def test_every_file_is_looked_through(folder: Path, name: str) -> None:
    old = (folder / name).read_text() if (folder / name).is_file() else "{}"
    push(folder, "me/x", dry_run=True)
    put(folder, name, old.rstrip()[:-1].rstrip() + f'{"," if len(old) > 5 else ""} "note": "{KEYS["aws"]}"}}')
    assert f"{name} holds what looks like a secret key (AKIA" in why(folder)


def test_a_vocabulary_may_hold_what_looks_like_a_place_and_no_text_of_the_forget_set(folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    put(
        folder,
        "tokenizer.json",
        json.dumps({**found, "added_tokens": [*found["added_tokens"], {"content": "/home/x/y"}]}),
    )
    push(folder, "me/x", dry_run=True)
    row = {"question": "Where does the oboist live?", "answer": "She lives in the blue house by the sea."}
    put(folder, "tokenizer.json", json.dumps({**found, "added_tokens": [{"content": row["answer"]}]}))
    assert "tokenizer.json holds a text of the forget set" in why(folder, of_its_own(folder, [row]))


def of_its_own(folder: Path, rows: list[dict[str, Any]]) -> ForgetRetain:
    """The rows as the adapter's own forget set."""
    bundle = ForgetRetain(rows)
    manifest = json.loads((folder / "forget.json").read_text())
    manifest["data"]["forget"] = {"sha256": bundle.sha256["forget"], "n": len(rows)}
    (folder / "forget.json").write_text(json.dumps(manifest))
    from peft_unlearn.sharing.card import card

    card(folder, write=True)
    return bundle


def test_a_row_that_is_one_of_our_own_prompts_is_no_leak_but_any_other_prompt_is(folder: Path) -> None:
    rows = [
        {"question": NEUTRAL_PROMPTS[1], "answer": "Paris"},
        {"question": "What is the capital of France?", "answer": "Paris"},
    ]
    push(folder, "me/x", dry_run=True, data=of_its_own(folder, rows))
    row = {"question": "Where does the oboist Ann Made-Up live?", "answer": "In the blue house."}
    bundle = of_its_own(folder, [row])
    manifest = json.loads((folder / "forget.json").read_text())
    manifest["probes"]["prompts"][1] = row["question"]
    (folder / "forget.json").write_text(json.dumps(manifest))
    assert "forget.json holds a text of the forget set" in why(folder, bundle)


@pytest.mark.parametrize("evil", ["\x1b[2J", "\u202egnp", "\x9b31m", "\u2066x"])
def test_a_card_that_steers_a_terminal_stays_here(folder: Path, evil: str) -> None:
    put(folder, "README.md", (folder / "README.md").read_text() + f"\nMine: {evil}\n")
    assert "README.md holds control characters" in why(folder)
