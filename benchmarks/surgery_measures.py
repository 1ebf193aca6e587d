"""What ``bench_surgery.py`` asks of each cell, and the figures of a side beside the first one's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from bench_models import Figure
from bench_quality import NORMAL_95, mean_and_error
from surgery_workers import QUERY

MONOCYTES = "CD14 Mono"
K, FEW = 50, 15
MEASURES = ("accuracy", "weighted accuracy", "entropy", "apart", "purity")


def cell_values(folder: Path, out: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """By measure the value of each cell that it looks at.

    Parameters
    ----------
    folder, out
        The embedding is ``out.npz``.
    rows
        Its cells, as lines of ``cells.npz``.
    """
    from atlas.evaluation.labels import majority_vote
    from atlas.evaluation.mixing import batch_entropies
    from atlas.evaluation.neighbours import nearest
    from atlas.evaluation.purity import overlap

    cells, made = np.load(folder / "cells.npz"), np.load(folder / f"{out}.npz")
    batch, label, own = (cells[key][rows] for key in ("batch", "label", "own"))
    place = {name: i for i, name in enumerate(made["name"])}
    z = made["z"][[place[name] for name in cells["name"][rows]]]
    of_query, known = np.isin(batch, QUERY), label != ""
    voting = np.flatnonzero(~of_query & known)
    names, codes = np.unique(label[voting], return_inverse=True)
    asked = np.flatnonzero(of_query & np.isin(label, names))
    near = nearest(z[voting], z[asked], min(K, len(voting)))
    found = names[majority_vote(codes[near.indices], len(names)).codes]
    control = np.flatnonzero(batch != QUERY[1])
    mixed = nearest(z[control], z[control], min(K, len(control) - 1), np.arange(len(control)))
    side = of_query[control].astype(np.int64)
    mono = np.flatnonzero(of_query & (label == MONOCYTES))
    mates = nearest(z[mono], z[mono], min(FEW, len(mono) - 1), np.arange(len(mono)))
    pure = np.zeros(len(rows))
    for name in np.unique(batch):
        inside = np.flatnonzero(batch == name)
        k, themselves = min(FEW, len(inside) - 1), np.arange(len(inside))
        pure[inside] = overlap(*(nearest(x[inside], x[inside], k, themselves) for x in (z, own)))
    return {
        "accuracy": (found == label[asked]).astype(np.float64),
        "entropy": batch_entropies(mixed.indices, side, 2),
        "apart": (batch[mono][mates.indices] == batch[mono][:, None]).mean(axis=1),
        "purity": pure,
        "truth": label[asked],
    }


def figures(values: dict[str, list[dict[str, np.ndarray]]]) -> list[Figure]:
    """All measures of all sides, beside the first side's.

    Parameters
    ----------
    values
        :func:`cell_values` by side, one of each seed. The cells of a seed are the same for all
        sides; those of two seeds may be others.
    """
    baseline = next(iter(values))
    out = []
    for name in MEASURES:
        key = name.removeprefix("weighted ")
        for side, runs in values.items():
            by_seed, errors, differences, spreads = [], [], [], []
            for run, other in zip(runs, values[baseline], strict=True):
                group = run["truth"] if name != key else None
                value, error = mean_and_error(run[key], group)
                by_seed.append(value)
                errors.append(error)
                difference, spread = mean_and_error(run[key] - other[key], group)
                differences.append(difference)
                spreads.append(spread)
            between, spread = float(np.mean(differences)), float(np.mean(spreads))
            first = side == baseline
            out.append(
                Figure(
                    side,
                    name,
                    float(np.mean(by_seed)),
                    float(np.mean(errors)),
                    by_seed,
                    None if first else between,
                    None if first else between - NORMAL_95 * spread,
                    None if first else between + NORMAL_95 * spread,
                )
            )
    return out
