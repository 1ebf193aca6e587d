"""From labelled cells of a store to labels of others, by their neighbours in an embedding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.config import VoteKernel
from atlas.errors import ConfigError
from atlas.evaluation.calibration import PUBLISHED, SetRule, UnknownRule, leave_out
from atlas.evaluation.knn_labels import Answer, KnnLabels
from atlas.evaluation.neighbours import Backend
from atlas.evaluation.transfer_score import UNKNOWN, QueryScore, Transferred, score_query
from atlas.hub import Package
from atlas.models import LabelTree
from atlas.store import CountStore
from atlas.store.annotate import STUDY_COLUMN
from atlas.store.options import check_name
from atlas.workflows.embedding import check_writable
from atlas.workflows.hierarchy import Hierarchy, read_hierarchy, tree_above
from atlas.workflows.misfitting import Asked, misfit_of
from atlas.workflows.rows import RowsOrMask, mask_of
from atlas.workflows.transfer_result import TransferredLabels
from atlas.workflows.voting import labels_of, of_package, of_store

Codes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_BLOCK_VALUES = 2**24
"""Probabilities that are held at a time."""


def transfer_labels(
    store: CountStore,
    *,
    embedding: str,
    reference: RowsOrMask | Package,
    query: RowsOrMask = None,
    name: str | None = "transferred",
    k: int = 50,
    kernel: VoteKernel = "gaussian",
    false_unknown: float | None = None,
    sets: float | None = None,
    per_label: bool = False,
    calibrate_by: str = "study",
    misfit: bool = False,
    hierarchy: Hierarchy | None = None,
    label_key: str | None = None,
    seed: int = 0,
    backend: Backend = "auto",
) -> TransferredLabels:
    """Label query cells by their k nearest reference cells in an embedding.

    A neighbour at distance d weighs exp(-d² / 2σ²), σ² the mean of the query's own k squared
    distances (other kernels by name: :func:`atlas.evaluation.kernels.kernel_weights`). P of a label
    is the share of the weights of the neighbours that have it, the label given is the most
    probable, of equals that of the nearest neighbour, and u = 1 - P is its uncertainty (after
    scArches, Lotfollahi et al. 2022, Methods, "Cell type annotation").

    Beside u each cell has a distance score, which tells how far it is from the reference in units
    of the reference's own distances (:class:`atlas.evaluation.novelty.DistanceScale`): cells of a
    type that the reference lacks are often all the same certain of a label, but lie outside. Some
    do not: the model has laid them among cells that it knows. ``misfit`` compares counts
    (:mod:`atlas.evaluation.misfit`): those of a cell's neighbours with those of the reference cells
    that they lie among.

    A cell is *Unknown* where u > .5 (the paper). With ``false_unknown`` it is so where u or the
    distance is above a line; the lines are drawn by leaving each study out of the reference, so
    that at most this share of left-out cells of known types are called Unknown. ``sets`` gives each
    cell all labels that it may well have, by conformal prediction with the same cells.
    :mod:`atlas.evaluation.calibration` says what is guaranteed and what is not for a new study.

    With a hierarchy the labels of all levels lie on one path, from the most probable root on to the
    most probable child. The tree is that of the reference's labels: a branch none of whose labels
    it has is left out. Cells labelled with a group vote for it and, below it, not at all.

    Parameters
    ----------
    store
        An open store.
    embedding
        Name of an embedding kept with it, in which reference and query lie.
    reference, query
        Cells by an obs column (``"study=a,b"``), or masks (n_obs,). Cells of the reference without
        a label do not vote. Without a query all cells outside the reference are labelled. Or the
        reference is a package that was fetched (:func:`atlas.load_package`), whose cells need not
        be in the store: the embedding is then one by its model extended. An index that is kept with
        the embedding, or came with the package, is searched.
    name
        Keep what is found as these obs columns: ``NAME`` (a label, or ``Unknown``),
        ``NAME_uncertainty``, ``NAME_distance``, ``NAME_misfit`` if asked for, with sets
        ``NAME_set`` (labels joined by ``"; "``), and with a hierarchy ``NAME_level_0`` (coarsest),
        ``NAME_level_0_uncertainty`` and so on. None keeps none. Cells that are not of the query
        keep what they had.
    k
        Neighbours that vote. A type with fewer than k / 2 cells in the reference hardly wins.
    kernel
        ``"gaussian"``; ``"scarches"``, the published one; ``"uniform"``, the plain vote.
    false_unknown
        Share of cells of known types that may be called Unknown; None for u > .5.
    sets
        Probability with which label sets hold the label, such as .9; None for no sets.
    per_label
        Draw the line of the sets for each label apart.
    calibrate_by
        The obs column whose groups are left out in turn; ``"batch"`` for one study of several
        batches.
    misfit
        Also tell how unlike the reference each cell is in what it expresses. Which of the two
        scores finds a type that is not there depends on the studies (benchmarks/bench_transfer.py).
    hierarchy
        The parent of each label: a mapping, or a file (JSON, or a table of child and parent).
    label_key
        The obs column of the labels; the store's own labels when None.
    seed
        Of samples: of cells that are left out, and of those by which distances are known.
    backend
        Of :func:`atlas.evaluation.neighbours.nearest`; another than ``"auto"`` searches exactly and
        without the index of the embedding.

    Raises
    ------
    ConfigError, MissingColumnError
        Reference and query share cells, or either has none; the reference has no labels, or not
        more than k labelled cells; there is nothing to calibrate by; an option is out of range;
        ``name`` is an obs column that was not made here.
    StoreError, ModelError
        The store has no such embedding, or it holds values that are not finite; its index is not
        its own; or the cells of the package do not lie in it.
    """
    check_share("false_unknown", false_unknown)
    check_share("sets", sets)
    if name is not None:
        check_name(name, "label column")
        check_writable(store, f"name={name!r}")
        check_free(store, name)
    calibrated = false_unknown is not None or sets is not None
    groups = calibrate_by if calibrated else None
    if isinstance(reference, Package):
        if misfit:
            raise ConfigError(
                "The misfit compares counts of cells that are in the store",
                found="misfit with a package as the reference",
                expected="reference cells of the store",
                do="leave it out, or ingest counts that the package has as a study",
                path=reference.folder,
            )
        asked = _numbers(store, "query", mask_of(store, query))
        z = store.embedding(embedding)
        voting = of_package(
            reference,
            store,
            z,
            embedding=embedding,
            label_key=label_key,
            groups=groups,
            backend=backend,
        )
        texts = labels_of(store, None)
    else:
        rows, asked = _cells(store, reference, query)
        z = store.embedding(embedding)
        texts = labels_of(store, label_key)
        voting = of_store(
            store,
            rows,
            z,
            texts,
            embedding=embedding,
            label_key=label_key,
            groups=groups,
            backend=backend,
        )
    parent_of = {} if hierarchy is None else read_hierarchy(hierarchy)
    tree = tree_above(set(voting.texts), parent_of)
    nodes = tree.codes(voting.texts).astype(np.int64)
    options = {"k": k, "kernel": kernel, "seed": seed, "backend": backend}
    knn = KnnLabels(voting.z, nodes, tree, search=voting.search, **options)  # type: ignore[arg-type]
    left_out, unknown_rule, set_rule = None, PUBLISHED, None
    if voting.groups is not None:
        left_out = leave_out(voting.z, nodes, voting.groups, tree, **options)  # type: ignore[arg-type]
        if false_unknown is not None:
            unknown_rule = left_out.unknown_rule(false_unknown)
            if math.isinf(unknown_rule.uncertainty_above):
                warnings.warn(
                    f"no cell is called Unknown: of {int(left_out.known.sum()):,} left-out cells "
                    f"of known types no line can be drawn with {false_unknown:g} of them beyond",
                    stacklevel=2,
                )
        if sets is not None:
            set_rule = left_out.set_rule(sets, per_label)
    found = _ask(knn, z, asked, unknown_rule, set_rule)
    if misfit and voting.rows is not None:  # a package was refused
        cells = Asked(asked, found.path[:, -1], voting.rows, voting.search)
        found = replace(
            found, misfit=misfit_of(store, embedding, cells, seed=seed, backend=backend)
        )
    column = name or "transferred"
    table = _table(found, tree, column)
    table.index = store.obs([]).index[asked]
    if name is not None:
        study = np.asarray(store.studies, object)[store.obs_codes["study"][asked]]
        store.annotate(table.assign(**{STUDY_COLUMN: study}))
    return TransferredLabels(
        table=table,
        counts={str(label): int(n) for label, n in table[column].value_counts().items()},
        n_reference=len(voting.z),
        k=k,
        kernel=kernel,
        mean_uncertainty=float(found.uncertainty[:, -1].mean()),
        mean_distance=float(found.distance.mean()),
        few_cells={
            tree.names[node]: int(n) for node, n in enumerate(np.bincount(nodes)) if 0 < n < k / 2
        },
        rule=unknown_rule,
        false_unknown=false_unknown,
        sets=sets,
        folds=() if left_out is None else left_out.folds(false_unknown, sets, per_label),
        score=_score(found, texts[asked], tree, parent_of),
        backend=knn.backend,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What all query cells got, block after block; as in :class:`Transferred`."""

    path: Codes
    unknown: Mask
    uncertainty: npt.NDArray[np.float64]
    distance: npt.NDArray[np.float64]
    sets: Mask | None
    misfit: npt.NDArray[np.float64] | None = None


def _ask(
    knn: KnnLabels,
    z: npt.NDArray[np.float32],
    asked: Codes,
    unknown_rule: UnknownRule,
    set_rule: SetRule | None,
) -> Found:
    tree = knn.tree
    n, levels = len(asked), tree.n_levels
    out = Found(
        path=np.empty((n, levels), np.int64),
        unknown=np.empty((n, levels), bool),
        uncertainty=np.empty((n, levels)),
        distance=np.empty(n),
        sets=None if set_rule is None else np.empty((n, len(tree.leaves)), bool),
    )
    block = max(1, _BLOCK_VALUES // max(knn.k, len(tree.parents)))
    for start in range(0, n, block):
        rows = slice(start, start + block)
        answer: Answer = knn.ask(z[asked[rows]])
        out.path[rows] = answer.path
        out.uncertainty[rows] = 1 - answer.probability
        out.distance[rows] = answer.distance
        out.unknown[rows] = unknown_rule.applies(out.uncertainty[rows], answer.distance[:, None])
        if set_rule is not None and out.sets is not None:
            out.sets[rows] = set_rule.sets(answer, tree)
    return out


def _cells(store: CountStore, reference: RowsOrMask, query: RowsOrMask) -> tuple[Codes, Codes]:
    """Rows of the reference, and of the query."""
    if reference is None:
        raise ConfigError(
            "No cells are given whose labels are carried over",
            expected="reference cells by an obs column, such as study=a,b, or a mask",
        )
    voting = mask_of(store, reference)
    asking = ~voting if query is None else mask_of(store, query)
    if both := int((voting & asking).sum()):
        raise ConfigError(
            "reference and query share cells",
            found=f"{both:,} cells in both",
            expected="no cell in both, as it would be labelled by itself",
            do="choose them so that they do not overlap",
            path=store.path,
        )
    return _numbers(store, "reference", voting), _numbers(store, "query", asking)


def _numbers(store: CountStore, what: str, mask: npt.NDArray[np.bool_]) -> Codes:
    """Numbers of the chosen rows, of which there has to be one."""
    if not mask.any():
        raise ConfigError(
            f"There is no cell in the {what}",
            found=f"none of {store.n_obs:,} cells",
            expected="one at least",
            path=store.path,
        )
    return np.flatnonzero(mask)


def _table(found: Found, tree: LabelTree, name: str) -> pd.DataFrame:
    columns: dict[str, Any] = {
        **_labels_at(found, tree, -1, name),
        f"{name}_distance": found.distance,
    }
    if found.misfit is not None:
        columns[f"{name}_misfit"] = found.misfit
    if found.sets is not None:
        chosen, which = np.unique(found.sets, axis=0, return_inverse=True)
        classes = np.array(tree.classes, object)
        texts = ["; ".join(classes[row]) for row in chosen]
        columns[f"{name}_set"] = pd.Categorical.from_codes(which.ravel(), pd.Index(texts))
    for level in range(tree.n_levels if tree.n_levels > 1 else 0):
        columns |= _labels_at(found, tree, level, f"{name}_level_{level}")
    return pd.DataFrame(columns)


def _labels_at(found: Found, tree: LabelTree, level: int, name: str) -> dict[str, Any]:
    """Two columns: the label at a level, or Unknown, and its uncertainty."""
    offered = np.unique(tree.at_level(level if level >= 0 else tree.n_levels - 1))
    codes = np.searchsorted(offered, found.path[:, level])
    codes[found.unknown[:, level]] = len(offered)
    names = pd.Index([*(tree.names[node] for node in offered), UNKNOWN])
    return {
        name: pd.Categorical.from_codes(codes, names),
        f"{name}_uncertainty": found.uncertainty[:, level],
    }


def _score(
    found: Found, own: npt.NDArray[np.object_], tree: LabelTree, parent_of: Mapping[str, str]
) -> QueryScore | None:
    """Agreement with the labels that query cells have; None where they have none."""
    rows = np.flatnonzero(own != "")
    if not len(rows):
        return None
    names, which = np.unique(own[rows].astype(str), return_inverse=True)
    extra: list[str] = []
    truth = np.empty(len(names), np.int64)
    for i, name in enumerate(names):
        # a label finer than the reference's counts as that of the reference
        at = name
        while at not in tree.names and at in parent_of:
            at = parent_of[at]
        if name in tree.names or at in tree.classes:
            truth[i] = tree.names.index(at)
        else:
            truth[i] = len(tree.names) + len(extra)
            extra.append(name)
    given = Transferred(
        truth=truth[which],
        known=truth[which] < len(tree.names),
        path=found.path[rows],
        unknown=found.unknown[rows],
        uncertainty=found.uncertainty[rows, -1],
        distance=found.distance[rows],
        sets=None if found.sets is None else found.sets[rows],
        misfit=None if found.misfit is None else found.misfit[rows],
    )
    return score_query(given, tree, (*tree.names, *extra))


def check_share(option: str, share: float | None) -> None:
    """Refuse a share that is none, such as 5 for 5 %."""
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"{option} is out of range", found=share, expected="within 0 and 1")


def check_free(store: CountStore, name: str) -> None:
    """Refuse to write over a column that did not come from here."""
    there = set(store.obs().columns)
    if name in there and f"{name}_distance" not in there:
        raise ConfigError(
            f"There is an obs column {name!r} already, and it holds no transferred labels",
            found=name,
            expected="a name of its own for these labels",
            do="give another name, or rename that column in the input",
            path=store.path,
        )
