"""Evaluation: metrics, suites, the scores of several subjects on one loaded model, and what evaluates while training.

Importing the room registers the metrics, what feeds them, and the attacks. torch comes with it; transformers, scipy and rouge-score are
imported where they are used.
"""

from . import attacks as attacks
from . import depth as depth
from . import extraction as extraction
from . import gradient_norm as gradient_norm
from . import letters as letters
from . import metrics as metrics
