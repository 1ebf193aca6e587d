"""Ways to lay out columns and counts: bytes a cell, and the speed of decoding on one core."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import pcodec
import pcodec.standalone
from common import say, table

from atlas.codecs.deltas import sum_deltas

Array = npt.NDArray[Any]

REPEATS = 3


def running_sum(values: Array) -> None:
    """The inverse of the delta filter, in place, wrapping around: the fastest way that we know."""
    sum_deltas(values, 0, values)


def fastest(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Least seconds of some runs: what the step takes when nothing else is in the way."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@dataclass(frozen=True)
class Layout:
    """A way to store columns and counts.

    ``codec`` is ``"lz4-5"``, ``"zstd-3"`` (Blosc with byte shuffle) or ``"pcodec-8"``.
    """

    codec: str
    chunk: int
    delta: bool

    def encode(self, values: Array) -> bytes:
        name, level = self.codec.split("-")
        if name == "pcodec":
            config = pcodec.ChunkConfig(compression_level=int(level))
            return bytes(pcodec.standalone.simple_compress(values, config))
        shuffle = numcodecs.blosc.SHUFFLE
        return bytes(numcodecs.blosc.compress(values, name.encode(), int(level), shuffle))

    def decode(self, body: bytes, out: Array) -> None:
        if self.codec.startswith("pcodec"):
            pcodec.standalone.simple_decompress_into(body, out)
        else:
            numcodecs.blosc.decompress(body, out)


LAYOUTS = [
    *(
        Layout(codec, chunk, delta)
        for codec in ("lz4-5", "zstd-3")
        for chunk in (32_768, 65_536, 131_072)
        for delta in (False, True)
    ),
    Layout("pcodec-4", 131_072, False),
    Layout("pcodec-8", 131_072, False),
]


def measure_layout(layout: Layout, indices: Array, data: Array, n_rows: float) -> dict[str, Any]:
    """Bytes a cell, and cells a second of decompress + sum on one core."""
    size, seconds = 0, 0.0
    for values, delta in ((indices, layout.delta), (data, False)):
        whole = values.astype(np.uint16)
        chunks = np.split(whole, range(layout.chunk, len(whole), layout.chunk))
        if delta:
            chunks = [np.diff(chunk, prepend=chunk.dtype.type(0)) for chunk in chunks]
        bodies = [layout.encode(chunk) for chunk in chunks]
        size += sum(map(len, bodies))
        targets = [np.empty(len(chunk), np.uint16) for chunk in chunks[:1]] * (len(chunks) - 1)
        targets.append(np.empty(len(chunks[-1]), np.uint16))

        def work(
            bodies: list[bytes] = bodies, targets: list[Array] = targets, delta: bool = delta
        ) -> None:
            for body, target in zip(bodies, targets, strict=True):
                layout.decode(body, target)
                if delta:
                    running_sum(target)

        work()
        seconds += fastest(work)
    return {
        "codec": layout.codec,
        "chunk": layout.chunk,
        "delta": layout.delta,
        "bytes_a_cell": size / n_rows,
        "cells_a_second": n_rows / seconds,
    }


def say_layouts(found: list[dict[str, Any]]) -> None:
    say(
        table(
            ["codec", "chunk", "delta", "bytes a cell", "decode + sum, cells/s a core"],
            [
                [
                    row["codec"],
                    f"{row['chunk']:,}",
                    "yes" if row["delta"] else "no",
                    f"{row['bytes_a_cell']:,.0f}",
                    f"{row['cells_a_second']:,.0f}",
                ]
                for row in found
            ],
        )
    )
