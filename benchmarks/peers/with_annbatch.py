"""annbatch: its own store of the cells, and its loader, in its fastest set-up for a processor.

That is: the ``zarrs`` pipeline (Rust), no obs frame to slice, scipy CSR as it comes out of the
loader with nothing converted, chunks of 32 rows, 256 at a time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import numpy as np
from contract import Json, Phases, Rows, measured, serve_worker, versions_of


def _use_zarrs() -> None:
    import zarr
    import zarrs  # noqa: F401

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def convert(arguments: Json, phases: Phases) -> Json:
    """Make its store with its defaults, which shuffle, but for datasets of 2 GB in place of 20.

    With the default a million cells of 1,000 values were too many for 23.5 GiB of memory.
    """
    _use_zarrs()
    from annbatch import DatasetCollection

    shutil.rmtree(arguments["store"], ignore_errors=True)
    phases.begin("work")
    started = time.perf_counter()
    collection = DatasetCollection(arguments["store"])
    rng = np.random.default_rng(0)
    collection.add_adatas([arguments["file"]], rng=rng, dataset_size="2GB")
    seconds = time.perf_counter() - started
    phases.begin("rest")
    return {"seconds": seconds}


def stream(arguments: Json, phases: Phases) -> Json:
    """Stream shuffled minibatches."""
    _use_zarrs()
    import anndata
    from annbatch import DatasetCollection, Loader

    phases.begin("open")
    loader = Loader(
        batch_size=arguments["minibatch_size"],
        chunk_size=arguments["block_size"],
        preload_nchunks=arguments["blocks"],
        shuffle=True,
        rng=np.random.default_rng(0),
        preload_to_gpu=False,
    ).use_collection(
        DatasetCollection(arguments["store"], mode="r"),
        load_adata=lambda group: anndata.AnnData(X=anndata.io.sparse_dataset(group["X"])),
    )

    def epoch() -> Iterator[Rows]:
        for minibatch in loader:
            counts = minibatch["X"]
            yield counts.data, counts.indices, counts.indptr

    result = measured(epoch, arguments, phases)
    phases.begin("rest")
    names = ("annbatch", "zarr", "zarrs", "anndata", "numpy", "scipy")
    return result | {"versions": versions_of(*names)}


if __name__ == "__main__":
    serve_worker([convert, stream])
