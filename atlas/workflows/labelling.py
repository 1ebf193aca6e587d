"""From a scANVI model and a store to labels of its cells."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import ConfigError, ModelError
from atlas.models import SCANVI, LabelTree, TrainedModel
from atlas.store import CountStore, FilesSource
from atlas.store.annotate import STUDY_COLUMN
from atlas.store.options import check_name
from atlas.workflows.embedding import check_writable
from atlas.workflows.output import check_table_name, write_table
from atlas.workflows.rows import RowsOrMask
from atlas.workflows.streaming import CellStream


@dataclass(frozen=True, slots=True)
class Labelling:
    """Labels that a model gave to cells.

    Attributes
    ----------
    table
        By row name, in the order of the store: ``NAME`` (categories), ``NAME_probability``,
        ``NAME_entropy`` and, with a hierarchy, ``NAME_level_0`` (coarsest),
        ``NAME_level_0_probability`` and so on.
    counts
        Cells of each class, classes without any included.
    mean_probability, mean_entropy
        Of the class given, and of all of a cell's classes in nats, over cells.
    """

    table: pd.DataFrame
    counts: dict[str, int]
    mean_probability: float
    mean_entropy: float


def label(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    name: str | None = "",
    probabilities: str | PathLike[str] | None = None,
    rows: RowsOrMask = None,
    device: str = "auto",
    progress: bool = False,
) -> Labelling:
    """Label cells with the classes of a scANVI: posterior q(c | x) at the posterior mean of z.

    With a hierarchy the labels of all levels lie on one path, from the most probable root on to the
    most probable child (:meth:`atlas.models.LabelTree.paths`); a class stands at the levels below
    it too. The coarsest label is the most probable of its level. A finer one is so among its
    siblings: where no group is certain, a class of another group can be more probable
    (:func:`label_probabilities` has all). Probabilities are marginal ones, not shares of the
    parent's, so they fall from level to level. ``unobserved …`` is a label too.

    Parameters
    ----------
    model
        A trained scANVI.
    store
        An open store, or files as they are.
    name
        Keep the labels as these obs columns, by default of the model's name; None keeps none.
        Cells that are not chosen keep what they had.
    probabilities
        A CSV or TSV to write: what :func:`label_probabilities` gives of these cells.
    rows
        Which cells: by an obs column, or a mask (n_obs,); all when None.
    device, progress
        As for :func:`atlas.embed`.

    Raises
    ------
    ModelError, ConfigError, OutputError
        The model has no classes, ``name`` is an obs column that was not made here, or the file
        cannot be written.
    """
    _, tree = classes_of(model)
    if probabilities is not None:
        check_table_name(probabilities)
    name = model.name if name == "" else name
    if name is not None:
        check_name(name, "label column")
        check_writable(store, f"name={name!r}")
        _check_free(store, name)
    chosen, log_p = _log_probabilities(model, store, rows, device, progress)
    table = _table(tree, log_p, name or model.name)
    table.index = store.obs([]).index[chosen]
    if probabilities is not None:
        write_table(_probabilities(tree, log_p, table.index), probabilities, "cell")
    predicted = table[name or model.name]
    if name is not None and isinstance(store, CountStore):
        study = np.asarray(store.studies, object)[store.obs_codes["study"][chosen]]
        store.annotate(table.assign(**{STUDY_COLUMN: study}))
    cells = predicted.value_counts()
    return Labelling(
        table,
        {label: int(cells.get(label, 0)) for label in tree.classes},
        float(table.iloc[:, 1].mean()),
        float(table.iloc[:, 2].mean()),
    )


def label_probabilities(
    model: TrainedModel,
    store: CountStore | FilesSource,
    *,
    rows: RowsOrMask = None,
    device: str = "auto",
    progress: bool = False,
) -> pd.DataFrame:
    """Posterior probability of each class and each group above, by row name.

    Arguments as for :func:`label`. Columns are the nodes of the hierarchy, parents first; those of
    siblings sum to that of their parent.
    """
    _, tree = classes_of(model)
    chosen, log_p = _log_probabilities(model, store, rows, device, progress)
    return _probabilities(tree, log_p, store.obs([]).index[chosen])


def _probabilities(
    tree: LabelTree, log_p: npt.NDArray[np.float32], index: pd.Index[Any]
) -> pd.DataFrame:
    return pd.DataFrame(np.exp(log_p), index, list(tree.names))


def classes_of(model: TrainedModel) -> tuple[SCANVI, LabelTree]:
    """The module and the classes of a scANVI.

    Raises
    ------
    ModelError
        The model has no classes.
    """
    if not isinstance(model.module, SCANVI) or model.labels is None:
        raise ModelError(
            "The model has no classes of cells",
            found=f"a {model.name} model",
            expected="a scanvi model",
            do="train one with `atlas train --model scanvi`; --from goes on from a trained scvi",
        )
    return model.module, model.labels


def _log_probabilities(
    model: TrainedModel,
    store: CountStore | FilesSource,
    rows: RowsOrMask,
    device: str,
    progress: bool,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Cells chosen, and the log-probability of each node of the tree: (n_cells, n_nodes)."""
    module, tree = classes_of(model)
    stream = CellStream(
        model, store, rows=rows, device=device, progress="labels" if progress else None
    )
    out = np.empty((len(stream.chosen), len(tree.names)), np.float32)
    for cells in stream:
        out[cells.place] = module.log_probabilities(cells.inputs)[: cells.n_cells].cpu().numpy()
    return stream.chosen, out


def _table(tree: LabelTree, log_p: npt.NDArray[np.float32], name: str) -> pd.DataFrame:
    paths = tree.paths(log_p)
    log_q = log_p[:, list(tree.leaves)].astype(np.float64)
    columns = {
        **_labels(tree, log_p, paths[:, -1], np.array(tree.leaves), name),
        # where q is 0 to the last bit its logarithm is finite: 0, not NaN
        f"{name}_entropy": np.maximum(-(np.exp(log_q) * log_q).sum(axis=1), 0.0),
    }
    for level in range(tree.n_levels if tree.n_levels > 1 else 0):
        offered = np.unique(tree.at_level(level))
        columns |= _labels(tree, log_p, paths[:, level], offered, f"{name}_level_{level}")
    return pd.DataFrame(columns)


def _labels(
    tree: LabelTree,
    log_p: npt.NDArray[np.float32],
    nodes: npt.NDArray[np.int64],
    offered: npt.NDArray[np.int64],
    name: str,
) -> dict[str, Any]:
    """Two columns: the node given to each cell, of those offered, and its probability."""
    names = pd.Index([tree.names[node] for node in offered])
    p = np.exp(log_p[np.arange(len(nodes)), nodes].astype(np.float64))
    return {
        name: pd.Categorical.from_codes(np.searchsorted(offered, nodes), names),
        f"{name}_probability": p,
    }


def _check_free(store: CountStore | FilesSource, name: str) -> None:
    """Refuse to write over a column that did not come from here."""
    there = set(store.obs().columns)
    if name in there and f"{name}_entropy" not in there:
        raise ConfigError(
            f"There is an obs column {name!r} already, and it holds no labels of a model",
            found=name,
            expected="a name of its own for these labels",
            do="give another --name",
            path=store.path,
        )
