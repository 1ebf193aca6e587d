"""Whose labels are carried over: labelled cells of a store, or of a package that was fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError, MissingColumnError, ModelError
from atlas.evaluation.codes import Categories
from atlas.evaluation.index.among import Among
from atlas.evaluation.neighbours import Backend, Search
from atlas.hub import Package
from atlas.store import CountStore
from atlas.workflows.columns import label_names
from atlas.workflows.indexing import stored_index
from atlas.workflows.rows import texts_of
from atlas.workflows.starting import weights_digest

Codes = npt.NDArray[np.int64]
Embedding = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Voting:
    """Cells that vote, all of them with a label.

    Attributes
    ----------
    z
        Their embedding: float32 (n_cells, d).
    texts
        Their labels: (n_cells,).
    groups
        What is left out in turn to calibrate; None where that is not asked for.
    search
        What finds neighbours among them; None for exact search.
    rows
        Where they are in the store: int64 (n_cells,); None for those of a package.
    """

    z: Embedding
    texts: npt.NDArray[np.object_]
    groups: Categories | None
    search: Search | None
    rows: Codes | None = None


def of_store(
    store: CountStore,
    rows: Codes,
    z: Embedding,
    texts: npt.NDArray[np.object_],
    *,
    embedding: str,
    label_key: str | None,
    groups: str | None,
    backend: Backend,
) -> Voting:
    """Cells of the store itself, searched through the embedding's index where it has one.

    ``z`` and ``texts``, as :func:`labels_of` gives them, are of all cells.

    Raises
    ------
    ConfigError
        None of them has a label.
    StoreError
        The index is not of the embedding as it is.
    """
    rows = rows[texts[rows] != ""]
    if not len(rows):
        raise ConfigError(
            "The reference has no labelled cell",
            found="no label " + (f"in {label_key!r}" if label_key else "there"),
            expected="cells with labels",
            do="give the obs column of the labels (--label-key), or label them by `atlas annotate`",
            path=store.path,
        )
    index = stored_index(store, embedding, z) if backend == "auto" else None
    return Voting(
        z=z[rows],
        texts=texts[rows],
        groups=None if groups is None else _groups(store, groups)[rows],
        search=None if index is None else Among(index, rows).search,
        rows=rows,
    )


def of_package(
    package: Package,
    store: CountStore,
    z: Embedding,
    *,
    embedding: str,
    label_key: str | None,
    groups: str | None,
    backend: Backend,
) -> Voting:
    """Cells of a package: their embedding and labels, without their counts.

    They are searched through the index that came with them, as those of a store are through its.

    Raises
    ------
    ModelError
        The embedding is not of the package's model, or of one extended from it.
    ConfigError, MissingColumnError
        No cell of the package has a label; it has no such column.
    """
    if label_key is not None:
        raise ConfigError(
            "A package has labels of its own",
            found=f"label_key={label_key!r}",
            do="leave it out",
            path=package.folder,
        )
    _check_space(package, store, z, embedding)
    labels = package.labels
    if labels is None:
        raise ConfigError(
            "The reference has no labelled cell",
            found="a package without labels",
            expected="a package that was shared with labels",
            do="ask its owner to share it with --label-key",
            path=package.folder,
        )
    rows = np.flatnonzero(labels.codes >= 0)
    chosen = None
    if groups in ("study", "batch"):
        chosen = (package.studies if groups == "study" else package.batches)[rows]
    elif groups is not None:
        if groups not in package.obs:
            raise MissingColumnError(
                f"The package has no column {groups!r} to calibrate by",
                found=", ".join(package.obs.columns) or "no further columns",
                expected="study, batch, or a column that was shared",
                path=package.folder,
            )
        column = package.obs[groups].astype("category").cat
        chosen = Categories(column.codes.to_numpy(), list(column.categories))[rows]
    names = np.array(labels.names, object)
    index = package.index() if backend == "auto" else None
    search = None if index is None else Among(index, rows).search
    return Voting(package.embedding[rows], names[labels.codes[rows]], chosen, search)


def labels_of(store: CountStore, label_key: str | None) -> npt.NDArray[np.object_]:
    """The label of each cell, "" for none."""
    if label_key is None:
        names = np.array([*store.labels, ""], object)
        return names[store.obs_codes["label"]]
    texts = texts_of(store, label_key)
    known = texts.isin(label_names(store, label_key))
    return texts.where(known, "").to_numpy(object)


def _groups(store: CountStore, column: str) -> Categories:
    """What is left out in turn; cells without a value never are."""
    texts = texts_of(store, column).astype("category")
    return Categories(texts.cat.codes.to_numpy(), list(texts.cat.categories))


def _check_space(package: Package, store: CountStore, z: Embedding, embedding: str) -> None:
    """Refuse an embedding in which the package's cells do not lie.

    Of one that did not come from a model here nothing is known but its width.
    """
    about = store.embedding_details(embedding)
    wanted = (
        f"an embedding by the package's model extended by the study, of {z.shape[1]} dimensions"
    )
    do = (
        f"atlas extend {package.folder / 'model'} {store.path} --out RUN, then "
        f"atlas embed RUN {store.path}"
    )
    found = None
    if z.shape[1] != package.embedding.shape[1]:
        found = f"{z.shape[1]} dimensions"
        wanted = f"{package.embedding.shape[1]} dimensions, those of the package's model"
    elif "training" in about:
        own = weights_digest(package.model.module)
        if own not in _weights(about):
            found = "an embedding by a model that does not come from the package's"
        moved = [
            strategy
            for strategy in about.get("strategies", [])[len(package.model.surgery) :]
            if strategy != "conditions"
        ]
        if moved:
            found = f"a surgery that moved the reference (strategy {moved[0]})"
    if found is not None:
        raise ModelError(
            f"The cells of the package do not lie in the embedding {embedding!r}",
            found=found,
            expected=wanted,
            do=do,
            path=store.path,
        )


def _weights(about: Mapping[str, Any]) -> Iterator[str]:
    """Digests of the weights of a model and of those that it was extended from."""
    yield str(about.get("weights"))
    training = about.get("training")
    while isinstance(training, Mapping):
        yield str(training.get("reference_weights"))
        training = training.get("reference")
