"""All measures of one embedding, with their errors, in one pass.

A measure that the data cannot give (no labels, one batch, fewer cells than neighbours) is listed
without a value and with the reason; it is not an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from atlas.errors import ConfigError
from atlas.evaluation.codes import UNLABELED, Categories, sample_rows
from atlas.evaluation.labels import Accuracy, LabelTransfer, Mask, label_accuracy
from atlas.evaluation.metrics import Measure, Metrics
from atlas.evaluation.mixing import batch_mixing
from atlas.evaluation.neighbours import Backend, Embedding, nearest
from atlas.evaluation.silhouette import Silhouette, batch_silhouette, label_silhouette


def evaluate_embedding(
    embedding: Embedding,
    batches: Categories,
    labels: Categories | None = None,
    *,
    reference: Mask | None = None,
    query: Mask | None = None,
    mixing_k: Sequence[int] = (50, 15),
    label_k: int = 50,
    seed: int = 0,
    max_queries: int = 20_000,
    silhouette_cells: int = 10_000,
    backend: Backend = "auto",
) -> Metrics:
    """Measure how well an embedding mixes batches and keeps labels apart.

    Parameters
    ----------
    embedding
        float32, (n_cells, d).
    batches
        Batch of every cell.
    labels
        Label of every cell, -1 for none; None without any labels.
    reference, query
        Cells whose labels are carried over, and cells they are carried to: bool, (n_cells,). With
        neither, each labeled cell is predicted from all the others; with one of them, the other
        is the remaining cells.
    mixing_k
        Neighbours for the entropy of batch mixing (scVI and scANVI 50, scArches 15).
    label_k
        Neighbours that vote on a label.
    seed
        Of the samples.
    max_queries
        Cells above this number are sampled as queries; they are searched among all cells.
    silhouette_cells
        Cells above this number are sampled for the silhouettes.
    backend
        Of :func:`atlas.evaluation.neighbours.nearest`.

    Raises
    ------
    ConfigError
        Arrays of different lengths, a cell without a batch, or reference and query that overlap.
    ModelError
        An embedding that is not finite.
    """
    embedding = np.ascontiguousarray(embedding, dtype=np.float32)
    _check_lengths(embedding, batches, labels, reference, query)
    mixing = _mixing(embedding, batches, mixing_k, seed, max_queries, backend)
    measures = list(mixing)
    transfer = None
    reason = _no_transfer(labels, reference, query, label_k)
    if labels is not None and reason is None:
        transfer = label_accuracy(
            embedding,
            labels,
            reference,
            query,
            k=label_k,
            max_queries=max_queries,
            seed=seed,
            backend=backend,
        )
    measures += _label_measures(transfer, label_k, reason)
    measures += _silhouettes(embedding, batches, labels, silhouette_cells, seed)
    return Metrics(
        n_cells=len(embedding),
        n_dimensions=embedding.shape[1],
        seed=seed,
        measures=tuple(measures),
        confusion=transfer.confusion if transfer else None,
        label_protocol=_protocol(transfer) if transfer else None,
    )


def _check_lengths(
    embedding: Embedding,
    batches: Categories,
    labels: Categories | None,
    reference: Mask | None,
    query: Mask | None,
) -> None:
    if embedding.ndim != 2 or not embedding.size:
        raise ConfigError(
            "there is no embedding to evaluate",
            found=f"an array of shape {embedding.shape}",
            expected="(n_cells, d), neither of them 0",
        )
    given = {"batches": batches, "labels": labels, "reference": reference, "query": query}
    for name, values in given.items():
        if values is not None and len(values) != len(embedding):
            raise ConfigError(
                f"{name} and embedding have different numbers of cells",
                found=f"{len(values)} and {len(embedding)}",
                expected="one entry per cell, in the same order",
            )
    if np.any(batches.codes == UNLABELED):
        raise ConfigError(
            "some cells have no batch",
            found=f"{int((batches.codes == UNLABELED).sum())} cells with code -1",
            expected="a batch for every cell",
        )


def _mixing(
    embedding: Embedding,
    batches: Categories,
    ks: Sequence[int],
    seed: int,
    max_queries: int,
    backend: Backend,
) -> Iterator[Measure]:
    if len(batches.present()) < 2:
        for k in ks:
            yield from _mixing_measures(k, skipped="there is only one batch")
        return
    possible = [k for k in ks if k < len(embedding)]
    found = None
    if possible:
        rows = sample_rows(np.arange(len(embedding), dtype=np.int64), max_queries, seed)
        found = nearest(embedding, embedding[rows], max(possible), rows, backend=backend)
    for k in ks:
        if found is None or k not in possible:
            reason = f"{k} neighbours need at least {k + 1} cells, and there are {len(embedding)}"
            yield from _mixing_measures(k, skipped=reason)
            continue
        mixing = batch_mixing(found.first(k), batches)
        error = None if math.isnan(mixing.standard_error) else mixing.standard_error
        yield from _mixing_measures(
            k,
            values=(
                mixing.entropy,
                mixing.bits,
                mixing.entropy / mixing.log_batches,
                mixing.entropy / mixing.ceiling if mixing.ceiling else None,
            ),
            errors=(
                error,
                error and error / math.log(2),
                error and error / mixing.log_batches,
                error and mixing.ceiling and error / mixing.ceiling,
            ),
            n=mixing.n_cells,
            backend=found.backend,
        )


def _mixing_measures(
    k: int,
    *,
    values: Sequence[float | None] = (None,) * 4,
    errors: Sequence[float | None] = (None,) * 4,
    n: int | None = None,
    backend: str | None = None,
    skipped: str | None = None,
) -> Iterator[Measure]:
    entropy = f"How evenly the batches are found among the {k} nearest neighbours of a cell"
    kinds = (
        ("mixing_entropy", "Batch mixing, entropy", "nats", f"{entropy}; 0 is one batch only."),
        ("mixing_entropy_bits", "Batch mixing, entropy", "bits", "The same in bits."),
        (
            "mixing_share_of_log_b",
            "Batch mixing, share of ln B",
            "share",
            "The entropy as a share of that of all batches in equal parts.",
        ),
        (
            "mixing_share_of_ceiling",
            "Batch mixing, share of the ceiling",
            "share",
            "The entropy as a share of what cells dealt out to batches at random would give; "
            "1 is perfect mixing. Cell types that only some batches have keep it below 1.",
        ),
    )
    for (name, title, unit, meaning), value, error in zip(kinds, values, errors, strict=True):
        yield Measure(
            name=f"{name}_k{k}",
            title=title,
            meaning=meaning,
            unit=unit,
            value=value,
            standard_error=error,
            n=n,
            k=k,
            backend=backend,
            skipped=skipped or ("batches are too small to mix" if value is None else None),
        )


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
    asked = int((labeled & (~reference if query is None else query)).sum())
    if not asked:
        return "no query cell has a label to compare with"
    if voting < k:
        return f"{k} neighbours need at least {k} labeled reference cells, and there are {voting}"
    return None


def _label_measures(
    transfer: LabelTransfer | None, k: int, reason: str | None
) -> Iterator[Measure]:
    plain = (
        f"Share of cells whose label is the most frequent among their {k} nearest labeled "
        "neighbours."
    )
    weighted = "The same share within each label, averaged over labels, so that rare labels count."
    unsure = (
        "As above with scArches' vote, in which near neighbours count more and an unsure answer "
        "is Unknown, which counts as wrong."
    )
    majority = transfer.majority if transfer else None
    kernel = transfer.weighted if transfer else None
    kinds: tuple[tuple[str, str, str, Accuracy | None, str], ...] = (
        ("label_accuracy", "Label accuracy", plain, majority, "accuracy"),
        (
            "label_weighted_accuracy",
            "Label accuracy, mean over labels",
            weighted,
            majority,
            "weighted_accuracy",
        ),
        ("label_accuracy_kernel", "Label accuracy, weighted vote", unsure, kernel, "accuracy"),
        (
            "label_weighted_accuracy_kernel",
            "Label accuracy, weighted vote, mean over labels",
            "The weighted vote's share within each label, averaged over labels.",
            kernel,
            "weighted_accuracy",
        ),
    )
    n = transfer.n_cells if transfer else None
    backend = transfer.backend if transfer else None
    for name, title, meaning, accuracy, field in kinds:
        yield Measure(
            name=f"{name}_k{k}",
            title=title,
            meaning=meaning,
            unit="share",
            value=getattr(accuracy, field) if accuracy else None,
            standard_error=getattr(accuracy, f"{field}_error") if accuracy else None,
            n=n,
            k=k,
            backend=backend,
            skipped=reason,
        )
    yield Measure(
        name=f"label_unknown_share_k{k}",
        title="Answered Unknown by the weighted vote",
        meaning="Share of cells for which no label reaches half of the weighted vote.",
        unit="share",
        better="neither",
        value=kernel.unknown_share if kernel else None,
        standard_error=_binomial(kernel.unknown_share, n) if kernel and n else None,
        n=n,
        k=k,
        backend=backend,
        skipped=reason,
    )
    yield Measure(
        name="label_query_only_share",
        title="Labels that the reference does not have",
        meaning="Share of query cells whose label no reference cell has; none can be right.",
        unit="share",
        better="neither",
        value=transfer.query_only_share if transfer else None,
        standard_error=_binomial(transfer.query_only_share, transfer.n_cells) if transfer else None,
        n=n,
        skipped=reason,
    )


def _binomial(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / n)


def _silhouettes(
    embedding: Embedding,
    batches: Categories,
    labels: Categories | None,
    max_cells: int,
    seed: int,
) -> Iterator[Measure]:
    label: Silhouette | str = "no cell has a label"
    batch: Silhouette | str = label
    if labels is not None and len(labels.present()):
        try:
            label = label_silhouette(embedding, labels, max_cells=max_cells, seed=seed)
        except ConfigError:
            label = "it needs two labels or more, with several cells each"
        try:
            batch = batch_silhouette(embedding, labels, batches, max_cells=max_cells, seed=seed)
        except ConfigError:
            batch = "no label has several cells in two batches or more"
    kinds = (
        (
            "silhouette_label",
            "Label silhouette",
            "How compact and apart the labels lie: 1 is far apart, .5 is overlapping.",
            label,
        ),
        (
            "silhouette_batch",
            "Batch silhouette within labels",
            "How little the batches lie apart within one label: 1 is fully mixed.",
            batch,
        ),
    )
    for name, title, meaning, result in kinds:
        if isinstance(result, str):
            yield Measure(name, title, meaning, "score", skipped=result)
            continue
        error = result.standard_error
        yield Measure(
            name,
            title,
            meaning,
            "score",
            value=result.value,
            standard_error=None if math.isnan(error) else error,
            n=result.n_cells,
            backend="scikit-learn",
        )


def _protocol(transfer: LabelTransfer) -> str:
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
