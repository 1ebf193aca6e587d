"""The living atlas: a study added to a store and to a model kept with it, in one step.

An update works in ``STORE/.update-STUDY``: a fork of the store (:mod:`atlas.store.fork`), where
each step commits a state of its own, and the run folder of the surgery. Which steps are done is
read from these; the last one makes a single state of the store out of them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from atlas.errors import ConfigError, ModelError, StudyExistsError
from atlas.models import load_model
from atlas.models.surgery import check_reference
from atlas.store import CountStore, open_store
from atlas.store import manifest as manifests
from atlas.store.fork import publish
from atlas.store.options import check_name
from atlas.workflows.drift import Drift, measure_drift
from atlas.workflows.embedding import check_writable, embed_study, how_made
from atlas.workflows.growing import INGESTED
from atlas.workflows.indexing import write_index
from atlas.workflows.keeping import embedded_by, record_of, stored_model
from atlas.workflows.newcomers import labels_by_classifier, labels_by_neighbours
from atlas.workflows.surgery import extend_reference
from atlas.workflows.transferring import check_free, check_share
from atlas.workflows.unfinished import begin, is_of, kept_to_go_on, request_of, work_folder
from atlas.workflows.unseen import UnseenGroup, group_unseen
from atlas.workflows.update_errors import told_of_the_atlas

FALSE_UNKNOWN = 0.05
"""Share of cells of known types that may be called Unknown."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What an update did.

    Attributes
    ----------
    study, n_obs
        Its name and cells.
    model, version, manifest
        The model, its version and the state of the store that hold it now.
    n_trained, n_parameters
        Parameters that surgery trained, and those of the model.
    new_classes
        Labels of the study that became classes of a scANVI, which did not have them.
    labels
        New cells of each label, ``Unknown`` among them; empty where nothing was transferred.
    classes
        New cells of each class of a scANVI, by its classifier; empty for other models.
    drift
        How the study lies to the others.
    notes
        What is worth saying.
    seconds
        Wall time of this call.
    """

    study: str
    n_obs: int
    model: str
    version: int
    manifest: int
    n_trained: int
    n_parameters: int
    new_classes: tuple[str, ...]
    labels: dict[str, int]
    classes: dict[str, int]
    drift: Drift
    notes: tuple[str, ...]
    seconds: float


def update(
    path: str | PathLike[str],
    source: str | PathLike[str] | AnnData,
    *,
    study: str,
    model: str,
    ingest: Mapping[str, Any] | None = None,
    false_unknown: float | None = FALSE_UNKNOWN,
    device: str = "auto",
    fresh: bool = False,
    progress: bool = False,
    **options: Any,
) -> UpdateReport:
    """Add a study to a store and to a model kept with it, in one step.

    The study is ingested, the model extended by it (surgery of the strategy ``conditions``), the
    new cells are embedded, added to the index of neighbours and labelled by their neighbours, those
    that are Unknown are grouped, and drift is measured. All of it
    becomes one state of the store at the end; until then, and after any failure, the store is as it
    was. After Ctrl-C or a kill the same call goes on from the last step that was finished; what is
    left meanwhile is told by :func:`atlas.unfinished_updates`.

    Parameters
    ----------
    path
        The store.
    source, study
        Where the counts are, and the name of the study.
    model
        Name of a model kept with the store (:func:`atlas.keep`); its embedding has the same name.
        Labels by neighbours go to the obs columns ``MODEL_label``, ``MODEL_label_uncertainty`` and
        ``MODEL_label_distance``, groups of Unknown cells to ``MODEL_label_group``; labels by the
        classifier of a scANVI beside them to ``MODEL_class``, ``MODEL_class_probability`` and
        ``MODEL_class_entropy``.
    ingest
        Further options of :meth:`atlas.store.CountStore.append`, such as ``batch_key``.
    false_unknown
        Share of cells of known types that may be called Unknown, by leaving studies out of the
        reference (or batches, where it is one study); None, or a reference that cannot be divided
        so: Unknown above an uncertainty of .5.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, …
    fresh
        Start anew, even if an earlier call was interrupted.
    progress
        Show the progress of each step on stderr.
    **options
        Further options of :func:`atlas.extend_reference`, such as ``max_epochs`` and ``seed``.

    Raises
    ------
    StudyExistsError, LockedError
        The name of the study is taken; another process writes to the store.
    StoreError, ModelError, InputError, ConfigError
        There is no such model, it cannot be extended, or the study cannot be added to it.
    """
    started = time.monotonic()
    check_name(study, "study")
    check_share("false_unknown", false_unknown)
    if "strategy" in options:
        raise ConfigError(
            "An update leaves the reference where it is",
            found=f"strategy={options['strategy']!r}",
            do="leave it out, or use `atlas extend` and `atlas keep`",
        )
    store = open_store(path)
    check_writable(store, f"study={study!r}")
    root, work = store.path, work_folder(store.path, study)
    appending = {**(ingest or {}), "study": study}
    with told_of_the_atlas(root, work), manifests.writer(root, f"update {study}") as newest:
        store = CountStore(root, newest)
        asked = request_of(
            source,
            model,
            appending,
            {**options, "device": device, "false_unknown": false_unknown},
        )
        notes = []
        whole = is_of(work, {**asked, "manifest": newest.number - 1})
        if whole and newest.action.startswith(_action(study, model)):
            notes.append("the update was whole already")  # killed after the last step
            state, version = newest, newest.models[model].version
        else:
            _check(store, study, model)
            with kept_to_go_on(work):
                notes += begin(root, work, {**asked, "manifest": newest.number}, fresh=fresh)
                forked = open_store(work / "store")
                notes += _ingest(forked, source, appending, progress)
                check_free(forked, f"{model}_label")
                before = newest.models[model].version
                if forked.models[model] == before:
                    asking = {**options, "device": device, "progress": progress}
                    notes += _take_labels(forked, model, appending, asking)
                    _extend(forked, root, work, model, study, false_unknown, asking)
                version = forked.models[model]
            action = f"{_action(study, model)}{version}"
            state = publish(root, newest, work / "store", action)
        shutil.rmtree(work, ignore_errors=True)
    store = CountStore(root, state)
    record, trained = store.model_record(model, version), stored_model(store, model, version)
    return UpdateReport(
        study=study,
        n_obs=store.study(study).entry.n_obs,
        model=model,
        version=version,
        manifest=state.number,
        n_trained=trained.surgery[-1].n_trained,
        n_parameters=sum(part.numel() for part in trained.module.parameters()),
        new_classes=trained.surgery[-1].labels,
        labels=record["labels"],
        classes=record.get("classes", {}),
        drift=Drift.from_json(record["drift"]),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


def _action(study: str, model: str) -> str:
    """What the history says of an update, but for the version."""
    return f"update {study}: model {model} "


def _check(store: CountStore, study: str, name: str) -> None:
    """Refuse what can be refused before anything is read."""
    if study in store.studies:
        raise StudyExistsError(
            "The study is in the store already",
            found=study,
            expected="a name not among " + ", ".join(store.studies),
            do="choose another name; a study is never changed once written",
            path=store.path,
        )
    trained = stored_model(store, name)
    check_reference(trained.module)
    if study in trained.studies:
        raise ModelError(
            f"The model {name!r} knows a study of this name, which was dropped from the store",
            found=study,
            do="give the study another name",
            path=store.path,
        )
    part = f"embedding:{name}"
    if without := [one.name for one in store.manifest.studies if part not in one.parts]:
        raise ModelError(
            f"The model {name!r} and its embedding do not cover the store",
            found=f"no embedding of {', '.join(without)}",
            expected="an embedding of every study before another one is added",
            do=f"atlas extend {store.model_folder(name)} {store.path} --out RUN, then "
            f"atlas keep {store.path} RUN --name {name}",
            path=store.path,
        )
    if not embedded_by(store, name, store.models[name]):
        raise ModelError(
            f"The embedding {name!r} is not of the model {name!r} that is kept",
            found="rows by a model with other weights, embedded under its name since",
            expected="rows by the kept model, among which those of the new cells can lie",
            do=f"atlas embed {store.model_folder(name)} {store.path} --name {name}",
            path=store.path,
        )


def _ingest(
    forked: CountStore,
    source: str | PathLike[str] | AnnData,
    appending: Mapping[str, Any],
    progress: bool,
) -> tuple[str, ...]:
    """Append the study where that is not done yet; returns what to say."""
    if appending["study"] in forked.studies:
        return ()
    return forked.append(source, **appending, progress=progress).notes


def _take_labels(
    forked: CountStore, name: str, appending: Mapping[str, Any], asking: dict[str, Any]
) -> list[str]:
    """Have surgery take the labels that the study is ingested with; returns what to say.

    A model that was trained by another obs column would pass them over.
    """
    key = appending.get("label_key")
    if key is None or "label_key" in asking:
        return []
    trained = stored_model(forked, name)
    own = trained.columns.label
    if trained.labels is None or own == key:
        return []
    asking["label_key"] = INGESTED
    if own is None:
        return []
    return [
        f"labels of {appending['study']} are taken from {key!r}: from now on the model {name} "
        f"takes the store's own, not obs column {own!r}"
    ]


def _extend(
    forked: CountStore,
    root: Path,
    work: Path,
    name: str,
    study: str,
    false_unknown: float | None,
    options: Mapping[str, Any],
) -> None:
    """Surgery, embedding, labels, drift; the model is in the fork at the end."""
    before, run = forked.models[name], work / "run"
    if not (run / "model.json").is_file():  # written last
        extend_reference(
            forked.model_folder(name),
            forked,
            [study],
            out=run,
            resume=True,
            **options,
        )
    trained, device = load_model(run), options["device"]
    if trained.training["store"] != str(root):
        # a run in the fork is one in the store, at the state that is to come
        number = manifests.numbers(root)[-1] + 1
        training = {**trained.training, "store": str(root), "manifest": number}
        trained = replace(trained, training=training)
        trained.save(run)
    if f"embedding:{name}" not in forked.study(study).entry.parts:
        z = embed_study(trained, forked, study, device=device, progress=options["progress"])
        covered = [one for one in forked.manifest.studies if one.name != study]
        old = [forked.part_array(one, f"embedding:{name}", "z") for one in covered]
        write_index(forked, name, z, np.concatenate(old) if old else None, work / "index")
        forked.extend_embedding(name, study, z, how_made(trained), index=work / "index")
    labels = labels_by_neighbours(forked, name, study, false_unknown)
    classes = labels_by_classifier(trained, forked, name, study, device)
    unseen: tuple[UnseenGroup, ...] = ()
    if labels:
        unseen = group_unseen(trained, forked, study, embedding=name, label=f"{name}_label")
    unknown = labels.get("Unknown", 0) / max(1, sum(labels.values()))
    drift = measure_drift(
        trained,
        forked,
        study,
        embedding=name,
        unknown_share=unknown if labels else None,
        unseen=unseen,
        device=device,
    )
    record = record_of(
        trained, before, study=study, labels=labels, classes=classes, drift=drift.to_json()
    )
    forked.write_model(name, run, record, after=before)
