"""For processes that fork children which are killed with -9."""

from __future__ import annotations

import threading

from tqdm import tqdm


def bars_of_its_own() -> None:
    """tqdm's lock is shared with forked children: one that is killed while it holds it stops every later bar of its parent, for ever."""
    tqdm.set_lock(threading.RLock())
