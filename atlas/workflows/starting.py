"""The profile that training starts at, from some of the cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from atlas.models.start import Profile
from atlas.store import CountView, FilesSource
from loaders import MinibatchLoader

_CELLS: Final = 4096


def profile_of(
    view: CountView | FilesSource, rows: Sequence[tuple[int, int]], seed: int
) -> Profile:
    """The profile of 4,096 cells drawn from ranges of rows, or all where there are fewer."""
    size = min(_CELLS, sum(stop - start for start, stop in rows))
    loader = MinibatchLoader(view, size, seed, rows=rows)
    minibatch = next(iter(loader))
    study = np.asarray(minibatch.obs["study"], np.int32)
    return Profile.of(minibatch.to_scipy(), study, view.presence)
