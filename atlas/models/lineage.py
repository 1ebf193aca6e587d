"""What surgery did to a reference: kept with the model that came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Surgery:
    """Studies that were added to a reference at once.

    Attributes
    ----------
    studies, batches, labels
        What was added; labels only where a scANVI got new classes.
    strategy, initialisation
        See :func:`atlas.models.surgery.graft`.
    keep_apart
        See :func:`atlas.extend_reference`.
    zero_filled
        Whether genes that a study lacks were taken as measured and zero, instead of left out.
    n_trained
        Number of parameters that were trained.
    apart_from
        Studies known before from which these were kept apart too.
    orthologs
        Of studies of another species: the gene that the store has, and the model's gene that it is
        taken for.
    categories
        New categories of each categorical covariate.
    """

    studies: tuple[str, ...]
    batches: tuple[str, ...]
    labels: tuple[str, ...]
    strategy: str
    initialisation: str
    keep_apart: float
    zero_filled: bool
    n_trained: int
    apart_from: tuple[str, ...] = ()
    orthologs: tuple[tuple[str, str], ...] = ()
    categories: tuple[tuple[str, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        for name in _NESTED:
            values[name] = [list(one) for one in values[name]]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        listed: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**listed | {name: tuple(map(tuple, values.get(name, ()))) for name in _NESTED})


_NESTED = ("orthologs", "categories")
_TEXTS = {"type": "array", "items": {"type": "string"}}

SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            **dict.fromkeys(("studies", "batches", "labels", "apart_from"), _TEXTS),
            "strategy": {"type": "string"},
            "initialisation": {"type": "string"},
            "keep_apart": {"type": "number", "minimum": 0},
            "zero_filled": {"type": "boolean"},
            "n_trained": {"type": "integer", "minimum": 1},
            "orthologs": {
                "type": "array",
                "items": {**_TEXTS, "minItems": 2, "maxItems": 2},
            },
            "categories": {"type": "array", "items": _TEXTS},
        },
        "required": [
            field.name
            for field in dataclasses.fields(Surgery)
            if field.default is dataclasses.MISSING
        ],
        "additionalProperties": False,
    },
}
"""Of the list of them in ``model.json``."""
