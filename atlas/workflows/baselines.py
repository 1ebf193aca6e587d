"""Embeddings to lay a model's beside: PCA out of core, and Harmony on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from atlas.errors import ConfigError
from atlas.evaluation.pca import Components, Moments
from atlas.models.base import Inputs
from atlas.models.expression import log_normalized
from atlas.provenance import command, versions
from atlas.store import CountStore
from atlas.store.options import check_name
from atlas.workflows.embedding import check_writable
from atlas.workflows.measuring import batch_sizes
from loaders import SequentialLoader

Method = Literal["pca", "harmony"]

N_COMPONENTS = 50
"""As scanpy and scib-metrics take them."""
OWN_COMPONENTS = 10
_MINIBATCH = 2048
_MOMENTS_BYTES = 2**29


def baseline(
    store: CountStore,
    method: Method = "pca",
    *,
    genes: Sequence[str] | None = None,
    n_components: int | None = None,
    per_batch: bool = False,
    name: str | None = "",
    seed: int = 0,
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Embed all cells by PCA of log-normalised counts, or by Harmony on that.

    Counts are read twice: the covariance of the genes is added up in one pass, cells are projected
    in another; memory does not depend on the number of cells, but for the embedding itself.
    Harmony (Korsunsky et al. 2019) runs in memory, by the package harmonypy, which is not
    installed with Atlas and is GPL-3.

    Parameters
    ----------
    store
        An open store.
    method
        ``"pca"`` or ``"harmony"``.
    genes
        At most 5,000; without them those chosen by :func:`atlas.select_genes`.
    n_components
        Axes: 50 without, 10 per batch, and no more than there are genes or cells.
    per_batch
        PCA of each batch on its own: what kNN purity compares with. Coordinates of different
        batches have nothing to do with each other.
    name
        Keep the embedding under this name; the method's without, ``"pca_batch"`` per batch. None
        does not keep it.
    seed
        Of Harmony.
    progress
        Show cells/s and the time left on stderr.

    Returns
    -------
    float32, (n_obs, n_components), in the order of the store.

    Raises
    ------
    ConfigError
        No genes were chosen, too many, fewer than two cells, more axes than genes or cells, Harmony
        is not installed, or it is asked for per batch.
    """
    if method not in get_args(Method):
        raise ConfigError("there is no such baseline", found=method, expected="pca or harmony")
    if method == "harmony" and per_batch:
        raise ConfigError(
            "Harmony joins batches, so there is none per batch", do="take method='pca'"
        )
    if name == "":
        name = "pca_batch" if per_batch else method
    if name is not None:
        check_name(name, "embedding")
        check_writable(store, f"name={name!r}")
    harmony = _import_harmony() if method == "harmony" else None
    chosen = store.genes if genes is None else tuple(map(str, genes))
    if chosen is None:
        raise ConfigError(
            "no genes were chosen", do="run `atlas genes`, or name them", path=store.path
        )
    n = _n_components(store, n_components, len(chosen), per_batch)
    z = _pca(store, chosen, n, per_batch, progress)
    if harmony is not None:
        z = harmony(z, store.obs_codes["batch"], store.batches, seed)
    if name is not None:
        how: dict[str, Any] = {
            "model": {"name": method, "n_components": n, "per_batch": per_batch, "seed": seed},
            "genes": list(chosen),
            "versions": versions(),
            "command": command(),
        }
        if per_batch:
            how["per_batch"] = batch_sizes(store)
        store.write_embedding(name, z, how)
    return z


def _n_components(store: CountStore, asked: int | None, n_genes: int, per_batch: bool) -> int:
    """Axes to make; refused where there cannot be so many, fewer where none were asked for."""
    cells = int(np.bincount(store.obs_codes["batch"]).max()) if per_batch else store.n_obs
    most = max(1, min(n_genes, cells - 1))
    if asked is None:
        return min(most, OWN_COMPONENTS if per_batch else N_COMPONENTS)
    if not 1 <= asked <= most:
        of = "cells of the largest batch" if per_batch else "cells"
        raise ConfigError(
            "n_components is out of range",
            found=asked,
            expected=f"1 to {most:,}: there are {n_genes:,} genes and {cells:,} {of}",
            path=store.path,
        )
    return asked


def _pca(
    store: CountStore, genes: Sequence[str], n: int, per_batch: bool, progress: bool
) -> npt.NDArray[np.float32]:
    out = np.zeros((store.n_obs, n), dtype=np.float32)
    batch = store.obs_codes["batch"]
    present = store.presence(genes)
    if not per_batch:
        moments = Moments(present)
        for _, study, values in _cells(store, genes, None, "moments" if progress else None):
            moments.update(values, study)
        found = moments.components(n)
        for rows, study, values in _cells(store, genes, None, "projecting" if progress else None):
            _put(out, rows, found, values, present[study])
        return out
    # As many batches at a time as have room for their covariances.
    at_once = max(1, _MOMENTS_BYTES // (8 * len(genes) ** 2))
    codes = np.unique(batch)
    for start in range(0, len(codes), at_once):
        some = codes[start : start + at_once]
        mask = np.isin(batch, some)
        by_batch = {int(code): Moments(present) for code in some}
        for rows, study, values in _cells(store, genes, mask, "moments" if progress else None):
            for code in np.unique(batch[rows]):
                by_batch[int(code)].update(values[batch[rows] == code], study)
        # A batch of one cell has no axes and stays at the origin.
        axes = {c: m.components(n) for c, m in by_batch.items() if m.n_cells > 1}
        for rows, study, values in _cells(store, genes, mask, "projecting" if progress else None):
            for code in np.unique(batch[rows]):
                own = batch[rows] == code
                if int(code) in axes:
                    _put(out, rows[own], axes[int(code)], values[own], present[study])
    return out


def _put(
    out: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    found: Components,
    values: Tensor,
    present: npt.NDArray[np.bool_],
) -> None:
    z = found.project(values, present)
    out[rows, : z.shape[1]] = z


def _cells(
    store: CountStore,
    genes: Sequence[str],
    mask: npt.NDArray[np.bool_] | None,
    progress: str | None,
) -> Iterator[tuple[npt.NDArray[np.int64], int, Tensor]]:
    """Rows, study and log-normalised expression, minibatch after minibatch."""
    view = store.select(genes)
    total = store.n_obs if mask is None else int(mask.sum())
    with tqdm(
        total=total, desc=progress, unit=" cells", unit_scale=True, disable=progress is None
    ) as bar:
        if not total:
            return
        for minibatch in SequentialLoader(view, _MINIBATCH, rows=mask):
            rows = np.asarray(minibatch.rows, dtype=np.int64)
            counts = minibatch.to_torch("cpu", dense=True)
            inputs = Inputs(counts, torch.zeros(len(rows), dtype=torch.int64), None)
            yield rows, int(minibatch.obs["study"][0]), log_normalized(inputs)
            bar.update(len(rows))


def _import_harmony() -> Callable[..., npt.NDArray[np.float32]]:
    try:
        import harmonypy
    except ImportError as error:
        raise ConfigError(
            "Harmony is asked for and not installed",
            do="pip install harmonypy, which is GPL-3",
        ) from error

    def run(
        z: npt.NDArray[np.float32],
        codes: npt.NDArray[Any],
        names: Sequence[str],
        seed: int,
    ) -> npt.NDArray[np.float32]:
        if len(np.unique(codes)) < 2:
            raise ConfigError("Harmony joins batches, and there is only one", found=list(names))
        table = pd.DataFrame({"batch": np.asarray(names)[codes]})
        found = harmonypy.run_harmony(z, table, ["batch"], random_state=seed, verbose=False)
        joined = np.asarray(found.Z_corr, dtype=np.float32)
        # Older versions have cells in columns.
        return np.ascontiguousarray(joined if joined.shape == z.shape else joined.T)

    return run
