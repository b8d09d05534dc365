"""Importing costs next to nothing, and imports run in one direction."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_unlearn

PACKAGE = Path(peft_unlearn.__file__).resolve().parent
# docs/design.md: each room imports only from rooms before it
ORDER = ["errors", "progress", "registry", "reporting", "data", "folder", "tuners", "head", "prefix", "forward", "stack", "merging",
         "objectives", "gradients", "attribution", "evaluation", "training", "attacks", "sharing", "records", "analysis", "request", "demo",
         "cli"]  # fmt: skip
OUTSIDE = {"__init__", "__main__"}  # the public names, loaded when asked for


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_import_pulls_in_nothing_heavy():
    out = json.loads(
        fresh(
            "import sys; before = set(sys.modules); import peft_unlearn, json\n"
            "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
        )
    )
    heavy = {"torch", "peft", "transformers", "accelerate", "numpy", "scipy", "rich", "typer", "yaml", "datasets"}
    assert not heavy & set(out)


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "errors",
        "progress",
        "registry",
        "reporting",
        "reporting.tables",
        "reporting.result",
        "data.embedded",
        "data.formats",
        "folder.recipe",
        "folder.base",
        "folder.results",
        "evaluation",
    ],
)
def test_light_modules_stay_light(module):
    out = fresh(f"import sys, peft_unlearn.{module}\nprint('torch' in sys.modules, 'peft' in sys.modules)")
    assert out.split() == ["False", "False"]


def test_import_is_quick():
    code = "import time; a = time.process_time(); import peft_unlearn; print(time.process_time() - a)"
    assert min(float(fresh(code)) for _ in range(3)) < 0.1


def test_help_is_quick():
    times = []
    for _ in range(3):
        start = sum(os.times()[2:4])
        done = subprocess.run(
            [sys.executable, "-m", "peft_unlearn", "--help"], capture_output=True, text=True, timeout=60, check=True
        )
        times.append(sum(os.times()[2:4]) - start)
    assert (
        "train" in done.stdout and min(times) < 2.0
    )  # s of a processor, 0.5 on an idle machine: torch alone takes longer


def test_public_names_resolve():
    for name in peft_unlearn.__all__:
        assert getattr(peft_unlearn, name) is not None
    assert set(peft_unlearn.__all__) <= set(dir(peft_unlearn))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        peft_unlearn.nothing  # noqa: B018


def test_every_command_is_a_public_function():
    commands = "attack audit calibrate sanitize compare report merge compose remove verify push pull train evaluate plan record"
    assert all(
        callable(getattr(peft_unlearn, name))
        for name in [*commands.split(), "card", "effect", "experts", "export", "interference", "methods"]
    )


def test_public_names_are_typed_where_they_are_loaded_from():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert typed == peft_unlearn._WHERE


def rooms() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).with_suffix("").parts[0], []).append(path)
    return found


def imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports anywhere, inside functions too."""
    package = ("peft_unlearn", *path.relative_to(PACKAGE).parts[:-1])
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(a.name.split(".")) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            whole = (*start, *(node.module.split(".") if node.module else ()))
            names = [whole] if len(whole) > 1 else [(*whole, a.name) for a in node.names]
        out |= {n[1] for n in names if len(n) > 1 and n[0] == "peft_unlearn"}
    return out


def test_every_room_is_known():
    assert set(rooms()) - OUTSIDE - set(ORDER) == set()


@pytest.mark.parametrize("room", [r for r in ORDER if r in rooms()])
def test_rooms_import_only_from_rooms_before_them(room):
    at = ORDER.index(room)
    for path in rooms()[room]:
        late = {r for r in imported(path) if r != room and (r not in ORDER or ORDER.index(r) > at)}
        assert not late, f"{path.relative_to(PACKAGE)} imports {sorted(late)}"


def lines_of(paths: list[Path]) -> int:
    return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in paths)


def test_no_room_is_a_house_of_its_own():
    """A room past a sixth of the lines holds two purposes."""
    sizes = {room: lines_of(paths) for room, paths in rooms().items()}
    whole = sum(sizes.values())
    assert whole <= 41_000  # docs/design.md, "How large it is"
    assert {room: n for room, n in sizes.items() if n > 0.16 * whole} == {}


def test_no_file_imports_in_a_circle():
    """What is imported while a file is loaded; imports inside functions and for type checkers do not count."""
    files = {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
        for ps in rooms().values()
        for p in ps
    }
    needs = {name: {n for n in loaded(path) if n in files and n != name} for name, path in files.items()}
    while ready := [name for name, found in needs.items() if not found]:
        needs = {name: found - set(ready) for name, found in needs.items() if name not in ready}
    assert not needs, f"these import each other: {sorted(needs)}"


def loaded(path: Path) -> set[str]:
    """Files that are imported with this one, as ``room.file``."""
    package = path.relative_to(PACKAGE).parts[:-1]
    out = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            whole = ".".join((*start, *(node.module.split(".") if node.module else ())))
            out |= {whole, *(f"{whole}.{a.name}".lstrip(".") for a in node.names)}
    return out


def test_files_are_small():
    """A file past about 350 lines asks to be two."""
    long = {p.name: n for ps in rooms().values() for p in ps if (n := len(p.read_text().splitlines())) > 500}
    assert not long
