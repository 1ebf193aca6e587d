"""How fast do shuffled minibatches come from disk, beside the other loaders?

Simulated cells × 20,000 genes in a file sorted by batch. Each side makes its own store of it and
streams shuffled minibatches: ours, annbatch, scDataset, tiledbsoma-ml. Every measurement is a
process of its own (in an environment of its own, made by ``benchmarks/peers/setup``, for a peer);
the sides take turns, so that what else happens on the machine falls on all. The page cache is warm;
``cold`` rows drop it first, and the disk's own rate stands beside them.

cells/s
    whole epochs over their time, the filling of buffers at the start of each included; slow sides
    are stopped in mid-epoch. Counts are summed and columns hashed on every side. Median over
    the repeats, with the lowest and highest.
same cells
    In the first repeat every row read gets a fingerprint of its counts and columns, outside the
    timed epoch, and all are compared with those of the file (see ``peers/contract.py``): after a
    whole epoch as multisets, otherwise that no row came that is not in the file.
diversity
    of the batches in minibatches, the mean entropy as a share of an ideal shuffle's
    (``loaders.audit``): in that same first epoch, where it was whole and each row came once.
memory
    peak private memory while opening and streaming above the process after its imports.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import (
    Json,
    argument_parser,
    megabytes,
    phases_json,
    provenance,
    run_worker,
    say,
    say_provenance,
    table,
    write_json,
)

from loaders.audit import diversity

HERE = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(HERE))
from sides import COLD, COMPARISONS, MEMORY, Side, sides  # noqa: E402
from stores import Stores, make_stores, sequential_rate  # noqa: E402

FULL: Json = {"genes": 20_000, "n_genes": 2000, "seconds": 3.0, "warm_seconds": 3.0, "limit": 20.0}
TINY: Json = {"genes": 500, "n_genes": 50, "seconds": 0.0, "warm_seconds": 0.1, "limit": 20.0}


def environment(peers: Path, side: Side) -> str | None:
    """The interpreter that runs a side, if it is there."""
    if side.environment is None:
        return sys.executable
    python = peers / side.environment / "bin" / "python"
    return str(python) if python.exists() else None


def reason_to_skip(side: Side, stores: Stores, args: argparse.Namespace, cells: int) -> str | None:
    """Why a side is not measured on these cells, if it is not."""
    if environment(args.peers, side) is None:
        place = args.peers / str(side.environment)
        return f"no environment in {place}: make it by benchmarks/peers/setup"
    asked_for = args.soma and side.environment == "tiledbsoma"
    if side.most_cells is not None and cells > side.most_cells and not asked_for:
        return f"only up to {side.most_cells:,} cells: making its store takes too long"
    if side.needs in stores.failed:
        return f"its store could not be made: {stores.failed[side.needs]}"
    return None


def measure(
    side: Side, stores: Stores, python: str, settings: Json, minibatch_size: int, cold: bool
) -> Json:
    """One run of one side."""
    folder = stores.folder
    prove = folder / "seen.npz" if settings["prove"] else None
    arguments = {
        **stores.paths,
        **side.arguments(minibatch_size),
        **{key: settings[key] for key in ("seconds", "warm_seconds")},
        "limit": settings["limit"] if side.limit is None else side.limit,
        "minibatch_size": minibatch_size,
        "prove": None if prove is None else str(prove),
        "cold": cold,
    }
    if side.environment is not None:
        arguments["store"] = stores.paths[side.needs]
    outcome = run_worker(str(HERE / side.script), "stream", arguments, folder, python)
    result = outcome.result | {
        "memory_bytes": outcome.peak_above("open", "open", "epoch"),
        "phases": phases_json(outcome),
    }
    result["same_cells"] = check(result, stores, side, prove)
    result["diversity"] = diversity_of_batches(stores, side, prove)
    if prove is not None:
        prove.unlink()
    return result


def check(result: Json, stores: Stores, side: Side, prove: Path | None) -> str:
    """Whether what came is what the file holds; a word, or ``NO: …``."""
    known = stores.reference[side.genes]
    once = result["whole"] and not side.weighted
    if once:
        seen = result["cells_an_epoch"], result["columns_hash"]
        if seen != (known["cells"], known["columns_hash"]):
            return f"NO: {seen[0]:,} of {known['cells']:,} cells, or other columns"
        if abs(result["total"] - known["total"]) > 1e-6 * known["total"]:
            return f"NO: the counts sum to {result['total']:.0f}, not {known['total']:.0f}"
    if prove is None:
        return "sums equal" if once else "not compared"
    found, expected = np.sort(np.load(prove)["prints"]), np.load(stores.paths[side.genes])["prints"]
    if not side.weighted and len(found) == len(expected):
        return "every row once" if np.array_equal(found, expected) else "NO: rows differ"
    places = np.minimum(np.searchsorted(expected, found), len(expected) - 1)
    if not np.array_equal(expected[places], found):
        return "NO: rows that are not in the file"
    # Rows of equal content are possible, but not many.
    if not side.weighted and len(np.unique(found)) < 0.99 * len(found):
        return "NO: rows came twice"
    return f"{len(found):,} rows, all in the file"


def diversity_of_batches(stores: Stores, side: Side, prove: Path | None) -> float | None:
    """How well the epoch that was proven mixed the batches, if it was a whole one."""
    if prove is None or side.weighted:
        return None
    found, expected = np.load(prove), np.load(stores.paths[side.genes])
    prints, sizes = found["prints"], found["sizes"].tolist()
    if not np.array_equal(np.sort(prints), expected["prints"]):
        return None
    codes = expected["batch"][np.searchsorted(expected["prints"], prints)]
    return diversity(codes, sizes)


def round_of_sides(
    stores: Stores, args: argparse.Namespace, settings: Json, cells: int, minibatch_size: int
) -> list[Json]:
    """All sides in turn, as often as asked, then the cold ones."""
    rows: dict[str, Json] = {}
    chosen = [s for s in sides(minibatch_size) if not args.sides or s.name in args.sides]
    plan = [(side, False, repeat) for repeat in range(args.repeats) for side in chosen]
    if args.cold:
        plan += [(side, True, repeat) for repeat in range(args.repeats) for side in chosen
                 if side.name in COLD]  # fmt: skip
    for side, cold, repeat in plan:
        name = side.name + (", cold" if cold else "")
        row = rows.setdefault(
            name, {"side": name, "minibatch_size": minibatch_size, "runs": [], "skipped": None}
        )
        row["skipped"] = row["skipped"] or reason_to_skip(side, stores, args, cells)
        python = environment(args.peers, side)
        if row["skipped"] or python is None:
            continue
        asked = settings | {"prove": repeat == 0 and not cold}
        try:
            run = measure(side, stores, python, asked, minibatch_size, cold)
        except RuntimeError as error:
            row["skipped"] = f"failed: {error}"
            say(f"minibatch {minibatch_size}, {name}: {row['skipped']}")
            continue
        row["runs"].append(run)
        say(
            f"minibatch {minibatch_size}, {name}: {run['cells_a_second']:,.0f} cells/s, "
            f"{megabytes(run['memory_bytes'])}, {run['same_cells']}"
        )
    return [summary(row) for row in rows.values()]


def summary(row: Json) -> Json:
    """Median, lowest and highest over the repeats."""
    runs = row["runs"]
    if not runs:
        return row
    rates = [run["cells_a_second"] for run in runs]
    words = [run["same_cells"] for run in runs]
    return row | {
        "cells_a_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "memory_bytes": max(run["memory_bytes"] for run in runs),
        "same_cells": next((word for word in words if word.startswith("NO")), words[0]),
    }


def comparisons(rows: list[Json], made: Json) -> list[Json]:
    """Ratios beside their targets: speed, ingest, size, memory."""
    out: list[Json] = []
    by_name = {row["side"]: row for row in rows if row["runs"]}
    budgets = {side.name: side.budget for side in sides(1) if side.environment is None}
    for own, peer, target in COMPARISONS:
        if own in by_name and peer in by_name:
            ratio = by_name[own]["cells_a_second"] / by_name[peer]["cells_a_second"]
            out.append(compared(f"{own} / {peer}", ratio, target, at_least=True))
    for name, row in by_name.items():
        if name.startswith("ours") and "cold" not in name:
            most = row["memory_bytes"] / (budgets[name] + 200_000_000)
            out.append(compared(f"memory of {name} / (budget + 200 MB)", most, 1, at_least=False))
    own, peer = made.get("ours", {}), made.get("annbatch", {})
    if own.get("seconds") and peer.get("seconds"):
        ratio = statistics.median(peer["seconds"]) / statistics.median(own["seconds"])
        out.append(compared("speed of ingest / annbatch's add_adatas", ratio, 2, at_least=True))
    if own.get("bytes") and peer.get("bytes"):
        size = own["bytes"] / peer["bytes"]
        out.append(compared("size of the store / annbatch's", size, 1, at_least=False))
    return out


def compared(what: str, ratio: float, target: float, at_least: bool) -> Json:
    reached = ratio >= target if at_least else ratio <= target
    sign = "≥" if at_least else "≤"
    return {"what": what, "ratio": ratio, "target": f"{sign} {target:g}", "reached": reached}


def say_round(rows: list[Json], ratios: list[Json]) -> None:
    lines = []
    for row in rows:
        if row["runs"]:
            run = row["runs"][0]
            lines.append(
                [
                    row["side"],
                    f"{row['cells_a_second']:,.0f}",
                    f"{row['lowest']:,.0f}–{row['highest']:,.0f}",
                    "/".join(run["types"][:2]),
                    megabytes(row["memory_bytes"]),
                    "–" if run["diversity"] is None else f"{run['diversity']:.4f}",
                    row["same_cells"],
                ]
            )
        else:
            lines.append([row["side"], "–", "–", "–", "–", "–", f"left out: {row['skipped']}"])
    header = [
        "side",
        "cells/s",
        "lowest–highest",
        "counts/columns",
        "memory",
        "diversity",
        "same cells",
    ]
    say("\n" + table(header, lines) + "\n")
    word = {True: "yes", False: "NO"}
    say(
        table(
            ["ratio", "found", "target", "reached"],
            [[r["what"], f"{r['ratio']:.2f}", r["target"], word[r["reached"]]] for r in ratios],
        )
    )


def say_stores(made: Json, cells: int) -> None:
    rows = [
        [
            name,
            f"{statistics.median(one['seconds']):.1f} s" if "seconds" in one else "–",
            f"{one['bytes'] / cells:,.0f} B" if "bytes" in one else "–",
            megabytes(one["memory_bytes"]) if "memory_bytes" in one else "–",
            one.get("failed", ""),
        ]
        for name, one in made.items()
    ]
    say("\n" + table(["store", "making", "size a cell", "memory", "left out"], rows))


def one_size(args: argparse.Namespace, settings: Json, work: Path, cells: int, nnz: int) -> Json:
    """All that is measured on one file."""
    folder = work / f"{cells}x{settings['genes']}-{nnz}"
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"cells": cells, "nnz": nnz, "genes": settings["genes"]}
    say(f"\n{cells:,} cells, about {nnz:,} non-zeros each, in {folder}")
    stores = make_stores(folder, shape | {"n_genes": settings["n_genes"]}, args)
    say_stores(stores.made, cells)
    disk = sequential_rate(Path(stores.paths["store"])) if args.cold else None
    if disk is not None:
        a_cell = stores.made["ours"]["bytes"] / cells
        say(f"disk, read in order, cold: {megabytes(disk)}/s, {disk / a_cell:,.0f} of our cells/s")
    rounds = []
    for minibatch_size in args.minibatch_sizes:
        rows = round_of_sides(stores, args, settings, cells, minibatch_size)
        ratios = comparisons(rows, stores.made)
        say_round(rows, ratios)
        rounds.append({"minibatch_size": minibatch_size, "sides": rows, "ratios": ratios})
    return shape | {
        "nnz_found": stores.reference["nnz"] / cells,
        "stores": stores.made,
        "disk_bytes_a_second": disk,
        "rounds": rounds,
    }


def arguments() -> argparse.Namespace:
    parser = argument_parser("Cells a second from disk, beside the other loaders")
    home = os.environ.get("ATLAS_PEERS", Path.home() / ".cache" / "atlas-peers")
    parser.add_argument("--peers", type=Path, default=Path(home), help="the peers' environments")
    parser.add_argument("--cells", type=int, nargs="+", default=None)
    parser.add_argument("--nnz", type=int, nargs="+", choices=(1900, 1000), default=[1900, 1000])
    parser.add_argument("--minibatch-sizes", type=int, nargs="+", default=None)
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--sides", nargs="+", default=None, help="only these, by name")
    parser.add_argument("--no-cold", dest="cold", action="store_false")
    parser.add_argument(
        "--keep-stores", action="store_true", help="use stores that are there; do not time ingest"
    )
    parser.add_argument(
        "--soma",
        action="store_true",
        help="tiledbsoma-ml above 100,000 cells too: its store takes over 15 minutes at a million",
    )
    args = parser.parse_args()
    if args.tiny:
        args.nnz, args.cold = args.nnz[:1], False
    args.cells = sorted(args.cells or ([600] if args.tiny else [100_000, 1_000_000]))
    args.minibatch_sizes = args.minibatch_sizes or ([32] if args.tiny else [128, 4096])
    args.repeats = args.repeats or (1 if args.tiny else 3)
    if args.cold and not os.access("/proc/sys/vm/drop_caches", os.W_OK):
        say("cold: not measured, because dropping the page cache takes root")
        args.cold = False
    return args


def main() -> None:
    args = arguments()
    settings = TINY if args.tiny else FULL
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-loader-", dir=args.work) as temporary:
        work = args.work or Path(temporary)
        sizes = [
            one_size(args, settings, work, cells, nnz) for cells in args.cells for nnz in args.nnz
        ]
    write_json(
        args.json,
        {
            "benchmark": "loader",
            **known,
            "settings": settings | {"repeats": args.repeats, "memory": MEMORY},
            "sizes": sizes,
            "seconds": time.monotonic() - started,
        },
    )


if __name__ == "__main__":
    main()
