"""scDataset: blocks of rows straight from the h5ad, by anndata's sparse dataset on h5py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from contract import Json, Phases, Rows, measured, serve_worker, versions_of


def stream(arguments: Json, phases: Phases) -> Json:
    """Stream shuffled minibatches."""
    import anndata
    import h5py
    from scdataset import BlockShuffling, scDataset

    phases.begin("open")
    counts = anndata.io.sparse_dataset(h5py.File(arguments["file"])["X"])

    class Cells:
        """What scDataset asks of a collection."""

        def __len__(self) -> int:
            return int(counts.shape[0])

        def __getitem__(self, rows: Any) -> Any:
            return counts[np.asarray(rows)]

    dataset = scDataset(
        Cells(),
        BlockShuffling(block_size=arguments["block_size"]),
        batch_size=arguments["minibatch_size"],
        fetch_factor=arguments["fetch_factor"],
        seed=0,
    )

    def epoch() -> Iterator[Rows]:
        for minibatch in dataset:
            yield minibatch.data, minibatch.indices, minibatch.indptr

    result = measured(epoch, arguments, phases)
    phases.begin("rest")
    names = ("scdataset", "torch", "anndata", "h5py", "numpy", "scipy")
    return result | {"versions": versions_of(*names)}


if __name__ == "__main__":
    serve_worker([stream])
