"""The loader of a training run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from atlas.config import TrainConfig
from atlas.errors import ConfigError
from atlas.models.base import Model
from atlas.training.inputs import CellColumns
from atlas.training.ranks import Ranks
from loaders import MinibatchLoader
from loaders.source import RowSource

Ranges = Sequence[tuple[int, int]]
"""Sorted, disjoint ranges (start, stop) of rows."""


def n_rows(ranges: Ranges) -> int:
    """How many rows there are in ranges."""
    return sum(stop - start for start, stop in ranges)


def training_loader(
    model: Model,
    source: RowSource,
    rows: Ranges,
    config: TrainConfig,
    device: torch.device,
    columns: CellColumns,
    ranks: Ranks,
) -> MinibatchLoader:
    """The loader of the run; to a GPU counts travel narrow where the source has them so.

    A rank gets its part of each minibatch.

    Raises
    ------
    ConfigError
        There is nothing to train on.
    """
    cells = n_rows(rows)
    # BatchNorm has no variance to divide by in a minibatch of one cell. The loader shares the rows
    # of a last minibatch that small with the one before; only a pair of them stays too small.
    has_batch_norm = any(isinstance(part, nn.BatchNorm1d) for part in model.modules())
    drop_last = has_batch_norm and config.minibatch_size == 2 and cells % 2 == 1
    if cells < 1 + has_batch_norm:
        raise ConfigError(
            "There are too few cells to train on",
            found=f"{cells} training cells",
            expected="at least 2 with BatchNorm, else 1",
            do="lower --validation-share, or append more cells",
        )
    balance: str | npt.NDArray[np.int32] | None = None
    if config.balance == "label" and columns.label is not None:
        balance = columns.label
    elif config.balance != "none":
        balance = config.balance
    return MinibatchLoader(
        source,
        config.minibatch_size,
        config.seed,
        rows=rows,
        block_size=config.block_size or None,
        buffer_size=config.buffer_size or None,
        drop_last=drop_last,
        balance=balance,
        memory=config.memory or None,
        narrow=device.type == "cuda" and source.narrow,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
