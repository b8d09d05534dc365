"""The command line: thin. Results go to standard output, everything else to standard error.

Exit codes: 0 done; 1 a check answered no; 2 the user's input; 3 interrupted or a resource lost; 4 a defect of ours.
"""

from __future__ import annotations

import sys

# The order in which --help lists them
from . import training as training

from . import judging as judging  # isort: skip
from . import stacking as stacking  # isort: skip
from . import sharing as sharing  # isort: skip
from . import embedded as embedded  # isort: skip
from .options import app as app


def main() -> None:
    """Entry point: every error is a message; a defect's traceback is in a log file (or shown, with PEFT_UNLEARN_TRACEBACK set)."""
    import os
    import warnings

    if not sys.stderr.isatty():  # the bars of the libraries underneath are for a terminal
        os.environ.setdefault("TQDM_DISABLE", "1")
    from ..errors import Interrupted, UserError
    from ..reporting.text import printable

    # Where in the program a warning was given is nothing to the user
    warnings.formatwarning = lambda message, *_, **__: f"note: {printable(str(message))}\n"
    # PEFT looks for the base on the Hub when it saves; embedded and local ones are not there, and nothing is missing.
    warnings.filterwarnings("ignore", message="Could not find a config file in")
    # Deprecations between the libraries underneath are nothing a user of this command can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b")
    try:
        app()
    except SystemExit as e:
        # Typer's own codes: 130 for Ctrl-C, 1 when the reader of our output went away.
        if e.code == 130:
            print("interrupted", file=sys.stderr)
        lost = e.code == 130 or isinstance(e.__context__, BrokenPipeError)
        sys.exit(3 if lost else e.code)
    except UserError as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Interrupted) as e:
        print(printable(f"interrupted{f': {e}' if str(e) else ''}"), file=sys.stderr)
        sys.exit(3)
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        sys.stderr.close()
        sys.exit(3)
    except Exception as e:
        if os.environ.get("PEFT_UNLEARN_TRACEBACK"):
            raise
        from .unexpected import explain

        text, code = explain(e)
        print(printable(text), file=sys.stderr)
        sys.exit(code)
