"""What do the measures of an embedding take, in seconds and memory, beside scib-metrics?

At one size scib-metrics can be waited for: both measure the same cells, and the values are laid
side by side. Larger ones are for ours alone, read from a mapped file. Ours does more than the peer
at all: entropy, purity, accuracy, k-means, kBET within labels, and an error for each figure.
Graph connectivity asks the neighbours of all cells of ours too, and not of a sample; at the size
that both measure the clock is told with it and without it.

    benchmarks/peers/setup /scratch/peers
    python benchmarks/bench_metrics.py --peers /scratch/peers --json metrics.json

``--cells`` and ``--beside`` are the sizes; what 100 million cells would take is computed from the
two largest of the former.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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

D = 10
SIDE = Path(__file__).parent / "peers" / "scib_side.py"
PEER_NAMES = {
    "ilisi": "ilisi",
    "clisi": "clisi",
    "silhouette_label": "silhouette_label",
    "silhouette_batch": "silhouette_batch",
    "isolated_labels": "isolated_labels",
    "bras": "bras",
    "pcr_batch": "pcr_batch",
    "pcr_comparison": "pcr_comparison",
    "kbet": "kbet",
    "graph_connectivity": "graph_connectivity",
    "nmi_kmeans": "kmeans_nmi",
    "ari_kmeans": "kmeans_ari",
}
PEER_WORKS = (
    "ilisi",
    "clisi",
    "silhouette_label",
    "silhouette_batch",
    "isolated_labels",
    "bras",
    "pcr_batch",
    "pcr_comparison",
    "kbet",
    "graph_connectivity",
    "kmeans",
)


def make_cells(folder: Path, n: int) -> Path:
    """An embedding, one before integration, labels and batches: 12 labels in 6 uneven batches."""
    made = folder / f"cells-{n}"
    if (made / "whole").exists():
        return made
    made.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    labels = rng.choice(12, n, p=np.r_[np.full(10, 0.095), 0.03, 0.02])
    batches = rng.choice(6, n, p=[0.3, 0.25, 0.2, 0.15, 0.07, 0.03])
    labels[(labels == 11) & (batches > 1)] = 0
    centres = (2.2 * rng.standard_normal((12, D))).astype(np.float32)
    shifts = rng.standard_normal((6, D)).astype(np.float32)
    before = np.lib.format.open_memmap(made / "before.npy", "w+", np.float32, (n, D))
    z = np.lib.format.open_memmap(made / "z.npy", "w+", np.float32, (n, D))
    for start in range(0, n, 2**18):
        part = slice(start, min(start + 2**18, n))
        noise = rng.standard_normal((part.stop - start, D), dtype=np.float32)
        before[part] = centres[labels[part]] + shifts[batches[part]] + noise
        more = 0.3 * rng.standard_normal(noise.shape, dtype=np.float32)
        z[part] = centres[labels[part]] + 0.3 * shifts[batches[part]] + noise + more
    z.flush()
    before.flush()
    np.save(made / "labels.npy", labels)
    np.save(made / "batches.npy", batches)
    (made / "whole").touch()
    return made


def ours(arguments: Json, phases: Phases) -> Json:
    """All measures of a mapped embedding, the batches' own embeddings given."""
    from atlas.evaluation.codes import Categories
    from atlas.evaluation.measures import evaluate_embedding

    made = Path(arguments["cells"])
    phases.begin("open")
    z = np.load(made / "z.npy", mmap_mode="r")
    before = np.load(made / "before.npy", mmap_mode="r")
    batches = Categories(np.load(made / "batches.npy"), [str(i) for i in range(6)])
    labels = Categories(np.load(made / "labels.npy"), [str(i) for i in range(12)])
    phases.begin("measure")
    start = time.perf_counter()
    metrics = evaluate_embedding(
        z,
        batches,
        labels,
        before=before,
        individual=before,
        max_queries=arguments["queries"],
        graph_cells=arguments["graph_cells"],
        leiden_cells=0,  # not of the set that the figures are about
    )
    seconds = time.perf_counter() - start
    phases.begin("after")
    return {"seconds": seconds, "metrics": metrics.to_json()}


def theirs(made: Path, folder: Path, peers: Path, limit: float) -> Json:
    """scib-metrics on the same cells; what it had done when time was up."""
    python = peers / "scib" / "bin" / "python"
    if not python.exists():
        return {"skipped": f"there is no environment of it: {python}"}
    cells, out = folder / "scib.npz", folder / "scib.json"
    out.unlink(missing_ok=True)
    np.savez(
        cells,
        z=np.load(made / "z.npy"),
        before=np.load(made / "before.npy"),
        labels=np.load(made / "labels.npy"),
        batches=np.load(made / "batches.npy"),
    )
    command = [str(python), str(SIDE), str(cells), str(out), *PEER_WORKS]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        subprocess.run(command, check=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        say(f"scib-metrics was stopped after {limit:.0f} s")
    except subprocess.CalledProcessError as error:
        return {"skipped": str(error)}
    if not out.exists():
        return {"skipped": f"nothing was done after {limit:.0f} s"}
    return {"skipped": None, **json.loads(out.read_text())}


def main() -> None:
    serve_worker([ours])
    parser = argument_parser(str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--cells", type=int, nargs="*", default=[1_000_000, 10_000_000], help="for ours alone"
    )
    parser.add_argument("--beside", type=int, default=100_000, help="cells for both; 0 for none")
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--limit", type=float, default=7200, help="seconds for scib-metrics")
    peers = Path(os.environ.get("ATLAS_PEERS", Path.home() / ".cache" / "atlas-peers"))
    parser.add_argument("--peers", type=Path, default=peers)
    options = parser.parse_args()
    if options.tiny:
        options.cells, options.beside = [3000, 6000], 1500
        options.queries, options.limit = 500, 200
    known = provenance()
    say_provenance(known)
    figures: Json = {"provenance": known, "queries": options.queries}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if options.beside:
            figures["beside"] = beside(folder, options.beside, options)
        figures["large"] = []
        for n in sorted(options.cells):
            found = run_ours(folder, n, options.queries, 0)
            tell(found, n)
            figures["large"].append(found)
        if len(figures["large"]) > 1:
            figures["computed"] = compute(*figures["large"][-2:])
    write_json(options.json, figures)


def run_ours(folder: Path, n: int, queries: int, graph_cells: int) -> Json:
    """Ours in a process of its own."""
    made = make_cells(folder, n)
    asked = {"cells": str(made), "queries": queries, "graph_cells": graph_cells}
    outcome = run_worker(__file__, "ours", asked, folder)
    return {
        **outcome.result,
        "n_cells": n,
        "peak_bytes": outcome.peak_above("open", "open", "measure"),
        "cpu_seconds": outcome.phases["measure"].cpu_seconds,
        "phases": phases_json(outcome),
    }


def beside(folder: Path, n: int, options: object) -> Json:
    """Both on the same cells."""
    queries, limit, peers = options.queries, options.limit, options.peers  # type: ignore[attr-defined]
    own, sampled = run_ours(folder, n, queries, n), run_ours(folder, n, queries, 0)
    peer = theirs(make_cells(folder, n), folder, peers, limit)
    measures = {m["name"]: m for m in own["metrics"]["measures"]}
    lines = []
    for name, title in PEER_NAMES.items():
        measure = measures[name]
        value = "–" if measure["value"] is None else f"{measure['value']:.4f}"
        error = "" if measure["standard_error"] is None else f"{measure['standard_error']:.4f}"
        found = (peer.get("values") or {}).get(title)
        told = f"{found:.4f}" if isinstance(found, float) else str(found or "")
        seconds = (peer.get("seconds") or {}).get(title.partition("_nmi")[0].partition("_ari")[0])
        lines.append(
            [measure["title"], value, error, told, "" if seconds is None else f"{seconds:.1f}"]
        )
    say()
    say(f"{n:,} cells × {D} dimensions, ours with {queries:,} queries")
    say(table(["measure", "ours", "± error", "scib-metrics", "its seconds"], lines))
    by_measure = peer.get("seconds") or {}
    total = sum(by_measure.values())
    rest = total - by_measure.get("graph_connectivity", 0.0)
    if peer.get("skipped"):
        say(f"scib-metrics: {peer['skipped']}")
    for what, mine, seconds in (
        ("all measures", own, total),
        ("without graph connectivity", sampled, rest),
    ):
        told = f"{what}: ours {mine['seconds']:.1f} s, {megabytes(mine['peak_bytes'])} above what "
        told += f"was open; scib-metrics {seconds:.1f} s"
        say(told if peer.get("skipped") else f"{told}, {seconds / mine['seconds']:.1f} times")
    return {"ours": own, "sampled": sampled, "theirs": peer, "their_seconds": total}


def compute(smaller: Json, larger: Json, n: int = 100_000_000) -> Json:
    """Seconds and memory of more cells than are run, on the line through two sizes."""

    def at(key: str) -> float:
        slope = (larger[key] - smaller[key]) / (larger["n_cells"] - smaller["n_cells"])
        return float(larger[key] + slope * (n - larger["n_cells"]))

    told = {"n_cells": n, "seconds": at("seconds"), "peak_bytes": at("peak_bytes")}
    say()
    say(
        f"{n:,} cells, computed from the two sizes, not run: {told['seconds']:.0f} s, "
        f"{megabytes(told['peak_bytes'])}"
    )
    return told


def tell(found: Json, n: int) -> None:
    """Ours alone, with its errors."""
    lines = [
        [
            m["title"] + ("" if m["k"] is None else f" (k {m['k']})"),
            "–" if m["value"] is None else f"{m['value']:.4f}",
            "" if m["standard_error"] is None else f"{m['standard_error']:.4f}",
            m["unit"],
            m["skipped"] or "",
        ]
        for m in found["metrics"]["measures"]
    ]
    say()
    say(f"{n:,} cells × {D} dimensions from a mapped file")
    say(table(["measure", "value", "± error", "unit", "skipped"], lines))
    spent = f"{found['seconds']:.1f} s ({found['cpu_seconds']:.1f} s on all cores)"
    say(f"{spent}, {megabytes(found['peak_bytes'])} above what was open")


if __name__ == "__main__":
    sys.exit(main())
