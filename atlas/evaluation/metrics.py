"""What the measures of an embedding come out as: figures with errors, to JSON and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from atlas.errors import FormatError
from atlas.evaluation.labels import Confusion

SCHEMA = "atlas.metrics"
VERSION = 1


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
        ``"nats"``, ``"bits"``, ``"share"`` or ``"score"`` (0 to 1).
    better
        ``"higher"``, ``"lower"``, or ``"neither"`` for a figure that only describes.
    n, k
        Cells it is averaged over, and neighbours of each; None where there are none.
    backend
        What searched the neighbours, or computed it.
    skipped
        Why it has no value; None where it has one.
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
    """

    n_cells: int
    n_dimensions: int
    seed: int
    measures: tuple[Measure, ...]
    confusion: Confusion | None
    label_protocol: str | None

    def __getitem__(self, name: str) -> Measure:
        """The measure of that name."""
        for measure in self.measures:
            if measure.name == name:
                return measure
        raise KeyError(name)

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
            "confusion": confusion,
            "label_protocol": self.label_protocol,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Metrics:
        """The inverse of :meth:`to_json`.

        Raises
        ------
        FormatError
            Another schema, or a version that is not read.
        """
        if (values.get("schema"), values.get("version")) != (SCHEMA, VERSION):
            raise FormatError(
                "these are no measures of an embedding that this version reads",
                found=f"schema {values.get('schema')!r}, version {values.get('version')!r}",
                expected=f"schema {SCHEMA!r}, version {VERSION}",
            )
        stored = values["confusion"]
        return cls(
            n_cells=values["n_cells"],
            n_dimensions=values["n_dimensions"],
            seed=values["seed"],
            measures=tuple(Measure(**measure) for measure in values["measures"]),
            confusion=stored
            and Confusion(
                tuple(stored["truth"]),
                tuple(stored["predicted"]),
                np.array(stored["counts"], dtype=np.int64),
            ),
            label_protocol=values["label_protocol"],
        )
