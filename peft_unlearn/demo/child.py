"""A child process that has PEFT and has not this package: does the saved folder work for somebody who never installed it?

The child starts without site-packages (``-I -S``) and is given a folder of links to everything installed, except what
belongs to peft_unlearn. It proves to itself that peft_unlearn cannot be found before it loads anything. This holds for
a wheel, for an editable install and for a source tree alike, for none of their hooks runs there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OURS = "peft_unlearn"

_SCRIPT = r"""
import importlib, importlib.metadata, importlib.util, json, sys
site, request, answer = sys.argv[1:4]
sys.path.append(site)
importlib.invalidate_caches()
assert importlib.util.find_spec("peft_unlearn") is None, "peft_unlearn can be found here"
try:
    importlib.metadata.distribution("peft-unlearn")
    raise AssertionError("peft-unlearn is installed here")
except importlib.metadata.PackageNotFoundError:
    pass
try:
    import peft_unlearn
    raise AssertionError("peft_unlearn can be imported here")
except ModuleNotFoundError:
    pass
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
ask = json.load(open(request, encoding="utf-8"))
torch.set_num_threads(ask["threads"])
tokenizer = AutoTokenizer.from_pretrained(ask["adapter"], trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(ask["base"], dtype=torch.float32, trust_remote_code=False)
model = PeftModel.from_pretrained(model, ask["adapter"]).eval()
logits = []
with torch.no_grad():
    for text in ask["prompts"]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logits.append(model(input_ids=ids, use_cache=False).logits[0, -1].tolist())
foreign = sorted(m for m in sys.modules if m.partition(".")[0] == "peft_unlearn")
assert not foreign, foreign
with open(answer, "w", encoding="utf-8") as f:
    json.dump({"logits": logits, "peft": importlib.metadata.version("peft")}, f)
"""


def run(base: Path, adapter: Path, prompts: list[str]) -> dict[str, Any]:
    """Load `adapter` with plain PEFT in such a child.

    Returns:
        {"logits": (prompts, vocab) of the last position as lists, "peft": version}.

    Raises:
        RuntimeError: peft_unlearn was found there after all, or PEFT could not load the folder; with the child's last words.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="plain-peft-") as scratch:
        site = Path(scratch, "site")
        link_site(site)
        request, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
        ask = {"base": str(base.resolve()), "adapter": str(adapter.resolve()), "prompts": prompts}
        request.write_text(json.dumps({**ask, "threads": torch.get_num_threads()}), encoding="utf-8")
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-I", "-S", "-c", _SCRIPT, str(site), str(request), str(answer)]
        # Its own folder: an empty one, so that nothing lies about that could be imported.
        done = subprocess.run(command, env=env, cwd=scratch, capture_output=True, text=True, errors="replace")
        if done.returncode != 0 or not answer.is_file():
            last = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise RuntimeError(f"plain PEFT in a process without {OURS} failed:\n{last}")
        return json.loads(answer.read_text(encoding="utf-8"))


def link_site(site: Path) -> None:
    """Fill `site` with links to everything in the folders where PEFT and torch are installed, without what is ours.

    Hooks (.pth files, editable finders) are left out too: they are how a package can be there without being there.
    """
    site.mkdir()
    for folder in _installed():
        for entry in sorted(folder.iterdir()):
            name = entry.name.lower().replace("-", "_")
            hidden = name.startswith((OURS, f"_editable_impl_{OURS}", f"__editable___{OURS}")) or name.endswith(".pth")
            target = site / entry.name
            if hidden or target.exists():
                continue
            try:
                target.symlink_to(entry.resolve(), target_is_directory=entry.is_dir())
            except OSError as e:  # a system without links for plain users
                raise RuntimeError(
                    f"links cannot be made here ({e}), so no process without {OURS} can be set up"
                ) from e


def _installed() -> list[Path]:
    """The folders of the import path in which distributions are installed, in its order."""
    wanted = [p for p in map(Path, sys.path) if p.is_dir() and next(p.glob("*.dist-info"), None) is not None]
    for name in ("torch", "peft", "transformers"):  # and wherever else these lie
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            wanted.append(Path(spec.origin).parent.parent)
    return list(dict.fromkeys(p.resolve() for p in wanted))
