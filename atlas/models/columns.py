"""Columns of obs that a model takes besides the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from atlas.models.base import CovariateSizes

UNLABELED: Final = "Unknown"


@dataclass(frozen=True, slots=True)
class ObsColumns:
    """What a model is told of each cell, by the names that obs has for it.

    Attributes
    ----------
    categorical
        Name of each categorical covariate, and its categories by code.
    continuous
        Names of the continuous covariates.
    size_factor
        Name of the column of size factors; None where the model takes none.
    label
        Name of the column of labels; None for the store's own.
    unlabeled
        The value of that column that stands for no label, as a missing one does.
    """

    categorical: tuple[tuple[str, tuple[str, ...]], ...] = ()
    continuous: tuple[str, ...] = ()
    size_factor: str | None = None
    label: str | None = None
    unlabeled: str = UNLABELED

    @property
    def sizes(self) -> CovariateSizes:
        """Number of covariates and of their categories."""
        return CovariateSizes(
            tuple(len(categories) for _, categories in self.categorical), len(self.continuous)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``unlabeled`` only where it is not the usual one.

        Models with the usual one so stay those of before, which earlier versions read.
        """
        unlabeled = {} if self.unlabeled == UNLABELED else {"unlabeled": self.unlabeled}
        return {
            "categorical": {name: list(categories) for name, categories in self.categorical},
            "continuous": list(self.continuous),
            "size_factor": self.size_factor,
            "label": self.label,
            **unlabeled,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls(
            tuple((name, tuple(found)) for name, found in values["categorical"].items()),
            tuple(values["continuous"]),
            values["size_factor"],
            values["label"],
            values.get("unlabeled", UNLABELED),
        )


NO_COLUMNS = ObsColumns()
