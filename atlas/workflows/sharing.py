"""From a store and a model to a package that others map onto, and what leaves with it."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.config import BatchNames
from atlas.errors import MissingColumnError, ModelError
from atlas.evaluation.codes import Categories
from atlas.evaluation.exact import import_faiss
from atlas.evaluation.index import NeighborIndex
from atlas.evaluation.index.arrays import ListArrays
from atlas.hub.manifest import About, IndexAbout, RecallAbout
from atlas.hub.sharing import Shared, Shipment, archive_kind, write_package
from atlas.hub.staging import check_free
from atlas.models import TrainedModel, load_model
from atlas.models.columns import UNLABELED
from atlas.store import CountStore
from atlas.store.tables import kind_of
from atlas.workflows.donors import disguise
from atlas.workflows.genes import GenesInStore
from atlas.workflows.indexing import stored_index
from atlas.workflows.keeping import stored_model
from atlas.workflows.rows import texts_of
from atlas.workflows.streaming import CellStream

_TRIED = 256
"""Cells that are embedded again, to see whose embedding it is."""
_FAR = 0.05
"""Standard deviations of an embedding that no other processor or library moves a cell."""
_RECALL_K = 50
"""Neighbours for which the recall of an index is told: as many as vote on a label."""

Mask = npt.NDArray[np.bool_]


def share(
    store: CountStore,
    model: TrainedModel | str | PathLike[str],
    to: str | PathLike[str],
    *,
    embedding: str | None = None,
    label_key: str | None = None,
    obs_columns: Sequence[str] = (),
    counts: bool = False,
    batch_names: BatchNames = "no-donors",
    title: str | None = None,
    description: str | None = None,
    licence: str | None = None,
    citation: str | None = None,
) -> Shared:
    """Write a trained model and its reference so that a stranger maps cells and labels them.

    Of each cell go its embedding, study, batch and label, and its list where the embedding has an
    index of inverted lists; not its counts, its name, or any other obs column, unless named here.
    Names of batches, studies and the model's covariates go with the model, but those of donors are
    replaced by others unless the column of donors is named. :func:`prepare_share` says what would
    go, and writes nothing.

    Parameters
    ----------
    store
        The store of the reference; cells of studies that the model knows are taken.
    model
        The model, its run folder, or its name where it is kept with the store.
    to
        A new folder, or an archive: ``.tar.gz`` or ``.zip``.
    embedding
        Its name in the store; the model's when None. A sample of cells is embedded again to see
        that it is this model's.
    label_key
        The obs column of the labels; the model's when None, and where it has none, or the store
        does not have it, the store's own.
    obs_columns
        Further obs columns to give away, such as ``["donor"]``.
    counts
        Give the counts of the model's genes away.
    batch_names
        Which names of batches leave: all but those of donors who are in no column of
        ``obs_columns`` (``"no-donors"``), ``"all"``, or ``"none"``. The others become
        ``STUDY/batch 1`` and so on. Donors are told by their columns (``donor_id``, ``patient``,
        ``subject``, ``individual`` …), or by such a word in the name itself.
    title, description, licence, citation
        For people; the description is Markdown.

    Returns
    -------
    Shared
        With the SHA-256 to announce.

    Raises
    ------
    ModelError
        The model knows none of the studies, or the embedding is another model's.
    StoreError, MissingColumnError
        There is no such embedding or column.
    OutputError, ConfigError
        ``to`` is there already, cannot be written, or is an archive of another kind.
    """
    check_target(to)
    shipment = prepare_share(
        store,
        model,
        embedding=embedding,
        label_key=label_key,
        obs_columns=obs_columns,
        counts=counts,
        batch_names=batch_names,
        title=title,
        description=description,
        licence=licence,
        citation=citation,
    )
    return write_package(shipment, Path(to))


def check_target(to: str | PathLike[str]) -> None:
    """Refuse a target that is there or cannot be, before anything is read.

    Raises
    ------
    OutputError, ConfigError
        As for :func:`share`.
    """
    archive_kind(Path(to))
    check_free(Path(to).absolute())


def prepare_share(
    store: CountStore,
    model: TrainedModel | str | PathLike[str],
    *,
    embedding: str | None = None,
    label_key: str | None = None,
    obs_columns: Sequence[str] = (),
    counts: bool = False,
    batch_names: BatchNames = "no-donors",
    title: str | None = None,
    description: str | None = None,
    licence: str | None = None,
    citation: str | None = None,
) -> Shipment:
    """All that :func:`share` would write, with a ``listing()`` of what would leave the machine.

    Parameters and errors are those of :func:`share`.
    """
    trained = model if isinstance(model, TrainedModel) else _model(store, model)
    rows = _rows(store, trained)
    name = trained.name if embedding is None else embedding
    z = _embedding(store, name, rows)
    _check_embedding(store, trained, name, z, rows)
    labels, label_key, said = _labels_of(store, trained, label_key, rows)
    studies = _occurring(store.obs_codes["study"][rows], store.studies)
    if title is None:
        title = f"{trained.name} of {', '.join(studies.names)}"[:1000]
    view = GenesInStore.of(trained, store).select(store) if counts else None
    index, lists = _index(store, name, z, rows)
    leaving = disguise(store, trained, rows, named=obs_columns, batch_names=batch_names)
    batches = _occurring(store.obs_codes["batch"][rows], store.batches)
    return Shipment(
        about=About(title, description, licence, citation),
        model=leaving.model,
        embedding=z,
        studies=studies,
        batches=Categories(
            batches.codes, [leaving.batches.get(name, name) for name in batches.names]
        ),
        labels=labels,
        label_key=label_key,
        columns={column: _column(store, column, rows) for column in obs_columns},
        counts=None if view is None else (view, rows),
        index=index,
        lists=lists,
        said={**leaving.said, **said},
    )


def _model(store: CountStore, model: str | PathLike[str]) -> TrainedModel:
    kept = str(model) in store.models and not Path(model).exists()
    return stored_model(store, str(model)) if kept else load_model(model)


def _rows(store: CountStore, model: TrainedModel) -> Mask:
    """Cells of studies that the model knows."""
    known = [i for i, name in enumerate(store.studies) if name in model.studies]
    rows = np.isin(store.obs_codes["study"], known)
    if not rows.any():
        raise ModelError(
            "The store has no cell of a study that the model knows",
            found=", ".join(store.studies) or "no studies",
            expected="some of " + ", ".join(model.studies),
            do="share it with the store that it was trained on",
            path=store.path,
        )
    return rows


def _embedding(store: CountStore, name: str, rows: Mask) -> npt.NDArray[np.float32]:
    """Of the chosen cells, whose studies are whole: float32, (n_cells, n_latent)."""
    store.embedding_details(name)  # which says so where there is none
    part, chosen = f"embedding:{name}", []
    for study, start in zip(store.manifest.studies, store.segments, strict=False):
        if study.n_obs and rows[start]:
            if part not in study.parts:
                return store.embedding(name)[rows]  # which says that the study is not covered
            chosen.append(store.part_array(study, part, "z"))
    return np.concatenate(chosen)


def _check_embedding(
    store: CountStore,
    model: TrainedModel,
    name: str,
    z: npt.NDArray[np.float32],
    rows: Mask,
) -> None:
    """Refuse the embedding of another model."""
    if z.shape[1] != model.config.n_latent:
        raise _of_another(store, name, f"{z.shape[1]} dimensions", model.config.n_latent)
    tried = np.flatnonzero(rows)
    tried = tried[np.linspace(0, len(tried) - 1, min(_TRIED, len(tried))).astype(np.int64)]
    mask = np.zeros(store.n_obs, bool)
    mask[tried] = True
    place = np.cumsum(rows) - 1
    farthest = 0.0
    for cells in CellStream(model, store, rows=mask, device=str(model.device)):
        again = model.embed(cells.inputs)[: cells.n_cells].cpu().numpy()
        farthest = max(farthest, float(np.abs(again - z[place[cells.rows]]).max()))
    if not farthest <= _FAR * float(z.std()):
        found = f"a cell that this model puts {farthest:.3g} away in one dimension"
        raise _of_another(store, name, found, f"at most {_FAR * float(z.std()):.3g}")


def _of_another(store: CountStore, name: str, found: str, expected: object) -> ModelError:
    return ModelError(
        f"The embedding {name!r} is not of this model",
        found=found,
        expected=expected,
        do="run `atlas embed` with this model, or name its embedding with --embedding",
        path=store.path,
    )


def _index(
    store: CountStore, name: str, z: npt.NDArray[np.float32], rows: Mask
) -> tuple[IndexAbout, ListArrays | None]:
    """What is said of the index that is kept with an embedding, and what of it can leave."""
    if store.index_folder(name) is None:
        return IndexAbout(why="no index is kept with the embedding"), None
    if import_faiss() is None:
        return IndexAbout(why="FAISS, which reads the one that is kept, is not installed"), None
    part, bounds = f"embedding:{name}", [*store.segments, store.n_obs]
    covered = np.zeros(store.n_obs, bool)  # an index is of the studies that had been embedded
    for i, study in enumerate(store.manifest.studies):
        covered[bounds[i] : bounds[i + 1]] = part in study.parts
    same = bool((rows == covered).all())
    index = stored_index(store, name, z if same else _embedding(store, name, covered))
    assert index is not None
    if not same:
        # its lists are of cells that stay too, and centroids are means of them
        index = NeighborIndex.build(z, seed=index.seed, recall_target=index.recall_target)
    kind = index.choice.kind  # why it was taken tells of the machine
    if kind == "hnsw":
        why = "of a graph (HNSW) there is FAISS's own file alone, which code that trusts it reads"
        return IndexAbout(kind, why), None
    if (lists := ListArrays.of(index)) is None:
        return IndexAbout(kind, "the owner's search is exact, and needs the embedding alone"), None
    k = max(1, min(_RECALL_K, len(z) - 1))
    recall = lists.index(z, device="cpu").recall(k)
    about = IndexAbout(
        kind,
        "inverted lists are kept with the embedding",
        len(lists.centroids),
        lists.breadth,
        lists.seed,
        lists.recall_target,
        RecallAbout(k, recall.value, recall.standard_error, recall.n_queries),
    )
    return about, lists


def _labels_of(
    store: CountStore, model: TrainedModel, label_key: str | None, rows: Mask
) -> tuple[Categories | None, str | None, dict[str, str]]:
    """Labels of the chosen cells, the column they are from, and what is to be said of it."""
    if label_key is not None:
        return _labels(store, label_key, rows, UNLABELED), label_key, {}
    label_key, unlabeled = model.columns.label, model.columns.unlabeled
    try:
        return _labels(store, label_key, rows, unlabeled), label_key, {}
    except MissingColumnError:
        said = f"the model's are of obs column {label_key}, which the store does not have"
        return _labels(store, None, rows, unlabeled), None, {"labels": said}


def _labels(
    store: CountStore, label_key: str | None, rows: Mask, unlabeled: str
) -> Categories | None:
    if label_key is None:
        labeled = np.array([name != unlabeled for name in store.labels] + [False])
        codes = store.obs_codes["label"][rows]
        labels = _occurring(np.where(labeled[codes], codes, np.int32(-1)), store.labels)
    else:
        texts = texts_of(store, label_key)[rows]
        labels = _categories(texts.where(~texts.isin(["", unlabeled])))
    return labels if labels.names else None


def _column(
    store: CountStore, name: str, rows: Mask
) -> Categories | npt.NDArray[np.float64] | npt.NDArray[np.int64]:
    column = store.obs([name])[name][rows]
    kind = kind_of(column)
    if kind == "integer" and not column.isna().any():
        return column.to_numpy(np.int64)
    if kind in ("integer", "float"):
        return column.to_numpy(np.float64, na_value=np.nan)
    return _categories(texts_of(store, name)[rows])


def _categories(texts: pd.Series[Any]) -> Categories:
    codes, names = pd.factorize(texts, sort=True)
    return Categories(codes, [str(name) for name in names])


def _occurring(codes: npt.NDArray[np.int32], names: Sequence[str]) -> Categories:
    """Categories of the names that cells have: a store keeps those of studies dropped, too."""
    met = np.unique(codes[codes >= 0])
    code = np.full(len(names) + 1, -1, np.int64)
    code[met] = np.arange(len(met))
    return Categories(code[codes], [names[i] for i in met])
