"""Dense values of cells and genes, block by block: to an AnnData in Zarr, or in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from anndata import AnnData
from torch import Tensor

from atlas import files
from atlas.errors import ConfigError, ModelError, OutputError
from atlas.models import TrainedModel
from atlas.store import CountStore, FilesSource
from atlas.store.export import obs_of, var_of
from atlas.store.zarr_study import create_group, write_tables
from atlas.workflows.output import check_file
from atlas.workflows.streaming import Cells, CellStream

CHUNK = (1024, 1024)
"""Cells and genes of a chunk on disk: 4 MB before compression."""

Compute = Callable[[Cells], Tensor]
"""Values of a minibatch, padding included, over all modelled genes: (n_cells, n_genes)."""


def collect(
    model: TrainedModel,
    store: CountStore | FilesSource,
    stream: CellStream,
    compute: Compute,
    *,
    genes: Sequence[str] | None,
    out: str | PathLike[str] | None,
    how: Mapping[str, Any],
) -> AnnData | Path:
    """Compute values of all cells of a stream.

    Parameters
    ----------
    model, store
        What the stream is of.
    stream
        The cells.
    compute
        Gives the values of a minibatch.
    genes
        The genes to keep, in this order; all modelled ones when None.
    out
        A folder to write, as AnnData in Zarr: X is float32 in chunks of 1,024 × 1,024, written as
        it comes, so that it never is in memory. The folder is there whole afterwards or not at
        all. None: return an AnnData.
    how
        How the values came about: kept as ``uns["atlas"]``, plain JSON.

    Returns
    -------
    AnnData or Path
        The values as X: float32, (n_cells, n_genes); obs as the store has it.

    Raises
    ------
    ConfigError, ModelError, OutputError
        The folder is there already or cannot be written, or the model has no such gene.
    """
    columns = gene_columns(model, genes)
    names = [model.genes[i] for i in columns]
    obs, var = obs_of(store, stream.chosen), var_of(store).loc[names]
    uns = {"atlas": dict(how)}
    shape = (len(obs), len(names))
    if out is None:
        values = np.empty(shape, np.float32)
        for place, block in _blocks(stream, compute, columns):
            values[place] = block
        return AnnData(values, obs=obs, var=var, uns=uns)
    path = Path(out)
    check_out(path)
    with _appearing(path) as partial:
        group = create_group(partial)
        write_tables(group, obs, var, {}, uns, path)
        chunks = tuple(max(1, min(sizes)) for sizes in zip(shape, CHUNK, strict=True))
        array = group.create_array("X", shape=shape, dtype=np.float32, chunks=chunks)
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        _write(array, _blocks(stream, compute, columns))
    return path


def gene_columns(model: TrainedModel, genes: Sequence[str] | None) -> npt.NDArray[np.int64]:
    """Columns of the model that genes have, in the order given; all when None."""
    if genes is None:
        return np.arange(len(model.genes))
    if isinstance(genes, str):
        raise ConfigError("Genes are given as a list", found=repr(genes), expected="a list")
    place = {name: i for i, name in enumerate(model.genes)}
    if unknown := [str(gene) for gene in genes if gene not in place]:
        raise ModelError(
            "The model has no such genes",
            found=", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else ""),
            expected=f"some of its {len(place):,} genes, such as {', '.join(model.genes[:5])}",
            do="leave them out, or train with them chosen (`atlas genes`)",
        )
    columns = np.array([place[gene] for gene in genes], np.int64)
    if not len(columns) or len(set(columns)) < len(columns):
        raise ConfigError(
            "Genes are given twice, or none at all",
            found=f"{len(genes)} names, {len(set(columns))} different",
            expected="each once",
        )
    return columns


def check_out(path: Path) -> None:
    """Refuse a folder that is there, one in a folder that is not, and names of other formats."""
    if path.suffix in (".h5ad", ".h5", ".csv", ".tsv"):
        raise ConfigError(
            "Values of cells and genes are written as AnnData in Zarr, a folder",
            found=path.name,
            expected=f"a name such as {path.stem}.zarr",
            path=path,
        )
    if path.exists():
        raise OutputError("There is something here already", do="choose another name", path=path)
    check_file(path)


def _blocks(
    stream: CellStream, compute: Compute, columns: npt.NDArray[np.int64]
) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Values of cells and their place in the stream."""
    picked = torch.from_numpy(columns).to(stream.device)
    for cells in stream:
        values = compute(cells)[: cells.n_cells]
        if not torch.equal(picked, torch.arange(values.shape[1], device=stream.device)):
            values = values[:, picked]
        yield cells.place, values.cpu().numpy().astype(np.float32, copy=False)


def _write(array: Any, blocks: Iterator[tuple[slice, npt.NDArray[np.float32]]]) -> None:
    """Write blocks of rows in whole chunks: minibatches end where studies do, chunks do not."""
    height, done, waiting = array.chunks[0], 0, 0
    held: list[npt.NDArray[np.float32]] = []
    for _, block in blocks:
        held.append(block)
        waiting += len(block)
        if waiting >= height:
            rows = np.concatenate(held)
            whole = waiting // height * height
            array[done : done + whole] = rows[:whole]
            done, waiting, held = done + whole, waiting - whole, [rows[whole:]]
    if waiting:
        array[done : done + waiting] = np.concatenate(held)


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Give a folder beside ``path`` to write to, and move it there when all went well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        files.sync_tree(partial)
        partial.rename(path)
    except OSError as error:
        raise OutputError(
            "The folder could not be written",
            found=str(error),
            expected="a folder that is there, and room in it",
            path=path,
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
