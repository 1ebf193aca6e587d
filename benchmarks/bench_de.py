"""Does differential expression find what is there, and nothing else, beside scvi-tools and scanpy?

kang
    ``kang_ifnb_pbmc.h5ad``, donors as batches: stimulated cells against control. Lines of six
    interferon genes in the tables; and halves of one group, of which nothing should be called.
simulated
    Five types in two studies, one of them counted at a third of the depth, by each ``--processes``
    of :func:`atlas.simulate.simulate`: true log2 fold changes between types (of mean shares,
    without batch effects) against estimated ones and Bayes factors, all ten pairs of types.
flipped
    The same cells, labels in the first study only, 0 % or 30 % of two types' labels exchanged there
    (scANVI, Xu et al. 2021, "Hypotheses testing in harmonized datasets"). scVI, ours and theirs,
    labels the second study by 10 neighbours; the scANVI form draws from the classes.

Each seed has its own model, and in the last two questions its own data. The architecture is the
same on all sides, and so are epochs, number of pairs and threshold: a log2 fold change of .25. Both
of a pair are decoded for the same batch (scvi-tools' ``batch_correction``). scanpy is Wilcoxon's
test of log-normalised counts, batches pooled; its genes are called below an adjusted p of .05 with
an estimated fold change beyond .25, and its statistic takes the place of the Bayes factor.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from common import (
    Json,
    Outcome,
    argument_parser,
    phases_json,
    provenance,
    run_worker,
    say,
    say_provenance,
    serve_worker,
    write_json,
)
from de_measures import (
    Estimate,
    Floats,
    Values,
    against_truth,
    figure_table,
    figures_of,
    truth_as_estimate,
)
from de_workers import (
    FLIPPED,
    HALVES,
    INTERFERON,
    N_TYPES,
    RATES,
    UNTOUCHED,
    key_of,
    ours,
    prepare,
    scanpy_wilcoxon,
    scvi_tools,
)

QUESTIONS = ("kang", "simulated", "flipped")
STRONG = 3.0  # |Bayes factor| (scVI, Lopez et al. 2018, Methods 4.3)
OURS, THEIRS, SCANPY, BEST = "ours, scVI", "scvi-tools SCVI", "scanpy Wilcoxon", "the truth"
FULL = {
    "kang": {"n_genes": 2000, "epochs": 50, "share": 1.0},
    "simulated": {"n_genes": 1000, "epochs": 100, "cells": 4000},
    "n_hidden": 128,
    "n_pairs": 5000,
    "resamples": 200,
}
TINY = {
    "kang": {"n_genes": 120, "epochs": 2, "share": 0.08},
    "simulated": {"n_genes": 400, "epochs": 2, "cells": 400},
    "n_hidden": 16,
    "n_pairs": 200,
    "resamples": 5,
}


# what is trained and tested


@dataclass(frozen=True)
class Job:
    """A worker, the model it trains, and its tests (``side``, ``name``, ``kind``, groups)."""

    worker: str
    options: Json
    tests: list[Json]


def _tests(side: str, kind: str, groups: list[tuple[str, str, str, str]]) -> list[Json]:
    return [
        {"side": side, "kind": kind, "name": name, "column": column, "one": one, "other": other}
        for name, column, one, other in groups
    ]


def jobs(question: str) -> Iterator[Job]:
    """All jobs of a question, for one seed; scanpy after our scVI, whose labels it takes."""
    scvi: Json = {"model": "scvi"}
    if question == "flipped":
        groups = [
            (f"{what}, {rate} %", f"given {rate}", *pair)
            for rate in RATES
            for what, pair in (("flipped", FLIPPED), ("untouched", UNTOUCHED))
        ]
        theirs = _tests(THEIRS, "neighbours", groups)
        theirs += _tests("scvi-tools SCANVI, its labels", "predicted", groups)
        yield Job("scvi_tools", {}, theirs)
        yield Job("ours", scvi, _tests(OURS, "neighbours", groups))
        for rate in RATES:
            mine = [group for group in groups if group[1] == f"given {rate}"]
            for training in ("alternating", "joint"):
                side = f"ours, scANVI, {training}"
                options = {"model": "scanvi", "training": training, "label_key": f"given {rate}"}
                tests = _tests(f"{side}, scANVI form", "classes", mine)
                tests += _tests(f"{side}, its labels", "predicted", mine)
                yield Job("ours", options, tests)
        yield Job("scanpy_wilcoxon", {}, _tests(SCANPY, "neighbours", groups))
        return
    if question == "kang":
        groups = [("stim against ctrl", "batch", "stim", "ctrl")]
        groups += [(name, name, "a", "b") for name in HALVES.values()]
    else:
        pairs = combinations([f"type_{i + 1}" for i in range(N_TYPES)], 2)
        groups = [(f"{one} {other}", "true_type", one, other) for one, other in pairs]
    yield Job("scvi_tools", {}, _tests(THEIRS, "cells", groups))
    yield Job("ours", scvi, _tests(OURS, "cells", groups))
    yield Job("scanpy_wilcoxon", {}, _tests(SCANPY, "cells", groups))


def kang_values(estimate: Estimate, name: str, genes: list[str], model: bool) -> dict[str, Floats]:
    """Lines of the interferon genes, or how much is called between halves of a group."""
    if name in HALVES.values():
        found = {"genes called": float(estimate.called.sum())}
        if model:
            found["genes with |Bayes factor| > 3"] = float((np.abs(estimate.k) > STRONG).sum())
            found["largest |Bayes factor|"] = float(np.abs(estimate.k).max())
        found["largest |LFC|"] = float(np.abs(estimate.lfc).max())
    else:
        rows = [genes.index(gene) for gene in INTERFERON]
        found = {f"line of {g}": float(estimate.rank[genes.index(g)]) for g in INTERFERON}
        found["last line of the six"] = float(estimate.rank[rows].max())
        found["last line of the six, Bayes factor"] = float(estimate.rank_k[rows].max())
        found["genes called"] = float(estimate.called.sum())
    return {measure: np.array([value]) for measure, value in found.items()}


def run_seed(common: Json, question: str, runs: dict[str, list[Outcome]]) -> dict[str, Estimate]:
    """All jobs of one seed; estimates by side and test."""
    folder = Path(common["folder"])
    found: dict[str, Estimate] = {}
    for i, job in enumerate(jobs(question)):
        out = f"{i}-{common['seed']}"
        asked = {"out": out, "options": job.options, "tests": job.tests}
        outcome = run_worker(__file__, job.worker, common | asked, folder)
        runs.setdefault(" ".join([job.worker, *map(str, job.options.values())]), []).append(outcome)
        with np.load(folder / f"{out}.npz") as arrays:
            found |= {key_of(test): Estimate.load(arrays, key_of(test)) for test in job.tests}
    return found


def add_values(values: Values, found: dict[str, Estimate], common: Json, question: str) -> None:
    """Measures of one seed, to those of the seeds before."""
    cells = np.load(Path(common["folder"]) / "cells.npz")
    seed = common["seed"]
    cases: dict[tuple[str, str], list[tuple[Floats, Estimate]]] = {}
    for key, estimate in found.items():
        side, _, name = key.partition("|")
        if question == "kang":
            new = kang_values(estimate, name, cells["genes"].tolist(), side != SCANPY)
            _add(values, name, side, new)
            continue
        pair = name
        case = common["process"]
        if question == "flipped":
            pair, case = " ".join(FLIPPED if "flipped" in name else UNTOUCHED), f"{case}, {name}"
        cases.setdefault((case, side), []).append((cells[pair], estimate))
    rng = np.random.default_rng(0)
    for (case, side), pairs in list(cases.items()):
        if side == OURS:
            cases[case, BEST] = [(truth, truth_as_estimate(truth, rng)) for truth, _ in pairs]
    for (case, side), pairs in cases.items():
        _add(values, case, side, against_truth(pairs, common["resamples"], seed))


def add_losses(values: Values) -> None:
    """What the flips cost: the cases with them less those without, as cases of their own."""
    for case, sides in list(values.items()):
        if not case.endswith(f", {RATES[1]} %"):
            continue
        without = values[case.removesuffix(f"{RATES[1]} %") + f"{RATES[0]} %"]
        for side, own in sides.items():
            for measure, flipped in own.items():
                before = without[side][measure]
                for one, other in zip(flipped, before, strict=True):
                    _add(values, f"{case} less {RATES[0]} %", side, {measure: one - other})


def _add(values: Values, case: str, side: str, new: dict[str, Floats]) -> None:
    for measure, value in new.items():
        own = values.setdefault(case, {}).setdefault(side, {})
        own.setdefault(measure, []).append(value)


def main() -> None:
    serve_worker([prepare, ours, scvi_tools, scanpy_wilcoxon])
    parser = argument_parser("Differential expression beside scvi-tools and scanpy")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--processes", nargs="+", choices=("zinb", "umi"), default=["zinb", "umi"])
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--epochs", type=int, help="passes over the cells")
    args = parser.parse_args()
    seeds = args.seeds or ([0] if args.tiny else [0, 1, 2])
    settings: Json = TINY if args.tiny else FULL
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    results: list[Json] = []
    for question in args.questions:
        own = settings["kang" if question == "kang" else "simulated"]
        own = own | {name: settings[name] for name in ("n_hidden", "n_pairs", "resamples")}
        if args.epochs:
            own["epochs"] = args.epochs
        values: Values = {}
        runs: dict[str, list[Outcome]] = {}
        cells: list[Json] = []
        for process in ["none"] if question == "kang" else args.processes:
            for seed in seeds:
                with tempfile.TemporaryDirectory(prefix="bench-de-", dir=args.work) as temporary:
                    common = {"folder": temporary, "question": question, "process": process}
                    common |= own | {"seed": seed}
                    made = run_worker(__file__, "prepare", common, Path(temporary))
                    say(f"{question}, {process}, seed {seed}: {made.result}")
                    cells.append({"process": process, "seed": seed, **made.result})
                    add_values(values, run_seed(common, question, runs), common, question)
        add_losses(values)
        found = figures_of(values, THEIRS)
        say("\n" + figure_table(found) + "\n")
        for name, outcomes in runs.items():
            seconds = {
                phase: np.mean([o.phases[phase].seconds for o in outcomes])
                for phase in outcomes[0].phases
            }
            say(
                name
                + ": "
                + ", ".join(f"{phase} {value:.0f} s" for phase, value in seconds.items())
            )
        results.append(
            {
                "question": question,
                "settings": own,
                "cells": cells,
                "figures": [asdict(figure) for figure in found],
                "runs": {name: [phases_json(o) for o in own] for name, own in runs.items()},
            }
        )
    content = {
        "benchmark": "de",
        **known,
        "seeds": seeds,
        "results": results,
        "seconds": time.monotonic() - started,
    }
    write_json(args.json, content)


if __name__ == "__main__":
    main()
