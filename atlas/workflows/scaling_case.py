"""One measurement of ``atlas bench``, in a process of its own: ``python -m`` this, JSON in and out.

What is made to measure on (simulated studies, a trained model) is not timed; a simulated store
stays in the work folder for the next case.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from atlas.config import BenchTask
from atlas.evaluation.index import NeighborIndex
from atlas.models import TrainedModel
from atlas.simulate import simulate
from atlas.store import CountStore, create_store, open_store
from atlas.workflows.embedding import embed
from atlas.workflows.keeping import keep
from atlas.workflows.living import update
from atlas.workflows.modelling import train
from loaders import MinibatchLoader

_ADDED = 2000
"""Cells of the study that an update adds, whatever the size of the reference."""
_SEARCHED, _K = 5000, 50
_LATENT = 10
_WARM = 20
_SECONDS = 3.0
"""The loader reads whole epochs for so long at least."""

Case = dict[str, Any]
"""The task and its settings, see :func:`atlas.workflows.scaling.bench`."""


class Measured:
    """Seconds of a body, and the most memory that it took above what was there before it."""

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measured() -> Iterator[Measured]:
    """Measure the body; memory is known on Linux only."""
    found = Measured()
    clear = Path("/proc/self/clear_refs")
    before = None
    if clear.exists():
        clear.write_text("5")  # the high-water mark starts again
        before = _resident("VmRSS")
    began = time.perf_counter()
    yield found
    found.seconds = time.perf_counter() - began
    if before is not None:
        found.peak_bytes = max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _outcome(found: Measured, n: int, unit: str, **more: Any) -> Case:
    return {
        "seconds": found.seconds,
        "rate": n / found.seconds,
        "unit": unit,
        "peak_bytes": found.peak_bytes,
        **more,
    }


def _store(case: Case) -> CountStore:
    """The store given, or one simulated, which is kept."""
    if case["store"] is not None:
        return open_store(case["store"])
    name = f"{case['cells']}-{case['genes']}-{case['batches']}-{case['seed']}.atlas"
    path = Path(case["work"]) / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=case["work"]) as folder:
            made = Path(folder) / "made.atlas"
            store = create_store(made)
            for file in simulate(
                Path(folder) / "files",
                case["cells"],
                1,
                case["seed"],
                genes=case["genes"],
                batches=case["batches"],
                progress=False,
            ):
                store.append(file, study="one", batch_key="batch", label_key="cell_type")
            made.rename(path)
    return open_store(path)


def _genes(store: CountStore, case: Case) -> tuple[str, ...]:
    """Genes to model: those the store has chosen, else the first by name.

    Which genes they are changes no speed, and choosing them takes time.
    """
    if case["store"] is not None and store.genes is not None:
        return store.genes
    return tuple(store.var.index[: case["modelled"]])


def _trained(store: CountStore, case: Case, out: Path, **options: Any) -> TrainedModel:
    return train(
        store,
        "scvi",
        genes=_genes(store, case),
        out=out,
        max_epochs=case["epochs"],
        seed=case["seed"],
        minibatch_size=case["minibatch_size"],
        device=case["device"],
        threads=case["threads"],
        validation_share=0.0,
        **options,
    )


def _loader(case: Case, folder: Path) -> Case:
    store = _store(case)
    loader = MinibatchLoader(store, case["minibatch_size"], case["seed"])
    for _, minibatch in zip(range(_WARM), loader, strict=False):
        assert minibatch.n_rows
    cells = 0
    with measured() as found:
        began = time.perf_counter()
        while time.perf_counter() - began < _SECONDS:
            cells += sum(minibatch.n_rows for minibatch in loader)
    return _outcome(found, cells, "cells/s")


def _train(case: Case, folder: Path) -> Case:
    store = _store(case)
    with measured() as found:
        model = _trained(store, case, folder / "run")
    last = model.training["history"][-1]
    steady = {"rate": last["cells_per_second"]}  # compiling and opening are in the seconds only
    return _outcome(found, store.n_obs, "cells/s") | steady


def _embed(case: Case, folder: Path) -> Case:
    store = _store(case)
    model = _trained(store, case | {"epochs": 1}, folder / "run")
    with measured() as found:
        embed(model, store, name=None, device=case["device"])
    return _outcome(found, store.n_obs, "cells/s")


def _neighbours(case: Case, folder: Path) -> Case:
    random = np.random.default_rng(case["seed"])
    centres = random.normal(0, 4, (20, _LATENT))
    cells = case["cells"]
    z = (centres[random.integers(20, size=cells)] + random.normal(size=(cells, _LATENT))).astype(
        np.float32
    )
    rows = np.sort(random.choice(cells, min(_SEARCHED, cells), replace=False))
    with measured() as found:
        began = time.perf_counter()
        index = NeighborIndex.build(z)
        built = time.perf_counter() - began
        index.neighbours(min(_K, cells - 1), rows)
    told = index.recall(min(_K, cells - 1))
    searching = found.seconds - built
    return _outcome(found, len(rows), "queries/s") | {
        "rate": len(rows) / searching,
        "build_seconds": built,
        "recall": told.value,
    }


def _update(case: Case, folder: Path) -> Case:
    made = _store(case)
    # a copy, as an update changes the store
    path = folder / "living.atlas"
    shutil.copytree(made.path, path)
    store = open_store(path)
    _trained(store, case | {"epochs": 1}, folder / "run")
    keep(store, folder / "run", "scvi", device=case["device"])
    (file,) = simulate(
        folder / "new",
        _ADDED,
        1,
        case["seed"] + 1,
        genes=case["genes"],
        batches=case["batches"],
        progress=False,
    )
    with measured() as found:
        update(
            path,
            file,
            study="new",
            model="scvi",
            ingest={"batch_key": "batch", "label_key": "cell_type"},
            device=case["device"],
            threads=case["threads"],
        )
    return _outcome(found, _ADDED, "new cells/s")


TASKS: dict[BenchTask, Callable[[Case, Path], Case]] = {
    "loader": _loader,
    "train": _train,
    "embed": _embed,
    "neighbours": _neighbours,
    "update": _update,
}


def main() -> None:
    """Read a case from stdin, write what was measured to the file named."""
    case: Case = json.load(sys.stdin)
    with tempfile.TemporaryDirectory(dir=case["work"]) as folder:
        found = TASKS[case["task"]](case, Path(folder))
    Path(case["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
