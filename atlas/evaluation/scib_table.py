"""scib-metrics' aggregate scores: bio conservation, batch correction and their total.

The rule is that of ``Benchmarker.get_results(min_max_scale=False)`` of scib-metrics 0.5.10 (Luecken
et al. 2022, Methods): the mean of the measures of each class, those without a value left out, and
.6 of the first plus .4 of the second. The measures are those of its Benchmarker by default, which
leaves Leiden out.

On purpose it differs so:

- KBET is our ``kbet_by_label``: searched within each label, in place of ``kbet_per_label``'s joint
  graph repaired by diffusion.
- Cells without a label take no part in what needs labels; there they are a label of their own.
- PCR comparison needs an embedding before integration (``before``); there a PCA is made where none
  is given. Without one it is left out, and the table says so.
- Where nothing but graph connectivity has a value, as with one batch, batch correction has none: it
  is of labels alone, and would go into the total as if batches had been corrected.
- On many cells the measures come from samples, and each score carries a standard error. That of an
  aggregate is an upper bound: the errors of its parts, added as if they all went together.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from atlas.errors import ConfigError
from atlas.evaluation.metrics import Measure, Metrics

if TYPE_CHECKING:
    import pandas as pd

Part = Literal["Bio conservation", "Batch correction", "Aggregate score"]

BIO: dict[str, str] = {
    "isolated_labels": "Isolated labels",
    "nmi_leiden": "Leiden NMI",
    "ari_leiden": "Leiden ARI",
    "nmi_kmeans": "KMeans NMI",
    "ari_kmeans": "KMeans ARI",
    "silhouette_label": "Silhouette label",
    "clisi": "cLISI",
}
BATCH: dict[str, str] = {
    "bras": "BRAS",
    "ilisi": "iLISI",
    "kbet_by_label": "KBET",
    "graph_connectivity": "Graph connectivity",
    "pcr_comparison": "PCR comparison",
}
BIO_WEIGHT, BATCH_WEIGHT = 0.6, 0.4
_METRIC_TYPE = "Metric Type"
_TOTAL = "Total"


@dataclass(frozen=True, slots=True)
class Score:
    """One field of the table.

    Attributes
    ----------
    embedding
        Whose it is.
    part
        Class of the measure, or ``"Aggregate score"``.
    title
        As scib-metrics writes it.
    value, standard_error
        The score, 1 being best, and its standard error, an upper bound for an aggregate; None where
        it has none.
    skipped
        Why it has no value, or what an aggregate was made without; None where all is there.
    """

    embedding: str
    part: Part
    title: str
    value: float | None
    standard_error: float | None
    skipped: str | None


@dataclass(frozen=True, slots=True)
class ScibTable:
    """The scores of one or several embeddings.

    Attributes
    ----------
    embeddings
        Names, in the order given.
    scores
        Of each in turn: bio conservation, batch correction, then the three aggregates.
    """

    embeddings: tuple[str, ...]
    scores: tuple[Score, ...]

    def __getitem__(self, key: tuple[str, str]) -> Score:
        """The score of an embedding by its title: ``table["scvi", "Total"]``."""
        for score in self.scores:
            if (score.embedding, score.title) == key:
                return score
        raise KeyError(key)

    def of(self, embedding: str) -> tuple[Score, ...]:
        """The scores of one embedding."""
        return tuple(score for score in self.scores if score.embedding == embedding)

    @property
    def missing(self) -> dict[str, str]:
        """Measures without a value for any embedding, and why, by title."""
        return {
            score.title: score.skipped
            for score in self.scores
            if score.part != "Aggregate score" and score.value is None and score.skipped
        }

    def to_frame(self) -> pd.DataFrame:
        """As ``Benchmarker.get_results`` gives it: an embedding a row, the last row the classes.

        Scores that are not there are NaN.
        """
        import pandas as pd

        columns = [score.title for score in self.of(self.embeddings[0])]
        rows: dict[str, list[Any]] = {
            name: [np.nan if s.value is None else s.value for s in self.of(name)]
            for name in self.embeddings
        }
        rows[_METRIC_TYPE] = [score.part for score in self.of(self.embeddings[0])]
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        frame.index.name = "Embedding"
        return frame

    def to_csv(self) -> str:
        """The same as text, empty where there is no score."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        first = self.of(self.embeddings[0])
        writer.writerow(["Embedding", *(score.title for score in first)])
        for name in self.embeddings:
            values = ["" if s.value is None else s.value for s in self.of(name)]
            writer.writerow([name, *values])
        writer.writerow([_METRIC_TYPE, *(score.part for score in first)])
        return text.getvalue()

    def to_json(self) -> list[dict[str, Any]]:
        """Plain JSON values, one object a score."""
        return [
            {name: getattr(score, name) for name in Score.__dataclass_fields__}
            for score in self.scores
        ]


def scib_table(metrics: Mapping[str, Metrics], *, leiden: bool = False) -> ScibTable:
    """scib-metrics' table of one or several embeddings; see the module for where it differs.

    Parameters
    ----------
    metrics
        Measures of each embedding by name, as ``Comparison.metrics`` has them.
    leiden
        Whether NMI and ARI of Leiden clusters count too, as with
        ``BioConservation(nmi_ari_cluster_labels_leiden=True)``.

    Raises
    ------
    ConfigError
        There is no embedding.
    """
    if not metrics:
        raise ConfigError("there is no embedding to score")
    bio = {name: title for name, title in BIO.items() if leiden or not name.endswith("_leiden")}
    parts: dict[str, tuple[list[Score], list[Score]]] = {}
    for name, found in metrics.items():
        by_name = {measure.name: measure for measure in found.measures}
        own = _class(name, "Bio conservation", bio, by_name)
        parts[name] = own, _class(name, "Batch correction", BATCH, by_name)
    there = {
        s.title for both in parts.values() for part in both for s in part if s.value is not None
    }
    scores: dict[str, list[Score]] = {}
    for name, (own, other) in parts.items():
        kept, corrected = _mean(own, there), _mean(other, there)
        scores[name] = [*own, *other, corrected, kept, _total(name, kept, corrected)]
    return ScibTable(tuple(scores), tuple(score for own in scores.values() for score in own))


def _class(
    embedding: str, part: Part, titles: Mapping[str, str], measures: Mapping[str, Measure]
) -> list[Score]:
    out = []
    for name, title in titles.items():
        found = measures.get(name)
        if found is None:
            why = "it needs an embedding before integration" if name == "pcr_comparison" else None
            out.append(Score(embedding, part, title, None, None, why or "it was not measured"))
        else:
            out.append(
                Score(embedding, part, title, found.value, found.standard_error, found.skipped)
            )
    return out


def _mean(scores: list[Score], somewhere: Set[str]) -> Score:
    """The aggregate of a class; it says what it lacks, and what of that other embeddings have."""
    there = [score for score in scores if score.value is not None]
    lacking = [score.title for score in scores if score.value is None]
    others = [title for title in lacking if title in somewhere]
    embedding, part = scores[0].embedding, scores[0].part
    if not there:
        why = "none of its measures has a value"
        return Score(embedding, "Aggregate score", part, None, None, why)
    if {score.title for score in there} == {BATCH["graph_connectivity"]}:
        why = "only graph connectivity has a value, which knows no batches"
        return Score(embedding, "Aggregate score", part, None, None, why)
    errors = [score.standard_error for score in there]
    bound = None if None in errors else sum(e for e in errors if e is not None) / len(errors)
    value = sum(score.value for score in there if score.value is not None) / len(there)
    told = f"without {', '.join(lacking)}" if lacking else None
    if told and others:
        told += f"; others have {', '.join(others)}, so that these scores do not compare"
    return Score(embedding, "Aggregate score", part, value, bound, told)


def _total(embedding: str, kept: Score, corrected: Score) -> Score:
    if kept.value is None or corrected.value is None:
        return Score(embedding, "Aggregate score", _TOTAL, None, None, "a class has no value")
    value = BIO_WEIGHT * kept.value + BATCH_WEIGHT * corrected.value
    bound = None
    if kept.standard_error is not None and corrected.standard_error is not None:
        bound = BIO_WEIGHT * kept.standard_error + BATCH_WEIGHT * corrected.standard_error
    told = "; ".join(score.skipped for score in (kept, corrected) if score.skipped) or None
    return Score(embedding, "Aggregate score", _TOTAL, value, bound, told)
