"""How rows become minibatches. Knows no file format and no model."""

from loaders.errors import LoaderError
from loaders.loader import MinibatchLoader, SequentialLoader
from loaders.minibatch import Minibatch
from loaders.plan import EpochPlan
from loaders.source import ArraySource, RowBlock, RowSource

__all__ = [
    "ArraySource",
    "EpochPlan",
    "LoaderError",
    "Minibatch",
    "MinibatchLoader",
    "RowBlock",
    "RowSource",
    "SequentialLoader",
]
