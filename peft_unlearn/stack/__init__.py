"""Loading, stacking, merging and removing forget adapters. Nothing here trains or evaluates.

``from peft_unlearn.stack.model import ForgetModel``; `merge` and `remove` lie in the modules of those names.
"""
