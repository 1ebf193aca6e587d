"""tiledbsoma-ml: a SOMA experiment of the cells, shuffled, sparse output."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

from contract import Json, Phases, Rows, measured, serve_worker, versions_of


def convert(arguments: Json, phases: Phases) -> Json:
    """Make the experiment."""
    import tiledbsoma.io

    shutil.rmtree(arguments["store"], ignore_errors=True)
    phases.begin("work")
    started = time.perf_counter()
    tiledbsoma.io.from_h5ad(arguments["store"], arguments["file"], measurement_name="RNA")
    seconds = time.perf_counter() - started
    phases.begin("rest")
    return {"seconds": seconds}


def stream(arguments: Json, phases: Phases) -> Json:
    """Stream shuffled minibatches."""
    import tiledbsoma
    from tiledbsoma_ml import ExperimentDataset

    phases.begin("open")
    with (
        tiledbsoma.Experiment.open(arguments["store"]) as experiment,
        experiment.axis_query("RNA") as query,
    ):
        dataset = ExperimentDataset(
            query,
            layer_name="data",
            obs_column_names=["soma_joinid"],
            batch_size=arguments["minibatch_size"],
            shuffle=True,
            seed=0,
            return_sparse_X=True,
        )

        def epoch() -> Iterator[Rows]:
            for counts, _ in dataset:
                yield counts.data, counts.indices, counts.indptr

        result = measured(epoch, arguments, phases)
    phases.begin("rest")
    names = ("tiledbsoma-ml", "tiledbsoma", "torch", "numpy", "scipy")
    return result | {"versions": versions_of(*names)}


if __name__ == "__main__":
    serve_worker([convert, stream])
