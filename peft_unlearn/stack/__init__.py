"""Loading, stacking, composing, merging and removing forget adapters. Nothing here trains or evaluates.

``from peft_unlearn.stack.model import ForgetModel``; `compose`, `merge` and `remove` lie in the modules of those names, the
stack file in `stackfile`.
"""
