"""The forget adapter on disk: manifest, recipe, digests, and a writer that never leaves half a folder.

Light on purpose: `manifest` and `recipe` load without torch, so that ``--help`` and ``plan`` stay fast. Import the
module you need: ``from peft_unlearn.folder.read import read_adapter``.
"""
