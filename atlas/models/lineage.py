"""What surgery did to a reference: kept with the model that came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from atlas.errors import ModelError


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
    n_categories
        Number of new categories of each categorical covariate.
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
    n_categories: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self) | {"orthologs": [list(one) for one in self.orthologs]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        listed: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**listed | {"orthologs": tuple(map(tuple, values.get("orthologs", ())))})


def check_lineage(
    surgery: Sequence[Surgery],
    batches: Sequence[str],
    labels: Sequence[str],
    n_categories: Sequence[int],
) -> None:
    """Refuse surgeries that did not make a model of these batches, labels and categories.

    Raises
    ------
    ModelError
        What they added does not come last in it, in their order, or is all that it has.
    """
    for what, names, new in (
        ("batches", batches, [name for one in surgery for name in one.batches]),
        ("labels", labels, [name for one in surgery for name in one.labels]),
    ):
        if new and list(names[1:])[-len(new) :] != new:
            raise ModelError(
                f"what surgery added are not the last {what} of the model",
                found=f"{', '.join(new[:5])} of {len(names):,}",
                expected=f"… {', '.join(names[-5:])}",
            )
    told = [one.n_categories for one in surgery if one.n_categories]
    added = [sum(own) for own in zip(*told, strict=False)]
    fit = all(len(own) == len(n_categories) for own in told)
    if not fit or any(n >= whole for n, whole in zip(added, n_categories, strict=False)):
        raise ModelError(
            "the categories that surgery added are not those of the model",
            found=told,
            expected=f"for each of {len(n_categories)} covariates fewer than it has: "
            f"{list(n_categories)}",
        )


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
            "n_categories": {"type": "array", "items": {"type": "integer", "minimum": 0}},
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
