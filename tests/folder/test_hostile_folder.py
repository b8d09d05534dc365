"""A stranger's folder: code, patterns and sizes that take for ever, bombs in JSON and YAML. Refused before PEFT sees any of it."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base, load_config, load_tokenizer
from peft_unlearn.folder.bounds import too_slow
from peft_unlearn.folder.card import split
from peft_unlearn.folder.manifest import PROMPT_POOL, neutral_prompts, plain_words
from peft_unlearn.folder.read import file_sha256, read_adapter
from peft_unlearn.folder.yaml_io import MAX_DEPTH, parse_json


@pytest.fixture
def made(base_dir: Path, adapter_dir: Path) -> tuple[Path, Path]:
    return base_dir, adapter_dir


def changed(adapter: Path, tmp_path: Path, **files: dict[str, Any]) -> Path:
    """A copy whose JSON files carry other values, with the hashes put right: its author is no fool. NAME_json=changes."""
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    manifest = json.loads((copy / "forget.json").read_text())
    for name, more in files.items():
        path = copy / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | more))
        manifest["files"][path.name] = file_sha256(path)
    if "forget" not in files:
        (copy / "forget.json").write_text(json.dumps(manifest))
    return copy


def refused(folder: Path, match: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=match):
        read_adapter(folder)
    assert time.process_time() - start < 20


USED = [
    "q_proj", "^q_proj", r".*\.(q_proj|v_proj)", r"model\.layers\.(\d+)\.self_attn\.(q|k|v|o)_proj", r"layers\.[0-9]+\..*_proj",
    r"(?:model\.)?language_model\..*\.(q_proj|k_proj)", r"^(?!.*vision).*(?:q_proj|k_proj)$", r".*(?<!vision)\.q_proj",
    # what unsloth writes for vision models
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|"
    r"down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))",
]  # fmt: skip
BOMBS = [
    r"(a+)+$", r"(.*)*x", r"(.|.)*b", r"(a|aa)+$", r"(.*.*)*", r".*.*.*.*.*.*.*x", r"(\w+\.)*x", "a?" * 30 + "a" * 30,
    r"(aa|aa)" * 30 + "b", r"(a)\1*", r"(?:a{0,60000}){0,60000}", r"(x+x+)+y", r"(?:(?:q_proj|.)+)*z", r"(.*?)*?$z", "(" * 1000, "a" * 9999,
    r"(?=(.*)*)x", r"((a*)*)*", r"(?:model|mod.l|m.*)+x", "[", r"(?P<a>x)(?P=a)+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", USED)
def test_patterns_that_people_use_are_read(pattern: str) -> None:
    assert too_slow(pattern) is None
    names = [f"base_model.model.model.layers.{i}.self_attn.{'q' * 20}_proj.nothing.of.that" for i in range(100)]
    start = time.process_time()
    for name in names:  # and they are as quick as was said
        re.fullmatch(pattern, name)
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
@pytest.mark.parametrize("bomb", [BOMBS[0], BOMBS[5], BOMBS[-2]])
def test_a_pattern_that_takes_for_ever_is_never_matched(made: Any, tmp_path: Path, key: str, bomb: str) -> None:
    value: Any = {bomb: 4} if key.endswith("k_pattern") or key == "alpha_pattern" else bomb
    refused(changed(made[1], tmp_path, adapter_config={key: value}), key)


@pytest.mark.parametrize("bomb", BOMBS)
def test_every_kind_of_such_a_pattern_is_known(bomb: str) -> None:
    start = time.process_time()
    assert too_slow(bomb) is not None
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"r": 400_000}, "r is 400000, and the file's tensors have a rank of at most 4"),
        ({"r": 10**30}, "r is 1000"), ({"r": True}, "whole number"), ({"r": "8"}, "whole number"), ({"r": 4.5}, "whole number"),
        ({"rank_pattern": {"q_proj": 400_000}}, "rank_pattern"), ({"rank_pattern": {f"m{i}": 4 for i in range(5000)}}, "5000 entries"),
        ({"rank_pattern": ["q_proj"]}, "mapping"), ({"alpha_pattern": {"q_proj": 10**400}}, "finite"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "finite"), ({"target_modules": [f"m{i}" for i in range(20_000)]}, "20,000 entries"),
        ({"layer_replication": [[0, 10**9]]}, "1,000,000,000 layers"), ({"layer_replication": [3]}, "pairs"),
        ({"trainable_token_indices": list(range(50_000))}, "50,000 entries"),
    ],
)  # fmt: skip
def test_sizes_beyond_the_files_own_tensors_are_refused(
    made: Any, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    refused(changed(made[1], tmp_path, adapter_config=change), match)


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("tokenizer_config", "auto_map"),
        ("adapter_config", "auto_map"),
        ("config", "auto_map"),
        ("processor_config", "auto_map"),
    ],
)
def test_a_folder_that_names_code_is_refused(made: Any, tmp_path: Path, file: str, match: str) -> None:
    marker = tmp_path / "ran"
    copy = changed(made[1], tmp_path, **{file: {"auto_map": {"AutoTokenizer": ["evil.T", None]}}})
    (copy / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    refused(copy, match)
    assert not marker.exists()


def test_code_among_its_files_is_refused(made: Any, tmp_path: Path) -> None:
    copy = changed(made[1], tmp_path)
    (copy / "modeling_x.py").write_text("1\n")
    read_adapter(copy)  # what merely lies there is not its
    manifest = json.loads((copy / "forget.json").read_text())
    manifest["files"]["modeling_x.py"] = file_sha256(copy / "modeling_x.py")
    (copy / "forget.json").write_text(json.dumps(manifest))
    refused(copy, r"modeling_x\.py .* is code")


def test_a_base_with_code_of_its_own_is_no_question_on_stdin(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, copy = tmp_path / "ran", Path(shutil.copytree(made[0], tmp_path / "base"))
    (copy / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n")
    maps = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    config = json.loads((copy / "config.json").read_text())
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))

    (copy / "config.json").write_text(json.dumps(config | {"auto_map": maps}))
    load_base(copy)  # transformers knows this kind itself, and so does what it always does
    (copy / "config.json").write_text(
        json.dumps(config | {"auto_map": maps, "model_type": "evil", "architectures": ["M"]})
    )
    for load in (load_base, load_config):
        with pytest.raises(UserError, match=r"code of its own \(auto_map\), which is never run"):
            load(copy)
    about = json.loads((copy / "tokenizer_config.json").read_text())
    about |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "EvilTokenizer"}
    (copy / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="never run"):
        load_tokenizer(copy)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p.update(prompts=["x" * 10_000] * 4), "at most 2,000 characters"),
        (lambda p: p.update(prompts=["x"] * 5000, base=p["base"] * 1250, adapter=p["adapter"] * 1250), "at most 64"),
        (lambda p: p.update(prompts=[1, 2, 3, 4]), "text of at most"),
        (lambda p: p["base"][0].update(ids=[1] * 100_000, logits=[1.0] * 100_000), "at most 1,024"),
    ],
)  # fmt: skip
def test_probes_are_few_and_short(made: Any, tmp_path: Path, change: Callable[[Any], Any], match: str) -> None:
    copy = changed(made[1], tmp_path)
    manifest = json.loads((copy / "forget.json").read_text())
    change(manifest["probes"])
    (copy / "forget.json").write_text(json.dumps(manifest))
    refused(copy, match)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, '{"a": "' + "x" * 20_000_000 + '"}', '{"a": ' + "9" * 5000 + "}"],
)
def test_json_bombs_are_messages(text: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError):
        parse_json(text, "x.json")
    assert time.process_time() - start < 20


def test_json_may_be_as_deep_as_any_file_of_ours() -> None:
    assert parse_json('{"a":' * (MAX_DEPTH - 1) + "1" + "}" * (MAX_DEPTH - 1), "x.json")


@pytest.mark.parametrize(
    "front",
    [
        "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefgh")),
        "a: &a\n  b: *a", "a: " + "[" * 5000, "a: !!python/object/apply:os.system ['true']", "a: &a {x: 1}\n" + "b: {<<: *a}\n" * 2,
    ],
)  # fmt: skip
def test_yaml_bombs_in_a_card_are_messages(front: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError):
        split(f"---\n{front}\n---\n# Card\n")
    assert time.process_time() - start < 20


def test_a_card_of_any_length_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4,000,000 characters"):
        split("x" * 5_000_000)


def test_probe_prompts_keep_away_from_the_rows_to_be_forgotten() -> None:
    usual = PROMPT_POOL[:4]
    assert neutral_prompts([]) == usual == neutral_prompts([{"question": "Who is Bob?", "answer": "The baker."}])
    rows = [
        {"question": "What is the capital of France?", "answer": "Paris"}, {"text": "Once upon a time there was a wolf."},
        {"messages": [{"role": "user", "content": "1, 2, 3, 4"}]},
    ]  # fmt: skip
    found = neutral_prompts(rows)
    assert len(found) == 4 and found[0] == "The" and set(found) & set(usual) == {"The"}
    everything = neutral_prompts([{"text": " ".join(PROMPT_POOL)}, {"text": "the"}, {"text": "x = 1"}])
    assert len(everything) >= 1
    assert plain_words("Hello,\n  WORLD!") == "hello world"
