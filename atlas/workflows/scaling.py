"""How the cost of a task grows with cells, genes and batches: ``atlas bench``."""

from __future__ import annotations

import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final, get_args

import torch
from matplotlib.figure import Figure

from atlas.config import BenchTask
from atlas.errors import ConfigError, InputError
from atlas.evaluation.score_figure import FigureFormat
from atlas.provenance import command, versions
from atlas.store import open_store
from atlas.workflows.output import check_suffix, write_bytes
from loaders.pipeline import cores

TASKS: Final[tuple[str, ...]] = get_args(BenchTask)
SCHEMA: Final = "atlas-bench"
VERSION: Final = 1
TOLERANCE: Final = 0.2
"""Share by which a rate may fall before it is a regression."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Attributes
    ----------
    cells, genes, batches
        Size of what was measured on.
    seconds
        Of the task, as a user waits for it.
    rate, unit
        What is got through a second once it runs: cells, queries, or new cells of an update.
    peak_bytes
        Memory above that of the process before; None where the system does not tell.
    more
        What a task has besides: ``build_seconds`` and ``recall`` of neighbours.
    """

    cells: int
    genes: int
    batches: int
    seconds: float
    rate: float
    unit: str
    peak_bytes: int | None
    more: dict[str, float]

    @property
    def size(self) -> tuple[int, int, int]:
        """What two rows have in common that are compared."""
        return self.cells, self.genes, self.batches


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What ``atlas bench`` found.

    Attributes
    ----------
    task
        One of :data:`TASKS`.
    settings
        What was the same for all rows.
    machine
        Processor, cores, memory, GPU, system.
    versions
        Of the packages.
    rows
        The measurements.
    """

    task: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read by :func:`read_report`."""
        return {"schema": SCHEMA, "version": VERSION, "command": command(), **asdict(self)}

    def __str__(self) -> str:
        head = ("cells", "genes", "batches", "seconds", self.rows[0].unit, "peak MB", "")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows:
            peak = "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"
            more = ", ".join(f"{name} {value:.3g}" for name, value in row.more.items())
            size = (f"{n:,}" for n in row.size)
            lines.append((*size, f"{row.seconds:.2f}", f"{row.rate:,.0f}", peak, more))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


@dataclass(frozen=True, slots=True)
class Change:
    """A row beside the same one of an earlier report.

    Attributes
    ----------
    row
        The new one.
    ratio
        New rate over old.
    slower
        Whether it fell by more than the tolerance.
    """

    row: Row
    ratio: float
    slower: bool


def bench(
    task: str,
    cells: Sequence[int] = (10_000, 100_000),
    *,
    genes: Sequence[int] = (10_000,),
    batches: Sequence[int] = (4,),
    store: str | PathLike[str] | None = None,
    modelled: int = 2000,
    minibatch_size: int = 128,
    epochs: int = 1,
    seed: int = 0,
    device: str = "auto",
    threads: int = 0,
    work: str | PathLike[str] | None = None,
    progress: bool = False,
) -> BenchReport:
    """Measure a task at each size, every measurement in a process of its own.

    Parameters
    ----------
    task
        ``"loader"`` (an epoch of shuffled minibatches from a store), ``"train"`` (scVI),
        ``"embed"``, ``"neighbours"`` (an index of made-up embeddings, 5,000 queries, k 50) or
        ``"update"`` (a study of 2,000 cells into a reference of so many cells).
    cells, genes, batches
        Sizes of the simulated stores: each with each.
    store
        Measure on this store, as it is, in place of simulated ones.
    modelled
        Genes that are modelled, of those of a simulated store.
    minibatch_size, epochs, seed, device, threads
        Of loader and training.
    work
        Where simulated stores are made, and kept for the next run; a temporary folder when None.
    progress
        Say on stderr what is being measured.

    Raises
    ------
    ConfigError
        There is no such task, a size below 1, or a store for a task that makes its own.
    InputError
        A measurement failed; the message has the end of what it printed.
    """
    if task not in TASKS:
        raise ConfigError("There is no such task", found=repr(task), expected=", ".join(TASKS))
    for name, values in (("cells", cells), ("genes", genes), ("batches", batches)):
        if not values or min(values) < 1:
            raise ConfigError(f"{name} have to be 1 or more", found=list(values))
    settings: dict[str, Any] = {
        "store": None if store is None else str(store),
        "modelled": modelled,
        "minibatch_size": minibatch_size,
        "epochs": epochs,
        "seed": seed,
        "device": device,
        "threads": threads,
    }
    sizes = list(itertools.product(cells, genes, batches))
    if store is not None:
        if task in ("neighbours", "update"):
            raise ConfigError(
                f"atlas bench {task} makes what it measures on",
                found=f"store {store}",
                do="leave out --store, and give --cells",
            )
        opened = open_store(store)
        sizes = [(opened.n_obs, opened.n_vars, len(opened.batches))]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if work is None else work)
        folder.mkdir(parents=True, exist_ok=True)
        for number, (n_cells, n_genes, n_batches) in enumerate(sizes, 1):
            if progress:
                said = f"{n_cells:,} cells, {n_genes:,} genes, {n_batches} batches"
                print(f"{task} {number}/{len(sizes)}: {said}", file=sys.stderr, flush=True)
            size = {"cells": n_cells, "genes": n_genes, "batches": n_batches}
            rows.append(_measure({"task": task, **settings, **size}, folder, Path(temporary)))
    return BenchReport(task, settings, _machine(), versions(), tuple(rows))


def compare_reports(
    new: BenchReport, old: BenchReport, tolerance: float = TOLERANCE
) -> list[Change]:
    """Rows that both reports have.

    Raises
    ------
    ConfigError
        They are of two tasks, or of other settings, or have no row in common.
    """
    differing = [
        f"{name}: {old.settings.get(name)} then, {value} now"
        for name, value in new.settings.items()
        if old.settings.get(name) != value
    ]
    if new.task != old.task:
        differing.insert(0, f"task: {old.task} then, {new.task} now")
    before = {row.size: row for row in old.rows}
    shared = [row for row in new.rows if row.size in before]
    if differing or not shared:
        raise ConfigError(
            "The two runs of atlas bench cannot be compared",
            found="; ".join(differing) or "no size that both have",
            do="run it with the options of the earlier run",
        )
    return [
        Change(row, ratio := row.rate / before[row.size].rate, ratio < 1 - tolerance)
        for row in shared
    ]


def read_report(path: str | PathLike[str]) -> BenchReport:
    """A report that ``atlas bench --json`` wrote.

    Raises
    ------
    InputError
        The file is none, or of a newer version.
    """
    try:
        told = json.loads(Path(path).read_text())
        if (told["schema"], told["version"]) != (SCHEMA, VERSION):
            raise ValueError(f"{told['schema']} {told['version']}")
        rows = tuple(Row(**row) for row in told["rows"])
        return BenchReport(told["task"], told["settings"], told["machine"], told["versions"], rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "This is no report of atlas bench",
            found=f"{type(error).__name__}: {error}",
            expected=f"JSON of schema {SCHEMA} {VERSION}, as atlas bench --json writes",
            path=Path(path),
        ) from error


def draw_report(report: BenchReport, path: str | PathLike[str]) -> None:
    """Draw rate and peak memory against the size that varies most: .svg, .png or .pdf.

    Raises
    ------
    ConfigError
        Another suffix; :func:`check_plot_path` tells before anything is measured.
    """
    check_plot_path(path)
    names = ("cells", "genes", "batches")
    counts = [len({row.size[i] for row in report.rows}) for i in range(3)]
    along = counts.index(max(counts))
    lines: dict[tuple[int, ...], list[Row]] = {}
    for row in sorted(report.rows, key=lambda row: row.size[along]):
        lines.setdefault(row.size[:along] + row.size[along + 1 :], []).append(row)
    figure = Figure(figsize=(8, 3.4))
    left, right = figure.subplots(1, 2)
    others = [name for i, name in enumerate(names) if i != along]
    for key, rows in lines.items():
        label = ", ".join(f"{n:,} {name}" for n, name in zip(key, others, strict=True))
        x = [row.size[along] for row in rows]
        left.plot(x, [row.rate for row in rows], "o-", label=label)
        right.plot(x, [(row.peak_bytes or 0) / 1e6 for row in rows], "o-", label=label)
    left.set_ylabel(report.rows[0].unit)
    right.set_ylabel("peak memory, MB")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(names[along])
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(f"atlas bench {report.task}")
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(path).suffix.removeprefix("."))
    write_bytes(path, drawn.getvalue())


def check_plot_path(path: str | PathLike[str]) -> None:
    """Refuse a file that a figure cannot be written to."""
    check_suffix(path, get_args(FigureFormat), "a figure")


def _measure(case: dict[str, Any], work: Path, temporary: Path) -> Row:
    answer = temporary / f"answer-{time.monotonic_ns()}.json"
    asked = {**case, "work": str(work.resolve()), "answer": str(answer)}
    done = subprocess.run(
        [sys.executable, "-m", "atlas.workflows.scaling_case"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(
            f"atlas bench {case['task']} failed at {case['cells']:,} cells",
            found=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message",
            do="run with fewer cells, or look at the whole message:\n" + done.stderr[-2000:],
        )
    found = json.loads(answer.read_text())
    known = {"seconds", "rate", "unit", "peak_bytes"}
    return Row(
        **{name: case[name] for name in ("cells", "genes", "batches")},
        **{name: found[name] for name in known},
        more={name: value for name, value in found.items() if name not in known},
    )


def _machine() -> dict[str, Any]:
    names = [
        line.split(":", 1)[1].strip()
        for line in (_lines("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": cores(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": gpu,
        "system": platform.platform(),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
