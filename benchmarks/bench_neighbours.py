"""How fast are neighbours found, beside FAISS called directly, scikit-learn and pynndescent?

Each side searches k neighbours of the same cells in a process of its own. Exact sides answer a
sample of queries, approximate ones build their structure and answer all cells. Recall is measured
on 1,000 cells against exact search, for the peers by the same function.

    python benchmarks/bench_neighbours.py --json neighbours.json    # --cells, --queries, --k
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    Json,
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

OURS_EXACT = ("ours, exact (torch)", "ours, flat (FAISS)", "ours, flat, mapped file")
THEIRS_EXACT = ("FAISS IndexFlatL2", "scikit-learn brute", "scikit-learn kd-tree")
OURS_NEAR = ("ours, ivf", "ours, hnsw", "ours, disk")
THEIRS_NEAR = ("FAISS IVF", "FAISS HNSW", "pynndescent")
D, K = 10, 50


def cells_of(n: int, d: int, seed: int) -> np.ndarray:
    """Cells around 30 centres, as an embedding has them."""
    rng = np.random.default_rng(seed)
    centres = 3 * rng.standard_normal((30, d)).astype(np.float32)
    out = np.empty((n, d), np.float32)
    for start in range(0, n, 2**18):
        part = out[start : start + 2**18]
        part[:] = centres[rng.integers(0, 30, len(part))]
        part += rng.standard_normal(part.shape, dtype=np.float32)
    return out


def exact(arguments: Json, phases: Phases) -> Json:
    """Search a sample of queries exactly."""
    side, k = arguments["side"], arguments["k"]
    mapped = np.load(arguments["file"], mmap_mode="r")
    z = mapped if side.endswith("mapped file") else np.array(mapped)
    rows = np.random.default_rng(1).choice(len(z), arguments["queries"], replace=False)
    run = _exact_side(side, z, rows, k)
    _exact_side(side, np.array(z[:300]), np.arange(64), 5)()  # imports and what is compiled
    phases.begin("search")
    start = time.perf_counter()
    indices, what = run()
    seconds = time.perf_counter() - start
    phases.begin("after")
    np.save(arguments["out"], np.asarray(indices, dtype=np.int64))
    return {"seconds": seconds, "pairs": float(len(z)) * len(rows), "what": what}


def _exact_side(side: str, z: Any, rows: np.ndarray, k: int) -> Any:
    """What searches; called, it gives the neighbours and says where it ran."""
    if side.startswith("ours"):
        from atlas.evaluation.neighbours import nearest

        backend = "torch" if "torch" in side else "faiss"

        def ours() -> tuple[np.ndarray, str]:
            found = nearest(z, z[rows], k, rows, backend=backend)  # type: ignore[arg-type]
            return found.indices, found.backend

        return ours
    if side.startswith("FAISS"):
        import faiss

        def flat() -> tuple[np.ndarray, str]:
            index, gpus = faiss.IndexFlatL2(z.shape[1]), faiss.get_num_gpus()
            if gpus:
                index = faiss.index_cpu_to_all_gpus(index)
            index.add(z)
            indices = _without_self(index.search(z[rows], k + 1)[1], rows)
            return indices, f"{gpus} GPUs" if gpus else "CPU"

        return flat
    from sklearn.neighbors import NearestNeighbors

    algorithm = "brute" if side.endswith("brute") else "kd_tree"

    def theirs() -> tuple[np.ndarray, str]:
        found = NearestNeighbors(algorithm=algorithm, n_jobs=-1).fit(z)
        indices = found.kneighbors(z[rows], k + 1, return_distance=False)
        return _without_self(indices, rows), "CPU"

    return theirs


def _without_self(indices: np.ndarray, rows: np.ndarray) -> np.ndarray:
    own = indices == rows[:, None]
    own[~own.any(axis=1), -1] = True
    return indices[~own].reshape(len(indices), -1)


def near(arguments: Json, phases: Phases) -> Json:
    """Build a structure and search the neighbours of all cells."""
    side, k = arguments["side"], arguments["k"]
    z = np.load(arguments["file"])
    from atlas.evaluation.index import NeighborIndex

    if side == "pynndescent":  # which compiles for a minute
        _near_side(side, z[:500], 5)
    else:
        NeighborIndex.build(z[:500], kind="ivf").neighbours(5)
    phases.begin("search")
    start = time.perf_counter()
    if side.startswith("ours"):
        kind = side.removeprefix("ours, ")
        index = NeighborIndex.build(z, kind=kind, recall_target=arguments["target"])
        built = time.perf_counter()
        found = index.neighbours(k)
        indices, told = found.indices, found.recall.value if found.recall else None
        name = found.backend
    else:
        indices, built, name = _near_side(side, z, k)
        told = None
    end = time.perf_counter()
    phases.begin("after")
    from atlas.evaluation.neighbours import nearest

    rows = np.sort(np.random.default_rng(2).choice(len(z), min(1000, len(z)), replace=False))
    true = nearest(z, z[rows], k, rows)
    distances = np.sqrt(
        ((z[indices[rows]].astype(np.float64) - z[rows, None].astype(np.float64)) ** 2).sum(-1)
    ).astype(np.float32)
    recall = float((distances <= true.distances[:, -1:]).mean())
    return {
        "build_seconds": built - start,
        "search_seconds": end - built,
        "recall": recall,
        "recall_told": told,
        "what": name,
    }


def _near_side(side: str, z: np.ndarray, k: int) -> tuple[np.ndarray, float, str]:
    own = np.arange(len(z))
    if side == "pynndescent":
        import pynndescent

        found = pynndescent.NNDescent(z, n_neighbors=k + 1, random_state=0, n_jobs=-1)
        indices = found.neighbor_graph[0]
        return _without_self(indices, own), time.perf_counter(), "NNDescent, its defaults"
    import faiss

    if side == "FAISS IVF":
        from atlas.evaluation.index.lists import n_lists

        lists = n_lists(len(z))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(z.shape[1]), z.shape[1], lists)
        index.train(z)
        index.add(z)
        index.nprobe = max(1, lists // 64)
        name = f"nprobe {index.nprobe} of {lists}"
    else:
        index = faiss.IndexHNSWFlat(z.shape[1], 32)
        index.hnsw.efConstruction = 100
        index.add(z)
        index.hnsw.efSearch = 2 * k
        name = f"efSearch {2 * k}, built by all threads"
    built = time.perf_counter()
    return _without_self(index.search(z, k + 1)[1], own), built, name


def measure(folder: Path, n: int, queries: int, k: int, near_cells: int, sides: list[str]) -> Json:
    """The sides on the same cells."""
    file, small = folder / f"z-{n}.npy", folder / f"z-{near_cells}.npy"
    for path, size in ((file, n), (small, near_cells)):
        if not path.exists():
            np.save(path, cells_of(size, D, 0))
    rows: list[Json] = []
    first = None
    for side in [s for s in OURS_EXACT + THEIRS_EXACT if s in sides]:
        out = folder / "indices.npy"
        asked = {"side": side, "file": str(file), "queries": queries, "k": k, "out": str(out)}
        row: Json = {"side": side, "skipped": None}
        try:
            outcome = run_worker(__file__, "exact", asked, folder)
        except RuntimeError as error:
            rows.append(row | {"skipped": str(error)})
            continue
        found = np.sort(np.load(out), axis=1)
        first = found if first is None else first
        row |= outcome.result
        row["pairs_a_second"] = row["pairs"] / row["seconds"]
        row["same_neighbours"] = float((found == first).mean())
        row["peak_bytes"] = outcome.peak_above("search", "search")
        rows.append(row | {"phases": phases_json(outcome)})
        say(f"{side}: {row['pairs_a_second'] / 1e9:.3f} G pairs/s")
    nearly: list[Json] = []
    for side in [s for s in OURS_NEAR + THEIRS_NEAR if s in sides]:
        asked = {"side": side, "file": str(small), "k": k, "target": 0.99}
        row = {"side": side, "skipped": None}
        try:
            outcome = run_worker(__file__, "near", asked, folder)
        except RuntimeError as error:
            nearly.append(row | {"skipped": str(error)})
            continue
        row |= outcome.result
        row["peak_bytes"] = outcome.peak_above("search", "search")
        nearly.append(row | {"phases": phases_json(outcome)})
        say(f"{side}: {row['build_seconds']:.1f} + {row['search_seconds']:.1f} s")
    return {"exact": rows, "near": nearly}


def main() -> None:
    serve_worker([exact, near])
    parser = argument_parser(str(__doc__).partition("\n")[0])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--near-cells", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=K)
    every = [*OURS_EXACT, *THEIRS_EXACT, *OURS_NEAR, *THEIRS_NEAR]
    parser.add_argument("--sides", nargs="+", choices=every, default=every, metavar="SIDE")
    options = parser.parse_args()
    if options.tiny:
        options.cells, options.queries, options.near_cells, options.k = 3000, 200, 3000, 10
    known = provenance()
    say_provenance(known)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(
            folder,
            options.cells,
            options.queries,
            options.k,
            options.near_cells,
            options.sides,
        )
    peer = {row["side"]: row for row in found["exact"]}.get("FAISS IndexFlatL2", {})
    say()
    say(
        f"exact: {options.queries:,} queries × {options.cells:,} cells, {D} dimensions, "
        f"k {options.k}"
    )
    lines = []
    for row in found["exact"]:
        if row["skipped"]:
            lines.append([row["side"], row["skipped"], "", "", "", "", ""])
            continue
        ratio = row["pairs_a_second"] / peer["pairs_a_second"] if peer.get("pairs") else 0
        row["ratio_to_faiss_flat"] = ratio
        lines.append(
            [
                row["side"],
                f"{row['seconds']:.1f}",
                f"{row['pairs_a_second'] / 1e9:.3f}",
                f"{ratio:.2f}",
                f"{row['same_neighbours']:.5f}",
                megabytes(row["peak_bytes"]),
                row["what"],
            ]
        )
    header = ["side", "seconds", "G pairs/s", "of FAISS flat", "same as the first", "peak above"]
    header.append("where")
    say(table(header, lines))
    say()
    say(f"approximate: all {options.near_cells:,} cells, k {options.k}, target recall .99")
    lines = [
        [row["side"], row["skipped"], "", "", "", "", ""]
        if row["skipped"]
        else [
            row["side"],
            f"{row['build_seconds']:.1f}",
            f"{row['search_seconds']:.1f}",
            f"{row['recall']:.4f}",
            "" if row["recall_told"] is None else f"{row['recall_told']:.4f}",
            megabytes(row["peak_bytes"]),
            row["what"],
        ]
        for row in found["near"]
    ]
    header = ["side", "build, s", "search, s", "recall", "recall told", "peak above", "how"]
    say(table(header, lines))
    write_json(options.json, {"provenance": known, "options": vars_of(options), **found})


def vars_of(options: Any) -> Json:
    """Plain values of the options."""
    return {
        name: value if isinstance(value, (int, float, bool)) else str(value)
        for name, value in vars(options).items()
    }


if __name__ == "__main__":
    sys.exit(main())
