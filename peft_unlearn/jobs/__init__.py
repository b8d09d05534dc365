"""What the commands do, without a terminal. Everything a user can get wrong is checked before a model is loaded."""

from .evaluate import check_out, evaluate, save_report
from .plan import Plan, plan
from .run import Run, load_data, prepare
from .save import save_adapter
from .subjects import check_data
from .train import generate_alternates, quiet, train

__all__ = [
    "Plan",
    "Run",
    "check_data",
    "check_out",
    "evaluate",
    "generate_alternates",
    "load_data",
    "plan",
    "prepare",
    "quiet",
    "save_adapter",
    "save_report",
    "train",
]
