"""The documentation says what the code does: pages are current, every method has a card, links and recipes work."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peft_unlearn import registry
from peft_unlearn.folder.recipe import check_recipe
from peft_unlearn.folder.yaml_io import parse_yaml
from peft_unlearn.training.recipe import prepare

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def load(path: str) -> ModuleType:
    """A script that is no part of the package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return load("docs/generate.py")


def test_every_method_has_a_card(generate: ModuleType) -> None:
    written = generate.cards()
    shared = written.pop("shared")
    assert set(written) == {f"{m.kind}/{m.name}" for m in generate.methods()}
    used = generate.recipes().values()
    for m in generate.methods():
        card = written[f"{m.kind}/{m.name}"]
        asked = {"use", "formula", "published", "cost", "limits", "form"}
        assert asked <= set(card) <= asked | {"params", "example", "fragment"}, m.name
        assert set(card.get("params", {})) <= set(m.params), m.name
        assert set(m.params) <= set(card.get("params", {})) | set(shared), m.name
        assert all(set(p) == {"value", "source"} for p in card["published"]), m.name
        if m.faithful == "reconstructed":
            assert card["form"].startswith("Reconstructed"), m.name
        shown = any(f"{m.kind}/{m.name}" in r["uses"] for r in used)
        assert shown + ("example" in card) + ("fragment" in card) == 1, f"{m.name}: a recipe, or an example of its own"


def test_every_kind_of_method_has_pages_or_is_known_not_to(generate: ModuleType) -> None:
    assert set(registry.KINDS) - set(generate.KINDS) == {"selection", "metric", "attack"}


def test_pages_are_current(generate: ModuleType) -> None:
    assert not generate.stale(), "run `make docs`"


def test_a_changed_page_is_noticed(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    real = generate.build
    monkeypatch.setattr(generate, "build", lambda: {**real(), "npo.md": "other"})
    assert generate.stale() == ["npo.md"]


def test_recipes_count_their_methods(generate: ModuleType) -> None:
    recipe = {"terms": {"forget": {"idk-dpo": {}}, "retain": "nll"}, "smoothing": {"sam": {}}}
    assert generate.uses(recipe) == {
        "objective/idk_dpo": "terms.forget",
        "objective/nll": "terms.retain",
        "rule/sum": "rule",
        "smoothing/sam": "smoothing",
    }


def test_measurements_belong_to_recipes(generate: ModuleType) -> None:
    """Every measured recipe is still there, and both scripts agree on what makes a recipe another one."""
    measuring = load("tests/bench/measure_recipes.py")
    have, found = generate.recipes(), generate.results()
    assert set(found["recipes"]) <= set(have)
    assert all(measuring.fingerprint(r["recipe"]) == r["fingerprint"] for r in have.values())
    assert all(set(r["figures"]) == set(measuring.WANTED) for r in found["recipes"].values() if "figures" in r)


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    heads = re.findall(r"^#+ +(.*)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_point_to_something(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        lost = (
            anchor
            and path.suffix == ".md"
            and path.exists()
            and anchor not in anchors(path.read_text(encoding="utf-8"))
        )
        if lost or not path.exists():
            broken.append(target)
    assert not broken


def recipes_in(page: Path) -> list[dict[str, Any]]:
    """Every fenced YAML block that is a whole recipe: it names base, data and terms."""
    blocks = re.findall(r"^```ya?ml\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    found = [parse_yaml(b, page.name) for b in blocks]
    return [f for f in found if isinstance(f, dict) and {"base", "data", "terms"} <= set(f)]


@pytest.mark.parametrize("page", [p for p in PAGES if recipes_in(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_recipes_in_the_text_are_accepted(page: Path, tmp_path: Path) -> None:
    for recipe in recipes_in(page):
        prepare(check_recipe(recipe, page.name), tmp_path / "out")
