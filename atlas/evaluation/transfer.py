"""The measures of label transfer, and how it was done in words."""

from __future__ import annotations

import numpy as np

from atlas.evaluation.catalogue import Result, kind
from atlas.evaluation.cells import Cells, by_group, unasked
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.estimates import Estimate, mean, mean_of_groups
from atlas.evaluation.labels import LabelTransfer, Mask, label_accuracy
from atlas.evaluation.neighbours import EXACT, Indices

_NAMES = (
    "label_accuracy",
    "label_weighted_accuracy",
    "label_accuracy_kernel",
    "label_weighted_accuracy_kernel",
    "label_accuracy_answered",
    "label_unknown_share",
)


def transfer_results(
    cells: Cells, reference: Mask | None, query: Mask | None, k: int
) -> tuple[LabelTransfer | None, list[Result], list[Result]]:
    """Accuracy of labels carried by k neighbours, plain and weighted, with Unknown apart.

    Returns
    -------
    The transfer, its measures, and those of the plain vote by batch and label; the first is None,
    and the measures have no value, where labels cannot be carried.
    """
    leave_one_out = reference is None and query is None
    reason = _no_transfer(cells.labels, reference, query, k)
    if reason is not None:
        results = [Result(kind(name, k), None, k, skipped=reason) for name in _NAMES]
        if not leave_one_out:
            results.append(Result(kind("label_query_only_share"), None, skipped=reason))
        return None, results, []
    assert cells.labels is not None
    reuse = leave_one_out and cells.all_labeled
    transfer = label_accuracy(
        cells.embedding,
        cells.labels,
        reference,
        query,
        k=k,
        max_queries=cells.max_queries,
        seed=cells.seed,
        strata=cells.strata,
        found=cells.neighbours if reuse else None,
        backend=cells.backend,
    )
    sample, truth = transfer.sample, transfer.truth
    right = (transfer.predicted == truth).astype(np.float64)
    kernel = (transfer.predicted_weighted == truth).astype(np.float64)
    answered = transfer.predicted_weighted != UNLABELED
    estimates: tuple[Estimate | None, ...] = (
        mean(right, sample, share=True),
        mean_of_groups(right, truth, sample),
        mean(kernel, sample, share=True),
        mean_of_groups(kernel, truth, sample),
        mean(kernel, sample, answered, share=True) if answered.any() else None,
        mean((~answered).astype(np.float64), sample, share=True),
    )
    recall = cells.neighbours.recall if reuse and cells.neighbours is not None else EXACT
    everyone = _asked_of(cells.labels, reference, query)
    note = unasked(cells.labels, everyone, sample.rows, "label")
    results = [
        Result(
            kind(name, k),
            estimate,
            k,
            transfer.backend,
            recall,
            "every cell is answered Unknown" if estimate is None else None,
            note=note if "weighted_accuracy" in name else None,
        )
        for name, estimate in zip(_NAMES, estimates, strict=True)
    ]
    if not leave_one_out:
        share = _query_only_share(transfer, cells.labels, everyone)
        results.append(Result(kind("label_query_only_share"), share))
    groups = list(by_group(right, sample, cells, results[0], batches=True, labels=True))
    return transfer, results, groups


def _query_only_share(transfer: LabelTransfer, labels: Categories, everyone: Indices) -> Estimate:
    """Of all query cells, asked or not, so its error is that of another draw of all of them."""
    codes = [labels.names.index(name) for name in transfer.query_only_labels]
    value = float(np.isin(labels.codes[everyone], codes).mean())
    influence = np.isin(transfer.truth, codes).astype(np.float64) - value
    return Estimate(value, influence, transfer.sample.of_all(), len(everyone), share=True)


def _asked_of(labels: Categories, reference: Mask | None, query: Mask | None) -> Indices:
    """Rows of all cells to which labels are carried, asked or not."""
    labeled = labels.codes != UNLABELED
    if query is None and reference is not None:
        query = ~reference
    return np.flatnonzero(labeled if query is None else labeled & query).astype(np.int64)


def _no_transfer(
    labels: Categories | None, reference: Mask | None, query: Mask | None, k: int
) -> str | None:
    """Why labels cannot be transferred; None where they can."""
    if labels is None or not np.any(labels.codes != UNLABELED):
        return "no cell has a label"
    labeled = labels.codes != UNLABELED
    n_labeled = int(labeled.sum())
    if reference is None and query is None:
        if n_labeled <= k:
            return f"{k} neighbours need at least {k + 1} labeled cells, and there are {n_labeled}"
        return None
    if reference is None:
        reference = ~np.asarray(query)
    voting = int((labeled & reference).sum())
    if not len(_asked_of(labels, reference, query)):
        return "no query cell has a label to compare with"
    if voting < k:
        return f"{k} neighbours need at least {k} labeled reference cells, and there are {voting}"
    return None


def protocol(transfer: LabelTransfer) -> str:
    """How labels were transferred, and what counts as an error, in words."""
    if transfer.leave_one_out:
        text = (
            f"Each of {transfer.n_cells:,} labeled cells was predicted from the other "
            f"{transfer.n_reference - 1:,} labeled cells."
        )
    else:
        text = (
            f"{transfer.n_cells:,} labeled query cells were predicted from "
            f"{transfer.n_reference:,} labeled reference cells."
        )
    text += (
        " Unlabeled cells neither vote nor count. Of equally frequent labels the nearest "
        "neighbour's wins; Unknown counts as wrong."
    )
    if transfer.query_only_labels:
        text += (
            " Labels that only the query has count as wrong too: "
            f"{', '.join(transfer.query_only_labels)}."
        )
    return text
