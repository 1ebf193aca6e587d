"""What the measures of an embedding come out as: figures with errors, to JSON, CSV and pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from atlas.errors import FormatError
from atlas.evaluation.labels import Confusion

if TYPE_CHECKING:
    import pandas as pd

    from atlas.evaluation.scib_table import ScibTable

SCHEMA = "atlas.metrics"
VERSION = 3
READABLE = (1, 2, 3)
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure.

    Attributes
    ----------
    name
        Stable name, as in ``"mixing_entropy_k50"``.
    title, meaning
        For people: a short title, and one sentence that says what it tells.
    value, standard_error
        The figure and its standard error; None where it has none.
    unit
        ``"nats"``, ``"bits"``, ``"share"`` or ``"score"`` (0 to 1), or ``"fold"``.
    better
        ``"higher"``, ``"lower"``, or ``"neither"`` for a figure that only describes.
    n, k
        Cells it is averaged over, and neighbours of each; None where there are none.
    backend
        What searched the neighbours, or computed it.
    skipped
        Why it has no value; None where it has one.
    low, high
        Ends of the 95 % interval; None where there is no value.
    recall
        Share of the true neighbours that the search finds; None where none are searched, or nobody
        measured it.
    of
        ``"batch NAME"`` or ``"label NAME"`` for a figure of part of the cells; None for all. NAME
        is ``*`` where there are too many to give each.
    note
        What has to be known of the value, as that of some labels no cell was asked, or that cells
        coincide; None for most.
    """

    name: str
    title: str
    meaning: str
    unit: str
    better: Literal["higher", "lower", "neither"] = "higher"
    value: float | None = None
    standard_error: float | None = None
    n: int | None = None
    k: int | None = None
    backend: str | None = None
    skipped: str | None = None
    low: float | None = None
    high: float | None = None
    recall: float | None = None
    of: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Metrics:
    """The measures of one embedding.

    Attributes
    ----------
    n_cells, n_dimensions
        Shape of the embedding.
    seed
        Of all samples.
    measures
        In the order of the report.
    confusion
        Query cells by label and predicted label; None without label transfer.
    label_protocol
        How labels were transferred, and what counts as an error, in words; None without it.
    groups
        Measures of single batches and labels.
    """

    n_cells: int
    n_dimensions: int
    seed: int
    measures: tuple[Measure, ...]
    confusion: Confusion | None
    label_protocol: str | None
    groups: tuple[Measure, ...] = ()

    def __getitem__(self, name: str) -> Measure:
        """The measure of that name."""
        for measure in self.measures:
            if measure.name == name:
                return measure
        raise KeyError(name)

    def to_frame(self) -> pd.DataFrame:
        """A row for each measure, those of batches and labels last, a column for each field."""
        import pandas as pd

        return pd.DataFrame(
            [asdict(measure) for measure in (*self.measures, *self.groups)],
            columns=[field.name for field in fields(Measure)],
        )

    def to_csv(self) -> str:
        """The same rows as text, with empty fields where there is no value."""
        names = [field.name for field in fields(Measure)]
        return _csv(names, [asdict(measure) for measure in (*self.measures, *self.groups)])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with schema name and version; read again by :meth:`from_json`."""
        confusion = self.confusion and {
            "truth": list(self.confusion.truth),
            "predicted": list(self.confusion.predicted),
            "counts": self.confusion.counts.tolist(),
        }
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "n_cells": self.n_cells,
            "n_dimensions": self.n_dimensions,
            "seed": self.seed,
            "measures": [asdict(measure) for measure in self.measures],
            "groups": [asdict(measure) for measure in self.groups],
            "confusion": confusion,
            "label_protocol": self.label_protocol,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Metrics:
        """The inverse of :meth:`to_json`; reads version 1 too, which has no intervals or groups,
        and version 2, which has no notes.

        Raises
        ------
        FormatError
            Another schema, or a version that is not read.
        """
        if values.get("schema") != SCHEMA or values.get("version") not in READABLE:
            raise FormatError(
                "these are no measures of an embedding that this version reads",
                found=f"schema {values.get('schema')!r}, version {values.get('version')!r}",
                expected=f"schema {SCHEMA!r}, version {READABLE[0]} to {READABLE[-1]}",
            )
        stored = values["confusion"]
        return cls(
            n_cells=values["n_cells"],
            n_dimensions=values["n_dimensions"],
            seed=values["seed"],
            measures=tuple(Measure(**measure) for measure in values["measures"]),
            groups=tuple(Measure(**measure) for measure in values.get("groups", ())),
            confusion=stored
            and Confusion(
                tuple(stored["truth"]),
                tuple(stored["predicted"]),
                np.array(stored["counts"], dtype=np.int64),
            ),
            label_protocol=values["label_protocol"],
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """How much a measure differs between two embeddings, on the same cells.

    Attributes
    ----------
    name, title, unit, better
        As in :class:`Measure`.
    first, second
        Names of the embeddings.
    value, standard_error, low, high
        The measure of the first less that of the second, its standard error and 95 % interval; the
        error is paired by cell, so it is far below those of the two figures where they go together.
    n, k
        Cells and neighbours.
    """

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower", "neither"]
    first: str
    second: str
    value: float
    standard_error: float
    low: float
    high: float
    n: int
    k: int | None

    @property
    def favours(self) -> str | None:
        """The embedding that the interval says is better; None where it holds 0, or neither is.

        Differences up to 1e-12 are rounding.
        """
        if self.better == "neither" or self.low <= 0 <= self.high or abs(self.value) <= _ROUNDING:
            return None
        return self.first if (self.value > 0) == (self.better == "higher") else self.second


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several embeddings of the same cells.

    Attributes
    ----------
    metrics
        Measures of each, by name.
    differences
        Of each pair, in the order of the names.
    """

    metrics: dict[str, Metrics]
    differences: tuple[Difference, ...]

    def scib_table(self, *, leiden: bool = False) -> ScibTable:
        """scib-metrics' aggregate scores: :func:`atlas.evaluation.scib_table.scib_table`."""
        from atlas.evaluation.scib_table import scib_table

        return scib_table(self.metrics, leiden=leiden)

    def to_frame(self) -> pd.DataFrame:
        """A row for each difference."""
        import pandas as pd

        return pd.DataFrame(
            [asdict(difference) for difference in self.differences],
            columns=[field.name for field in fields(Difference)],
        )

    def to_csv(self) -> str:
        """The measures of each embedding as text, those without a value too, then the differences.

        Of a difference ``less`` names the second embedding, which is empty for a measure.
        """
        rows: list[dict[str, Any]] = []
        for name, metrics in self.metrics.items():
            rows += [asdict(measure) | {"embedding": name} for measure in metrics.measures]
        for each in self.differences:
            rows.append(asdict(each) | {"embedding": each.first, "less": each.second})
        return _csv(_COMPARED, rows)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with schema name and version."""
        return {
            "schema": "atlas.comparison",
            "version": 1,
            "metrics": {name: metrics.to_json() for name, metrics in self.metrics.items()},
            "differences": [asdict(difference) for difference in self.differences],
            "scores": self.scib_table().to_json(),
        }


_COMPARED = (
    *("name", "title", "embedding", "less", "value", "standard_error", "low", "high", "unit"),
    *("better", "n", "k", "backend", "recall", "skipped", "note"),
)


def _csv(columns: Sequence[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
