"""Names of donors in the names of batches and covariates: they leave only where they are named."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from atlas.models import TrainedModel

_WORDS: Final = "(donor|patient|subject|indiv(idual)?|participant|proband|volunteer|person)s?"
_COLUMN: Final = re.compile(
    rf"{_WORDS}(ids?|names?|nos?|nrs?|num(ber)?s?|codes?|keys?|labels?|barcodes?|index)?$"
)
_NAME: Final = re.compile(
    rf"{_WORDS}[\W_]*((id|no|nr)[\W_]*)?([a-z]?[0-9][a-z0-9]*|[a-z])(?![a-z0-9])"
)
_ANYTHING: Final = re.compile(r"[0-9]{1,2}|[^\W_]")
"""Names of donors that are not looked for within other names: "1" or "A" is in many."""


def is_donor_column(name: str) -> bool:
    """Whether an obs column is one of donors by its name, such as ``donor_id`` or ``Patient``."""
    return _COLUMN.search(re.sub(r"[^a-z]", "", name.lower())) is not None


def looks_like_donor(name: str) -> bool:
    """Whether a name says itself that it is a donor's, such as ``lane2_donorA``."""
    return _NAME.search(name.lower()) is not None


def tells_of(name: str, donors: Collection[str]) -> bool:
    """Whether a name is, or has in it as a word, that of one of some donors."""
    name = name.casefold()
    pieces = {name, *name.split("|")}  # columns combined
    for donor in donors:
        donor = donor.casefold()
        if donor in pieces:
            return True
        if donor in name and not _ANYTHING.fullmatch(donor):
            within = rf"(?<![^\W_]){re.escape(donor)}(?![^\W_])"
            if re.search(within, name):
                return True
    return False


@dataclass(frozen=True, slots=True)
class Donors:
    """Names of donors in the cells of a reference.

    Attributes
    ----------
    hidden, named
        By study: those in columns of donors that were not named for sharing, and that were.
    columns
        The columns of donors that were not named.
    """

    hidden: Mapping[str, frozenset[str]]
    named: Mapping[str, frozenset[str]]
    columns: tuple[str, ...]

    def told(
        self, names: Sequence[str], study: str | None, *, all_of_donors: bool = False
    ) -> list[bool]:
        """Which names tell of a donor who was not named; of all studies where None."""
        hidden = self._of(self.hidden, study)
        named = self._of(self.named, study)
        return [
            tells_of(name, hidden)
            or ((all_of_donors or looks_like_donor(name)) and not tells_of(name, named))
            for name in names
        ]

    @staticmethod
    def _of(donors: Mapping[str, frozenset[str]], study: str | None) -> frozenset[str]:
        if study is not None:
            return donors.get(study, frozenset())
        return frozenset().union(*donors.values())


def told_batches(model: TrainedModel, donors: Donors) -> list[str]:
    """The batches of a model whose names, within their study, tell of a donor."""
    told = []
    for batch in model.batches:
        study, slash, name = batch.partition("/")
        if slash:
            tells = donors.told([name], study)[0]
        else:  # a whole study, or a name by scvi-tools
            tells = batch not in model.studies and donors.told([batch], None)[0]
        if tells:
            told.append(batch)
    return told


def neutral_batches(
    batches: Sequence[str], which: Collection[str], studies: Collection[str]
) -> dict[str, str]:
    """New names of some of the batches: ``STUDY/batch 1`` and so on, apart from the others.

    A batch that is a whole study has its name and keeps it; one that names no study, as those of
    scvi-tools, becomes ``batch 1``.
    """
    new: dict[str, str] = {}
    taken = set(batches) - set(which)
    numbers: dict[str, int] = {}
    for batch in batches:
        if batch not in which or batch in studies:
            continue
        study, slash, _ = batch.partition("/")
        before = f"{study}/" if slash else ""
        while True:
            numbers[before] = numbers.get(before, 0) + 1
            name = f"{before}batch {numbers[before]}"
            if name not in taken:
                break
        new[batch] = name
    return new


def with_batches(model: TrainedModel, new: Mapping[str, str]) -> TrainedModel:
    """A model whose batches have other names, also where it says what surgery added."""

    def renamed(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(new.get(name, name) for name in names)

    surgery = tuple(replace(one, batches=renamed(one.batches)) for one in model.surgery)
    return replace(model, batches=renamed(model.batches), surgery=surgery)


def without_covariates_of_donors(
    model: TrainedModel, donors: Donors, named: Collection[str]
) -> tuple[TrainedModel, dict[str, int]]:
    """A model whose covariates do not tell of donors, and how many values each lost.

    A value becomes ``COLUMN 1 of the reference``: a stranger's cells must not have it.
    """
    categorical, replaced = [], {}
    for column, values in model.columns.categorical:
        told = donors.told(values, None, all_of_donors=is_donor_column(column))
        if column in named or not any(told):
            categorical.append((column, values))
            continue
        neutral = [f"{column} {i} of the reference" for i in range(1, len(values) + 1)]
        pairs = zip(values, neutral, told, strict=True)
        categorical.append((column, tuple(new if tell else old for old, new, tell in pairs)))
        replaced[column] = sum(told)
    columns = replace(model.columns, categorical=tuple(categorical))
    return replace(model, columns=columns), replaced
