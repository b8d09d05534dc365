"""Every Python block of README and docs runs: the blocks of a page in their order, in one namespace and an empty folder.

A page gets what its text says is there already (`BEFORE`) and fewer steps (`SHORTER`); the code is run as it stands otherwise.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from markdown_it import MarkdownIt

from peft_unlearn import registry

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "adapters" / "published"
Names = dict[str, Any]


def blocks(page: str, language: str) -> list[str]:
    tokens = MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8"))
    return [t.content for t in tokens if t.type == "fence" and t.info.strip() == language]


def a_trainer(folder: Path) -> Names:
    """`trainer`, as the page on the G-effect has it."""
    from peft_unlearn import UnlearnConfig, UnlearnTrainer

    args = UnlearnConfig(
        output_dir=str(folder / "run"), max_steps=2, per_device_train_batch_size=4, save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    data = {"forget": tiny.rows(8, "f", seed=1), "retain": tiny.rows(8, "r", seed=2)}
    return {"trainer": UnlearnTrainer(tiny.lora(tiny.llama()), args, data=data, processing_class=tiny.tokenizer())}


def a_sparse_adapter(folder: Path) -> Names:
    """`base`, and the folder W of a sparse adapter in several parts for it."""
    from peft_unlearn import train

    tiny.llama().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    for name, seed in (("forget", 1), ("retain", 2)):
        rows = "\n".join(json.dumps(r) for r in tiny.rows(4, name[0], seed))
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    recipe = {
        "base": str(folder / "base"), "data": {n: str(folder / f"{n}.jsonl") for n in ("forget", "retain")},
        "adapter": {"type": "sparse"}, "selection": {"method": "random", "ratio": 0.06},
        "terms": {"forget": {"npo": {}}, "retain": {"nll": {}}}, "train": {"max_steps": 1, "use_cpu": True},
    }  # fmt: skip
    train(recipe, folder / "W", progress=lambda _: None)
    return {"base": tiny.llama()}


def adapters(**named: str) -> Callable[[Path], Names]:
    """out/NAME holds the published adapter."""

    def copy(folder: Path) -> Names:
        for name, published in named.items():
            shutil.copytree(PUBLISHED / published, folder / "out" / name)
        return {}

    return copy


def the_recipe(folder: Path) -> Names:
    text = blocks("docs/quickstart.md", "yaml")[0]
    assert "max_steps: 120" in text
    (folder / "recipe.yaml").write_text(text.replace("max_steps: 120", "max_steps: 2"), encoding="utf-8")
    return {}


BEFORE: dict[str, Callable[[Path], Names]] = {
    "docs/effect.md": a_trainer,
    "docs/selection.md": a_sparse_adapter,
    "docs/stack.md": adapters(anna="simnpo", bob="gru"),
    "docs/tutorials/first-adapter.md": adapters(simnpo="simnpo"),
    "docs/quickstart.md": the_recipe,
}
SHORTER = {
    "README.md": ("max_steps=120", "max_steps=3, use_cpu=True, disable_tqdm=True"),
    "docs/stack.md": ("me/forget-bob@0123456789abcdef0123456789abcdef01234567", "out/bob"),  # no Hub in a test
}
PAGES = [
    page
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "adapters" / "README.md"])
    if blocks(page := path.relative_to(ROOT).as_posix(), "python")
]
SLOW = {"README.md", "docs/quickstart.md"}


def run(page: str, folder: Path) -> Names:
    names: Names = {"__name__": "example", **BEFORE.get(page, lambda _: {})(folder)}
    for i, code in enumerate(blocks(page, "python")):
        old, new = SHORTER.get(page, ("", ""))
        exec(compile(code.replace(old, new) if old else code, f"{page}, block {i}", "exec"), names)
    return names


@pytest.fixture
def only_our_methods():
    """A page may register a method; tests that count methods must not see it."""
    registry.methods()
    before = {kind: dict(found) for kind, found in registry._METHODS.items()}
    yield
    for kind, found in before.items():
        registry._METHODS[kind].clear()
        registry._METHODS[kind].update(found)


def test_replacements_have_something_to_replace() -> None:
    for page, (old, _) in SHORTER.items():
        assert any(old in code for code in blocks(page, "python")), page
    assert set(BEFORE) | set(SHORTER) <= set(PAGES)


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in PAGES], ids=str)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_our_methods: None) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(page, tmp_path)
    if page == "docs/selection.md":
        assert len(names["parts"]) > 0 and names["model"].base_model.active_adapters == ["default", *names["parts"]]
    if page == "README.md":
        from peft_unlearn.folder.read import read_adapter

        folder = read_adapter(tmp_path / "my-adapter")
        assert folder.manifest.base.ref == "embedded:people"
        assert folder.recipe["train"]["max_steps"] == 3 and folder.recipe["terms"]["forget"]["npo"] == {"beta": 0.1}
        assert names["model"].peft_config["default"].r == folder.recipe["adapter"]["r"]
