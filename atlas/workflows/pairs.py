"""Pairs of draws of z, and what both of a pair are decoded for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atlas.errors import ConfigError
from atlas.evaluation.differential import Floats
from atlas.models import Conditions, TrainedModel
from atlas.store import CountStore, FilesSource
from atlas.workflows.expression import batch_code, batch_frequencies
from atlas.workflows.streaming import MINIBATCH, CellStream


class DecodedPairs:
    """Shares of pairs of draws of z under the same conditions, block by block."""

    def __init__(self, model: TrainedModel, z1: Tensor, z2: Tensor, conditions: Conditions) -> None:
        self._model, self._z, self._conditions = model, (z1, z2), conditions

    def __call__(self) -> Iterator[tuple[Floats, Floats]]:
        for start in range(0, len(self._z[0]), MINIBATCH):
            block = slice(start, start + MINIBATCH)
            there = _rows_of(self._conditions, block)
            one, other = (self._model.module.decode(z[block], there) for z in self._z)
            yield one.cpu().numpy(), other.cpu().numpy()


def batch_weights(
    model: TrainedModel, store: CountStore | FilesSource, batches: Sequence[str] | None
) -> npt.NDArray[np.float64]:
    """How often each batch is decoded for: those named equally, or all by their frequencies."""
    if batches is None:
        return batch_frequencies(model, store)
    if isinstance(batches, str) or not len(batches):
        raise ConfigError("Batches are given as a list", found=repr(batches), expected="a list")
    out = np.zeros(len(model.batches))
    out[[batch_code(model, name) for name in batches]] = 1
    out /= out.sum()
    return out


def draw_conditions(
    stream: CellStream,
    weights: npt.NDArray[np.float64],
    n_pairs: int,
    rng: np.random.Generator,
) -> Conditions:
    """What each pair is decoded for: batches in their proportions, covariates of cells drawn."""
    ends = np.round(np.cumsum(weights) * n_pairs).astype(np.int64)
    batch = rng.permutation(np.searchsorted(ends, np.arange(n_pairs), side="right"))
    cells = rng.choice(stream.chosen, n_pairs)
    columns = stream.columns
    found = Conditions(
        torch.from_numpy(batch.astype(np.int64)),
        None
        if columns.categories is None
        else torch.from_numpy(columns.categories[cells].astype(np.int64)),
        None if columns.continuous is None else torch.from_numpy(columns.continuous[cells]),
    )
    return found.to(stream.device)


def _rows_of(conditions: Conditions, rows: slice) -> Conditions:
    categories, continuous = conditions.categories, conditions.continuous
    return Conditions(
        conditions.batch[rows],
        None if categories is None else categories[rows],
        None if continuous is None else continuous[rows],
    )
