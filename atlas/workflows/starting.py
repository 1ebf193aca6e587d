"""What a training starts from: weights, the profile of the cells, the prior of their library."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from atlas.config import ScviConfig
from atlas.errors import ModelError
from atlas.models import SCANVI, Model, TrainedModel
from atlas.models.start import GeneProfile
from atlas.store import CountView, FilesSource
from loaders import MinibatchLoader, SequentialLoader

_CELLS: Final = 4096


def profile_of(
    view: CountView | FilesSource, rows: Sequence[tuple[int, int]], seed: int
) -> GeneProfile:
    """The profile of 4,096 cells drawn from ranges of rows, or all where there are fewer."""
    size = min(_CELLS, sum(stop - start for start, stop in rows))
    loader = MinibatchLoader(view, size, seed, rows=rows)
    minibatch = next(iter(loader))
    study = np.asarray(minibatch.obs["study"], np.int32)
    return GeneProfile.of(minibatch.to_scipy(), study, view.presence)


def take_weights(
    module: SCANVI, begin: TrainedModel, genes: Sequence[str], batches: Sequence[str]
) -> None:
    """Give a scANVI the weights of a trained scVI."""
    config = module.config.to_json()
    own = {f.name: config[f.name] for f in dataclasses.fields(ScviConfig)}
    sides = (
        {"model": begin.name, **begin.config.to_json(), "batches": list(begin.batches)},
        {"model": "scvi", **own, "batches": list(batches)},
    )
    differing = [name for name in sides[1] if sides[0].get(name) != sides[1][name]]
    if tuple(begin.genes) != tuple(genes):
        differing.append("genes")
    if differing:
        raise ModelError(
            "The model to start from does not fit",
            found="; ".join(
                f"{name}: {sides[0].get(name, 'absent')!s:.80}" if name in sides[1] else name
                for name in differing
            ),
            expected="; ".join(
                f"{name}: {sides[1][name]!s:.80}" if name in sides[1] else name
                for name in differing
            ),
            do="train scVI with the same options on the same store, or leave out start_from",
        )
    module.scvi.load_state_dict(begin.module.state_dict())


def weights_digest(module: Model) -> str:
    """What the weights that training starts from are."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def library_prior(
    view: CountView | FilesSource,
    batch: npt.NDArray[np.int32],
    n_batches: int,
    chosen: npt.NDArray[np.bool_] | None = None,
) -> torch.Tensor:
    """Mean and variance of the log library of each batch: float32, (n_batches, 2).

    ``batch`` has the code of each row, ``chosen`` the rows that count. Empty cells count as one
    count; a batch of one cell has variance 0 and is given a small one.
    """
    chosen = np.ones(view.n_obs, bool) if chosen is None else chosen
    sums = np.zeros(view.n_obs)
    for minibatch in SequentialLoader(view, 4096, rows=chosen):
        sums[minibatch.rows] = minibatch.to_scipy().sum(axis=1).A1
    log_library = np.log(np.maximum(sums, 1))
    prior = np.tile(np.array([log_library[chosen].mean(), 1.0], np.float32), (n_batches, 1))
    for code in np.unique(batch[chosen]):
        mine = log_library[chosen & (batch == code)]
        prior[code] = mine.mean(), max(mine.var(), 1e-2)
    return torch.from_numpy(prior)
