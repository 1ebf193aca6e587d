"""How rows become minibatches. Knows no file format and no model."""

from typing import TYPE_CHECKING, Any

from loaders.audit import Audit, audit
from loaders.errors import LoaderError
from loaders.loader import MinibatchLoader
from loaders.minibatch import Minibatch
from loaders.plan import EpochPlan
from loaders.sequential import SequentialLoader
from loaders.source import ArraySource, RowBlock, RowSource

if TYPE_CHECKING:
    from loaders.device import DeviceFeed
    from loaders.torch_dataset import TorchDataset

__all__ = [
    "ArraySource",
    "Audit",
    "DeviceFeed",
    "EpochPlan",
    "LoaderError",
    "Minibatch",
    "MinibatchLoader",
    "RowBlock",
    "RowSource",
    "SequentialLoader",
    "TorchDataset",
    "audit",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; only these need it
    if name == "DeviceFeed":
        from loaders.device import DeviceFeed

        return DeviceFeed
    if name == "TorchDataset":
        from loaders.torch_dataset import TorchDataset

        return TorchDataset
    raise AttributeError(f"module 'loaders' has no attribute {name!r}")
