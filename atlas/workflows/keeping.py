"""Models kept with the store under names and versions, and the states that the store has had."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atlas.errors import ModelError, OutputError
from atlas.models import TrainedModel, load_model
from atlas.provenance import command, versions
from atlas.store import CountStore, open_store
from atlas.store import manifest as manifests
from atlas.store.fork import fork
from atlas.store.options import check_name
from atlas.workflows.embedding import check_writable, embed_study, how_made
from atlas.workflows.indexing import write_index
from atlas.workflows.starting import weights_digest


def stored_model(store: CountStore, name: str, version: int | None = None) -> TrainedModel:
    """A model kept with a store, in its newest version when None."""
    return load_model(store.model_folder(name, version))


def keep(
    store: CountStore,
    run: str | PathLike[str],
    name: str = "",
    *,
    device: str = "auto",
    progress: bool = False,
) -> int:
    """Keep a trained model with the store, its embedding and an index of it, in one step.

    The embedding has the model's name; the index is of the nearest neighbours in it.

    Under a name that is there, the model has to come after the newest version: extended from it, or
    trained anew on all studies that it knows and the store still has. Rows of an embedding that a
    surgery left as they were stay, byte for byte.

    Parameters
    ----------
    store
        An open store, all of whose batches the model knows.
    run
        Its run folder.
    name
        The model's when empty, such as ``"scvi"``.
    device, progress
        As for :func:`atlas.embed`.

    Returns
    -------
    int
        The version.

    Raises
    ------
    ModelError
        The run is behind the newest version, or does not fit the store.
    """
    trained = load_model(run)
    name = name or trained.name
    check_name(name, "model")
    check_writable(store, f"name={name!r}")
    after = store.models.get(name)
    parent = None if after is None else _parent(store, name, trained, run)
    covered: set[str] = set()
    if (
        parent is not None
        and _unmoved(trained, stored_model(store, name, parent))
        and embedded_by(store, name, parent)
    ):
        part = f"embedding:{name}"
        covered = {study.name for study in store.manifest.studies if part in study.parts}
    rows = {
        study: embed_study(trained, store, study, device=device, progress=progress)
        for study in store.studies
        if study not in covered
    }
    with tempfile.TemporaryDirectory(prefix="atlas-keep-") as folder:
        index = Path(folder) / "index"
        _index(store, name, rows, index)
        return store.write_model(
            name,
            run,
            record_of(trained, parent),
            after=after,
            embedding=rows,
            details=how_made(trained),
            index=index,
        )


def _index(
    store: CountStore, name: str, rows: Mapping[str, npt.NDArray[np.float32]], folder: Path
) -> None:
    """Write the index of an embedding that gets these rows; others, which come first, stay."""
    studies, part = store.manifest.studies, f"embedding:{name}"
    pieces = [
        rows[study.name] if study.name in rows else store.part_array(study, part, "z")
        for study in studies
    ]
    is_new = [study.name in rows for study in studies]
    n_old = is_new.index(True) if True in is_new else len(is_new)
    if n_old and all(is_new[n_old:]):
        old = np.concatenate(pieces[:n_old])
        new = np.concatenate([old[:0], *pieces[n_old:]])
        write_index(store, name, new, old, folder)
    else:
        write_index(store, name, np.concatenate(pieces), None, folder)


def embedded_by(store: CountStore, name: str, version: int) -> bool:
    """Whether the embedding of this name is by this version of the model."""
    if name not in store.embeddings:
        return False
    weights: str = store.model_record(name, version)["weights"]
    return store.embedding_details(name).get("weights") == weights


def record_of(trained: TrainedModel, parent: int | None, **further: Any) -> dict[str, Any]:
    """What the store keeps of where a model came from."""
    surgery = [one.to_json() for one in trained.surgery]
    return {
        "parent": parent,
        "model": trained.name,
        "studies": list(trained.studies),
        "weights": weights_digest(trained.module),
        "settings": {
            "architecture": trained.config.to_json(),
            "training": trained.training.get("config"),
            "surgery": surgery[-1] if surgery else None,
        },
        "versions": versions(),
        "command": command(),
        **further,
    }


def _parent(
    store: CountStore, name: str, trained: TrainedModel, run: str | PathLike[str]
) -> int | None:
    """The version that a run extended, None where it was trained anew; others are refused."""
    records = {v: store.model_record(name, v) for v in store.model_versions(name)}
    newest = max(records)
    known = records[newest]
    weights = weights_digest(trained.module)
    kept = [version for version, one in records.items() if one["weights"] == weights]
    training: Any = trained.training
    while not kept and isinstance(training, Mapping):
        if training.get("reference_weights") == known["weights"]:
            return newest
        training = training.get("reference")
    left = [study for study in known["studies"] if study in store.studies]
    missing = [study for study in left if study not in trained.studies]
    if not kept and not trained.surgery and not missing:
        return None
    raise ModelError(
        f"The run does not come after the newest version of {name!r}",
        found=f"the model of version {kept[0]}"
        if kept
        else (f"a model without {', '.join(missing)}" if missing else "another model extended"),
        expected=f"{name} {newest} extended, or a model trained anew on "
        + ", ".join(left or store.studies),
        do=f"extend the model of the atlas: `atlas update`, or `atlas extend "
        f"{store.path / 'models' / name / str(newest)} …`; or give another --name",
        path=run,
    )


def _unmoved(trained: TrainedModel, parent: TrainedModel) -> bool:
    """Whether all surgery since a version trained new rows of weights only."""
    since = trained.surgery[len(parent.surgery) :]
    return all(one.strategy == "conditions" for one in since)


def named(run: str | PathLike[str]) -> str:
    """Name that a run is kept under unless another is given."""
    return load_model(run).name


def checkout(path: str | PathLike[str], number: int, out: str | PathLike[str]) -> CountStore:
    """Make an earlier state a store of its own, by links to the files of the store.

    It is read, and even written to, as any store; the store itself never changes by that. Where
    only Python reads, ``open_store(path, number=…)`` does without.

    Parameters
    ----------
    path, number
        The store, and the number of the state.
    out
        A path that is free.

    Raises
    ------
    StoreError, OutputError
        There is no such state; ``out`` is taken or cannot be written to.
    """
    store = open_store(path, number=number)
    check_writable(store, f"checkout {number}")
    if Path(out).exists():
        raise OutputError("There is something here already", do="choose another path", path=out)
    try:
        fork(store.path, Path(out), store.manifest)
    except OSError as error:
        raise OutputError("The links cannot be made", found=str(error), path=out) from error
    return open_store(out)


def history(store: CountStore) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """States of a store, and versions of the models kept with it.

    Returns
    -------
    Of each state up to the one that is open: ``number``, ``created``, ``action``, ``studies``,
    ``n_obs``. Of each version: ``name``, ``version``, and its record.
    """
    states = [
        {
            "number": one.number,
            "created": one.created,
            "action": one.action,
            "studies": [study.name for study in one.studies],
            "n_obs": one.n_obs,
        }
        for one in manifests.history(store.path)
        if one.number <= store.number
    ]
    kept = [
        {"name": name, "version": version, **store.model_record(name, version)}
        for name in store.models
        for version in store.model_versions(name)
    ]
    return states, kept
