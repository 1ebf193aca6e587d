"""The command that measures how cost grows."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, get_args

from atlas.cli.applied import add_device
from atlas.config import BenchTask

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}


def sizes(text: str) -> list[int]:
    """``10k,1M`` as numbers."""
    found = [re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", part.strip()) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes such as 10k,100k,1M")
    return [round(float(m[1]) * _UNITS[m[2].lower()]) for m in found if m]


def add_bench(command: Callable[..., Any]) -> None:
    """The command and its options."""
    sub = command("bench", bench, "measure how the cost of a task grows with its size")
    sub.add_argument("task", choices=get_args(BenchTask))
    sub.add_argument("--cells", type=sizes, default="10k,100k", help="of simulated stores")
    sub.add_argument("--genes", type=sizes, default="10k", help="of simulated stores")
    sub.add_argument("--batches", type=sizes, default="4", help="of simulated stores")
    sub.add_argument("--store", help="measure on this store, as it is")
    sub.add_argument("--modelled", type=int, default=2000, help="genes modelled")
    sub.add_argument("--minibatch-size", type=int, default=128)
    sub.add_argument("--epochs", type=int, default=1)
    sub.add_argument("--seed", type=int, default=0)
    add_device(sub)
    sub.add_argument("--threads", type=int, default=0)
    sub.add_argument("--work", metavar="DIR", help="where simulated stores are kept")
    sub.add_argument("--json", metavar="FILE", help="write all that was measured")
    sub.add_argument("--plot", metavar="FILE", help="draw it, as .svg, .png or .pdf")
    sub.add_argument(
        "--against", metavar="FILE", help="an earlier --json; exit code 1 where one is slower"
    )
    sub.add_argument("--tolerance", type=float, default=0.2, help="share it may be slower by")


def bench(options: argparse.Namespace) -> int:
    from atlas import workflows
    from atlas.workflows import scaling

    # what can be refused is, before anything is measured
    old = None if options.against is None else scaling.read_report(options.against)
    if options.plot:
        scaling.check_plot_path(options.plot)
    report = scaling.bench(
        options.task,
        options.cells,
        genes=options.genes,
        batches=options.batches,
        store=options.store,
        modelled=options.modelled,
        minibatch_size=options.minibatch_size,
        epochs=options.epochs,
        seed=options.seed,
        device=options.device,
        threads=options.threads,
        work=options.work,
        progress=True,
    )
    machine = report.machine
    print(f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB")
    print(report)
    if options.json:
        workflows.write_json(options.json, report.to_json())
    if options.plot:
        scaling.draw_report(report, options.plot)
    if old is None:
        return 0
    if old.machine != machine:
        print("the earlier run was on another machine, so ratios say little")
    changes = scaling.compare_reports(report, old, options.tolerance)
    for change in changes:
        said = "  slower" if change.slower else ""
        size = ", ".join(f"{n:,}" for n in change.row.size)
        print(f"{size}: {change.ratio:.2f} of the earlier rate{said}")
    return int(any(change.slower for change in changes))
