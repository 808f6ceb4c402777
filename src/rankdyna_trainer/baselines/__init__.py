"""
The methods that the paper compares RankDyna with, and one that it does not: they factor a model that is already
fine-tuned.

Each ends in what [`compact`] makes of a RankDyna run, so it is saved, loaded, reported and trained on in the same way.
"""

from .fwsvd import fwsvd
from .shrink import shrink, shrink_on_data
from .svd import svd
from .tfwsvd import tfwsvd
from .whitened import whitened_svd

__all__ = ["fwsvd", "shrink", "shrink_on_data", "svd", "tfwsvd", "whitened_svd"]
