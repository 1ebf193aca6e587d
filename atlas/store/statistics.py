"""Mean, variance and ``seurat_v3`` variance of every gene in every batch of one study, streaming.

Two passes over the rows: the first takes sums and sums of squares, from which follow means,
variances and each batch's loess curve; the second finds the values above the clipping bound of
that curve. Both passes add whole numbers in float64, exactly below 2^53, so that the result depends
neither on the blocks nor on the number of workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Self, TypeAlias

import dask
import numba
import numpy as np
import numpy.typing as npt
from dask.system import CPU_COUNT

from atlas.errors import ConfigError

RowReader: TypeAlias = Callable[
    [int, int], tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
]
"""``read(start, stop) -> (indptr, indices, data)``: rows ``start`` to ``stop`` of one study in CSR
form, in the study's own columns; ``indptr`` starts at 0. Safe to call from several threads at once;
picklable where a distributed scheduler is used."""

Floats: TypeAlias = npt.NDArray[np.float64]

_SPANS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Share of the genes in each local fit: the first is Seurat's and scanpy's."""

_MIN_LOESS_MEANS = 10
"""Distinct means below which loess is not tried: its local quadratics would be undetermined, and
its Fortran code answers that with anything from an error to an endless loop."""

_ACCUMULATOR_BYTES = 128 * 2**20
"""What the accumulators of all workers together may take, before there are fewer workers."""

_MAX_THREADS = 16
_CONNECT = "10s"


@dataclass(frozen=True, slots=True, eq=False)
class GeneStatistics:
    """Statistics per batch (row) and gene (column) of one study.

    Attributes
    ----------
    n_cells
        int64, (n_batches,): cells of each batch.
    mean
        float64, (n_batches, n_vars): counts per cell; 0 for a batch without cells.
    variance
        float64, (n_batches, n_vars): with ``ddof=1``; 0 for a batch of fewer than two cells.
    normalized_variance
        float64, (n_batches, n_vars): variance of the counts after division by the standard
        deviation that the batch's mean-variance curve expects, and clipping at the square root of
        the number of cells (Seurat v3: Stuart et al. 2019, Methods, "Feature selection"). 0 exactly
        where the variance is 0.
    """

    n_cells: npt.NDArray[np.int64]
    mean: Floats
    variance: Floats
    normalized_variance: Floats

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return int(self.mean.shape[0])

    @property
    def n_vars(self) -> int:
        """Number of genes of the study."""
        return int(self.mean.shape[1])

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name, for storage."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """The inverse of :meth:`to_arrays`.

        Raises
        ------
        KeyError
            If an array is missing.
        ValueError
            If the shapes do not belong together.
        """
        n_cells = np.asarray(arrays["n_cells"], dtype=np.int64)
        tables = [
            np.asarray(arrays[name], dtype=np.float64)
            for name in ("mean", "variance", "normalized_variance")
        ]
        shapes = {table.shape for table in tables}
        if len(shapes) != 1 or tables[0].ndim != 2 or n_cells.shape != tables[0].shape[:1]:
            raise ValueError(
                f"gene statistics of shapes {n_cells.shape} and {sorted(shapes)} do not match"
            )
        return cls(n_cells, *tables)


def gene_statistics(
    read: RowReader,
    n_obs: int,
    n_vars: int,
    batch_codes: npt.NDArray[np.int32],
    *,
    n_batches: int | None = None,
    scheduler: str | None = None,
    block_rows: int = 1024,
) -> GeneStatistics:
    """Compute the statistics of one study, block by block.

    Memory: a block of rows and two ``(n_batches, n_vars)`` accumulators per worker.

    Parameters
    ----------
    read
        Reads rows of the study, see :data:`RowReader`.
    n_obs, n_vars
        Cells and genes of the study.
    batch_codes
        int32, (n_obs,): batch of each cell, 0 to ``n_batches - 1``.
    n_batches
        Number of batches; by default the largest code plus one.
    scheduler
        ``None``: dask's threads. Otherwise the address of a ``dask.distributed`` scheduler, whose
        workers must be able to import ``atlas`` and to read what ``read`` reads.
    block_rows
        Rows per block; best a multiple of the rows per chunk on disk.

    Raises
    ------
    ConfigError
        If ``block_rows`` is below 1 or the codes do not fit ``n_obs`` and ``n_batches``.
    """
    if block_rows < 1:
        raise ConfigError("block_rows is out of range", found=block_rows, expected="at least 1")
    codes = np.ascontiguousarray(batch_codes, dtype=np.int32)
    if n_batches is None:
        n_batches = int(codes.max()) + 1 if codes.size else 0
    if codes.shape != (n_obs,) or (n_obs and not 0 <= codes.min() <= codes.max() < n_batches):
        raise ConfigError(
            "the batch codes do not fit the study",
            found=f"shape {codes.shape}"
            + (f", codes {codes.min()} to {codes.max()}" if codes.size else ""),
            expected=f"shape ({n_obs},), codes 0 to {n_batches - 1}",
        )
    if n_obs == 0 or n_vars == 0:
        empty = np.zeros((n_batches, n_vars))
        return GeneStatistics(
            np.bincount(codes, minlength=n_batches).astype(np.int64), empty, empty, empty
        )

    if scheduler is None:
        threads = min(_MAX_THREADS, CPU_COUNT)
        return _compute(read, n_vars, codes, n_batches, block_rows, threads, "threads")
    with connect(scheduler) as client:
        workers = sum(client.nthreads().values())
        return _compute(read, n_vars, codes, n_batches, block_rows, workers, client)


def connect(scheduler: str) -> Any:
    """A client of a ``dask.distributed`` scheduler, to be used in a ``with`` statement.

    Raises
    ------
    ConfigError
        None answers at this address.
    """
    from dask.distributed import Client  # takes a second to import, and is seldom needed

    try:
        return Client(scheduler, set_as_default=False, timeout=_CONNECT)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            "no dask scheduler answers",
            found=f"{scheduler}: {error}",
            expected="an address such as tcp://host:8786",
            do="check --scheduler, or leave it out",
        ) from error


def _compute(
    read: RowReader,
    n_vars: int,
    codes: npt.NDArray[np.int32],
    n_batches: int,
    block_rows: int,
    workers: int,
    scheduler: Any,
) -> GeneStatistics:
    n_obs = len(codes)
    n_blocks = -(-n_obs // block_rows)
    affordable = _ACCUMULATOR_BYTES // (3 * 8 * n_batches * n_vars)
    n_lanes = max(1, min(workers, n_blocks, affordable))
    # Whole blocks per lane, so that reads stay aligned with the chunks on disk.
    bounds = [min(n_obs, n_blocks * i // n_lanes * block_rows) for i in range(n_lanes + 1)]

    def run(clip: Floats | None) -> list[Floats]:
        # One task and one accumulator per lane, not per block; and the lanes are added as a tree.
        reader, shared = (dask.delayed(x, pure=False, traverse=False) for x in (read, clip))
        lane, add = (dask.delayed(f, pure=False, traverse=False) for f in (_lane, _add))
        sums = [
            lane(reader, start, codes[start:stop], n_batches, n_vars, block_rows, shared)
            for start, stop in pairwise(bounds)
        ]
        while len(sums) > 1:
            pairs = [add(*sums[i : i + 2]) for i in range(0, len(sums) - 1, 2)]
            sums = pairs + sums[2 * len(pairs) :]
        if isinstance(scheduler, str):
            (total,) = dask.compute(sums[0], scheduler=scheduler, num_workers=n_lanes)
        else:
            total = scheduler.compute(sums[0]).result()
        return list(total)

    n_cells = np.bincount(codes, minlength=n_batches).astype(np.int64)
    return statistics_of_sums(n_cells, run)


def statistics_of_sums(
    n_cells: npt.NDArray[np.int64], sums: Callable[[Floats | None], list[Floats]]
) -> GeneStatistics:
    """The statistics from sums over the rows, however these were come by.

    Parameters
    ----------
    n_cells
        int64, (n_batches,): cells of each batch.
    sums
        With None: sums and sums of squares of the counts. With a bound for each batch and gene:
        number, sums and sums of squares of the counts above it. Each float64 (n_batches, n_vars).
    """
    n_batches = len(n_cells)
    n = n_cells[:, None].astype(np.float64)
    total, squares = sums(None)
    mean = total / np.maximum(n, 1)
    variance = np.maximum(squares - total * mean, 0) / np.maximum(n - 1, 1)
    expected = np.empty_like(mean)
    for b in range(n_batches):
        expected[b] = expected_variance(mean[b], variance[b])
    clip = np.sqrt(expected * n) + mean

    n_clipped, clipped, clipped_squares = sums(clip)
    total += n_clipped * clip - clipped
    squares += n_clipped * np.square(clip) - clipped_squares
    # Σ (x - mean)² of the clipped x, whose own mean lies below `mean`.
    spread = n * np.square(mean) + squares - 2 * total * mean
    normalized = np.maximum(spread, 0) / (np.maximum(n - 1, 1) * expected)
    normalized[variance == 0] = 0
    return GeneStatistics(n_cells, mean, variance, normalized)


def expected_variance(mean: Floats, variance: Floats) -> Floats:
    """Variance that a gene of this mean has in this batch.

    A loess of degree 2 and span 0.3 of log10 variance on log10 mean over the genes that vary, as
    scanpy's ``seurat_v3`` fits it. Where so many genes share a mean that local fits are singular
    (batches of a few hundred cells; scanpy raises there) the span is widened by steps of 0.1 until
    they are not. Where none will do, or there are fewer than ten distinct means, a parabola through
    all genes by least squares takes its place, of lower degree below three distinct means.

    Parameters
    ----------
    mean, variance
        float64, (n_vars,): of one batch.

    Returns
    -------
    float64, (n_vars,): positive; 1 for genes that do not vary.
    """
    expected = np.ones_like(mean)
    varies = variance > 0
    if not varies.any():
        return expected
    x, y = np.log10(mean[varies]), np.log10(variance[varies])
    distinct = len(np.unique(x))
    fitted = _loess(x, y) if distinct >= _MIN_LOESS_MEANS else None
    if fitted is None:
        fitted = np.polynomial.Polynomial.fit(x, y, deg=min(2, distinct - 1))(x)
    expected[varies] = 10**fitted
    return expected


def _loess(x: Floats, y: Floats) -> Floats | None:
    """Fitted values at the narrowest span that has an answer; None where none has."""
    from skmisc.loess import loess

    for span in _SPANS:
        model = loess(x, y, span=span, degree=2)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit()
        except ValueError:  # all that skmisc raises: the message of its Fortran code
            continue
        fitted: Floats = np.array(model.outputs.fitted_values, dtype=np.float64)
        if np.isfinite(fitted).all() and np.abs(fitted).max() < 100:
            return fitted
    return None


def _add(left: list[Floats], right: list[Floats]) -> list[Floats]:
    """Sum of two lanes; not in place, because dask may run a task again."""
    return [a + b for a, b in zip(left, right, strict=True)]


def _lane(
    read: RowReader,
    start: int,
    codes: npt.NDArray[np.int32],
    n_batches: int,
    n_vars: int,
    block_rows: int,
    clip: Floats | None,
) -> list[Floats]:
    """Sums over the rows from ``start`` on, one per code; of the clipped values if ``clip``."""
    sums = [np.zeros((n_batches, n_vars)) for _ in range(2 if clip is None else 3)]
    for offset in range(0, len(codes), block_rows):
        block = codes[offset : offset + block_rows]
        indptr, indices, data = read(start + offset, start + offset + len(block))
        if clip is None:
            _accumulate(indptr, indices, data, block, *sums)
        else:
            _accumulate_clipped(indptr, indices, data, block, clip, *sums)
    return sums


@numba.njit(nogil=True, cache=True)
def _accumulate(indptr, indices, data, codes, total, squares):  # type: ignore[no-untyped-def]
    for row in range(len(codes)):
        batch = codes[row]
        for i in range(indptr[row], indptr[row + 1]):
            value = np.float64(data[i])
            total[batch, indices[i]] += value
            squares[batch, indices[i]] += value * value


@numba.njit(nogil=True, cache=True)
def _accumulate_clipped(  # type: ignore[no-untyped-def]
    indptr, indices, data, codes, clip, n_clipped, clipped, clipped_squares
):
    """Number, sum and sum of squares of the values above ``clip``: few, and whole numbers."""
    for row in range(len(codes)):
        batch = codes[row]
        for i in range(indptr[row], indptr[row + 1]):
            value = np.float64(data[i])
            gene = indices[i]
            if value > clip[batch, gene]:
                n_clipped[batch, gene] += 1
                clipped[batch, gene] += value
                clipped_squares[batch, gene] += value * value
