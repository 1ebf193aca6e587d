"""What a trained model knows of cells: latent variables, library sizes, how likely they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from atlas.errors import ConfigError, ModelError
from atlas.models import SCANVI, SCVI, TrainedModel
from atlas.models.base import evaluating
from atlas.models.layers import sample_normal
from atlas.store import CountStore, FilesSource
from atlas.training.state import seeded_generator
from atlas.workflows.output import check_table_name, write_table
from atlas.workflows.rows import RowsOrMask
from atlas.workflows.streaming import CellStream

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Latent:
    """Posterior of z of cells.

    Attributes
    ----------
    rows
        Row numbers of the cells in the store: int64, (n_cells,).
    mean, variance
        Each float32, (n_cells, n_latent).
    samples
        Draws: float32, (n_samples, n_cells, n_latent).
    """

    rows: npt.NDArray[np.int64]
    mean: Floats
    variance: Floats
    samples: Floats


def latent_posterior(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    n_samples: int = 0,
    rows: RowsOrMask = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> Latent:
    """Mean and variance of q(z | x) of cells, and draws from it.

    Parameters
    ----------
    model, store
        A trained model, and an open store or files as they are.
    n_samples
        How many draws for each cell.
    rows
        Which cells: by an obs column, or a mask (n_obs,); all when None.
    seed
        Of the draws, which come in the order of the cells chosen.
    device, progress
        As for :func:`atlas.embed`.
    """
    _check_at_least("n_samples", n_samples, 0)
    stream = _stream(model, store, rows, device, "latent" if progress else None, sparse=True)
    generator = seeded_generator(stream.device, seed)
    shape = (len(stream.chosen), model.module.n_latent)
    mean, variance = np.empty(shape, np.float32), np.empty(shape, np.float32)
    samples = np.empty((n_samples, *shape), np.float32)
    for cells in stream:
        own = cells.place
        m, v = (values[: cells.n_cells] for values in model.module.posterior(cells.inputs))
        mean[own], variance[own] = m.cpu().numpy(), v.cpu().numpy()
        for i in range(n_samples):
            samples[i, own] = sample_normal(m, v, generator).cpu().numpy()
    return Latent(stream.chosen, mean, variance, samples)


def library_posterior(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    rows: RowsOrMask = None,
    device: str = "auto",
    progress: bool = False,
) -> pd.DataFrame:
    """Posterior of the log library size of cells: columns ``mean`` and ``variance``, natural log.

    The variance is 0 where the library is observed or given. Arguments as for
    :func:`latent_posterior`; the index are the row names.

    Raises
    ------
    ModelError
        The model has no library size of its own: it is scVI or scANVI that do.
    """
    module = model.module.scvi if isinstance(model.module, SCANVI) else model.module
    if not isinstance(module, SCVI):
        raise ModelError(
            "The model has no library size", found=model.name, expected="scvi or scanvi"
        )
    stream = _stream(model, store, rows, device, "library" if progress else None)
    out = np.empty((len(stream.chosen), 2), np.float32)
    for cells in stream:
        found = torch.cat(module.library_posterior(cells.inputs), dim=-1)
        out[cells.place] = found[: cells.n_cells].cpu().numpy()
    return pd.DataFrame(out, store.obs([]).index[stream.chosen], ["mean", "variance"])


def posterior_table(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    out: str | PathLike[str],
    n_samples: int = 0,
    library: bool = False,
    rows: RowsOrMask = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> pd.DataFrame:
    """The posterior of z of cells as a table, which is written.

    Parameters
    ----------
    out
        A CSV or TSV, a line for each cell.
    library
        Also the posterior of the log library size, in a pass of its own.
    model, store, n_samples, rows, seed, device, progress
        As for :func:`latent_posterior`.

    Returns
    -------
    DataFrame
        By row name: ``mean_1`` … and ``variance_1`` … of each dimension; ``sample_1_1`` … of draw
        and dimension; ``log_library_mean`` and ``log_library_variance``, natural log.

    Raises
    ------
    ConfigError, ModelError, OutputError
        As for :func:`latent_posterior` and :func:`library_posterior`, or the file cannot be
        written.
    """
    check_table_name(out)
    more = []
    given: dict[str, Any] = {"rows": rows, "device": device, "progress": progress}
    if library:
        more = [library_posterior(model, store, **given).add_prefix("log_library_")]
    found = latent_posterior(model, store, n_samples=n_samples, seed=seed, **given)
    draws = {f"sample_{i}": values for i, values in enumerate(found.samples, start=1)}
    named = {"mean": found.mean, "variance": found.variance, **draws}
    index = store.obs([]).index[found.rows]
    parts = [
        pd.DataFrame(values, index, [f"{name}_{j + 1}" for j in range(values.shape[1])])
        for name, values in named.items()
    ]
    table = pd.concat([*parts, *more], axis=1)
    write_table(table, out, "cell")
    return table


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the counts of cells are, in nats.

    Attributes
    ----------
    cells
        By row name: ``reconstruction_error``, ``elbo`` and, if asked for, ``log_likelihood``.
    n_samples
        Draws of the importance-weighted estimate; 0 where there is none.
    """

    cells: pd.DataFrame
    n_samples: int

    @property
    def mean(self) -> dict[str, float]:
        """Mean of each over all cells, however they came in minibatches."""
        return {str(name): float(self.cells[name].mean()) for name in self.cells}

    @property
    def standard_error(self) -> dict[str, float]:
        """Standard error of each mean, over cells; NaN of a single one."""
        n = len(self.cells)
        return {str(name): float(self.cells[name].std() / math.sqrt(n)) for name in self.cells}


def likelihood(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    n_samples: int = 100,
    rows: RowsOrMask = None,
    out: str | PathLike[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> Likelihood:
    """Reconstruction error, evidence lower bound and log-likelihood of cells.

    The log-likelihood of a cell is ``log 1/n Σ p(x, z_i) / q(z_i | x)`` over n draws (Burda et al.
    2016, equation 8): below the true one in expectation, and nearer with more draws. Means are over
    cells, not over minibatches of unlike size. Of scANVI it is that of the counts, labels unseen.

    Parameters
    ----------
    model, store
        A trained model, and an open store or files as they are.
    n_samples
        Draws for the log-likelihood; 0 leaves it out.
    rows
        Which cells: by an obs column, or a mask (n_obs,); all when None.
    out
        A CSV or TSV to write, a line for each cell.
    seed
        Of the draws. Reconstruction error (``-log p(x | z)``) and bound are at one draw.
    device, progress
        As for :func:`atlas.embed`.

    Raises
    ------
    ConfigError, ModelError, OutputError
        A number out of range, a batch that the model does not know, a file that cannot be written.
    """
    _check_at_least("n_samples", n_samples, 0)
    if out is not None:
        check_table_name(out)
    stream = _stream(model, store, rows, device, "likelihood" if progress else None, own=True)
    generator = seeded_generator(stream.device, seed)
    names = ["reconstruction_error", "elbo", *(["log_likelihood"] if n_samples else [])]
    values = np.empty((len(stream.chosen), len(names)))
    for cells in stream:
        inputs = cells.inputs
        with evaluating(model.module):
            losses = model.module.loss(inputs, 1.0, generator)
        found = [losses.reconstruction_loss, -losses.negative_bound]
        if n_samples:
            total = torch.full_like(losses.reconstruction_loss, -torch.inf, dtype=torch.float64)
            for _ in range(n_samples):
                log_weight = model.module.log_weight(inputs, generator)
                total = torch.logaddexp(total, log_weight.double())
            found.append(total - math.log(n_samples))
        for i, one in enumerate(found):
            values[cells.place, i] = one[: cells.n_cells].cpu().numpy()
    table = pd.DataFrame(values, store.obs([]).index[stream.chosen], names)
    if out is not None:
        write_table(table, out, "cell")
    return Likelihood(table, n_samples)


def _stream(
    model: TrainedModel,
    store: CountStore | FilesSource,
    rows: RowsOrMask,
    device: str,
    progress: str | None,
    own: bool = False,
    sparse: bool = False,
) -> CellStream:
    return CellStream(
        model,
        store,
        rows=rows,
        device=device,
        progress=progress,
        own_batch=own,
        sparse=sparse,
    )


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is out of range", found=value, expected=f"at least {least}")
