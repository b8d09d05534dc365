"""Evaluation: metrics, suites, the scores of several subjects on one loaded model, and what evaluates while training.

Importing the room registers the metrics and what feeds them. torch, transformers, scipy and rouge-score are imported where they are
used.
"""

from . import metrics as metrics
