"""The measures by name: what each is called, what it tells, and its unit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from atlas.evaluation.estimates import Estimate
from atlas.evaluation.metrics import Difference, Measure
from atlas.evaluation.neighbours import Recall


@dataclass(frozen=True, slots=True)
class Kind:
    """A measure, before it has a value; fields as in :class:`Measure`."""

    name: str
    title: str
    meaning: str
    unit: str
    better: Literal["higher", "lower", "neither"] = "higher"


_MEANINGS = {
    "mixing_entropy": (
        "Batch mixing, entropy",
        "How evenly the batches are found among the {k} nearest neighbours of a cell; 0 is one "
        "batch only.",
        "nats",
        "higher",
    ),
    "mixing_entropy_bits": ("Batch mixing, entropy", "The same in bits.", "bits", "higher"),
    "mixing_share_of_log_b": (
        "Batch mixing, share of ln B",
        "The entropy as a share of that of all batches in equal parts.",
        "share",
        "higher",
    ),
    "mixing_share_of_ceiling": (
        "Batch mixing, share of the ceiling",
        "The entropy as a share of what cells dealt out to batches at random would give; 1 is "
        "perfect mixing. Cell types that only some batches have keep it below 1.",
        "share",
        "higher",
    ),
    "mixing_reweighted": (
        "Batch mixing, batches reweighted",
        "The entropy as a share of ln B, with neighbours counted relative to the size of their "
        "batch, so that small batches count as much as large ones.",
        "share",
        "higher",
    ),
    "label_accuracy": (
        "Label accuracy",
        "Share of cells whose label is the most frequent among their {k} nearest labeled "
        "neighbours.",
        "share",
        "higher",
    ),
    "label_weighted_accuracy": (
        "Label accuracy, mean over labels",
        "The same share within each label, averaged over labels, so that rare labels count.",
        "share",
        "higher",
    ),
    "label_accuracy_kernel": (
        "Label accuracy, weighted vote",
        "As above with scArches' vote, in which near neighbours count more and an unsure answer "
        "is Unknown, which counts as wrong.",
        "share",
        "higher",
    ),
    "label_weighted_accuracy_kernel": (
        "Label accuracy, weighted vote, mean over labels",
        "The weighted vote's share within each label, averaged over labels.",
        "share",
        "higher",
    ),
    "label_accuracy_answered": (
        "Label accuracy, weighted vote, where it answers",
        "Share right among the cells that the weighted vote does not answer Unknown.",
        "share",
        "higher",
    ),
    "label_unknown_share": (
        "Answered Unknown by the weighted vote",
        "Share of cells for which no label reaches half of the weighted vote.",
        "share",
        "neither",
    ),
    "label_query_only_share": (
        "Labels that the reference does not have",
        "Share of query cells whose label no reference cell has; none can be right.",
        "share",
        "neither",
    ),
    "silhouette_label": (
        "Label silhouette",
        "How compact and apart the labels lie: 1 is far apart, .5 is overlapping.",
        "score",
        "higher",
    ),
    "silhouette_batch": (
        "Batch silhouette within labels",
        "How little the batches lie apart within one label: 1 is fully mixed.",
        "score",
        "higher",
    ),
    "isolated_labels": (
        "Isolated labels, silhouette",
        "The label silhouette of the labels that lie in the fewest batches.",
        "score",
        "higher",
    ),
    "bras": (
        "BRAS",
        "The batch silhouette within labels by cosine distance, each batch against all others "
        "taken together: 1 is fully mixed.",
        "score",
        "higher",
    ),
    "ilisi": (
        "iLISI",
        "How many batches are found near a cell (median), from 0 for one to 1 for all equally "
        "often.",
        "score",
        "higher",
    ),
    "clisi": (
        "cLISI",
        "How few labels are found near a cell (median): 1 is one label.",
        "score",
        "higher",
    ),
    "kbet": (
        "kBET acceptance",
        "Share of cells near which the batches are as frequent as among all, as χ² tells at .05.",
        "share",
        "higher",
    ),
    "kbet_by_label": (
        "kBET acceptance within labels",
        "The same within each label, for 5 to 25 % of its cells as neighbours, averaged over "
        "labels.",
        "share",
        "higher",
    ),
    "graph_connectivity": (
        "Graph connectivity",
        "Share of each label's cells that hang together in the graph of neighbours, averaged over "
        "labels.",
        "score",
        "higher",
    ),
    "pcr_batch": (
        "Variance explained by batch",
        "Share of the embedding's variance that lies between batches.",
        "share",
        "lower",
    ),
    "pcr_comparison": (
        "PCR comparison",
        "How much less of the variance lies between batches than before integration.",
        "score",
        "higher",
    ),
    "nmi_kmeans": (
        "NMI of k-means and labels",
        "How well as many clusters as labels agree with the labels.",
        "score",
        "higher",
    ),
    "ari_kmeans": (
        "ARI of k-means and labels",
        "How well as many clusters as labels agree with the labels; 0 is by chance.",
        "score",
        "higher",
    ),
    "ari_batch": (
        "1 - ARI of k-means and batches",
        "How little the same clusters follow the batches.",
        "score",
        "higher",
    ),
    "nmi_leiden": (
        "NMI of Leiden clusters and labels",
        "How well clusters of the graph of neighbours agree with the labels, at the best of ten "
        "resolutions.",
        "score",
        "higher",
    ),
    "ari_leiden": (
        "ARI of Leiden clusters and labels",
        "The same clusters; 0 is by chance.",
        "score",
        "higher",
    ),
    "ari_batch_leiden": (
        "1 - ARI of Leiden clusters and batches",
        "How little the same clusters follow the batches.",
        "score",
        "higher",
    ),
    "purity": (
        "kNN purity",
        "How many of a cell's {k} nearest neighbours within its batch are the same as in the "
        "embedding of that batch alone (Jaccard).",
        "share",
        "higher",
    ),
    "cluster_conservation": (
        "k-means conservation",
        "How well the clusters of each batch agree with those in its own embedding (ARI), "
        "averaged over batches.",
        "score",
        "higher",
    ),
    "protein_overlap": (
        "Common neighbours with proteins",
        "How many of a cell's {k} nearest neighbours by its proteins are so in the embedding too.",
        "share",
        "higher",
    ),
    "protein_fold_enrichment": (
        "Common neighbours with proteins, fold enrichment",
        "How many times as many as by chance.",
        "fold",
        "higher",
    ),
    "protein_spearman": (
        "Graphs of neighbours by proteins and embedding, Spearman",
        "Correlation of the two adjacency matrices; 0 is by chance.",
        "score",
        "higher",
    ),
}


def kind(name: str, k: int | None = None) -> Kind:
    """The measure of that name, for k neighbours where their number is part of its name."""
    title, meaning, unit, better = _MEANINGS[name]
    full = name if k is None else f"{name}_k{k}"
    assert better in ("higher", "lower", "neither")
    return Kind(full, title, meaning.format(k=k), unit, better)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Result:
    """A measure with its estimate, which embeddings can be compared by.

    Attributes
    ----------
    kind
        What it is.
    estimate
        Value and errors; None where it was skipped.
    k, backend, recall
        Of the neighbours.
    skipped
        Why it has no value.
    of
        Batch or label, as in :class:`Measure`.
    note
        What has to be known of the value.
    """

    kind: Kind
    estimate: Estimate | None
    k: int | None = None
    backend: str | None = None
    recall: Recall | None = None
    skipped: str | None = None
    of: str | None = None
    note: str | None = None

    def measure(self) -> Measure:
        """As it is told."""
        kind = self.kind
        told = Measure(
            kind.name, kind.title, kind.meaning, kind.unit, kind.better, k=self.k, of=self.of
        )
        estimate = self.estimate
        if estimate is None or not math.isfinite(estimate.value):
            return replace(told, skipped=self.skipped or "it has no value on these cells")
        low, high = estimate.interval()
        lowest, highest = bounds(kind.unit)
        # One cell tells nothing of the others.
        known = estimate.n > 1
        return replace(
            told,
            value=estimate.value,
            standard_error=estimate.standard_error if known else None,
            low=max(low, min(lowest, estimate.value)) if known else None,
            high=min(high, max(highest, estimate.value)) if known else None,
            n=estimate.n,
            backend=self.backend,
            recall=None if self.recall is None else self.recall.value,
            note=self.note,
        )

    def minus(self, other: Result, first: str, second: str) -> Difference | None:
        """The difference to the same measure of another embedding; None where one has no value."""
        if self.estimate is None or other.estimate is None:
            return None
        difference = self.estimate.minus(other.estimate)
        if not math.isfinite(difference.value) or difference.n < 2:
            return None
        low, high = difference.interval()
        kind = self.kind
        return Difference(
            name=kind.name,
            title=kind.title,
            unit=kind.unit,
            better=kind.better,
            first=first,
            second=second,
            value=difference.value,
            standard_error=difference.standard_error,
            low=low,
            high=high,
            n=difference.n,
            k=self.k,
        )


def bounds(unit: str) -> tuple[float, float]:
    """Least and largest value of a unit."""
    return (0.0, math.inf) if unit in ("nats", "bits", "fold") else (0.0, 1.0)
