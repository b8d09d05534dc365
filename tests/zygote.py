"""Processes for tests, without the seconds in which each of them would import torch, transformers and PEFT.

`run`, `start` and `ranks` take commands as `subprocess` does: [sys.executable, options, -c CODE | -m MODULE | SCRIPT, arguments]. One
helper for all workers of a test run has imported what is not ours, in one thread, and forks a child for each command. It
runs as `python -I -S` where this package is not installed; children without -S get the installed packages back, with their
hooks. What is read while libraries are imported (the variables of `FIXED`) is the helper's, so a test that needs other
values, or asks what an import does, takes a real process. So does one test of every kind.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

FIXED = ("HF_", "HUGGINGFACE", "TRANSFORMERS_", "OMP_", "MKL_", "OPENBLAS_", "TOKENIZERS_")
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))  # one helper for all workers of a run
_HOME = Path(tempfile.gettempdir(), f"peft-unlearn-zygote-{_RUN[:12]}")


class Process:
    """The part of `subprocess.Popen` that tests use."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | Path | None = None
    ) -> None:
        assert command[0] == sys.executable, command
        self.args, env = list(command), dict(os.environ if env is None else env)
        moved = [k for k in {*env, *os.environ} if k.startswith(FIXED) and env.get(k) != os.environ.get(k)]
        assert not moved, f"{moved} are read while libraries are imported: take a real process"
        self.returncode: int | None = None
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        read, write = os.pipe()
        self.stdout: IO[str] = os.fdopen(read, encoding="utf-8", errors="replace")
        self._line = _connected()
        installed = list(dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))))
        asked = {"args": self.args[1:], "env": env, "cwd": str(cwd or os.getcwd()), "installed": installed}
        with open(os.devnull, "rb") as none:
            socket.send_fds(self._line, [b" "], [none.fileno(), write, self._err.fileno()])
        os.close(write)
        self._line.sendall(json.dumps(asked).encode())
        self._line.shutdown(socket.SHUT_WR)
        self._told = self._line.makefile("r")
        self.pid = int(self._told.readline())

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), self.kill()))
        timer.start()
        try:
            out = self.stdout.read()
            if self.returncode is None:
                self.returncode = int(self._told.readline())
        finally:
            timer.cancel()
            self._line.close()
        if late.is_set():
            raise subprocess.TimeoutExpired(self.args, timeout, out)
        self._err.seek(0)
        return out, self._err.read().decode(errors="replace")


start = Process


def run(
    command: Sequence[str], env: Any = None, cwd: Any = None, timeout: float = 600, **_: Any
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run(command, capture_output=True, text=True)`."""
    process = Process(command, env, cwd)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ranks(script: str | Path, n: int = 2, timeout: float = 400) -> list[subprocess.CompletedProcess[str]]:
    """`script` in `n` processes that find each other, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **where}
    started = [Process([sys.executable, str(script)], {**env, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(n)]
    done = [(p, *p.communicate(timeout)) for p in started]
    return [subprocess.CompletedProcess(p.args, p.returncode or 0, out, err) for p, out, err in done]


def _connected() -> socket.socket:
    from filelock import FileLock

    path = _HOME / "socket"
    with FileLock(f"{_HOME}.lock"):
        if not path.exists():
            _begin(path)
    line = socket.socket(socket.AF_UNIX)
    line.connect(str(path))
    return line


def _begin(path: Path) -> None:
    from peft_unlearn.demo.child import link_site

    _HOME.mkdir(mode=0o700)
    link_site(_HOME / "site")
    worker = "PYTEST_XDIST_WORKER" in os.environ
    command = [
        sys.executable,
        "-I",
        "-S",
        __file__,
        str(path),
        str(_HOME / "site"),
        str(os.getppid() if worker else os.getpid()),
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    with open(_HOME / "log", "wb") as log:
        helper = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    while not path.exists():
        assert helper.poll() is None, (_HOME / "log").read_text()
        time.sleep(0.05)


# --- the helper ---------------------------------------------------------------------------------------------------


def serve(path: str, site: str, life: int) -> dict[str, Any]:
    """Fork a child for each request until process `life` is gone; returns only in children, with what they are to be."""
    sys.path.append(site)
    import transformers.trainer  # noqa: F401
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    tqdm.set_lock(threading.RLock())  # its own is shared with children, and some of those are killed while they hold it
    assert threading.active_count() == 1 and "peft_unlearn" not in sys.modules
    gc.collect()
    gc.freeze()  # children share these pages
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    listener.settimeout(2)
    os.rename(path + ".new", path)
    while True:
        try:
            line = listener.accept()[0]
        except TimeoutError:
            try:
                os.kill(life, 0)
            except OSError:
                os._exit(0)
            continue
        finally:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        if os.fork() == 0:
            listener.close()
            fds = socket.recv_fds(line, 1, 3)[1]
            with line.makefile("rb") as f:
                asked = json.load(f)
            pid = os.fork()
            if pid == 0:
                line.close()
                return {**asked, "fds": fds}
            for fd in fds:
                os.close(fd)
            with contextlib.suppress(OSError):  # who asked may be gone
                line.sendall(b"%d\n" % pid)
                line.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
        line.close()


def become(args: list[str], env: dict[str, str], cwd: str, installed: list[str], fds: list[int]) -> None:
    """Do in this process what a new `python *args` would."""
    import builtins
    import importlib
    import runpy
    import site
    import types
    import warnings

    for i, fd in enumerate(fds):
        os.dup2(fd, i)
        os.close(fd)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    isolated = bare = False
    while args[0] not in ("-c", "-m") and args[0].startswith("-"):
        option = args.pop(0)
        if option == "-W":
            action, _, category = args.pop(0).partition("::")
            warnings.simplefilter(action, getattr(builtins, category))  # type: ignore[arg-type]
        else:
            isolated, bare = isolated or option == "-I", bare or option == "-S"
    lead: list[str] = []
    if not isolated:
        lead = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    if not bare:
        for folder in installed:
            site.addsitedir(folder)
    sys.path[:0] = lead
    importlib.invalidate_caches()
    kind = args.pop(0) if args[0] in ("-c", "-m") else ""
    what = args.pop(0)
    if not isolated:
        sys.path.insert(0, "" if kind == "-c" else cwd if kind == "-m" else str(Path(what).resolve().parent))
    if kind == "-m":
        sys.argv = [what, *args]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *args]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), module.__dict__)
    else:
        sys.argv = [what, *args]
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    code: Any = 1
    try:
        become(**serve(sys.argv[1], sys.argv[2], int(sys.argv[3])))
        code = 0
    except SystemExit as e:
        code = 0 if e.code is None else e.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
