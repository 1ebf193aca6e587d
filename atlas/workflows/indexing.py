"""Indexes of neighbours that are kept with the embeddings of a store."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError, OutputError, StoreError
from atlas.evaluation.index import NeighborIndex, choose
from atlas.store import CountStore

Rows = npt.NDArray[np.float32]


def stored_index(
    store: CountStore, name: str, z: Rows | None = None, *, mapped: bool = True
) -> NeighborIndex | None:
    """The index of an embedding kept with a store; None where it has none.

    Parameters
    ----------
    store, name
        The store, and the name of the embedding.
    z
        The embedding, if it is at hand: float32 (n_obs, n_latent).
    mapped
        Whether its files are read as they are needed; rows can be added only without.

    Raises
    ------
    StoreError
        The index is of other rows than the embedding.
    CorruptStoreError
        A file is missing or is not what was written.
    """
    folder = store.index_folder(name)
    if folder is None:
        return None
    z = store.embedding(name) if z is None else z
    try:
        return NeighborIndex.load(folder, embedding=z, mapped=mapped, check=False)
    except ConfigError as error:
        raise StoreError(
            f"The store has changed since the index of {name!r} was built",
            found=error.found,
            expected=f"an index of the {len(z):,} × {z.shape[1]} values of the embedding",
            do=f"restore the store from a copy, or go back to a state before: `atlas checkout`; "
            f"`atlas embed RUN {store.path} --name {name}` makes the embedding anew, without index",
            path=folder,
        ) from error


def write_index(store: CountStore, name: str, new: Rows, old: Rows | None, folder: Path) -> None:
    """Write the index that an embedding will have when rows come after those that it has.

    Only the new rows are added to the index that is there. It is built anew where there is none,
    where its kind takes no more rows (lists on disk), or where exact search would now take long.

    Parameters
    ----------
    store, name
        The store as it is before, and the name of the embedding.
    new
        Rows to come, after all others: float32 (n, n_latent).
    old
        The embedding as it is: float32 (n_obs, n_latent); None for a first one.
    folder
        Where; what a call that was interrupted left there is removed.

    Raises
    ------
    StoreError
        The index there is not of the embedding.
    OutputError
        It cannot be written.
    """
    index = None
    if old is not None:
        index = stored_index(store, name, old, mapped=False)
        if index is not None:
            kind = index.choice.kind
            n = len(old) + len(new)
            exact = ("exact", "flat")
            if kind == "disk" or (kind in exact and choose(n, old.shape[1], n).kind not in exact):
                index = None
    if index is not None and len(new):
        index.add(new)
    elif index is None:
        index = NeighborIndex.build(new if old is None else np.concatenate([old, new]))
    try:
        shutil.rmtree(folder, ignore_errors=True)
        index.save(folder)
    except OSError as error:
        raise OutputError(
            "The index of neighbours cannot be written", found=str(error), path=folder
        ) from error
