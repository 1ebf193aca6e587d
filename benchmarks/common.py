"""What the benchmarks share: machine and versions, tables, JSON, workers with their peak memory.

A *worker* is a function of a benchmark script that runs in a process of its own, so that neither
memory nor threads nor imports of one measurement reach another. It takes and returns plain JSON
values (arrays go through ``.npz`` files) and tells the phases it goes through; for each the harness
knows the memory at its start and its peak. Memory is counted in two ways:

``private``
    Anonymous and shared memory (``RssAnon + RssShmem`` of ``/proc/<pid>/status``), read every few
    milliseconds from outside the worker, so that neither Python's lock nor a busy kernel delays a
    sample. Files that are mapped or cached are left out: the system takes those pages back
    whenever another process wants them, so they are no demand on the machine.
``resident``
    The system's own high-water mark of the resident set (``VmHWM``, what ``getrusage`` gives as
    ``ru_maxrss``), set back at the start of each phase. It misses no peak however short, but counts
    mapped files: pages of shared libraries, and of memory-mapped data.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"

_SAMPLE_SECONDS = 0.004
_PEERS = (
    "torch",
    "numpy",
    "scipy",
    "numba",
    "numcodecs",
    "anndata",
    "zarr",
    "scanpy",
    "scvi-tools",
    "faiss-cpu",
    "faiss-gpu",
    "scikit-learn",
    "pynndescent",
)

Json = dict[str, Any]


# memory of a process


def _status(pid: int | str) -> dict[str, int]:
    """Bytes of the ``Vm…`` and ``Rss…`` lines of ``/proc/<pid>/status``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith(("Vm", "Rss")))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, *_ in fields}


def private_memory(pid: int | str = "self") -> int:
    """Anonymous and shared memory of a process, bytes."""
    status = _status(pid)
    return status["RssAnon"] + status["RssShmem"]


@dataclass(frozen=True)
class Phase:
    """What one phase of a worker took.

    Attributes
    ----------
    name
        As given to :meth:`Phases.begin`.
    seconds, cpu_seconds
        Wall clock, and time on all cores together, which a busy machine changes less.
    private_start, private_peak
        Private memory, bytes.
    resident_start, resident_peak
        Resident set, bytes.
    """

    name: str
    seconds: float
    cpu_seconds: float
    private_start: int
    private_peak: int
    resident_start: int
    resident_peak: int


class Phases:
    """The phases of a worker, told from inside it; one ends where the next begins."""

    def __init__(self) -> None:
        self.records: list[Json] = []
        self.begin("imports")

    def begin(self, name: str) -> None:
        """End the phase before, if any, and begin another."""
        self._end()
        # What Python could free is no part of a baseline.
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        status = _status("self")
        self.records.append(
            {
                "name": name,
                "begin": time.monotonic(),
                "cpu_begin": time.process_time(),
                "private_start": status["RssAnon"] + status["RssShmem"],
                "resident_start": status["VmRSS"],
            }
        )

    def finish(self) -> None:
        """End the last phase."""
        self._end()

    def _end(self) -> None:
        if self.records:
            status = _status("self")
            self.records[-1] |= {
                "end": time.monotonic(),
                "cpu_end": time.process_time(),
                "resident_peak": status["VmHWM"],
                "private_end": status["RssAnon"] + status["RssShmem"],
            }


Work = Callable[[Json, Phases], Json]


@dataclass(frozen=True)
class Outcome:
    """What a worker returned, and what its phases took."""

    result: Json
    phases: dict[str, Phase]

    def peak_above(self, baseline: str, *phases: str, kind: str = "private") -> int:
        """Peak over ``phases`` above the memory at the start of the phase ``baseline``, bytes."""
        peak = max(getattr(self.phases[name], f"{kind}_peak") for name in phases)
        start: int = getattr(self.phases[baseline], f"{kind}_start")
        return peak - start


def run_worker(
    script: str,
    work: str,
    arguments: Json,
    folder: Path,
    python: str = sys.executable,
    before: Sequence[str] = (),
) -> Outcome:
    """Run a function of a benchmark script in a process of its own.

    Parameters
    ----------
    script
        ``__file__`` of the benchmark, whose ``main`` calls :func:`serve_worker`.
    work
        Name of the function there.
    arguments
        Plain JSON values.
    folder
        For the files by which the two processes speak.
    python
        The interpreter; that of a peer's environment where the script needs no more than it has.
    before
        What it is given ahead of the script, such as the module of torchrun and its options. Memory
        is that of the process started so; of several that become the worker the first answers.

    Raises
    ------
    RuntimeError
        The worker failed; its output was printed by it.
    """
    asked, answered = folder / f"{work}.ask.json", folder / f"{work}.answer.json"
    asked.write_text(json.dumps(arguments))
    answered.unlink(missing_ok=True)
    command = [python, *before, script, "--worker", work, str(asked), str(answered)]
    process = subprocess.Popen(command)
    samples: list[tuple[float, int]] = []
    try:
        while process.poll() is None:
            try:
                samples.append((time.monotonic(), private_memory(process.pid)))
            except (KeyError, OSError):  # it is about to end
                continue
            time.sleep(_SAMPLE_SECONDS)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise RuntimeError(f"worker {work} ended with {process.returncode}")
    answer = json.loads(answered.read_text())
    phases = {}
    for record in answer["phases"]:
        seen = [size for at, size in samples if record["begin"] <= at <= record["end"]]
        phases[record["name"]] = Phase(
            name=record["name"],
            seconds=record["end"] - record["begin"],
            cpu_seconds=record["cpu_end"] - record["cpu_begin"],
            private_start=record["private_start"],
            private_peak=max([*seen, record["private_start"], record["private_end"]]),
            resident_start=record["resident_start"],
            resident_peak=record["resident_peak"],
        )
    return Outcome(answer["result"], phases)


def serve_worker(works: Sequence[Work]) -> None:
    """Where the command line asks for a worker, be it, and leave."""
    if len(sys.argv) != 5 or sys.argv[1] != "--worker":
        return
    _, _, name, asked, answered = sys.argv
    phases = Phases()
    result = {work.__name__: work for work in works}[name](
        json.loads(Path(asked).read_text()), phases
    )
    phases.finish()
    if os.environ.get("RANK", "0") != "0":
        sys.exit()
    Path(answered).write_text(json.dumps({"result": result, "phases": phases.records}))
    sys.exit()


# machine, versions, output


def machine() -> Json:
    """Processor, cores, memory, threads and load of this machine."""
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "system": platform.platform(),
        "processor": cpu[0] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "load_at_start": round(os.getloadavg()[0], 1),
    }


def versions() -> Json:
    """Versions of Python, Atlas (with its commit) and the packages that a figure depends on."""
    out = {"python": platform.python_version()}
    for name in ("atlas-trainer", *_PEERS):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "absent"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    out["commit"] = commit.stdout.strip() or "unknown"
    return out


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned so that it reads as plain text too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        for line in [lines[0], rule, *lines[1:]]
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def megabytes(size: float) -> str:
    """A size as text, in units of 10⁶ bytes."""
    return f"{size / 1e6:,.0f} MB"


def say(text: str = "") -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def provenance() -> Json:
    """What every figure must come with: command, time, machine, versions."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": machine(),
        "versions": versions(),
    }


def say_provenance(known: Mapping[str, Any]) -> None:
    """Print what :func:`provenance` found."""
    for part in ("machine", "versions"):
        say(f"{part}: " + ", ".join(f"{name} {value}" for name, value in known[part].items()))


def write_json(path: Path | None, content: Json) -> None:
    """Write the figures of a run, where a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def phases_json(outcome: Outcome) -> list[Json]:
    """All phases of a worker, as plain values."""
    return [asdict(phase) for phase in outcome.phases.values()]


def _folder(path: str) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes; a test")
    parser.add_argument("--work", type=_folder, help="folder for what is made on the way, and kept")
    return parser
