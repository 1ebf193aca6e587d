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
    """

    studies: tuple[str, ...]
    batches: tuple[str, ...]
    labels: tuple[str, ...]
    strategy: str
    initialisation: str
    keep_apart: float
    zero_filled: bool
    n_trained: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        listed: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**listed)


_TEXTS = {"type": "array", "items": {"type": "string"}}

SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            **dict.fromkeys(("studies", "batches", "labels"), _TEXTS),
            "strategy": {"type": "string"},
            "initialisation": {"type": "string"},
            "keep_apart": {"type": "number", "minimum": 0},
            "zero_filled": {"type": "boolean"},
            "n_trained": {"type": "integer", "minimum": 1},
        },
        "required": [field.name for field in dataclasses.fields(Surgery)],
        "additionalProperties": False,
    },
}
"""Of the list of them in ``model.json``."""
