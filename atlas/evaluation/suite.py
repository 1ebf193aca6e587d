"""The measures of one embedding by family, as estimates on one sample of cells.

A measure that the data cannot give is a result without an estimate and with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError
from atlas.evaluation import kbet, lisi, mixing
from atlas.evaluation.bras import bras
from atlas.evaluation.catalogue import Result, kind
from atlas.evaluation.cells import (
    GRAPH_K,
    KBET_K,
    LISI_K,
    Cells,
    by_group,
    by_label,
    unasked,
)
from atlas.evaluation.connectivity import LabelGraphs
from atlas.evaluation.estimates import (
    Estimate,
    GroupMeans,
    Mask,
    Sample,
    mean,
    mean_of,
    mean_of_groups,
    median,
)
from atlas.evaluation.neighbours import EXACT, Neighbours
from atlas.evaluation.regression import explained_variance, pcr_comparison
from atlas.evaluation.silhouette import (
    batch_silhouettes,
    isolated_labels,
    label_silhouettes,
)
from atlas.evaluation.vectors import Embedding

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def mixing_results(cells: Cells, ks: Sequence[int]) -> tuple[list[Result], list[Result]]:
    """Entropy of batch mixing for each k, plain and reweighted by batch and label too."""
    names = (
        "mixing_entropy",
        "mixing_entropy_bits",
        "mixing_share_of_log_b",
        "mixing_share_of_ceiling",
        "mixing_reweighted",
    )
    results: list[Result] = []
    groups: list[Result] = []
    present = cells.batches.present()
    n = len(cells.embedding)
    for k in ks:
        reason = None
        if len(present) < 2:
            reason = "there is only one batch"
        elif k >= n:
            reason = f"{k} neighbours need at least {k + 1} cells, and there are {n}"
        if reason is not None or cells.neighbours is None:
            results += [Result(kind(name, k), None, k, skipped=reason) for name in names]
            continue
        found = cells.neighbours.first(k)
        codes = np.searchsorted(present, cells.batches.codes)
        sizes = cells.batches.counts()[present]
        entropies = mixing.batch_entropies(found.indices, codes, len(present))
        even = mixing.reweighted_entropies(found.indices, codes, sizes)
        shares = even / math.log(len(present))
        entropy = mean(entropies, cells.sample)
        ceiling = mixing.permutation_ceiling(sizes, k)
        estimates = (
            entropy,
            entropy.scaled(1 / math.log(2)),
            entropy.scaled(1 / math.log(len(present))),
            entropy.scaled(1 / ceiling) if ceiling else None,
            mean(shares, cells.sample),
        )
        made = [
            Result(
                kind(name, k),
                estimate,
                k,
                found.backend,
                found.recall,
                "batches are too small to mix" if estimate is None else None,
            )
            for name, estimate in zip(names, estimates, strict=True)
        ]
        results += made
        for values, result in ((entropies, made[0]), (shares, made[-1])):
            groups += by_group(values, cells.sample, cells, result, batches=True, labels=True)
    return results, groups


def lisi_results(cells: Cells) -> tuple[list[Result], list[Result]]:
    """iLISI and cLISI."""
    ilisi, groups = _ilisi(cells)
    clisi, more = _clisi(cells)
    return [ilisi, clisi], [*groups, *more]


def _ilisi(cells: Cells) -> tuple[Result, list[Result]]:
    k, n_batches = LISI_K, len(cells.batches.present())
    if n_batches < 2:
        return Result(kind("ilisi"), None, k, skipped="there is only one batch"), []
    if cells.neighbours is None or cells.neighbours.k < k:
        why = f"{k} neighbours need at least {k + 1} cells"
        return Result(kind("ilisi"), None, k, skipped=why), []
    found = cells.neighbours.first(k)
    codes = np.searchsorted(cells.batches.present(), cells.batches.codes)
    values = lisi.lisi(found.distances, codes[found.indices], n_batches)
    scale = 1 / (n_batches - 1)
    return _median_results(cells, "ilisi", values, cells.sample, found, scale, -scale)


def _clisi(cells: Cells) -> tuple[Result, list[Result]]:
    k, name = LISI_K, kind("clisi")
    if not cells.has_labels:
        return Result(name, None, k, skipped="no cell has a label"), []
    assert cells.labels is not None
    present = cells.labels.present()
    if len(present) < 2:
        return Result(name, None, k, skipped="there is only one label"), []
    near = cells.labeled_neighbours
    if near is None or near.k < k:
        why = f"{k} neighbours need at least {k + 1} labeled cells"
        return Result(name, None, k, skipped=why), []
    near = near.first(k)
    codes = np.searchsorted(present, cells.labels.codes)
    values = lisi.lisi(near.distances, codes[near.indices], len(present))
    scale = 1 / (len(present) - 1)
    return _median_results(
        cells, "clisi", values, cells.labeled, near, -scale, len(present) * scale
    )


def _median_results(
    cells: Cells,
    name: str,
    values: Floats,
    sample: Sample,
    found: Neighbours,
    scale: float,
    offset: float,
) -> tuple[Result, list[Result]]:
    """Scaled medians of all cells, and of each batch and label."""

    def figure(values: Floats, sample: Sample, about: Mask | None = None) -> Estimate:
        return median(values, sample, about).scaled(scale, offset)

    result = Result(kind(name), figure(values, sample), found.k, found.backend, found.recall)
    return result, list(
        by_group(values, sample, cells, result, batches=True, labels=True, figure=figure)
    )


def kbet_results(cells: Cells) -> tuple[list[Result], list[Result]]:
    """kBET among all cells, and within labels."""
    present = cells.batches.present()
    k, name = KBET_K, kind("kbet")
    if len(present) < 2:
        why = "there is only one batch"
        return [Result(kind(n), None, skipped=why) for n in ("kbet", "kbet_by_label")], []
    results: list[Result] = []
    groups: list[Result] = []
    if cells.neighbours is None or cells.neighbours.k < k:
        why = f"{k} neighbours need at least {k + 1} cells"
        results.append(Result(name, None, k, skipped=why))
    else:
        found = cells.neighbours.first(k)
        codes = np.searchsorted(present, cells.batches.codes)
        try:
            p = kbet.p_values(
                found.indices, cells.sample.rows, codes, cells.batches.counts()[present]
            )
        except ConfigError:
            why = f"less than one cell of the smallest batch is expected among {k + 1}"
            results.append(Result(name, None, k, skipped=why))
        else:
            accepted = (p >= kbet.ALPHA).astype(np.float64)
            estimate = mean(accepted, cells.sample, share=True)
            results.append(Result(name, estimate, k, found.backend, found.recall))
            groups += by_group(accepted, cells.sample, cells, results[0], batches=True, labels=True)
    within = kind("kbet_by_label")
    if not cells.has_labels:
        return [*results, Result(within, None, skipped="no cell has a label")], groups
    assert cells.labels is not None
    tested = kbet.acceptance_by_label(cells.embedding, cells.labels, cells.batches, seed=cells.seed)
    for label in tested:
        of = f"label {cells.labels.names[label.label]}"
        told = Result(within, label.acceptance, None, "numpy", EXACT, label.skipped, of)
        groups.append(told)
    estimates = [label.acceptance for label in tested if label.acceptance is not None]
    if not estimates:
        why = "no label has enough cells in each of several batches"
        return [*results, Result(within, None, skipped=why)], groups
    return [*results, Result(within, mean_of(estimates), None, "numpy", EXACT)], groups


def graph_results(cells: Cells) -> tuple[list[Result], list[Result]]:
    """Graph connectivity; of many cells block by block, by an index where exact search is long."""
    n, name = len(cells.embedding), kind("graph_connectivity")
    reason = None
    if not cells.has_labels:
        reason = "no cell has a label"
    elif n <= GRAPH_K:
        reason = f"{GRAPH_K} neighbours need at least {GRAPH_K + 1} cells, and there are {n}"
    elif n > cells.graph_cells:
        most = f"{cells.graph_cells:,} (graph_cells)"
        reason = f"it needs the neighbours of all cells, and there are more than {most}"
    if reason is not None:
        return [Result(name, None, GRAPH_K, skipped=reason)], []
    assert cells.labels is not None
    labeled = cells.labeled_rows
    graphs = LabelGraphs(cells.labels, GRAPH_K)
    for rows, found in cells.neighbours_of_all(labeled, GRAPH_K):
        graphs.add(rows, found)
    inside = graphs.in_largest_part()
    codes, sizes = cells.labels.present(), cells.labels.counts()
    shares = (np.bincount(cells.labels.codes[inside], minlength=len(sizes)) / sizes.clip(1))[codes]
    sample = cells.many_labeled
    own = np.searchsorted(codes, cells.labels.codes[sample.rows])
    means = GroupMeans(shares, sizes[codes], own, inside[sample.rows] - shares[own], sample)
    result = Result(name, means.mean(), GRAPH_K, found.backend, found.recall)
    return [result], list(by_label(means, codes, cells, result, "it has no cell"))


def silhouette_results(cells: Cells) -> tuple[list[Result], list[Result]]:
    """Silhouettes of labels, of isolated labels, of batches within labels, and BRAS."""
    names = ("silhouette_label", "silhouette_batch", "isolated_labels", "bras")
    if not cells.has_labels:
        return [Result(kind(n), None, skipped="no cell has a label") for n in names], []
    assert cells.labels is not None
    sample, own = cells.labeled, cells.labels.codes[cells.labeled.rows]
    results: list[Result] = []
    groups: list[Result] = []
    apart = "no label has several cells in two batches or more"
    try:
        values = (label_silhouettes(cells.embedding, cells.labels, sample) + 1) / 2
    except ConfigError:
        why = "it needs two labels or more, with several cells each"
        results += [Result(kind(names[0]), None, skipped=why)]
        isolated = Result(kind(names[2]), None, skipped=why)
    else:
        result = Result(kind(names[0]), mean(values, sample), backend="torch")
        results.append(result)
        groups += by_group(values, sample, cells, result, batches=False, labels=True)
        isolated = _isolated(cells, values, sample, names[2])
    batch = batch_silhouettes(cells.embedding, cells.labels, cells.batches, sample)
    told = _within_labels(batch, own, sample, names[1], "torch", apart)
    note = unasked(cells.labels, cells.labeled_rows, sample.rows, "label")
    results.append(replace(told, note=note))
    without = "it lies in one batch, or each of its cells in another"
    groups += by_group(batch, sample, cells, told, batches=True, labels=True, without=without)
    results.append(isolated)
    codes, means = bras(cells.embedding, cells.labels, cells.batches, cells.many_labeled)
    if not len(codes):
        return [*results, Result(kind(names[3]), None, skipped=apart)], groups
    result = Result(kind(names[3]), means.mean(), backend="closed form")
    return [*results, result], [*groups, *by_label(means, codes, cells, result, without)]


def _isolated(cells: Cells, values: Floats, sample: Sample, name: str) -> Result:
    """The silhouettes of isolated labels, each label counting alike."""
    assert cells.labels is not None
    codes = isolated_labels(cells.labels, cells.batches)
    own = cells.labels.codes[sample.rows]
    rare = np.isin(own, codes)
    if not rare.any():
        return Result(kind(name), None, skipped="no cell of an isolated label was asked")
    estimate = mean_of_groups(values, np.where(rare, own, -1), sample)
    theirs = cells.labeled_rows[np.isin(cells.labels.codes[cells.labeled_rows], codes)]
    note = unasked(cells.labels, theirs, sample.rows, "label")
    return Result(kind(name), estimate, backend="torch", note=note)


def _within_labels(
    values: Floats, own: Indices, sample: Sample, name: str, backend: str, reason: str
) -> Result:
    defined = np.isfinite(values)
    if not defined.any():
        return Result(kind(name), None, skipped=reason)
    estimate = mean_of_groups(np.nan_to_num(values), np.where(defined, own, -1), sample)
    return Result(kind(name), estimate, backend=backend)


def variance_results(cells: Cells, before: Embedding | None) -> list[Result]:
    """Variance between batches, and what integration took of it."""
    names = ("pcr_batch",) if before is None else ("pcr_batch", "pcr_comparison")
    if len(cells.batches.present()) < 2:
        return [Result(kind(n), None, skipped="there is only one batch") for n in names]
    many = cells.many
    try:
        after = explained_variance(cells.embedding, cells.batches, many)
        results = [Result(kind("pcr_batch"), after, backend="closed form")]
        if before is not None:
            first = explained_variance(before, cells.batches, many, when=" before integration")
            compared = pcr_comparison(first, after)
            results.append(Result(kind("pcr_comparison"), compared, backend="closed form"))
    except ConfigError as error:
        return [Result(kind(n), None, skipped=str(error).partition("\n")[0]) for n in names]
    return results
