"""Does the memory of ingest, training and embedding stay the same however many cells there are?

One simulated study (one file: the hardest case, because a study is sorted as a whole), 20,000
genes, about 1,000 non-zeros a cell, of 10,000, 100,000 and 300,000 cells. Each step runs in a
process of its own: ``ingest`` (h5ad to store, and the choice of 2,000 genes by seurat_v3),
``train`` (scVI, one epoch, minibatch 128) and ``embed``. Beside it scvi-tools on the same files by
its in-memory route: ``anndata.read_h5ad``; reading, ``SCVI.train``; reading,
``get_latent_representation``. It is given our genes, because scanpy's seurat_v3 stops on the 512
cells of the warm-up with an error of its loess fit: its ``ingest`` is reading alone, so less than
ours. Where three copies of the matrix do not fit half of the free memory the peer is left out, and
the output says so.

The figures are private memory (see ``common.py``): pages of files, cached or mapped, do not count.

peak
    above the process after its imports: what the claim of less than 1 GB is about. It holds all
    that the step allocates, also compiled kernels and modules imported on the way.
after warm-up
    above the process after the same step was done once on 512 cells: what the cells themselves
    cost, kernels and late imports left out.
resident
    as peak, but the system's exact high-water mark, mapped files and libraries included.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    Json,
    Outcome,
    Phases,
    argument_parser,
    megabytes,
    phases_json,
    provenance,
    run_worker,
    say,
    say_provenance,
    serve_worker,
    table,
    write_json,
)

STEPS = ("ingest", "train", "embed")
LIMIT_BYTES = 10**9
FLAT_BYTES_A_CELL = 256
"""Growth from the second largest to the largest size that passes as flat: about what a cell's name,
annotations, hashes, codes and latent coordinates take, which are held for all cells of a study; its
counts would take some 8,000."""
COPIES_OF_THE_PEER = 3

FULL = {"genes": 20_000, "n_genes": 2000, "minibatch_size": 128, "warm_cells": 512}
TINY = {"genes": 500, "n_genes": 200, "minibatch_size": 128, "warm_cells": 256}


# workers: each does its step on few cells, then on all


def simulated(arguments: Json, phases: Phases) -> Json:
    """The cells, made once and kept."""
    from atlas.simulate import simulate

    folder = Path(arguments["files"])
    if not (folder / "truth.npz").exists():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        simulate(folder, arguments["cells"], 1, seed=0, genes=arguments["genes"], progress=False)
    return {}


def ingest(arguments: Json, phases: Phases) -> Json:
    """From the file to the store, and choose the genes."""
    import atlas
    from atlas import workflows

    for phase in ("warm", "work"):
        phases.begin(phase)
        here = arguments[phase]
        shutil.rmtree(here["store"], ignore_errors=True)
        workflows.ingest(
            here["store"], here["file"], study="one", batch_key="batch", label_key="cell_type"
        )
        genes = atlas.select_genes(atlas.open_store(here["store"]), arguments["n_genes"])
        np.save(here["genes"], genes)
    phases.begin("rest")
    return {}


def train(arguments: Json, phases: Phases) -> Json:
    """One epoch."""
    import atlas
    import atlas.workflows

    for phase in ("warm", "work"):
        phases.begin(phase)
        here = arguments[phase]
        shutil.rmtree(here["run"], ignore_errors=True)
        atlas.train(
            atlas.open_store(here["store"]),
            "scvi",
            out=here["run"],
            max_epochs=1,
            minibatch_size=arguments["minibatch_size"],
            device="cpu",
        )
    phases.begin("rest")
    return {}


def embed(arguments: Json, phases: Phases) -> Json:
    """Embed all cells, and keep the embedding with the store."""
    import atlas
    import atlas.workflows

    for phase in ("warm", "work"):
        phases.begin(phase)
        here = arguments[phase]
        model = atlas.load_model(here["run"])
        atlas.embed(model, atlas.open_store(here["store"]), name="scvi", device="cpu")
    phases.begin("rest")
    return {}


def peer_ingest(arguments: Json, phases: Phases) -> Json:
    """Read the file."""
    import anndata
    import scvi  # noqa: F401

    for phase in ("warm", "work"):
        phases.begin(phase)
        anndata.read_h5ad(arguments[phase]["file"])
    phases.begin("rest")
    return {}


def modelled(file: str, genes: Any) -> Any:
    """The cells in memory with the genes to be modelled, all others forgotten."""
    import anndata
    import scvi

    adata = anndata.read_h5ad(file)
    adata = adata[:, genes].copy()
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    return adata


def peer_train(arguments: Json, phases: Phases) -> Json:
    """Read the file, one epoch."""
    import anndata  # noqa: F401
    import scvi

    scvi.settings.verbosity = 30
    scvi.settings.seed = 0
    for phase in ("warm", "work"):
        phases.begin(phase)
        here = arguments[phase]
        model = scvi.model.SCVI(
            modelled(here["file"], np.load(here["genes"])),
            n_layers=2,
            gene_likelihood="zinb",
            use_layer_norm="both",
            use_batch_norm="none",
            encode_covariates=True,
        )
        model.train(
            max_epochs=1,
            accelerator="cpu",
            train_size=0.9,
            batch_size=arguments["minibatch_size"],
            check_val_every_n_epoch=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model.save(here["peer_run"], overwrite=True)
        del model
    phases.begin("rest")
    return {}


def peer_embed(arguments: Json, phases: Phases) -> Json:
    """Read the file, embed all cells."""
    import anndata  # noqa: F401
    import scvi

    scvi.settings.verbosity = 30
    for phase in ("warm", "work"):
        phases.begin(phase)
        here = arguments[phase]
        adata = modelled(here["file"], np.load(here["genes"]))
        model = scvi.model.SCVI.load(here["peer_run"], adata, accelerator="cpu")
        model.get_latent_representation()
        del model
    phases.begin("rest")
    return {}


# the run


def paths(folder: Path, files: Path) -> Json:
    """Where the workers find and leave what belongs to one number of cells."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "file": str(files / "study_1.h5ad"),
        "store": str(folder / "cells.atlas"),
        "run": str(folder / "run"),
        "genes": str(folder / "genes.npy"),
        "peer_run": str(folder / "peer-run"),
    }


def figures(outcome: Outcome) -> Json:
    """Peaks and seconds of one step."""
    return {
        "peak_bytes": outcome.peak_above("warm", "warm", "work"),
        "after_warm_up_bytes": outcome.peak_above("work", "work"),
        "resident_peak_bytes": outcome.peak_above("warm", "warm", "work", kind="resident"),
        "imports_bytes": outcome.phases["warm"].private_start,
        "seconds": outcome.phases["work"].seconds,
        "cpu_seconds": outcome.phases["work"].cpu_seconds,
        "phases": phases_json(outcome),
    }


def reason_to_skip(file: Path) -> str | None:
    """Why the peer cannot hold the cells of a file here, if it cannot."""
    import h5py

    with h5py.File(file) as opened:
        matrix = opened["X"]
        size = sum(matrix[part].size * matrix[part].dtype.itemsize for part in ("data", "indices"))
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    need = COPIES_OF_THE_PEER * size
    if need <= free / 2:
        return None
    return (
        f"{COPIES_OF_THE_PEER} copies of a matrix of {megabytes(size)} do not fit half of the "
        f"{megabytes(free)} that are free"
    )


def measured(cells: int, work: Path, settings: Json, warm: Json, with_peer: bool) -> Json:
    """All steps on one number of cells."""
    files = work / f"simulated-{cells}x{settings['genes']}-s1"
    with tempfile.TemporaryDirectory(prefix="bench-memory-", dir=work) as temporary:
        folder = Path(temporary)
        run_worker(__file__, "simulated", settings | {"cells": cells, "files": str(files)}, folder)
        arguments = settings | {"warm": warm, "work": paths(folder / "work", files)}
        ours, peer = {}, {}
        for step in STEPS:
            ours[step] = figures(run_worker(__file__, step, arguments, folder))
            say(f"{cells:,} cells, {step}: {megabytes(ours[step]['peak_bytes'])}")
        skipped = reason_to_skip(files / "study_1.h5ad") if with_peer else "not asked for"
        if skipped is None:
            for step in STEPS:
                peer[step] = figures(run_worker(__file__, f"peer_{step}", arguments, folder))
                say(f"{cells:,} cells, peer's {step}: {megabytes(peer[step]['peak_bytes'])}")
    return {"cells": cells, "ours": ours, "peer": peer, "peer_skipped": skipped}


def memory_table(runs: list[Json]) -> str:
    rows = []
    for step in STEPS:
        for run in runs:
            own, theirs = run["ours"][step], run["peer"].get(step)
            keys = ("peak_bytes", "after_warm_up_bytes", "resident_peak_bytes")
            rows.append(
                [
                    step,
                    f"{run['cells']:,}",
                    *(megabytes(own[key]) for key in keys),
                    f"{own['seconds']:.0f} s",
                    *([megabytes(theirs[key]) for key in keys[:2]] if theirs else ["–", "–"]),
                    f"{theirs['seconds']:.0f} s" if theirs else "–",
                    f"{own['peak_bytes'] / theirs['peak_bytes']:.2f}" if theirs else "–",
                ]
            )
    header = ["step", "cells", "peak", "after warm-up", "resident", "seconds"]
    header += ["peer's peak", "after warm-up", "seconds", "ours / peer (peak)"]
    return table(header, rows)


def verdicts(runs: list[Json]) -> Json:
    """Per step: the highest peak, and the growth from the second largest to the largest size."""
    out = {}
    for step in STEPS:
        peaks = [run["ours"][step]["peak_bytes"] for run in runs]
        grown = None
        if len(runs) > 1:
            grown = (peaks[-1] - peaks[-2]) / (runs[-1]["cells"] - runs[-2]["cells"])
        out[step] = {
            "highest_peak_bytes": max(peaks),
            "under_limit": max(peaks) < LIMIT_BYTES,
            "bytes_a_cell": grown,
            "flat": None if grown is None else grown < FLAT_BYTES_A_CELL,
        }
    return out


def verdict_table(found: Json) -> str:
    word = {True: "yes", False: "NO", None: "–"}
    rows = [
        [
            step,
            megabytes(f["highest_peak_bytes"]),
            word[f["under_limit"]],
            "–" if f["bytes_a_cell"] is None else f"{f['bytes_a_cell']:+,.0f} B",
            word[f["flat"]],
        ]
        for step, f in found.items()
    ]
    return table(["step", "highest peak", "under 1 GB", "growth a cell", "flat"], rows)


def main() -> None:
    serve_worker([simulated, ingest, train, embed, peer_ingest, peer_train, peer_embed])
    parser = argument_parser("Peak memory of ingest, training and embedding")
    parser.add_argument("--cells", type=int, nargs="+", default=None)
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    settings = TINY if args.tiny else FULL
    sizes = sorted(args.cells or ([400, 800] if args.tiny else [10_000, 100_000, 300_000]))
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-memory-", dir=args.work) as temporary:
        scratch = Path(temporary)
        work = args.work or scratch
        warm_files = scratch / "warm-files"
        warm = paths(scratch / "warm", warm_files)
        few = settings | {"cells": settings["warm_cells"], "files": str(warm_files)}
        run_worker(__file__, "simulated", few, scratch)
        # A test needs the peer once: its imports are what takes long.
        beside = [] if args.no_peer else sizes[:1] if args.tiny else sizes
        runs = [measured(cells, work, settings, warm, cells in beside) for cells in sizes]
    found = verdicts(runs)
    say("\n" + memory_table(runs))
    for run in runs:
        if run["peer_skipped"]:
            say(f"{run['cells']:,} cells, peer left out: {run['peer_skipped']}")
    say("\n" + verdict_table(found))
    write_json(
        args.json,
        {
            "benchmark": "memory",
            **known,
            "settings": settings | {"cells": sizes},
            "runs": runs,
            "verdicts": found,
            "seconds": time.monotonic() - started,
        },
    )


if __name__ == "__main__":
    main()
