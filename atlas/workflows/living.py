"""The living atlas: a study added to a store and to a model kept with it, in one step.

An update works in ``STORE/.update-STUDY``: a fork of the store (:mod:`atlas.store.fork`), where
each step commits a state of its own, and the run folder of the surgery. Which steps are done is
read from these; the last one makes a single state of the store out of them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from atlas import files
from atlas.errors import ConfigError, InputError, ModelError, StudyExistsError
from atlas.models import load_model
from atlas.models.surgery import check_reference
from atlas.store import CountStore, open_store
from atlas.store import manifest as manifests
from atlas.store.fork import fork, publish
from atlas.store.options import check_name
from atlas.workflows.drift import Drift, measure_drift
from atlas.workflows.embedding import check_writable, embed_study, how_made
from atlas.workflows.growing import INGESTED
from atlas.workflows.indexing import write_index
from atlas.workflows.keeping import embedded_by, record_of, stored_model
from atlas.workflows.newcomers import labels_by_classifier, labels_by_neighbours
from atlas.workflows.surgery import extend_reference
from atlas.workflows.transferring import check_free, check_share
from atlas.workflows.unseen import UnseenGroup, group_unseen

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
    was. After Ctrl-C or a kill the same call goes on from the last step that was finished.

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
    root, work = store.path, store.path / f".update-{study}"
    appending = {**(ingest or {}), "study": study}
    with manifests.writer(root, f"update {study}") as newest:
        store = CountStore(root, newest)
        asked = _request(
            source,
            model,
            appending,
            {**options, "device": device, "false_unknown": false_unknown},
        )
        notes = []
        whole = _recorded(work) == {**asked, "manifest": newest.number - 1}
        if whole and newest.action.startswith(_action(study, model)):
            notes.append("the update was whole already")  # killed after the last step
            state, version = newest, newest.models[model].version
        else:
            _check(store, study, model)
            with _clean_when_refused(work):
                notes += _begin(root, work, {**asked, "manifest": newest.number}, fresh=fresh)
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
    record = store.model_record(model, version)
    return UpdateReport(
        study=study,
        n_obs=store.study(study).entry.n_obs,
        model=model,
        version=version,
        manifest=state.number,
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


def _request(
    source: str | PathLike[str] | AnnData,
    model: str,
    appending: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What has to be the same for an update to go on, plain JSON."""
    found: list[Any]
    if isinstance(source, AnnData):
        found = ["memory", os.getpid(), id(source)]  # cannot go on in another process
    else:
        paths = [Path(source), *sorted(Path(source).rglob("*"))]
        stats = [(str(path.absolute()), path.stat()) for path in paths if path.is_file()]
        found = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    if (table := appending.get("orthologs")) and Path(table).is_file():
        found.append(files.digest_file(Path(table)))
    asked = {"source": found, "model": model, "append": appending, "options": options}
    return dict(json.loads(json.dumps(asked, default=str)))


def _recorded(work: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((work / "request.json").read_bytes()))
    except (OSError, ValueError):
        return None


def _begin(root: Path, work: Path, asked: Mapping[str, Any], *, fresh: bool) -> list[str]:
    """Make the folder to work in, or take the one to go on with; returns what to say."""
    notes = []
    if work.exists():
        recorded = _recorded(work)
        differing = [name for name in asked if (recorded or {}).get(name) != asked[name]]
        if not differing and not fresh:
            return ["going on with the update that was interrupted"]
        if recorded is not None:  # else it had not begun
            why = "--fresh was given" if fresh else f"it was of another {', '.join(differing)}"
            notes.append(f"an interrupted update was not gone on with: {why}")
        shutil.rmtree(work)
    work.mkdir()
    fork(root, work / "store", manifests.read(root))
    files.replace_bytes(work / "request.json", json.dumps(asked, indent=1).encode())
    return notes


@contextmanager
def _clean_when_refused(work: Path) -> Iterator[None]:
    """After what no repetition mends, such as bad input, nothing stays; else it can go on."""
    try:
        yield
    except (InputError, ModelError, ConfigError):
        shutil.rmtree(work, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "(what was done is kept: the same command goes on, --fresh starts anew)"
        ) from None


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
