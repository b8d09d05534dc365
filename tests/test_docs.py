"""The documentation says what the code does: pages are current, code blocks run or are checked, links and names lead somewhere."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markdown_it import MarkdownIt

import peft_unlearn
from peft_unlearn import registry
from peft_unlearn.folder.recipe import TOP_LEVEL, check_recipe
from peft_unlearn.folder.yaml_io import parse_yaml
from peft_unlearn.training.recipe import prepare

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "adapters" / "README.md"])
per_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


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


def test_cards_are_of_methods_and_whole(generate: ModuleType) -> None:
    written = generate.cards()
    shared = written.pop("shared")
    have = {f"{m.kind}/{m.name}": m for m in generate.methods()}
    assert set(written) <= set(have)
    for key, card in written.items():
        m = have[key]
        asked = {"use", "formula", "published", "cost", "limits", "form"}
        assert asked <= set(card) <= asked | {"params", "example", "fragment"}, m.name
        assert set(card.get("params", {})) <= set(m.params), m.name
        assert set(m.params) <= set(card.get("params", {})) | set(shared), m.name
        assert all(set(p) == {"value", "source"} for p in card["published"]), m.name
        if m.faithful == "reconstructed":
            assert card["form"].startswith("Reconstructed"), m.name


def test_a_method_without_a_card_has_a_page_of_its_docstring(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the function is asked of whoever adds an objective; pages in the repository stay as they are."""
    before, real = generate.build(), generate.cards()
    bare = {k: v for k, v in real.items() if k not in ("objective/ga", "smoothing/sam")}
    monkeypatch.setattr(generate, "cards", lambda: bare)
    assert set(before) - set(generate.build()) == {"ga.md", "sam.md"}
    pages = generate.build(written_only=False)
    assert set(pages) == set(before)
    for name, kind in (("ga", "objective"), ("sam", "smoothing")):
        method = registry.get(kind, name)
        assert generate.plain(method.summary)[:40] in pages[f"{name}.md"] and method.source.url in pages[f"{name}.md"]
        assert all(f"| `{p}` |" in pages[f"{name}.md"] for p in method.params)
        block = re.search(r"```yaml\n(.*?)```", pages[f"{name}.md"], re.S)
        assert block is not None
        part = parse_yaml(block[1], name)
        (hyper,) = (part["terms"]["forget"] if kind == "objective" else part[kind]).values()
        assert not method.check(hyper), "every default stands there and is accepted"


def test_every_kind_of_method_has_pages_or_is_known_not_to(generate: ModuleType) -> None:
    assert set(registry.KINDS) - set(generate.KINDS) == {"metric", "attack"}


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


@per_page
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


# --- code blocks ------------------------------------------------------------------------------------------------------


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of these languages, as a reader sees them."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [t.content for t in tokens if t.type == "fence" and t.info.strip() in languages]


@per_page
def test_every_block_says_its_language(page: Path) -> None:
    """So that none is passed over here; the specification's examples are of no language."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    assert {t.info.strip() for t in tokens if t.type == "fence"} <= {"python", "yaml", "sh", "toml", "text", ""}
    loose = [t.content for t in tokens if t.type == "code_block"]
    assert not [c for c in loose if re.match(r"\s*(peft-unlearn|make|pip|python|import|from) ", c)]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: str(p.relative_to(ROOT)))
def test_yaml_in_the_text_is_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes by the recipe's checks, suites by the suite's, parts of either as YAML of known keys."""
    monkeypatch.chdir(tmp_path)
    for name in ("forget", "retain"):  # as docs/tutorials/your-own-data.md writes them
        (tmp_path / f"{name}.jsonl").write_text(
            f'{{"question": "Who is {name}?", "answer": "Ada."}}\n', encoding="utf-8"
        )
    for text in blocks(page, "yaml"):
        found = parse_yaml(text, page.name)
        assert isinstance(found, dict) and found, text
        if {"base", "data", "terms"} <= set(found):
            prepare(check_recipe(found, page.name), tmp_path / "out")
        elif "sets" in found:
            read_suite(text, tmp_path / "suite.yaml")
        else:
            assert set(found) <= set(TOP_LEVEL) | STACK_KEYS, sorted(found)


def read_suite(text: str, path: Path) -> None:
    from peft_unlearn.evaluation.suites import load

    path.write_text(text, encoding="utf-8")
    load(path)


STACK_KEYS = {"format", "base", "adapters"}


def commands(page: Path) -> list[str]:
    """Lines of shell blocks, and commands in back-ticks that name a whole command line."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    inline = re.findall(r"`((?:peft-unlearn|make|python) [^`]+)`", text)
    shell = [line for block in blocks(page, "sh") for line in block.splitlines()]
    joined = [part.strip() for line in shell + inline for part in re.split(r"&&", line.split(" #")[0])]
    return [c for c in joined if c]


def written_out(command: str) -> list[str]:
    """The words of a command of a synopsis: `[..]` is optional and kept, of `A|B` the first, `..` is left out."""
    command = re.sub(r"(?<=\S)\|\S+", "", command.replace("[", " ").replace("]", " "))
    return [w for w in shlex.split(command) if w != ".."]


def parses(words: list[str]) -> None:
    """Raises what the command line would print; nothing is run."""
    import typer

    from peft_unlearn.cli import app

    command, context = typer.main.get_command(app), None
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
        context = command.context_class(command, parent=context)
    if words:  # the name alone stands for the command
        command.make_context(command.name, [w for w in words if w != "--help"])


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_the_text_exist(page: Path) -> None:
    """Every command, option and make target that is named; every script and file of a command that starts from the repository."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for command in commands(page):
        first, *words = written_out(command)
        if first == "peft-unlearn":
            parses(words)
        elif first == "make":
            assert {w for w in words if "=" not in w} <= targets, command
        elif first in ("python", "bash") and words[0] != "-m":
            assert (ROOT / words[0]).exists(), command
        else:
            assert first in ("pip", "pytest", "python", "pre-commit"), command
        for word in words:
            if word.startswith(("adapters/recipes/", "tests/")):
                assert (ROOT / word).exists(), command


PYTHON = [(p, i) for p in PAGES for i in range(len(blocks(p, "python")))]


@pytest.mark.parametrize(
    ("page", "i"), PYTHON, ids=lambda x: str(x.relative_to(ROOT)) if isinstance(x, Path) else str(x)
)
def test_python_in_the_text_names_what_there_is(page: Path, i: int) -> None:
    """It is Python, and every name that it takes from the package is there. tests/test_doc_examples.py runs it."""
    for node in ast.walk(ast.parse(blocks(page, "python")[i])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_unlearn") and not node.level:
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, a.name) for a in node.names), (page, ast.unparse(node))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "peft_unlearn":
            assert node.attr in peft_unlearn.__all__, node.attr


# --- names in back-ticks ----------------------------------------------------------------------------------------------

ELSEWHERES = {"docs/export.md"}  # names files of other projects, and says of which
NO_FOLDERS = {"sparse", "out", "OUT", "expert_lora"}  # of a user, or of an adapter


def resolves(dotted: str) -> bool:
    """Whether peft_unlearn.a.b.C names a module or something in one."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            if importlib.util.find_spec(".".join(parts[:n])) is None:
                continue
        except ModuleNotFoundError:
            continue
        found: Any = importlib.import_module(".".join(parts[:n]))
        for name in parts[n:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def is_file(name: str, page: Path) -> bool:
    """A path of the repository, of the package, or beside the page; without a folder, any file of the package or the page's own folder."""
    places = [ROOT / name, ROOT / "peft_unlearn" / name, page.parent / name]
    return any(p.exists() for p in places)


@per_page
def test_names_in_back_ticks_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    codes = set(re.findall(r"`([^`\n]+)`", text))
    assert not [code for code in sorted(codes) if not leads_somewhere(code, page)]


def leads_somewhere(code: str, page: Path) -> bool:
    """Whether a name of the package, a Python file (`FILE: NAME` too) or a folder in back-ticks is there; all other code is."""
    if match := re.fullmatch(r"(peft_unlearn(?:\.\w+)+)(?:\(.*\))?", code):
        return code == "peft_unlearn.plugins" or resolves(match[1])  # the entry-point group is no module
    if match := re.fullmatch(r"((?:[\w.-]+/)*[\w-]+\.py)(?:: *(\w+))?", code):
        if str(page.relative_to(ROOT)) in ELSEWHERES:
            return True
        module = "peft_unlearn." + match[1].removesuffix(".py").replace("/", ".")
        return is_file(match[1], page) and (match[2] is None or resolves(f"{module}.{match[2]}"))
    if re.fullmatch(r"(?:[\w.-]+/)+", code):
        return code.split("/")[0].removesuffix(".work") in NO_FOLDERS or is_file(code, page)
    return True


def test_the_table_of_rooms_is_the_line_of_rooms() -> None:
    """docs/design.md names every room once, in the order that tests/test_import.py holds."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(.*?)```", text, re.S)
    assert block is not None
    line = re.findall(r"\w+", block[1])
    there = {p.stem for p in (ROOT / "peft_unlearn").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert set(line) == there - {"__init__", "__main__"} and len(line) == len(set(line))
    table = re.search(r"\| room \|.*?\n\n", text, re.S)
    assert table is not None
    rows = [r.split("|")[1] for r in table[0].strip().splitlines()[2:]]
    assert [name for row in rows for name in re.findall(r"`(\w+)", row)] == line
