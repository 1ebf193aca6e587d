"""What label transfer comes out as: labels of cells, and figures that go to JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from atlas.config import VoteKernel
from atlas.evaluation.calibration import Fold, UnknownRule
from atlas.evaluation.transfer_score import QueryScore

SCHEMA = "atlas.label_transfer"
VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class TransferredLabels:
    """What :func:`atlas.transfer_labels` found.

    Attributes
    ----------
    table
        The obs columns, by row name, in the order of the store.
    counts
        Cells of each label, ``Unknown`` among them.
    mean_uncertainty, mean_distance
        Over the query cells. A mean distance above 0 is a shift: the query lies farther from the
        reference than the reference's cells from each other.
    n_reference, k, kernel, backend
        Cells that voted, neighbours of each query cell, their weights, and what searched them.
    few_cells
        Labels with fewer than k / 2 cells in the reference, and their number: they hardly win.
    rule, false_unknown
        When a cell is Unknown, and the share that was asked for; None with scArches' rule.
    sets
        Probability with which a set was to hold the label; None without sets.
    folds
        Each study of the reference, labelled by the others; empty without calibration.
    score
        Agreement with the labels that query cells have; None where they have none.
    """

    table: pd.DataFrame
    counts: dict[str, int]
    mean_uncertainty: float
    mean_distance: float
    n_reference: int
    k: int
    kernel: VoteKernel
    backend: str
    few_cells: dict[str, int]
    rule: UnknownRule
    false_unknown: float | None
    sets: float | None
    folds: tuple[Fold, ...]
    score: QueryScore | None

    def to_json(self) -> dict[str, Any]:
        """All but the table as plain JSON values, with schema name and version."""
        score = None
        if self.score is not None:
            confusion = self.score.confusion
            score = asdict(self.score) | {
                "confusion": {
                    "truth": list(confusion.truth),
                    "predicted": list(confusion.predicted),
                    "counts": confusion.counts.tolist(),
                }
            }
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "n_query": len(self.table),
            "n_reference": self.n_reference,
            "k": self.k,
            "kernel": self.kernel,
            "backend": self.backend,
            "counts": self.counts,
            "few_cells": self.few_cells,
            "mean_uncertainty": self.mean_uncertainty,
            "mean_distance": self.mean_distance,
            # a line at infinity is none
            "unknown_above": {
                name.removesuffix("_above"): value if math.isfinite(value) else None
                for name, value in asdict(self.rule).items()
            },
            "false_unknown": self.false_unknown,
            "sets": self.sets,
            "folds": [asdict(fold) for fold in self.folds],
            "score": score,
        }
