"""What bounds the loader: how fast can one core take each step from disk to minibatch?

The steps are measured one by one on the store's own chunks, in one thread, with the plainest code
that does each. It shares only the running sum with Atlas' reader, so that the bound does not move
when the reader does.

read
    ``pread`` of each run of chunks, from the page cache.
checksum
    crc32c of each chunk.
decompress
    Blosc (or pcodec), into the same buffer again and again.
sum
    Running sum of the deltas of the columns, in place.
gather
    Rows of a window of 8,192, in random order, copied into minibatches as uint16; or *gather and
    widen*, the same into int32 and float32.

The bound of a loader is the sum of its steps on one core, times the cores. Then the loader itself:
cells/s with as many threads as cores, and the share of the bound that it reaches. Last, other ways
to lay out the same cells: bytes a cell, and decompress + sum.

All targets are used again and again: memory that is new costs about as much as a copy, and a
loader whose minibatches keep their arrays has to pay it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numba
import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import pcodec.standalone
import zarr
from common import argument_parser, provenance, say, say_provenance, table, write_json
from decode_layouts import LAYOUTS, fastest, measure_layout, running_sum, say_layouts

Array = npt.NDArray[Any]

WINDOW = 8192
MINIBATCH = 4096
_VALUES = 2**25  # at most so many are decoded and kept: 128 MB


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def gather(
    indptr: Array, indices: Array, data: Array, rows: Array, to_indices: Array, to_data: Array
) -> int:
    """Copy rows one behind the other; widens where the targets are wider. Returns how many."""
    at = 0
    for row in rows:
        begin, end = indptr[row], indptr[row + 1]
        stop = at + end - begin
        # Over slices of equal length, which the compiler turns into wide moves.
        columns, values = indices[begin:end], data[begin:end]
        new_columns, new_values = to_indices[at:stop], to_data[at:stop]
        for k in range(len(columns)):
            new_columns[k] = columns[k]
        for k in range(len(values)):
            new_values[k] = values[k]
        at = stop
    return at


@dataclass(frozen=True)
class Stored:
    """One array on disk, by its zarr.json.

    Attributes
    ----------
    path
        Its folder.
    n, chunk
        Elements, and elements of a chunk.
    dtype
        As stored.
    codecs
        Of a chunk, in the order of encoding.
    per_shard
        Chunks of a shard, which ends with their index.
    """

    path: Path
    n: int
    chunk: int
    dtype: np.dtype[Any]
    codecs: tuple[str, ...]
    per_shard: int

    @classmethod
    def open(cls, path: Path) -> Stored:
        meta = json.loads((path / "zarr.json").read_bytes())
        inner = meta["codecs"][0]["configuration"]
        chunk, shard = (
            inner["chunk_shape"][0],
            meta["chunk_grid"]["configuration"]["chunk_shape"][0],
        )
        codecs = tuple(codec["name"] for codec in inner["codecs"])
        dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        return cls(path, meta["shape"][0], chunk, dtype, codecs, shard // chunk)

    @property
    def delta(self) -> bool:
        """Whether decoding ends with a running sum."""
        return self.codecs[0] == "numcodecs.delta"

    def places(self, most: int) -> Iterator[tuple[Path, list[tuple[int, int]]]]:
        """Per shard the offsets and lengths of its chunks, of the first ``most`` chunks."""
        shard = 0
        left = min(most, -(-self.n // self.chunk))
        while left:
            path = self.path / "c" / str(shard)
            with path.open("rb") as file:
                length = 16 * self.per_shard + 4
                file.seek(-length, os.SEEK_END)
                index = np.frombuffer(file.read(length - 4), "<u8").reshape(-1, 2)
            places = [(int(a), int(b)) for a, b in index[:left]]
            yield path, places
            left -= len(places)
            shard += 1

    def decompress(self, body: bytes | memoryview, out: Array) -> None:
        """All but the checksum and the sum."""
        if "blosc" in self.codecs:
            numcodecs.blosc.decompress(body, out)
        else:
            pcodec.standalone.simple_decompress_into(bytes(body), out)


def read_shards(array: Stored, most: int, scratch: bytearray) -> Iterator[memoryview]:
    """The compressed bytes of each chunk; one read a shard, into memory that is used again."""
    for path, places in array.places(most):
        begin = min(offset for offset, _ in places)
        end = max(offset + length for offset, length in places)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.preadv(descriptor, [memoryview(scratch)[: end - begin]], begin)
        finally:
            os.close(descriptor)
        yield from (memoryview(scratch)[offset - begin :][:length] for offset, length in places)


@dataclass(frozen=True)
class Decoded:
    """Whole rows from the start of a study, and the seconds each step took for all of them."""

    indptr: npt.NDArray[np.int64]
    indices: Array
    data: Array
    steps: dict[str, float]

    @property
    def n_rows(self) -> int:
        """Rows."""
        return len(self.indptr) - 1


def decode_study(folder: Path) -> Decoded:
    """Decode the start of a study step by step, each step over all chunks."""
    indptr = np.asarray(zarr.open_array(str(folder / "X" / "indptr"), mode="r")[:], np.int64)
    steps = dict.fromkeys(("read", "checksum", "decompress", "sum"), 0.0)
    parts = []
    for name in ("indices", "data"):
        array = Stored.open(folder / "X" / name)
        most = max(1, _VALUES // array.chunk)
        space = bytearray(2 * array.chunk * array.dtype.itemsize * array.per_shard)
        bodies = [bytes(chunk[:-4]) for chunk in read_shards(array, most, space)]
        steps["read"] += fastest(
            lambda a=array, m=most, s=space: [len(chunk) for chunk in read_shards(a, m, s)]
        )
        steps["checksum"] += fastest(lambda b=bodies: [google_crc32c.value(body) for body in b])
        scratch = np.empty(array.chunk, array.dtype)
        steps["decompress"] += fastest(
            lambda b=bodies, a=array, s=scratch: [a.decompress(body, s) for body in b]
        )
        out = np.empty((len(bodies), array.chunk), array.dtype)
        for body, row in zip(bodies, out, strict=True):
            array.decompress(body, row)
        if array.delta:
            again = out.copy()
            running_sum(again[0].copy())  # compiled
            steps["sum"] += fastest(lambda a=again: [running_sum(row) for row in a])
            for row in out:
                running_sum(row)
        parts.append(out.reshape(-1)[: array.n])
    n_rows = int(np.searchsorted(indptr, min(map(len, parts)), side="right")) - 1
    return Decoded(indptr[: n_rows + 1], parts[0], parts[1], steps)


def gather_steps(rows: Decoded) -> dict[str, float]:
    """Seconds of gathering all rows into minibatches, as stored and widened."""
    rng = np.random.default_rng(0)
    windows = [
        start + rng.permutation(min(WINDOW, rows.n_rows - start))
        for start in range(0, rows.n_rows, WINDOW)
    ]
    orders = [part for window in windows for part in np.array_split(window, WINDOW // MINIBATCH)]
    out = {}
    for name, kinds in (
        ("gather", (rows.indices.dtype, rows.data.dtype)),
        ("gather and widen", (np.dtype(np.int32), np.dtype(np.float32))),
    ):
        most = max(int((rows.indptr[o + 1] - rows.indptr[o]).sum()) for o in orders)
        to = [np.zeros(most, kind) for kind in kinds]

        def work(to: list[Array] = to) -> None:
            for order in orders:
                gather(rows.indptr, rows.indices, rows.data, order, *to)

        work()  # compiles
        out[name] = fastest(work)

    def into_new_memory() -> None:
        for order in orders:
            new = np.empty(most, np.int32), np.empty(most, np.float32)
            gather(rows.indptr, rows.indices, rows.data, order, *new)

    out["gather and widen, into new memory"] = fastest(into_new_memory)
    return out


def bounds(steps: dict[str, float]) -> dict[str, float]:
    """Seconds of the whole way, narrow and as float CSR."""
    decode = sum(steps[name] for name in ("read", "checksum", "decompress", "sum"))
    return {
        "all, narrow": decode + steps["gather"],
        "all, widened": decode + steps["gather and widen"],
    }


# the loader itself


def loader_rate(store: Any, narrow: bool, seconds: float) -> float:
    """Cells a second of whole epochs, after one that is not counted."""
    import loaders

    loader = loaders.MinibatchLoader(
        store, MINIBATCH, seed=0, **({"narrow": True} if narrow else {})
    )
    for _ in loader:
        pass
    cells, started = 0, time.perf_counter()
    while True:
        cells += sum(minibatch.n_rows for minibatch in loader)
        spent = time.perf_counter() - started
        if spent >= seconds:
            return cells / spent


def reached(store: Any, per_core: dict[str, float], seconds: float) -> list[dict[str, Any]]:
    """The loader's speed beside the bound on all cores."""
    cores = len(os.sched_getaffinity(0))
    out = []
    for name, narrow in (("all, narrow", True), ("all, widened", False)):
        bound = per_core[name] * cores
        row: dict[str, Any] = {"output": name, "bound_cells_a_second": bound, "cores": cores}
        try:
            row["cells_a_second"] = loader_rate(store, narrow, seconds)
            row["share"] = row["cells_a_second"] / bound
        except Exception as error:  # a benchmark of the bound goes on without the loader
            row["failed"] = f"{type(error).__name__}: {error}"
        out.append(row)
    return out


# the run


def opened(args: argparse.Namespace, work: Path) -> Any:
    """The store that was given, or one of simulated cells."""
    import atlas
    import atlas.workflows
    from atlas.simulate import simulate

    if args.store is not None:
        return atlas.open_store(args.store)
    cells, genes = (400, 500) if args.tiny else (20_000, 20_000)
    folder = work / f"decode-{cells}x{genes}"
    path = folder / "store.atlas"
    if not path.exists():
        simulate(folder / "files", cells, 1, genes=genes, library=5450.0, progress=False)
        file = folder / "files" / "study_1.h5ad"
        atlas.workflows.ingest(path, file, study="cells", batch_key="batch", label_key="cell_type")
    return atlas.open_store(path)


def say_steps(steps: dict[str, float], n_rows: int, n_values: int) -> None:
    total = steps["all, widened"]
    say(
        table(
            ["step", "ns a value", "µs a cell", "cells/s a core", "of the widened whole"],
            [
                [
                    name,
                    f"{seconds / n_values * 1e9:.2f}",
                    f"{seconds / n_rows * 1e6:.2f}",
                    f"{n_rows / seconds:,.0f}" if seconds else "–",
                    f"{seconds / total:.0%}",
                ]
                for name, seconds in steps.items()
            ],
        )
    )


def say_reached(found: list[dict[str, Any]]) -> None:
    say(
        table(
            ["output", "bound on all cores", "loader", "share"],
            [
                [
                    row["output"],
                    f"{row['bound_cells_a_second']:,.0f}",
                    f"{row['cells_a_second']:,.0f}" if "share" in row else row["failed"],
                    f"{row['share']:.0%}" if "share" in row else "–",
                ]
                for row in found
            ],
        )
    )


def main() -> None:
    parser = argument_parser("The bound of the loader, step by step")
    parser.add_argument(
        "--store", type=Path, help="a store of one study or more; the first is read"
    )
    args = parser.parse_args()
    known = provenance()
    say_provenance(known)
    numcodecs.blosc.set_nthreads(1)
    with tempfile.TemporaryDirectory(prefix="bench-decode-", dir=args.work) as temporary:
        store = opened(args, args.work or Path(temporary))
        rows = decode_study(Path(store.path) / "studies" / store.studies[0])
        n_values = int(rows.indptr[-1])
        # Chunks end in mid-row: the steps up to the sum saw a little more than the whole rows.
        share = n_values / min(len(rows.indices), len(rows.data))
        steps = {name: seconds * share for name, seconds in rows.steps.items()}
        steps |= gather_steps(rows)
        steps |= bounds(steps)
        say(f"\n{rows.n_rows:,} cells, {n_values / rows.n_rows:,.0f} values each, one core\n")
        say_steps(steps, rows.n_rows, n_values)
        per_core = {name: rows.n_rows / steps[name] for name in bounds(steps)}
        found = reached(store, per_core, 0.0 if args.tiny else 5.0)
        say("\nthe loader\n")
        say_reached(found)
        few = min(n_values, 2**24)
        cells = rows.n_rows * few / n_values
        layouts = [
            measure_layout(layout, rows.indices[:few], rows.data[:few], cells) for layout in LAYOUTS
        ]
        say("\nother layouts of the same cells, columns and counts as uint16\n")
        say_layouts(layouts)
    write_json(
        args.json,
        {
            "benchmark": "decode",
            **known,
            "cells": rows.n_rows,
            "values": n_values,
            "step_seconds": steps,
            "cells_a_second_a_core": {k: rows.n_rows / s for k, s in steps.items() if s},
            "loader": found,
            "layouts": layouts,
        },
    )


if __name__ == "__main__":
    main()
