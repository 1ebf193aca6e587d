"""What a trained model makes of cells, gene by gene: shares, expected counts, samples, dropout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from anndata import AnnData
from torch import Tensor

from atlas.errors import ConfigError, ModelError
from atlas.models import Inputs, TrainedModel
from atlas.models.base import CountParameters
from atlas.models.layers import sample_normal
from atlas.provenance import command, versions
from atlas.store import CountStore, FilesSource
from atlas.training.state import seeded_generator
from atlas.workflows.dense import Compute, collect
from atlas.workflows.rows import RowsOrMask
from atlas.workflows.streaming import Cells, CellStream

AVERAGE = "average"
"""In place of the name of a batch: all of them, by their frequencies."""

Out = str | PathLike[str] | None


def normalized(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    batch: str | None = None,
    library: float = 1.0,
    n_samples: int = 0,
    genes: Sequence[str] | None = None,
    rows: RowsOrMask = None,
    out: Out = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> AnnData | Path:
    """Expected share of each gene in cells' counts (ρ; scVI, Lopez et al. 2018, Methods 4.1).

    The shares are over all modelled genes, those that a cell's study did not measure included.

    Parameters
    ----------
    model
        A trained model.
    store
        An open store, or files as they are.
    batch
        Decode as if measured in this batch; ``"average"``: the mean over the model's batches, by
        the number of their cells in the store; None: in each cell's own.
    library
        What the shares of a cell sum to.
    n_samples
        Mean over so many draws of z; 0: at its posterior mean, without chance.
    genes
        The genes to return; all modelled ones when None.
    rows
        Which cells: by an obs column, or a mask (n_obs,); all when None.
    out
        A folder for an AnnData in Zarr, written block by block (see
        :func:`atlas.workflows.dense.collect`); None returns an AnnData.
    seed
        Of the draws, which come in the order of the cells chosen.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, …
    progress
        Show cells/s and the time left on stderr.

    Raises
    ------
    ModelError, ConfigError, OutputError
        An unknown batch or gene, a number out of range, or a folder that cannot be written.
    """
    if not 0 < library < np.inf:
        raise ConfigError("library is out of range", found=library, expected="a number above 0")
    weights = _batch_weights(model, store, batch)

    def of(z: Tensor, inputs: Inputs) -> Tensor:
        if weights is None:
            return model.module.decode(z, inputs.conditions) * library
        total = torch.zeros_like(inputs.counts)
        for code in np.flatnonzero(weights).tolist():
            there = torch.full_like(inputs.batch, code)
            conditions = dataclasses.replace(inputs.conditions, batch=there)
            total += model.module.decode(z, conditions) * (float(weights[code]) * library)
        return total

    wanted = _Wanted(model, store, "normalized", n_samples, genes, rows, out, seed, device)
    details = {"batch": "own" if batch is None else batch, "library": library}
    return wanted.collect(of, progress, own_batch=batch is None, **details)


def impute(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    zero_inflation: bool = False,
    n_samples: int = 25,
    genes: Sequence[str] | None = None,
    rows: RowsOrMask = None,
    out: Out = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> AnnData | Path:
    """Expected counts of cells given their posterior, at their own depth and in their own batch.

    The mean of the negative binomial is what the paper imputes (Lopez et al. 2018, Methods 4.7).
    A gene that a cell's study did not measure has the count that it would have had there.

    Parameters
    ----------
    zero_inflation
        Take the zero inflation in: what would be counted, not what would be there.
    n_samples
        Mean over so many draws of z; 0: at its posterior mean. A latent library is at its mean.
    model, store, genes, rows, out, seed, device, progress
        As for :func:`normalized`.

    Raises
    ------
    ModelError, ConfigError, OutputError
        The model is not one of counts, or as for :func:`normalized`.
    """

    def of(z: Tensor, inputs: Inputs) -> Tensor:
        found = _parameters(model, z, inputs)
        return found.expected if zero_inflation else found.mean

    wanted = _Wanted(model, store, "impute", n_samples, genes, rows, out, seed, device)
    return wanted.collect(of, progress, zero_inflation=zero_inflation)


def posterior_predictive(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    genes: Sequence[str] | None = None,
    rows: RowsOrMask = None,
    out: Out = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> AnnData | Path:
    """Counts drawn for cells: z from its posterior, then each count given z.

    One draw for each cell; another seed gives another. Arguments as for :func:`impute`.
    """
    generator: list[torch.Generator] = []

    def of(z: Tensor, inputs: Inputs) -> Tensor:
        if not generator:
            generator.append(seeded_generator(z.device, seed, 1))
        return _parameters(model, z, inputs).sample(generator[0])

    wanted = _Wanted(model, store, "posterior_predictive", 1, genes, rows, out, seed, device)
    return wanted.collect(of, progress)


def dropout_probability(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    n_samples: int = 0,
    genes: Sequence[str] | None = None,
    rows: RowsOrMask = None,
    out: Out = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> AnnData | Path:
    """Probability that a count was replaced by zero: π of the ZINB, given z but not the count.

    Arguments as for :func:`normalized`.

    Raises
    ------
    ModelError
        The model has no zero inflation, or as for :func:`normalized`.
    """

    def of(z: Tensor, inputs: Inputs) -> Tensor:
        found = model.module.count_parameters(z, inputs).dropout
        if found is None:
            raise ModelError(
                "The model has no zero inflation",
                found=f"a {getattr(model.config, 'gene_likelihood', model.name)} model",
                expected="a model trained with --gene-likelihood zinb",
            )
        return found

    wanted = _Wanted(model, store, "dropout_probability", n_samples, genes, rows, out, seed, device)
    return wanted.collect(of, progress)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What all functions here are asked for."""

    model: TrainedModel
    store: CountStore | FilesSource
    what: str
    n_samples: int
    genes: Sequence[str] | None
    rows: RowsOrMask
    out: Out
    seed: int
    device: str

    def collect(
        self,
        of: Callable[[Tensor, Inputs], Tensor],
        progress: bool,
        own_batch: bool = True,
        **details: Any,
    ) -> AnnData | Path:
        """The mean of a function of z over draws of z, for all cells."""
        if self.n_samples < 0:
            raise ConfigError("n_samples is out of range", found=self.n_samples, expected="0, 1, …")
        stream = CellStream(
            self.model,
            self.store,
            rows=self.rows,
            device=self.device,
            progress=self.what if progress else None,
            own_batch=own_batch,
        )
        how = {
            "what": self.what,
            **details,
            "n_samples": self.n_samples,
            "seed": self.seed,
            "model": self.model.name,
            "versions": versions(),
            "command": command(),
        }
        compute = self._compute(of, seeded_generator(stream.device, self.seed))
        return collect(
            self.model, self.store, stream, compute, genes=self.genes, out=self.out, how=how
        )

    def _compute(
        self, of: Callable[[Tensor, Inputs], Tensor], generator: torch.Generator
    ) -> Compute:
        def compute(cells: Cells) -> Tensor:
            total: Tensor | None = None
            for z in self._draws(cells.inputs, generator):
                values = of(z, cells.inputs)
                total = values if total is None else total.add_(values)
            assert total is not None
            return total.div_(max(1, self.n_samples))

        return compute

    def _draws(self, inputs: Inputs, generator: torch.Generator) -> Iterator[Tensor]:
        mean, variance = self.model.module.posterior(inputs)
        if not self.n_samples:
            yield mean
        for _ in range(self.n_samples):
            yield sample_normal(mean, variance, generator)


def batch_frequencies(
    model: TrainedModel, store: CountStore | FilesSource
) -> npt.NDArray[np.float64]:
    """Share of each of the model's batches among the store's cells: float64, (n_batch,).

    Raises
    ------
    ModelError
        No cell is of a batch that the model knows.
    """
    code = {name: i for i, name in enumerate(model.batches)}
    cells = np.bincount(store.obs_codes["batch"], minlength=len(store.batches))
    out = np.zeros(len(model.batches))
    for name, n in zip(store.batches, cells, strict=False):
        if name in code:
            out[code[name]] = n
    if not out.any():
        raise ModelError(
            "No cell is of a batch that the model knows, so that they have no frequencies",
            found=", ".join(store.batches[:5]),
            expected=f"some of {', '.join(model.batches[:8])}",
            do="name a batch",
            path=store.path,
        )
    out /= out.sum()
    return out


def batch_code(model: TrainedModel, name: str) -> int:
    """Code of a batch.

    Raises
    ------
    ModelError
        The model has no such batch.
    """
    if name not in model.batches:
        raise ModelError(
            "The model has no such batch",
            found=repr(name),
            expected=f"one of {', '.join(model.batches[:20])}",
            do="write it as `atlas info` does, STUDY/BATCH",
        )
    return model.batches.index(name)


def _batch_weights(
    model: TrainedModel, store: CountStore | FilesSource, batch: str | None
) -> npt.NDArray[np.float64] | None:
    if batch is None:
        return None
    if batch == AVERAGE:
        return batch_frequencies(model, store)
    out = np.zeros(len(model.batches))
    out[batch_code(model, batch)] = 1
    return out


def _parameters(model: TrainedModel, z: Tensor, inputs: Inputs) -> CountParameters:
    """Distribution of the counts, with those of genes that were not measured as if they had been.

    The library is over the genes measured, so that the others come on top of it.
    """
    found = model.module.count_parameters(z, inputs)
    if inputs.present is None:
        return found
    every = model.module.count_parameters(
        z, dataclasses.replace(inputs, counts=inputs.measured, present=None)
    )
    # The same up to a factor of each cell: what the softmax spends on the genes not measured.
    there = (every.mean * inputs.present).sum(dim=-1, keepdim=True)
    mean = every.mean * (found.mean.sum(dim=-1, keepdim=True) / there)
    return dataclasses.replace(found, mean=mean)
