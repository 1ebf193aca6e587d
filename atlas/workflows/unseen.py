"""Cells that no label of the reference fits: what groups they form, and by which genes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.evaluation.neighbours import nearest
from atlas.evaluation.transfer_score import UNKNOWN
from atlas.evaluation.unseen import connected_groups
from atlas.models import TrainedModel
from atlas.store import CountStore
from atlas.store.annotate import STUDY_COLUMN
from atlas.workflows.genes import GenesInStore
from atlas.workflows.indexing import stored_index
from loaders import SequentialLoader

K = 15
"""Neighbours of the graph, and cells that a group has at least."""
_MARKERS = 5
_MINIBATCH = 4096


@dataclass(frozen=True, slots=True)
class UnseenGroup:
    """Unknown cells that lie together, perhaps of a type that the reference lacks.

    Attributes
    ----------
    name, n_obs
        Its value in the obs column, and its cells.
    markers
        The model's genes that are highest in it above the study's other cells: by the difference of
        the mean of log(1 + counts per ten thousand), a plain ranking without a test.
    """

    name: str
    n_obs: int
    markers: tuple[str, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Of the values that :func:`dataclasses.asdict` gives."""
        return cls(values["name"], values["n_obs"], tuple(values["markers"]))


def group_unseen(
    model: TrainedModel, store: CountStore, study: str, *, embedding: str, label: str
) -> tuple[UnseenGroup, ...]:
    """Find groups among the Unknown cells of a study, and keep them as an obs column.

    Parameters
    ----------
    model
        Its genes are looked at for markers.
    store, study
        A store that has the study.
    embedding
        Of all cells.
    label
        The obs column that says ``Unknown``; the groups go to ``LABEL_group``: ``group 1`` for the
        largest, missing for all other cells.

    Returns
    -------
    tuple of UnseenGroup
        The largest first.
    """
    code = store.studies.index(study)
    start, stop = (int(store.segments[code + i]) for i in (0, 1))
    given = store.study(study).obs()[label].astype(str).to_numpy()
    rows = start + np.flatnonzero(given == UNKNOWN).astype(np.int64)
    codes = np.full(len(rows), -1, np.int64)
    if len(rows) >= K:
        z = store.embedding(embedding)
        index = stored_index(store, embedding, z)
        found = nearest(z, z[rows], K, rows) if index is None else index.neighbours(K, rows)
        codes = connected_groups(rows, found.indices, K)
    names = [f"group {i + 1}" for i in range(int(codes.max(initial=-1)) + 1)]
    of_study = np.full(stop - start, -1, np.int64)
    of_study[rows - start] = codes
    table = pd.DataFrame(
        {
            f"{label}_group": pd.Categorical.from_codes(of_study, pd.Index(names)),
            STUDY_COLUMN: study,
        },
        index=store.obs([]).index[start:stop],
    )
    store.annotate(table)
    markers = _markers(model, store, start, of_study, len(names)) if names else []
    sizes = np.bincount(codes[codes >= 0], minlength=len(names))
    return tuple(
        UnseenGroup(name, int(n), tuple(genes))
        for name, n, genes in zip(names, sizes, markers, strict=True)
    )


def _markers(
    model: TrainedModel,
    store: CountStore,
    start: int,
    codes: npt.NDArray[np.int64],
    n_groups: int,
) -> list[list[str]]:
    """Genes that stand out in each group, in one pass over the study."""
    view = GenesInStore.of(model, store).select(store)
    mask = np.zeros(store.n_obs, bool)
    mask[start : start + len(codes)] = True
    sums = np.zeros((n_groups + 1, len(model.genes)))  # the last row: cells of no group
    for minibatch in SequentialLoader(view, _MINIBATCH, rows=mask):
        counts = minibatch.to_scipy().astype(np.float64)
        total = np.asarray(counts.sum(axis=1)).ravel()
        counts.data *= np.repeat(1e4 / np.maximum(total, 1), np.diff(counts.indptr))
        np.log1p(counts.data, out=counts.data)
        own = codes[np.asarray(minibatch.rows, np.int64) - start]
        for group in np.unique(own):
            sums[group] += np.asarray(counts[own == group].sum(axis=0)).ravel()
    n = np.bincount(np.where(codes < 0, n_groups, codes), minlength=n_groups + 1)
    out = []
    for group in range(n_groups):
        others = (sums.sum(axis=0) - sums[group]) / max(1, n.sum() - n[group])
        above = sums[group] / n[group] - others
        best = np.argsort(-above, kind="stable")[:_MARKERS]
        out.append([model.genes[i] for i in best if above[i] > 0])
    return out
