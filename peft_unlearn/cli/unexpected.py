"""What nobody expected, as a sentence: every other error of a command ends here, its traceback in a log file."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
import traceback
from pathlib import Path

DEFECT = 4
"""Exit code of a defect of this package."""
KEPT_LOGS = 20
_WHERE = "https://github.com/peft-unlearn/peft-unlearn/issues"


def explain(error: BaseException) -> tuple[str, int]:
    """(what to print, exit code) of an error that no command turned into a message of its own; its traceback is stored."""
    log = write_log(error)
    at = "" if log is None else f" The traceback is in {log}."
    kind, text = type(error).__name__, next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return (
            f"out of memory ({text or kind}); fewer rows at once, a shorter max_length or a smaller base need less.{at}",
            3,
        )
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("peft_unlearn"):
        return f"error: this needs the library {error.name}, which is not installed; install it and run again.{at}", 2
    if isinstance(error, OSError) and error.strerror:
        places = " and ".join(str(f) for f in (error.filename, error.filename2) if f is not None)
        return f"error: {f'{places}: ' if places else ''}the system refused it ({error.strerror}).{at}", 2
    said = f"{kind}: {text}" if text else kind
    seen = at or " Set PEFT_UNLEARN_TRACEBACK=1 to see its traceback."
    return (
        f"error: peft-unlearn met what it did not expect ({said}).{seen} This is a defect of ours: please report it at {_WHERE}.",
        DEFECT,
    )


def write_log(error: BaseException) -> Path | None:
    """A file for this user alone, in the cache folder or else the system's temporary one; None where neither can be written."""
    from ..folder.eval_json import cache_dir
    from ..folder.versions import installed_versions

    try:
        about = ", ".join(f"{k} {v}" for k, v in installed_versions().items())
    except Exception as e:  # a broken installation is one of the things to be reported
        about = f"versions unknown ({e})"
    text = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n{' '.join(sys.argv)}\n{about}, python {sys.version.split()[0]}\n\n"
    text += "".join(traceback.format_exception(error))
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(2)}.log"
    for folder in (cache_dir() / "logs", Path(tempfile.gettempdir()) / "peft-unlearn-logs"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(
                os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600),
                "w",
                encoding="utf-8",
                errors="replace",
            ) as file:
                file.write(text)
            for old in sorted(folder.glob("error-*.log"))[:-KEPT_LOGS]:
                old.unlink(missing_ok=True)
        except OSError:
            continue
        return folder / name
    return None
