"""pyproject.toml, both constraints files and what the package imports say the same about versions."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import peft_unlearn
from peft_unlearn.folder.versions import versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = [Requirement(x) for x in PROJECT["dependencies"]]
EXTRAS = {
    k: [r for x in v if (r := Requirement(x)).marker is None or r.marker.evaluate()]
    for k, v in PROJECT["optional-dependencies"].items()
}
# Its older wheels for Linux bring several GB of CUDA with them: docs/compatibility.md says that the floor is not tested.
NOT_AT_FLOOR = {"torch"}
# A package imports under another name than it is installed by, or comes with one that is declared.
IMPORTED_AS = {
    "pyyaml": "yaml",
    "huggingface-hub": "huggingface_hub",
    "rouge-score": "rouge_score",
    "lm-eval": "lm_eval",
}
COMES_WITH = {"tokenizers": "transformers", "click": "typer", "PIL": "matplotlib"}
NOT_DECLARED = {"torchao": "a recipe that wants it is refused with its name where it is missing (folder/quantized.py)"}
NOT_IMPORTED = {
    "accelerate": "transformers' Trainer needs it",
    "bitsandbytes": "transformers loads it for quantized bases",
}


def pinned(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [x.split("==") for x in lines if x.strip() and not x.startswith("#")]
    names = [canonicalize_name(name) for name, _ in found]
    assert len(names) == len(set(names)), f"{file} pins a package twice"
    return {canonicalize_name(name): version.strip() for name, version in found}


def floor(r: Requirement) -> str:
    floors = [s.version for s in r.specifier if s.operator in (">=", "==")]
    assert len(floors) == 1, f"{r}: one floor"
    return floors[0]


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_pins_lie_in_the_declared_ranges(file: str) -> None:
    pins = pinned(file)
    extras = EXTRAS["dev"] + EXTRAS["data"] + EXTRAS["eval"] + (EXTRAS["docs"] if file == "constraints.txt" else [])
    for r in CORE + extras:
        assert canonicalize_name(r.name) in pins, f"{file} does not pin {r.name}"
        version = pins[canonicalize_name(r.name)]
        assert r.specifier.contains(version, prereleases=True), (
            f"{file} pins {r.name}=={version}, pyproject.toml says {r}"
        )


def test_the_oldest_pins_are_the_floors() -> None:
    pins = pinned("constraints-oldest.txt")
    for r in CORE:
        if r.name not in NOT_AT_FLOOR:
            assert Version(pins[canonicalize_name(r.name)]) == Version(floor(r)), r


def test_nothing_is_newer_among_the_oldest() -> None:
    new, old = pinned("constraints.txt"), pinned("constraints-oldest.txt")
    assert all(Version(old[canonicalize_name(r.name)]) <= Version(new[canonicalize_name(r.name)]) for r in CORE)


def imported() -> set[str]:
    found = set()
    for path in (ROOT / "peft_unlearn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"peft_unlearn"}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    extras = EXTRAS["data"] + EXTRAS["eval"] + EXTRAS["qlora"]
    declared = {IMPORTED_AS.get(r.name, r.name) for r in CORE + extras}
    assert not imported() - declared - set(COMES_WITH) - set(NOT_DECLARED)
    assert not declared - imported() - set(NOT_IMPORTED)


def test_the_version_is_said_once() -> None:
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", peft_unlearn.__version__)
    assert versions()["peft-unlearn"] in (peft_unlearn.__version__, "source")


def test_python_versions_agree() -> None:
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f"python: {classified}".replace("'", '"') in workflow
    assert PROJECT["requires-python"] == f">={classified[0]}"
