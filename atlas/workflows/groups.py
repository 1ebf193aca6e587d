"""Which groups of cells are compared, and what was counted in them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from atlas.errors import ConfigError, ModelError
from atlas.evaluation.differential import GroupCounts
from atlas.models import Inputs, LabelTree
from atlas.models.columns import UNLABELED
from atlas.store import CountStore, FilesSource
from atlas.workflows.rows import Rows, columns_of, refuse_measurements, rows_where, texts_of

Side = tuple[int, ...]
"""Codes of the groups on one side of a comparison."""
REST = "Rest"
FEW_CELLS = 10
"""A group of fewer is cautioned about: its cells say little of others of their kind."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two sides and what they are called."""

    name1: str
    name2: str
    side1: Side
    side2: Side


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of cells and the comparisons between them.

    Attributes
    ----------
    codes
        Group of each cell of the store, -1 for none: int32, (n_obs,).
    n_groups
        How many groups there are.
    comparisons
        Which are compared.
    """

    codes: npt.NDArray[np.int32]
    n_groups: int
    comparisons: tuple[Comparison, ...]


def groups_of(
    store: CountStore | FilesSource,
    chosen: npt.NDArray[np.bool_],
    group1: Rows | None,
    group2: Rows | None,
    by: str | None,
    pairwise: bool,
    unlabeled: str = UNLABELED,
) -> Groups:
    """Groups by obs columns, among the cells chosen; see :func:`differential_expression`.

    Cells without a value, or with ``unlabeled``, are no group of ``by`` and not in the rest of
    another group, unless they are asked for by name. A warning tells how many they are.

    Raises
    ------
    ConfigError, MissingColumnError
        Groups are not given or given twice, are empty, or overlap; there is no such column or
        value.
    """
    if (group1 is None) == (by is None) or (by is not None and group2 is not None):
        raise ConfigError(
            "Groups are given by group1 (and group2), or by a column",
            found=f"group1={group1!r}, group2={group2!r}, by={by!r}",
            expected="one of the two",
            do="--group1 column=value [--group2 column=value], or --by column",
        )
    if by is not None:
        refuse_measurements(store, by, "groups of cells")
        there = _labeled(store, (by,), chosen, unlabeled)
        texts = texts_of(store, by).where(there)
        values = sorted(set(texts.dropna()))
        codes = pd.Categorical(texts, categories=values).codes.astype(np.int32)
        return Groups(codes, len(values), _all_of(values, f"obs column {by!r}", pairwise))
    assert group1 is not None
    _no_pairwise(pairwise)
    first = rows_where(store, group1) & chosen
    if group2 is None:
        second = _labeled(store, columns_of(group1), chosen & ~first, unlabeled)
    else:
        second = rows_where(store, group2) & chosen
    for name, mask, asked in (("group1", first, group1), ("group2", second, group2)):
        if not mask.any():
            raise ConfigError(
                f"There is no cell in {name}",
                found=f"{name}={asked!r}, among {int(chosen.sum()):,} cells chosen",
                expected="at least one cell",
                path=store.path,
            )
    if both := int((first & second).sum()):
        raise ConfigError(
            "The groups overlap",
            found=f"{both:,} cells in both: group1={group1!r}, group2={group2!r}",
            expected="no cell in both",
            path=store.path,
        )
    codes = np.full(store.n_obs, -1, np.int32)
    codes[first], codes[second] = 0, 1
    names = _said(group1), REST if group2 is None else _said(group2)
    return Groups(codes, 2, (Comparison(*names, (0,), (1,)),))


def comparisons_of(
    tree: LabelTree, group1: Rows | None, group2: Rows | None, by: str | None, pairwise: bool
) -> tuple[Comparison, ...]:
    """Comparisons between classes of a model: each against all others if no group is given.

    Raises
    ------
    ConfigError, ModelError
        The model has no such label, or the groups overlap or are all classes.
    """
    if by is not None or (group1 is None and group2 is not None):
        raise ConfigError(
            "Groups of the scANVI form are labels of the model",
            found=f"by={by!r}" if by is not None else "group2 without group1",
            expected=f"some of {', '.join(tree.names[:10])}",
            do="give group1 (and group2), or neither for each label against the others",
        )
    if group1 is None:
        return _all_of(tree.classes, "the model", pairwise)
    _no_pairwise(pairwise)
    sides = [_classes(tree, group1)]
    every = range(len(tree.classes))
    sides += [
        tuple(c for c in every if c not in sides[0]) if group2 is None else _classes(tree, group2)
    ]
    both = sorted(set(sides[0]) & set(sides[1]))
    if both or not sides[1]:
        raise ConfigError(
            "The groups overlap" if both else "There is no class left for group2",
            found=f"group1={group1!r}, group2={group2!r}"
            + (f": {', '.join(tree.classes[c] for c in both)} in both" if both else ""),
            expected="different classes",
        )
    names = _said(group1), REST if group2 is None else _said(group2)
    return (Comparison(*names, *sides),)


def _classes(tree: LabelTree, group: Rows) -> Side:
    """Classes that are labels of the model, or lie below them."""
    if not isinstance(group, str):
        raise ConfigError(
            "A group of the scANVI form is a label of the model, or several: A,B", found=group
        )
    wanted = [group] if group in tree.names else group.split(",")
    if unknown := [name for name in wanted if name not in tree.names]:
        raise ModelError(
            "The model was not trained on this label",
            found=", ".join(map(repr, unknown)),
            expected=f"one of {', '.join(tree.names)}",
        )
    below = tree.below[[tree.names.index(name) for name in wanted]].any(axis=0)
    return tuple(np.flatnonzero(below).tolist())


def _all_of(names: Sequence[str], where: str, pairwise: bool) -> tuple[Comparison, ...]:
    if len(names) < 2:
        raise ConfigError(
            "There are not two groups to compare",
            found=f"{len(names)} value{'s' * (len(names) != 1)} in {where}"
            + (f": {names[0]!r}" if names else ""),
            expected="at least two",
        )
    every = range(len(names))
    if pairwise:
        return tuple(Comparison(names[a], names[b], (a,), (b,)) for a, b in combinations(every, 2))
    return tuple(Comparison(names[a], REST, (a,), tuple(b for b in every if b != a)) for a in every)


def _labeled(
    store: CountStore | FilesSource,
    columns: Sequence[str],
    chosen: npt.NDArray[np.bool_],
    unlabeled: str,
) -> npt.NDArray[np.bool_]:
    """Which of the cells chosen have a value in these columns; warns of those that have none."""
    none = np.zeros(store.n_obs, bool)
    for column in columns:
        texts = texts_of(store, column)
        none |= (texts.isna() | texts.isin(["", unlabeled])).to_numpy(bool)
    if n := int((none & chosen).sum()):
        warnings.warn(
            f"{n:,} cells are left out: they have no value in obs column "
            f"{' or '.join(map(repr, columns))}" + (f", or {unlabeled!r}" if unlabeled else ""),
            UserWarning,
            stacklevel=4,
        )
    return chosen & ~none


def warn_of_groups(store: CountStore | FilesSource, groups: Groups) -> None:
    """Warn of groups of few cells, and of comparisons whose groups share no batch."""
    within = groups.codes >= 0
    cells = np.zeros((groups.n_groups, len(store.batches)), np.int64)
    np.add.at(cells, (groups.codes[within], store.obs_codes["batch"][within]), 1)
    few: dict[str, int] = {}
    apart = []
    for one in groups.comparisons:
        sides = cells[list(one.side1)].sum(axis=0), cells[list(one.side2)].sum(axis=0)
        for name, side in zip((one.name1, one.name2), sides, strict=True):
            if side.sum() < FEW_CELLS:
                few[f"{REST} of {one.name1}" if name == REST else name] = int(side.sum())
        if not (sides[0] * sides[1]).any():
            apart.append(f"{one.name1} vs {one.name2}")
    if few:
        told = ", ".join(f"{name} ({n})" for name, n in few.items())
        warnings.warn(
            f"Groups of few cells, which say little of others of their kind: {told}",
            UserWarning,
            stacklevel=3,
        )
    if apart:
        told = ", ".join(apart[:5]) + (", …" if len(apart) > 5 else "")
        warnings.warn(
            f"No batch has cells of both groups: {told}. What differs between batches is taken "
            "out, so what differs between these groups can go with it; to see it, train with a "
            "--batch-key whose batches have cells of both",
            UserWarning,
            stacklevel=3,
        )


def _no_pairwise(pairwise: bool) -> None:
    if pairwise:
        raise ConfigError(
            "Pairwise comparisons are of all values of a column, or all labels of a model",
            found="pairwise with group1",
            do="leave one of them out",
        )


def _said(group: Rows) -> str:
    """A group as the table names it."""
    if isinstance(group, str):
        return group
    return ";".join(f"{column}={','.join(map(str, v))}" for column, v in group.items())


class GroupSums:
    """Sums over the cells of each group, from which those of any side follow.

    Parameters
    ----------
    n_groups, n_genes
        Sizes.
    device
        Where the inputs are.
    """

    def __init__(self, n_groups: int, n_genes: int, device: torch.device) -> None:
        # cells whose study measured the gene, counts, cells that have it, counts per 10,000
        self._sums = torch.zeros(4, n_groups, n_genes, dtype=torch.float64, device=device)
        self._cells = torch.zeros(n_groups, dtype=torch.float64, device=device)

    def add(self, inputs: Inputs, weights: Tensor) -> None:
        """Add cells; how much of each is in which group is float32, (n_cells, n_groups)."""
        counts = inputs.measured
        totals = counts.sum(dim=-1, keepdim=True)
        share = counts * (1e4 / totals.clamp(min=1))
        there = torch.ones_like(counts) if inputs.present is None else inputs.present.float()
        for total, values in zip(
            self._sums, (there, counts, (counts > 0).float(), share), strict=True
        ):
            total += weights.T @ values
        self._cells += weights.sum(dim=0)

    def of(self, side: Iterable[int]) -> GroupCounts:
        """What was counted on a side."""
        sums = self._sums[:, list(side)].sum(dim=1).cpu().numpy()
        with np.errstate(invalid="ignore"):
            found = sums[1:] / np.where(sums[0] > 0, sums[0], np.nan)
        n_cells = float(self._cells[list(side)].sum())
        return GroupCounts(n_cells, found[0], found[1], found[2])
