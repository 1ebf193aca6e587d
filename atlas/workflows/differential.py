"""From a model and a store to differential expression between groups of cells.

Cells are drawn for each side first and encoded once, in the pass that counts what the groups
hold; then pairs of draws of z are decoded, both under the same conditions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from atlas.errors import ConfigError
from atlas.evaluation import differential as maths
from atlas.evaluation.differential import GroupCounts, Sides
from atlas.models import TrainedModel
from atlas.models.columns import UNLABELED
from atlas.models.layers import sample_normal
from atlas.store import CountStore, FilesSource
from atlas.workflows.groups import (
    Comparison,
    Groups,
    GroupSums,
    Side,
    comparisons_of,
    groups_of,
    warn_of_groups,
)
from atlas.workflows.labelling import classes_of
from atlas.workflows.output import check_table_name, write_table
from atlas.workflows.pairs import DecodedPairs, batch_weights, draw_conditions
from atlas.workflows.rows import Rows, RowsOrMask, mask_of
from atlas.workflows.streaming import CellStream

Mode = Literal["change", "vanilla"]
DELTA = 0.25
"""The log2 fold change that counts, where none is given."""


def differential_expression(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    group1: Rows | None = None,
    group2: Rows | None = None,
    by: str | None = None,
    pairwise: bool = False,
    mode: Mode = "change",
    scanvi: bool = False,
    batches: Sequence[str] | None = None,
    delta: float | None = None,
    fdr: float = 0.05,
    sides: Sides | None = None,
    pseudocount: float | None = None,
    n_pairs: int = 5000,
    rows: RowsOrMask = None,
    unlabeled: str = UNLABELED,
    out: str | PathLike[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> pd.DataFrame:
    """Bayesian differential expression between groups of cells.

    Shares of genes are compared between draws of z of a cell of each group, both decoded for the
    same batch, which is drawn by its frequency: no gene is called for being higher in the batches
    that one group happens to come from (scVI, Lopez et al. 2018, Methods 4.3; scANVI, Xu et al.
    2021, Online Methods, "Bayesian differential expression"). Further covariates are drawn like the
    batch, from cells of the store.

    Parameters
    ----------
    model
        A trained model.
    store
        An open store, or files as they are.
    group1, group2
        Cells by an obs column, such as ``"cell_type=B"``; without ``group2`` all other cells that
        have a value there. In the scANVI form labels of the model.
    by
        In place of groups: each value of this obs column against all others.
    pairwise
        Each value, or label, against each other instead.
    mode
        ``"change"``: log fold changes and the probability that they exceed ``delta``
        (:func:`atlas.evaluation.differential.change`). ``"vanilla"``: Bayes factors of one share
        being higher than the other, by however little, with the log fold changes and the expected
        rate of wrong directions beside them (:func:`atlas.evaluation.differential.vanilla`).
    scanvi
        The scANVI form: z is drawn from p(z | u, c) for the label c, u from the aggregate of
        q(u | z, c) over the cells, weighted by their q(c | x), which also weighs the raw means.
        Labels of cells are not looked at.
    batches
        Decode for these, equally often, in place of all by their frequencies in the store.
    delta, sides
        Of mode ``change`` alone: the log fold change that counts, 0.25 where None; and
        ``"three"`` (where None) or ``"two"`` sides.
    fdr, pseudocount
        The expected false discovery rate to keep to, and what is added to shares before their
        logarithm; estimated where None.
    n_pairs
        Pairs for each comparison.
    rows
        Cells to look at: by an obs column, or a mask (n_obs,); all when None.
    unlabeled
        The value that stands for no label, besides missing and empty ones: such cells are neither a
        group of ``by`` nor among all others. A warning tells how many they are, and others tell of
        groups of fewer than 10 cells, and of groups that no batch has both of.
    out
        A CSV or TSV to write.
    seed
        Of the draws.
    device, progress
        As for :func:`atlas.embed`.

    Returns
    -------
    DataFrame
        A row for each gene and comparison, the most certain first, with scvi-tools' names of
        columns: what the mode gives; ``n_cells1`` (in the scANVI form the sum of their q),
        ``raw_mean1``, ``non_zeros_proportion1``, ``raw_normalized_mean1`` and the same of group 2,
        over the cells whose study measured the gene; ``comparison``, ``group1``, ``group2``.

    Raises
    ------
    ConfigError, MissingColumnError, ModelError
        Groups that are empty, overlap or are not there; an unknown label or batch; a number out of
        range.
    """
    _check(mode, sides, delta, fdr, n_pairs, pseudocount)
    if out is not None:
        check_table_name(out)
    rng = np.random.default_rng(seed)
    weights = batch_weights(model, store, batches)
    if scanvi:
        comparisons = comparisons_of(classes_of(model)[1], group1, group2, by, pairwise)
        stream = CellStream(
            model, store, rows=rows, device=device, progress="cells" if progress else None
        )
        drawn = _draw_classes(model, stream, comparisons, n_pairs, rng)
    else:
        groups = groups_of(store, mask_of(store, rows), group1, group2, by, pairwise, unlabeled)
        warn_of_groups(store, groups)
        stream = CellStream(
            model,
            store,
            rows=groups.codes >= 0,
            device=device,
            progress="cells" if progress else None,
        )
        comparisons = groups.comparisons
        drawn = _draw_cells(model, stream, groups, n_pairs, rng)
    conditions = draw_conditions(stream, weights, n_pairs, rng)
    tables = []
    for comparison in tqdm(comparisons, "comparisons", disable=not progress):
        side1, side2 = comparison.side1, comparison.side2
        pairs = DecodedPairs(model, drawn.z[side1], drawn.z[side2], conditions)
        counts1, counts2 = drawn.counts[side1], drawn.counts[side2]
        scales = maths.summarise(pairs)
        offset = pseudocount
        if offset is None:
            offset = maths.pseudocount_of(scales, counts1, counts2)
        if mode == "vanilla":
            table = maths.vanilla(pairs, scales, pseudocount=offset, fdr=fdr)
            order = ["bayes_factor"]
        else:
            table = maths.change(
                pairs,
                scales,
                pseudocount=offset,
                delta=DELTA if delta is None else delta,
                sides=sides or "three",
                fdr=fdr,
            )
            order = ["proba_de", "size"]
        table.index = pd.Index(model.genes, name="gene")
        tables.append(_finished(table, comparison, counts1, counts2, order))
    found = pd.concat(tables)
    if out is not None:
        write_table(found, out, "gene")
    return found


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Draws of z for each side, (n_pairs, n_latent), and what was counted on it."""

    z: Mapping[Side, Tensor]
    counts: Mapping[Side, GroupCounts]


def _finished(
    table: pd.DataFrame,
    comparison: Comparison,
    counts1: GroupCounts,
    counts2: GroupCounts,
    order: list[str],
) -> pd.DataFrame:
    """The table of a comparison with what was counted, the most certain genes first."""
    for i, counts in enumerate((counts1, counts2), start=1):
        for field in dataclasses.fields(counts):
            table[f"{field.name}{i}"] = getattr(counts, field.name)
    if "size" in order:
        table["size"] = table["lfc_median"].abs()  # of equally certain genes the larger change
    table = table.sort_values(order, ascending=False, kind="stable")
    table = table.drop(columns="size", errors="ignore")
    names = comparison.name1, comparison.name2
    return table.assign(comparison=" vs ".join(names), group1=names[0], group2=names[1])


def _sides_of(comparisons: Sequence[Comparison]) -> list[Side]:
    """The different sides, in order."""
    return list(dict.fromkeys(side for c in comparisons for side in (c.side1, c.side2)))


def _draw_cells(
    model: TrainedModel,
    stream: CellStream,
    groups: Groups,
    n_pairs: int,
    rng: np.random.Generator,
) -> _Drawn:
    """Draw cells of each side, then go through all cells once and encode those drawn."""
    sides = _sides_of(groups.comparisons)
    rows = {
        side: rng.choice(np.flatnonzero(np.isin(groups.codes, side)), n_pairs) for side in sides
    }
    encoded = np.unique(np.concatenate(list(rows.values())))
    mean = torch.empty(len(encoded), model.module.n_latent, device=stream.device)
    variance = torch.empty_like(mean)
    sums = GroupSums(groups.n_groups, len(model.genes), stream.device)
    for cells in stream:
        codes = torch.from_numpy(groups.codes[cells.rows].astype(np.int64)).to(stream.device)
        weights = torch.zeros(len(cells.inputs.counts), groups.n_groups, device=stream.device)
        weights[torch.arange(cells.n_cells, device=stream.device), codes] = 1
        sums.add(cells.inputs, weights)
        first, last = np.searchsorted(encoded, (cells.rows[0], cells.rows[-1] + 1))
        if last > first:
            here = torch.from_numpy(np.searchsorted(cells.rows, encoded[first:last]))
            found = model.module.posterior(cells.inputs)
            for kept, values in zip((mean, variance), found, strict=True):
                kept[first:last] = values[here]
    generator = _generator(rng, stream.device)
    z = {}
    for side in sides:
        at = torch.from_numpy(np.searchsorted(encoded, rows[side]))
        z[side] = sample_normal(mean[at], variance[at], generator)
    return _Drawn(z, {side: sums.of(side) for side in sides})


def _draw_classes(
    model: TrainedModel,
    stream: CellStream,
    comparisons: Sequence[Comparison],
    n_pairs: int,
    rng: np.random.Generator,
) -> _Drawn:
    """Draws of z from p(z | u, c), u from the aggregate posterior of the class, in one pass."""
    module, tree = classes_of(model)
    n_classes = len(tree.classes)
    generator = _generator(rng, stream.device)
    sums = GroupSums(n_classes, len(model.genes), stream.device)
    held = torch.zeros(n_classes, n_pairs, module.n_latent, device=stream.device)
    mass = np.zeros(n_classes)
    for cells in stream:
        log_q = module.log_probabilities(cells.inputs)[:, list(tree.leaves)]
        q = log_q.exp()
        q[cells.n_cells :] = 0
        sums.add(cells.inputs, q)
        mean, variance = module.posterior(cells.inputs)
        for c, weights in enumerate(q[: cells.n_cells].T.double().cpu().numpy()):
            slots, drawn = replaced(mass, c, weights, n_pairs, rng)
            at = torch.from_numpy(drawn)
            held[c, torch.from_numpy(slots)] = sample_normal(mean[at], variance[at], generator)
    sides = _sides_of(comparisons)
    z = {}
    for side in sides:
        share = mass[list(side)]
        if not share.sum():
            raise ConfigError(
                "No cell can be of these classes",
                found=", ".join(tree.classes[c] for c in side),
                expected="classes that the model gives to some of the cells, be it with doubt",
            )
        classes = torch.from_numpy(rng.choice(side, n_pairs, p=share / share.sum()))
        classes = classes.to(stream.device)
        # Which slot of a class is taken does not matter, as all are drawn alike.
        cells_z = held[classes, torch.arange(n_pairs, device=stream.device)]
        u = sample_normal(*module.u_posterior(cells_z, classes), generator)
        z[side] = module.sample_class(u, classes, generator)
    return _Drawn(z, {side: sums.of(side) for side in sides})


def replaced(
    mass: npt.NDArray[np.float64],
    group: int,
    weights: npt.NDArray[np.float64],
    n_slots: int,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which slots of a group's reservoir take which of some new cells.

    After all cells each slot holds one of them, independently of the other slots, with a
    probability proportional to its weight: a slot takes a new cell with the share that the new
    cells have of all weight seen, ``mass[group]``, which is brought up to date.
    """
    new = weights.sum()
    if not new > 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    mass[group] += new
    slots = np.flatnonzero(rng.random(n_slots) < new / mass[group])
    return slots, rng.choice(len(weights), len(slots), p=weights / new)


def _generator(rng: np.random.Generator, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(int(rng.integers(2**63)))


def _check(
    mode: str,
    sides: str | None,
    delta: float | None,
    fdr: float,
    n_pairs: int,
    pseudocount: float | None,
) -> None:
    for name, value, choices in (("mode", mode, Mode), ("sides", sides, Sides)):
        if value is not None and value not in get_args(choices):
            expected = " or ".join(map(repr, get_args(choices)))
            raise ConfigError(f"{name} is not offered", found=repr(value), expected=expected)
    for name, number, fits, expected in (
        ("delta", delta, delta is None or delta >= 0, "at least 0"),
        ("fdr", fdr, 0 < fdr < 1, "between 0 and 1"),
        ("n_pairs", n_pairs, n_pairs >= 1, "at least 1"),
        ("pseudocount", pseudocount, pseudocount is None or pseudocount > 0, "above 0"),
    ):
        if not fits:
            raise ConfigError(f"{name} is out of range", found=number, expected=expected)
    given = {"delta": delta, "sides": sides}
    if mode == "vanilla" and (vain := [name for name, v in given.items() if v is not None]):
        raise ConfigError(
            "Mode vanilla asks which share is higher, by however little",
            found=", ".join(f"{name}={given[name]!r}" for name in vain),
            expected="neither delta nor sides",
            do="leave them out, or choose --mode change",
        )
