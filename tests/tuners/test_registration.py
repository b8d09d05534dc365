"""PEFT knows the method whichever of the two packages is imported first, and importing ours alone brings neither torch nor peft."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import zygote

KNOWN = textwrap.dedent("""
    import copy, json, pickle
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    name = "PEFT_UNLEARN_EXPERT_LORA"
    kind = PeftType(name)
    assert kind is PeftType.PEFT_UNLEARN_EXPERT_LORA is PeftType[name] and kind in list(PeftType)
    assert pickle.loads(pickle.dumps(kind)) is kind and copy.deepcopy(kind) is kind
    assert json.dumps(kind) == f'"{name}"' and kind.value == kind.name == name
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind].__name__ == "ExpertLoraConfig"
    assert PEFT_TYPE_TO_TUNER_MAPPING[kind].prefix == PEFT_TYPE_TO_PREFIX_MAPPING[kind] == name.lower() + "_"
    from peft_unlearn.tuners import registration
    assert not any(isinstance(f, registration._AfterPeft) for f in sys.meta_path)
    before = len(PeftType)
    registration.install(); registration.install()
    assert registration.register() is kind and len(PeftType) == before
    assert not any(isinstance(f, registration._AfterPeft) for f in sys.meta_path)
""")


def child(code: str, *path: Path, run: Any = zygote.run) -> None:
    lead = f"import sys, time\nsys.path[:0] = {[str(p) for p in path]!r}\n"
    done = run([sys.executable, "-W", "error::RuntimeWarning", "-c", lead + code], timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# Where the helper's processes begin, PEFT has been imported; what it builds on stays, as if another library had needed that.
WITHOUT_PEFT = "for m in [m for m in sys.modules if m.partition('.')[0] == 'peft']:\n    del sys.modules[m]\n"


def test_ours_before_peft():
    """Asking whether peft exists, as transformers does, must not use the hook up."""
    child(
        textwrap.dedent("""
        import importlib.util
        start = time.process_time()
        import peft_unlearn, peft_unlearn
        assert time.process_time() - start < 0.1
        assert not {"torch", "peft", "transformers"} & set(sys.modules)
        from peft_unlearn.tuners import registration
        registration.install()
        assert sum(isinstance(f, registration._AfterPeft) for f in sys.meta_path) == 1
        spec = importlib.util.find_spec("peft")
        assert spec is not None and "peft" not in sys.modules
        import peft
        assert peft.__spec__.loader.get_source("peft")  # the loader is its own again
        """)
        + KNOWN,
        run=functools.partial(
            subprocess.run, capture_output=True, text=True
        ),  # what an import does is asked of a new process
    )


def test_peft_before_ours():
    child("import peft, peft_unlearn\n" + KNOWN)


def test_the_tuner_itself_first():
    """Importing the tuner imports peft, whose import registers the tuner that is being imported."""
    child(WITHOUT_PEFT + "from peft_unlearn.tuners.expert_lora import ExpertLoraConfig\n" + KNOWN)


def test_a_broken_or_foreign_peft(tmp_path):
    """An import that fails leaves the hook for the next try; a peft that we do not fit stays importable, with a warning."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/__init__.py").write_text("raise ImportError('broken')")
    child(
        WITHOUT_PEFT
        + textwrap.dedent(f"""
        import pathlib, warnings
        import peft_unlearn
        from peft_unlearn.tuners import registration
        hooks = lambda: [f for f in sys.meta_path if isinstance(f, registration._AfterPeft)]
        for _ in range(2):
            try:
                import peft
            except ImportError as e:
                assert str(e) == "broken"
            assert len(hooks()) == 1
        pathlib.Path({str(tmp_path / "peft/__init__.py")!r}).write_text("# mended, and quite another package")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            import peft
        assert "could not register" in str(found[0].message) and not hooks()
        """),
        tmp_path,
    )


@pytest.mark.parametrize("name", ["config", "model", "layer", "export", "blocks"])
def test_modules_import_in_this_process(name):
    __import__(f"peft_unlearn.tuners.expert_lora.{name}")
