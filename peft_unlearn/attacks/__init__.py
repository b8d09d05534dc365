"""Attacks: ways to get back what a forget adapter makes a model forget, each with the same attack on the retain model
beside it.

Importing the room registers the attacks.
"""

from . import gcg as gcg
from . import jailbreak as jailbreak
from . import probe as probe
from . import quantize as quantize
from . import relearn as relearn
from . import strip as strip
from . import suffix as suffix
