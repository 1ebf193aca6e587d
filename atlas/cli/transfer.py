"""The command that transfers labels: its options, and what it prints."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, get_args

from atlas.config import VoteKernel

Command = Callable[[str, Callable[[argparse.Namespace], int | None], str], Any]


def add_command(command: Command) -> None:
    """Add the command to the parser."""
    sub = command(
        "transfer-labels",
        transfer_labels,
        "label query cells by their neighbours in a reference, as obs columns of the store",
    )
    sub.add_argument("store")
    sub.add_argument("--embedding", required=True, help="in which reference and query lie")
    voting = sub.add_mutually_exclusive_group(required=True)
    voting.add_argument(
        "--reference", metavar="CELLS", help="whose labels vote: column=value,value"
    )
    voting.add_argument(
        "--package", metavar="DIR", help="a reference that was fetched, in place of cells here"
    )
    sub.add_argument("--query", metavar="CELLS", help="all other cells if not given")
    sub.add_argument("--name", default="transferred", help="of the columns")
    sub.add_argument("--k", type=int, default=50, help="neighbours that vote")
    sub.add_argument(
        "--kernel",
        choices=get_args(VoteKernel),
        default="gaussian",
        help="their weights by distance; scarches: as published",
    )
    sub.add_argument(
        "--false-unknown",
        type=float,
        metavar="SHARE",
        help="call so many cells of known types Unknown at most, by leaving studies out of the "
        "reference; Unknown is an uncertainty above .5 if not given",
    )
    sub.add_argument(
        "--sets",
        type=float,
        metavar="LEVEL",
        help="also a set of labels for each cell that holds its label with this probability",
    )
    sub.add_argument(
        "--per-label", action="store_true", help="draw the line of the sets for each label apart"
    )
    sub.add_argument(
        "--calibrate-by", default="study", metavar="COLUMN", help="what to leave out in turn"
    )
    sub.add_argument(
        "--misfit",
        action="store_true",
        help="also tell how unlike the reference cells that they lie among cells are in counts",
    )
    sub.add_argument(
        "--hierarchy",
        metavar="FILE",
        help="the parent of each label; JSON, or a table whose first line is child,parent",
    )
    sub.add_argument("--label-key", help="obs column of the labels; else the store's own")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--json", metavar="FILE", help="write all figures as JSON")


def transfer_labels(options: argparse.Namespace) -> None:
    from atlas import load_package, open_store, workflows

    store = open_store(options.store)
    others = ("run", "store", "json", "package")
    chosen = {name: value for name, value in vars(options).items() if name not in others}
    if options.package is not None:
        chosen["reference"] = load_package(options.package)
    found = workflows.transfer_labels(store, **chosen)
    for name, n in sorted(found.counts.items(), key=lambda item: -item[1]):
        print(f"  {name:<40} {n:>12,} cells")
    print(
        f"{len(found.table):,} cells labelled by {found.n_reference:,}; mean uncertainty "
        f"{found.mean_uncertainty:.3f}, mean distance {found.mean_distance:+.2f}"
    )
    line = found.rule.distance_above
    print(
        f"Unknown above an uncertainty of {found.rule.uncertainty_above:.3f}"
        + (f", or a distance of {line:.2f}" if math.isfinite(line) else "")
    )
    for fold in found.folds:
        told = {
            "right": fold.accuracy,
            "answered": fold.answered,
            "right of these": fold.answered_accuracy,
            "label in the set": fold.covered,
        }
        said = [f"{value:.1%} {name}" for name, value in told.items() if value is not None]
        if fold.mean_set_size is not None:
            said.append(f"{fold.mean_set_size:.2f} labels in it")
        if fold.unseen_unknown is not None:
            said.append(f"{fold.unseen_unknown:.1%} of {fold.n_unseen:,} of no other study Unknown")
        print(f"left out {fold.name}: {fold.n_known:,} cells, " + ", ".join(said))
    if found.few_cells:
        few = ", ".join(f"{name} ({n})" for name, n in found.few_cells.items())
        print(f"fewer cells than half of k = {found.k}, so hardly ever given: {few}")
    if found.score is not None:
        _print_score(found.score)
    print(f"obs columns {', '.join(found.table.columns)}; manifest {store.number}")
    if options.json:
        workflows.write_json(options.json, found.to_json())


def _print_score(score: Any) -> None:
    if score.accuracy is not None:
        made = score.accuracy
        print(
            f"{score.n_known:,} query cells have a label of the reference: "
            f"{made.accuracy:.1%} ± {made.accuracy_error:.1%} right, mean over labels "
            f"{made.weighted_accuracy:.1%}, {score.false_unknown:.1%} Unknown"
            + (f"; {score.covered:.1%} in the set" if score.covered is not None else "")
        )
    if score.n_unseen:
        said = f"{score.n_unseen:,} have another ({', '.join(score.unseen_labels)}): "
        said += f"{score.unseen_unknown:.1%} Unknown"
        if score.distance_auroc is not None:
            said += f"; AUROC {score.distance_auroc:.3f} of the distance"
            said += f", {score.uncertainty_auroc:.3f} of the uncertainty"
        if score.misfit_auroc is not None:
            said += f", {score.misfit_auroc:.3f} of the misfit"
        print(said)
