"""The metrics, one family a file. A metric is a pure function of what was measured on one set of rows. Its
positional parameters say by name what it is fed (`feed.INPUTS` lists the names), keyword-only ones are
hyper-parameters. It returns one value per row, (rows,) float64, of which the mean is reported, or one number for the
whole set; it raises `Unmeasured` with the reason where it has none. What one reading and one greedy answer do not give comes
from a *provider* beside the metrics that need it. Importing these files loads no torch.
"""

from . import classes as classes
from . import depth as depth
from . import extraction as extraction
from . import fluency as fluency
from . import generation as generation
from . import leak as leak
from . import letters as letters
from . import likelihood as likelihood
from . import membership as membership
from . import quality as quality
