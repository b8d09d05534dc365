"""Evaluation: metrics, suites, the scores of several subjects on one loaded model, and what evaluates while training.

Importing the room registers the metrics and what feeds them. torch comes with it; transformers, scipy and rouge-score are
imported where they are used.
"""

from . import metrics as metrics
from .metrics import depth_reading as depth_reading
from .metrics import extraction_reading as extraction_reading
from .metrics import gradient_norm as gradient_norm
from .metrics import letters_reading as letters_reading
