"""For processes that fork children and kill them with -9."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def bars_of_its_own() -> None:
    """tqdm's lock is shared with forked children: one that is killed while it holds it stops every later bar of its parent, for ever."""
    tqdm.set_lock(threading.RLock())


def killed(work: Callable[[], Any], after: float) -> bool | None:
    """Run `work` in a child and kill it -9 `after` seconds; whether it still ran then, None where it failed before."""
    pid = os.fork()
    if pid == 0:
        try:
            with (
                open(os.devnull, "w") as nowhere,
                contextlib.redirect_stdout(nowhere),
                contextlib.redirect_stderr(nowhere),
            ):
                work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return True if os.WIFSIGNALED(status) else None if os.WEXITSTATUS(status) else False
