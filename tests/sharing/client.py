"""Clients of the local Hub in processes of their own: huggingface_hub reads its environment once, at import.

`Clients` starts one process with the right environment that imports everything slow, and forks it for each call: a call costs
milliseconds and can be killed at any moment without taking anything else with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]


def environment(url: str, home: Path, token: str | None = None) -> dict[str, str]:
    """The environment in which huggingface_hub talks to `url` and to nothing else."""
    drop = ("proxy", "hf_", "huggingface")
    env = {k: v for k, v in os.environ.items() if not any(d in k.lower() for d in drop)}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error", "no_proxy": "*"}  # fmt: skip
    return env | ({"HF_TOKEN": token} if token else {})


class Clients:
    """`clients("push", folder, "me/x", token=..)` -> what it returned, as JSON; an error as {"error": [type, text]}."""

    def __init__(self, url: str, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=ROOT, env=environment(url, home) | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE.parents[1] / 'folder'}"},
        )  # fmt: skip

    def start(self, do: str, *args: Any, token: str | None = "hf_writer", **options: Any) -> int:
        """Begin a call; returns the process id of the child that runs it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([do, args, options, token]) + "\n")
        self.process.stdin.flush()
        return self._line()["pid"]

    def result(self) -> Any:
        return self._line()

    def __call__(self, do: str, *args: Any, token: str | None = "hf_writer", **options: Any) -> Any:
        self.start(do, *args, token=token, **options)
        return self.result()

    def _line(self) -> Any:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client process ended: {self.process.stderr.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


# --- the other side -------------------------------------------------------------------------------------------------------


def push(folder: str, repo: str, **options: Any) -> Any:
    from peft_unlearn.sharing.publish import push

    return push(folder, repo, **options).to_dict()


def pull(repo: str, out: str, cache: str | None = None, offline: bool = False, **options: Any) -> Any:
    import huggingface_hub.constants as constants

    from peft_unlearn.sharing.publish import pull

    constants.HF_HUB_OFFLINE = offline
    os.environ["HF_HUB_OFFLINE"] = str(int(offline))
    if cache is not None:
        constants.HF_HUB_CACHE = cache
    found = pull(repo, out, **options)
    return {"path": str(found.folder.path), "commit": found.commit, "adapter_id": found.folder.adapter_id}


def load(repo: str) -> Any:
    """Last logits of an adapter by its id, through the loaders that everybody has."""
    import tinyfolder
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    whole = AutoPeftModelForCausalLM.from_pretrained(repo, dtype="float32").eval()
    base = AutoModelForCausalLM.from_pretrained("me/base", dtype="float32").eval()
    plain = tinyfolder.logits(base)
    on_top = PeftModel.from_pretrained(base, repo).eval()
    return {"auto": tinyfolder.logits(whole)[0, -1].tolist(), "on_top": tinyfolder.logits(on_top)[0, -1].tolist(),
            "base": plain[0, -1].tolist()}  # fmt: skip


def load_without(repo: str, ids: list[list[int]]) -> Any:
    """The same in a process where this package cannot be imported, and was not."""
    import torch
    from peft import AutoPeftModelForCausalLM

    assert not [m for m in sys.modules if m.partition(".")[0] == "peft_unlearn"]
    sys.modules["peft_unlearn"] = None  # type: ignore[assignment]
    model = AutoPeftModelForCausalLM.from_pretrained(repo, dtype="float32").eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits[0, -1].tolist()


def main() -> None:
    import huggingface_hub.hf_api  # loaded once, before the forks
    import safetensors.torch  # noqa: F401
    import torch

    torch.set_num_threads(1)
    from tqdm import tqdm

    for name in ("HfApi", "CommitOperationAdd", "CommitOperationDelete", "snapshot_download", "get_token", "errors"):
        getattr(huggingface_hub, name)
    tqdm.set_lock(threading.RLock())  # its own is shared with the children below, and tests kill some
    real = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    for line in sys.stdin:
        do, args, options, token = json.loads(line)
        if do.startswith("load"):  # once, before the fork: two calls need them
            import transformers.models.llama.modeling_llama  # noqa: F401
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.environ.pop("HF_TOKEN", None)
            if token:
                os.environ["HF_TOKEN"] = token
            try:
                answer = globals()[do](*args, **options)
            except BaseException as e:
                answer = {"error": [type(e).__name__, str(e)], "trace": traceback.format_exc()}
            os.write(write, json.dumps(answer).encode())
            os._exit(0)
        os.close(write)
        print(json.dumps({"pid": pid}), file=real, flush=True)
        data = b""
        while piece := os.read(read, 1 << 16):
            data += piece
        os.close(read)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        print(json.dumps({"killed": True}) if killed else data.decode(), file=real, flush=True)


if __name__ == "__main__":
    main()
