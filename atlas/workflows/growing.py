"""What a study adds to a model: batches, categories of covariates, and classes of its own."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError, MissingColumnError, ModelError
from atlas.models import LabelTree, ObsColumns, TrainedModel
from atlas.models.columns import UNLABELED
from atlas.models.parts import Part, renumbered
from atlas.store import CountStore
from atlas.training.inputs import CellColumns
from atlas.workflows.columns import label_codes, label_names
from atlas.workflows.rows import batches_within, texts_of

Codes = npt.NDArray[np.int32]

INGESTED = "atlas_label"
"""Instead of an obs column: the labels that the studies were ingested or annotated with."""


def new_studies(
    model: TrainedModel, store: CountStore, studies: Sequence[str] | None
) -> tuple[str, ...]:
    """Names of the studies to add."""
    known = set(model.studies)
    if studies is None:
        names = tuple(name for name in store.studies if name not in known)
    else:
        names = tuple(dict.fromkeys([studies] if isinstance(studies, str) else studies))
    if unknown := [name for name in names if name not in store.studies]:
        raise ConfigError(
            "The store has no such study",
            found=", ".join(unknown),
            expected="some of " + ", ".join(store.studies),
            do="ingest it first",
            path=store.path,
        )
    taken = [name for name in names if name in known]
    if taken or not names:
        raise ModelError(
            "There is no study to add",
            found=(", ".join(taken) if taken else "only studies")
            + " that the model was trained on or extended by",
            expected="studies that are new to it",
            do="embed them with the model as it is; a study's new cells need a study of their own",
            path=store.path,
        )
    return names


def known_studies(
    model: TrainedModel, store: CountStore, studies: str | Sequence[str], keep_apart: float | None
) -> tuple[str, ...]:
    """Names of the studies from which new ones are kept apart."""
    names = tuple(dict.fromkeys([studies] if isinstance(studies, str) else studies))
    for place, known in (("model", model.studies), ("store", store.studies)):
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(
                f"The {place} does not have the study to keep apart from",
                found=", ".join(unknown),
                expected="some of " + ", ".join(known),
                path=store.path,
            )
    if names and keep_apart is not None and keep_apart <= 0:
        raise ConfigError(
            "Studies to keep apart from are named, and nothing keeps them apart",
            found=f"apart_from {', '.join(names)} with keep_apart {keep_apart:g}",
            expected="keep_apart above 0",
            do="leave one of them out",
        )
    return names


def new_batches(
    model: TrainedModel, store: CountStore, chosen: npt.NDArray[np.bool_]
) -> tuple[tuple[str, ...], Codes]:
    """The new batches, and the code of each row's batch in the new model; 0 for rows not chosen.

    Warns of names that batches of the reference have too: in a store they are of their study.
    """
    batches, codes = batches_within(store, chosen)
    codes[chosen] += len(model.batches)
    known = {name.partition("/")[2] for name in model.batches} - {""}
    if same := [name for name in batches if name.partition("/")[2] in known]:
        warnings.warn(
            "Batches have the names of batches of the reference, and are taken for other ones, "
            f"with weights of their own: {', '.join(same[:5])}" + (", …" if len(same) > 5 else ""),
            UserWarning,
            stacklevel=3,
        )
    return batches, codes


def grown_columns(
    model: TrainedModel, store: CountStore, chosen: npt.NDArray[np.bool_], label_key: str | None
) -> ObsColumns:
    """The model's columns, with the categories that only the new studies have after its own."""
    grown = []
    for name, known in model.columns.categorical:
        found = set(texts_of(store, name)[chosen].dropna())
        grown.append((name, (*known, *sorted(found - set(known)))))
    if label_key is not None and model.labels is None:
        raise ConfigError(
            "The model has no classes, so it takes no labels",
            found=f"label_key={label_key!r} with a {model.name}",
            do="leave it out, or train a scanvi as reference",
        )
    label = model.columns.label if label_key is None else label_key
    if label_key == INGESTED and _ingested(store, chosen):
        label = None  # the store's own, even where an input brought a column so named
    return dataclasses.replace(model.columns, categorical=tuple(grown), label=label)


def grown_labels(
    model: TrainedModel,
    store: CountStore,
    columns: ObsColumns,
    chosen: npt.NDArray[np.bool_],
    *,
    asked: bool,
) -> tuple[LabelTree | None, Codes | None]:
    """The model's labels with those that only the new studies have, and each cell's.

    The new ones come after the model's, at the root; -1 stands for no label, and for cells that
    are not chosen. A column that was asked for has to be there; without the model's own column the
    studies have no labels. Warns of labels that they were ingested with and that are passed over.
    """
    tree = model.labels
    if tree is None:
        return None, None
    none = np.full(store.n_obs, -1, np.int32)
    try:
        names = label_names(store, columns.label, columns.unlabeled)
    except MissingColumnError:
        if asked:
            raise
        names = []  # none of the studies has labels
    if columns.unlabeled != UNLABELED:  # which holds for labels of the store's own too
        names = [name for name in names if name != columns.unlabeled]
    met = np.empty(0, np.int64)
    if names:
        every = LabelTree(tuple(names), (-1,) * len(names))
        met = np.unique(label_codes(store, columns.label, every)[chosen])
        met = met[met >= 0]
    if not len(met):
        if not asked and columns.label is not None and (n := _ingested(store, chosen)):
            warnings.warn(
                f"The studies are taken as unlabelled: the model's labels are in obs column "
                f"{columns.label!r}, where none of their cells has one. {n:,} cells were ingested "
                f"with a label; to take these, say label_key={INGESTED!r} "
                f"(atlas extend --label-key {INGESTED})",
                UserWarning,
                stacklevel=3,
            )
        return tree, none
    new = [names[i] for i in met if names[i] not in tree.names]
    if len(new) == len(met):
        warnings.warn(
            "None of the studies' labels is a class of the model, so all become new classes: "
            f"{', '.join(new[:5])}; the model's are {', '.join(tree.names[:5])}",
            UserWarning,
            stacklevel=3,
        )
    grown = tree.with_roots(new)
    return grown, np.where(chosen, label_codes(store, columns.label, grown), none)


def part_for(model: TrainedModel, values: CellColumns, chosen: npt.NDArray[np.bool_]) -> Part:
    """The conditions that take part when studies are added.

    Those that the model had before any surgery, and of later ones the categories and labels that
    the studies' own cells have. Of models whose surgeries did not record categories, all of them.

    Parameters
    ----------
    model
        The model that grows.
    values
        Codes of categories and labels, the model's and new ones.
    chosen
        The studies' cells: bool (n_obs,).
    """
    categories = []
    for i, n in enumerate(model.columns.sizes.n_categories):
        assert values.categories is not None
        n_new = sum(one.n_categories[i] for one in model.surgery if one.n_categories)
        categories.append(_first_and(values.categories[chosen, i], n - n_new, n))
    nodes = np.empty(0, np.int64)
    if model.labels is not None:
        assert values.label is not None
        n = len(model.labels.names)
        n_original = n - sum(len(one.labels) for one in model.surgery)
        nodes = _first_and(values.label[chosen], n_original, n)
    n_batches = len(model.batches) - sum(len(one.batches) for one in model.surgery)
    return Part(np.arange(n_batches), tuple(categories), nodes, model.labels)


def _first_and(codes: Codes, n_original: int, n: int) -> npt.NDArray[np.int64]:
    """The first numbers, and of others below n those that are among codes."""
    used = np.unique(codes[(codes >= n_original) & (codes < n)])
    return np.concatenate([np.arange(n_original), used.astype(np.int64)])


def values_in_part(model: TrainedModel, part: Part, values: CellColumns) -> CellColumns:
    """Codes of batches, categories and labels by their numbers in a part of the model."""
    assert values.batch is not None
    categories, label = values.categories, values.label
    if categories is not None:
        sizes = model.columns.sizes.n_categories
        found = zip(categories.T, part.categories, sizes, strict=True)
        categories = np.stack([renumbered(*one) for one in found], axis=1)
    if label is not None and model.labels is not None:
        label = renumbered(label, part.nodes, len(model.labels.names))
    batch = renumbered(values.batch, part.batches, len(model.batches))
    return dataclasses.replace(values, batch=batch, label=label, categories=categories)


def _ingested(store: CountStore, chosen: npt.NDArray[np.bool_]) -> int:
    """How many of the chosen cells have a label of the store's own."""
    return int((store.obs_codes["label"][chosen] >= 0).sum())
