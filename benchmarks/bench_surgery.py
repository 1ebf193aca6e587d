"""Studies mapped onto a reference by surgery, beside scvi-tools' on the same cells.

``pbmc_4batch_3study.h5ad``: Zheng's and the pbmc3k cells are the reference; Kang's control and
stimulated cells are the query. Both train scVI of the same architecture on the reference, each for
itself, then map: scvi-tools by ``load_query_data`` and 50 epochs without weight decay, as its
documentation says, Atlas by ``atlas.extend_reference``. Genes are chosen over all four batches, as
for the figures of the peer that are known.

mapping
    the query at once, or control first and then stimulated cells, each condition a batch;
strategies
    the three granularities of scArches (Lotfollahi et al. 2022, Figure 2a-e), with all else as
    there: random rows, 50 epochs, nothing kept apart;
study
    both of Kang's conditions are one batch, so that no weight can tell them apart;
sizes
    a part of the query alone (as Figure 2f-g), drawn anew with each seed.

Measures:

accuracy, weighted accuracy
    of labels carried from the reference to the query by the majority of 50 neighbours;
entropy
    of reference and control among 50 neighbours, stimulated cells left out, nats;
apart
    share of cells of the same condition among 15 neighbours of Kang's CD14 monocytes: what is left
    of the response to interferon, which no batch effect is (in the query's own principal
    components it is .999);
purity
    of 15 neighbours within each condition, beside its own ten principal components, all cells.

Means over seeds; differences to the first side are paired by cell. The interval is that of the mean
over cells, normal, 95 %, with the error of one seed: that of the cells, not of the training.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import figure_table
from common import (
    DATA,
    Json,
    argument_parser,
    phases_json,
    provenance,
    run_worker,
    say,
    say_provenance,
    serve_worker,
    write_json,
)
from surgery_measures import cell_values, figures
from surgery_workers import (
    QUERY,
    ours,
    ours_reference,
    peer,
    peer_reference,
    prepare,
    sample_query,
)

FILE = DATA / "pbmc_4batch_3study.h5ad"
FULL = {"n_genes": 2000, "n_hidden": 128, "epochs": 50, "share": 1.0}
TINY = {"n_genes": 150, "n_hidden": 16, "epochs": 2, "share": 0.1}


@dataclass(frozen=True)
class Side:
    """One way to map the query.

    Attributes
    ----------
    name
        For the table.
    worker
        ``"ours"`` or ``"peer"``.
    steps
        Studies that are mapped at once, step after step; none trains on all cells instead.
    options
        Of :func:`atlas.extend_reference`.
    apart_from
        Its ``apart_from``, from the step on at which these studies are known.
    """

    name: str
    worker: str
    steps: tuple[tuple[str, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    apart_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What is asked of which sides: the key of the batches, and the part of the query."""

    name: str
    sides: list[Side]
    key: str = "batch"
    query_share: float = 1.0


AT_ONCE, IN_TURN = (QUERY,), tuple((name,) for name in QUERY)
STUDY = (("kang",),)
PAPER = {"initialisation": "random", "keep_apart": 0.0, "lr": 1e-3, "max_epochs": 50}
PEER, OURS = Side("scvi-tools", "peer", AT_ONCE), Side("ours", "ours", AT_ONCE)
QUESTIONS = {
    "mapping": [
        Question(
            "mapping",
            [
                PEER,
                Side("scvi-tools, in turn", "peer", IN_TURN),
                OURS,
                Side("ours, in turn", "ours", IN_TURN),
                Side("ours, in turn, apart", "ours", IN_TURN, apart_from=QUERY[:1]),
                Side("ours, not kept apart", "ours", AT_ONCE, {"keep_apart": 0.0}),
                Side("ours, trained on all", "ours", ()),
            ],
        )
    ],
    "strategies": [
        Question(
            "strategies",
            [
                Side(name, "ours", AT_ONCE, PAPER | {"strategy": name})
                for name in ("conditions", "input_layers", "all")
            ],
        )
    ],
    "study": [
        Question(
            "study",
            [
                Side("scvi-tools", "peer", STUDY),
                Side("ours", "ours", STUDY),
                Side("ours, trained on all", "ours", ()),
            ],
            key="study",
        )
    ],
    "sizes": [
        Question(f"{share:.0%} of the query", [PEER, OURS], query_share=share)
        for share in (0.02, 0.1, 0.3, 1.0)
    ],
}


def ask(question: Question, seeds: list[int], common: Json, folder: Path) -> Json:
    """Make what is missing of the references, run all sides, print the table."""
    samples = {}
    for seed in seeds:
        samples[seed] = f"query-{question.key}-{question.query_share}-{seed}"
        more = {"seed": seed, "sample": samples[seed], "key": question.key}
        more["query_share"] = question.query_share
        if not (folder / f"{samples[seed]}.npy").exists():
            run_worker(__file__, "sample_query", common | more, folder)
    runs: dict[str, list[Any]] = {}
    values: dict[str, list[dict[str, np.ndarray]]] = {}
    for side in question.sides:
        for seed in seeds:
            reference = f"{side.worker}-reference-{question.key}-{seed}"
            asked = common | {"seed": seed, "key": question.key}
            if side.steps and not (folder / reference).exists():
                worker = f"{side.worker}_reference"
                run_worker(__file__, worker, asked | {"out": reference}, folder)
            out = f"{question.name}-{side.name}-{seed}".replace(" ", "_")
            asked |= {"sample": samples[seed], "reference": reference, "out": out}
            asked |= {"steps": side.steps, "options": side.options, "apart_from": side.apart_from}
            runs.setdefault(side.name, []).append(run_worker(__file__, side.worker, asked, folder))
            rows = np.load(folder / f"{samples[seed]}.npy")
            values.setdefault(side.name, []).append(cell_values(folder, out, rows))
    found = figures(values)
    seconds = {
        name: float(np.mean([run.phases["map"].seconds for run in own]))
        for name, own in runs.items()
    }
    say(f"\n{question.name}")
    say(figure_table(found, seconds))
    trained = {name: own[0].result.get("trained") for name, own in runs.items()}
    if any(trained.values()):
        told = ", ".join(f"{name} {n:,}" for name, n in trained.items() if n)
        say(f"parameters trained: {told}")
    return {
        "question": question.name,
        "key": question.key,
        "query_share": question.query_share,
        "figures": [asdict(figure) for figure in found],
        "trained": trained,
        "runs": {name: [phases_json(run) for run in own] for name, own in runs.items()},
    }


def main() -> None:
    serve_worker([prepare, sample_query, ours_reference, ours, peer_reference, peer])
    parser = argument_parser("Surgery beside scvi-tools' on the same cells")
    parser.add_argument("--questions", nargs="+", choices=tuple(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    args = parser.parse_args()
    seeds = args.seeds or ([0] if args.tiny else [0, 1, 2])
    settings = dict(TINY if args.tiny else FULL)
    known = provenance()
    say_provenance(known)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-surgery-", dir=args.work) as temporary:
        folder = Path(temporary)
        common = {"folder": str(folder), "source": str(FILE), "tiny": args.tiny, **settings}
        made = run_worker(__file__, "prepare", common, folder)
        say(f"\n{made.result}")
        content = {
            "benchmark": "surgery",
            **known,
            "settings": settings | {"seeds": seeds},
            "cells": made.result,
            "questions": [],
        }
        for name in args.questions:
            # a hundredth of a tiny query has no monocytes
            for question in QUESTIONS[name][-2 if args.tiny else 0 :]:
                content["questions"].append(ask(question, seeds, common, folder))
                content["seconds"] = time.monotonic() - started
                write_json(args.json, content)


if __name__ == "__main__":
    main()
