"""From a store to a trained model."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from atlas.config import ARCHITECTURES, Architecture, ScanviConfig, ScviConfig, TrainConfig
from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories
from atlas.evaluation.confounding import confounding
from atlas.models import SCANVI, LabelTree, ObsColumns, TrainedModel, build_model, load_model
from atlas.models.columns import UNLABELED
from atlas.models.start import start_at
from atlas.provenance import command, versions
from atlas.store import CountStore, FilesSource
from atlas.store.split import Split, ranges_of
from atlas.training.loading import n_rows
from atlas.training.loop import fit
from atlas.training.ranks import Ranks, first_rank, joined
from atlas.training.run import check_run_folder
from atlas.workflows.columns import (
    cell_columns,
    check_unlabeled,
    describe_columns,
    label_names,
    warn_of_unseen,
)
from atlas.workflows.hierarchy import Hierarchy, label_tree
from atlas.workflows.projecting import advice, project
from atlas.workflows.rows import (
    Rows,
    RowsOrMask,
    batches_within,
    mask_of,
    rows_where,
    split_within,
)
from atlas.workflows.starting import (
    library_prior,
    profile_of,
    take_weights,
    weights_digest,
)
from loaders import RowSource


def default_epochs(n_obs: int) -> int:
    """scvi-tools' rule: 400 passes, fewer above 20,000 cells, but always one."""
    return max(1, min(400, round(8e6 / max(1, n_obs))))


def train(
    store: CountStore | FilesSource,
    model: str = "scvi",
    *,
    out: str | PathLike[str],
    genes: Sequence[str] | None = None,
    max_epochs: int | None = None,
    seed: int = 0,
    rows: RowsOrMask = None,
    hold_out: Rows | None = None,
    label_key: str | None = None,
    unlabeled: str = UNLABELED,
    hierarchy: Hierarchy | None = None,
    categorical_covariates: Sequence[str] = (),
    continuous_covariates: Sequence[str] = (),
    size_factor: str | None = None,
    start_from: TrainedModel | str | PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> TrainedModel:
    """Train a model on all studies of a store, or on some of its cells.

    Parameters
    ----------
    store
        An open store, or files as they are (:func:`atlas.open_files`).
    model
        ``"scvi"``, ``"scanvi"``, ``"trvae"``, ``"cvae"`` or ``"davae"``.
    out
        The run folder: log, checkpoints, and at the end the model.
    genes
        The genes to model; those recorded by :func:`select_genes` when None.
    max_epochs
        Passes over the cells; by default as scvi-tools (:func:`default_epochs`).
    seed
        Of weights, noise and order.
    rows
        Cells to train and validate on, by an obs column or a mask; all when None. The model then
        knows their batches and covariates only; a scANVI's classes are the store's.
    hold_out
        Cells to validate on and never to train on, by an obs column, such as ``"donor=D3"``; by
        default a share of the cells by their hash.
    label_key
        For scANVI: the obs column of the labels; the store's own when None. Cells without a value
        there, or with that of ``unlabeled``, have no label.
    unlabeled
        With ``label_key``: the value that stands for no label. The model remembers it.
    hierarchy
        For scANVI: the parent of each label that has one, to any depth; a mapping, a JSON file, or
        a table of two columns whose first line is ``child,parent``.
    categorical_covariates, continuous_covariates
        For scVI and scANVI: obs columns to condition on besides the batch.
    size_factor
        For scVI and scANVI: the obs column of size factors, in place of a library size.
    start_from
        For scANVI: a trained scVI of the same architecture, genes and batches, or its run folder;
        training goes on from its weights.
    resume
        Go on with the run in ``out``, wherever it was interrupted; start it where there is none.
    progress
        Show loss, cells/s and the time left on stderr, and whether ``project`` would pay.
    **options
        Fields of the model's configuration, such as :class:`atlas.config.ScviConfig`, and of
        :class:`atlas.config.TrainConfig`.

    Returns
    -------
    TrainedModel
        Also kept in ``out``; :func:`load_model` reads it.

    Raises
    ------
    ConfigError
        An option that is not there or is out of range.
    CheckpointError
        ``out`` holds another run, or one and ``resume`` is False.
    """
    folder = Path(out)
    if model not in ARCHITECTURES:
        names = ", ".join(map(repr, ARCHITECTURES))
        raise ConfigError("There is no such model", found=repr(model), expected=names)
    of_labels = {
        "label_key": label_key,
        "unlabeled": unlabeled != UNLABELED,
        "hierarchy": hierarchy,
        "start_from": start_from,
    }
    of_covariates = {
        "categorical_covariates": categorical_covariates,
        "continuous_covariates": continuous_covariates,
        "size_factor": size_factor,
    }
    _check_taken(model, of_labels, of_covariates)
    if size_factor is not None:
        options["library"] = "size-factor"
    chosen = mask_of(store, rows)
    epochs = default_epochs(int(chosen.sum())) if max_epochs is None else max_epochs
    architecture, training = _configs(model, {**options, "seed": seed, "max_epochs": epochs})
    library = getattr(architecture, "library", None)
    if library == "size-factor" and size_factor is None:
        raise ConfigError(
            "Size factors need an obs column",
            found="library='size-factor'",
            do="name the column with size_factor (--size-factor)",
        )
    genes = store.genes if genes is None else tuple(map(str, genes))
    if genes is None:
        raise ConfigError(
            "No genes are chosen",
            do="choose them with `atlas genes` (atlas.select_genes), or give genes=",
            path=store.path,
        )
    if training.project and not isinstance(store, CountStore):
        raise ConfigError(
            "Only a store can be projected",
            found=repr(store),
            do="leave out project, or ingest the files",
            path=store.path,
        )
    if first_rank():
        check_run_folder(folder, resume=resume)
    view = store.select(genes)
    batches = Categories(store.obs_codes["batch"], store.batches)[chosen]
    classes = Categories(store.obs_codes["label"], store.labels)[chosen]
    caution = confounding(batches, classes)
    if caution and first_rank():
        warnings.warn(caution, UserWarning, stacklevel=2)
    columns = describe_columns(
        store,
        categorical=categorical_covariates,
        continuous=continuous_covariates,
        size_factor=size_factor,
        label=label_key,
        unlabeled=unlabeled,
        chosen=chosen,
    )
    labels = None
    if isinstance(architecture, ScanviConfig):
        labels = _labels(store, columns, hierarchy, architecture.unobserved_classes)
    known, codes = store.batches, store.obs_codes["batch"]
    if rows is not None:
        known, codes = batches_within(store, chosen)
    prior = library_prior(view, codes, len(known), chosen) if library == "latent" else None
    module = build_model(
        architecture,
        view.n_vars,
        len(known),
        seed=seed,
        library_prior=prior,
        covariates=columns.sizes,
        labels=labels,
    )
    if isinstance(module, SCANVI) and start_from is not None:
        begin = start_from if isinstance(start_from, TrainedModel) else load_model(start_from)
        take_weights(module, begin, genes, known)
    projected = folder / "projected"
    progress = progress and first_rank()
    if not training.project and progress and (line := advice(view, epochs, folder)):
        print(line, file=sys.stderr)
    presence = view.presence
    if hold_out is None:
        split = store.split(training.validation_share)
        if rows is not None:
            split = split_within(split, chosen)
    else:
        held_out = rows_where(store, hold_out)
        if not (chosen & ~held_out).any():
            raise ConfigError(
                "All cells are held out, so none is left to train on",
                found=f"hold_out={hold_out!r}",
                expected="some of the cells",
                do="hold out fewer values of the column",
                path=store.path,
            )
        split = Split(ranges_of(chosen & ~held_out), ranges_of(chosen & held_out), [])
    if start_from is None and n_rows(split.train):
        start_at(module, profile_of(view, split.train, seed))
    values = cell_columns(store, columns, labels, chosen)
    if first_rank():
        warn_of_unseen(labels, values.label, split.train)
    if rows is not None:
        values = dataclasses.replace(values, batch=codes)
    with joined(training.device) as ranks:
        reading: Callable[[RowSource], RowSource] | None = None
        if training.project and isinstance(store, CountStore):
            reading = partial(_projected, store, genes, projected, progress, ranks)
        record = fit(
            module,
            view,
            train_rows=split.train,
            validation_rows=split.validation,
            presence=None if presence.all() else presence,
            config=training,
            out=folder,
            resume=resume,
            describe={
                "model": {"name": model, **architecture.to_json()},
                "genes": list(genes),
                "batches": list(known),
                "obs_columns": columns.to_json(),
                "labels": None if labels is None else labels.to_json(),
                "start": weights_digest(module),
            },
            columns=values,
            progress=progress,
            reading=reading,
            ranks=ranks,
        )
    ids = store.var["gene_id"].reindex(list(genes))
    trained = TrainedModel(
        module=module,
        genes=tuple(genes),
        batches=known,
        studies=store.studies,
        presence=presence,
        gene_ids=tuple(
            None if missing else str(i) for i, missing in zip(ids, ids.isna(), strict=True)
        ),
        labels=labels,
        columns=columns,
        training={
            "config": training.to_json(),
            "history": record.to_json(),
            "store": str(store.path),
            "manifest": store.number,
            "versions": versions(),
            "command": command(),
        },
    )
    if first_rank():
        shutil.rmtree(projected, ignore_errors=True)  # an earlier part of the run may have made it
        trained.save(folder)
    return trained


def _projected(
    store: CountStore,
    genes: Sequence[str],
    path: Path,
    progress: bool,
    ranks: Ranks,
    _: RowSource,
) -> RowSource:
    if not ranks.first:
        ranks.wait()  # until the first has written it
    made = project(store, genes, path, progress=progress)
    if ranks.first:
        ranks.wait()
    return made


def _configs(model: str, options: dict[str, Any]) -> tuple[Architecture, TrainConfig]:
    """Sort options into the two configurations."""
    kinds = (ARCHITECTURES[model], TrainConfig)
    sorted_out: list[dict[str, Any]] = []
    for kind in kinds:
        names = {field.name for field in dataclasses.fields(kind)}
        sorted_out.append({name: options.pop(name) for name in names & set(options)})
    if options:
        names = {f.name for kind in kinds for f in dataclasses.fields(kind)}
        raise ConfigError(
            f"The model {model} has no such options",
            found=", ".join(sorted(options)),
            expected="some of " + ", ".join(sorted(names)),
        )
    return kinds[0](**sorted_out[0]), TrainConfig(**sorted_out[1])


def _check_taken(
    model: str, of_labels: Mapping[str, Any], of_covariates: Mapping[str, Any]
) -> None:
    """Refuse what the model would not look at."""
    kind = ARCHITECTURES[model]
    wrong = [
        name
        for wanted, given in ((ScanviConfig, of_labels), (ScviConfig, of_covariates))
        for name, value in given.items()
        if value and not issubclass(kind, wanted)
    ]
    if wrong:
        raise ConfigError(
            f"The model {model} does not take these",
            found=", ".join(wrong),
            do="leave them out, or train scanvi",
        )


def _labels(
    store: CountStore | FilesSource,
    columns: ObsColumns,
    hierarchy: Hierarchy | None,
    unobserved: int,
) -> LabelTree:
    names = label_names(store, columns.label, columns.unlabeled)
    if columns.unlabeled != UNLABELED:
        check_unlabeled(store, columns)
    if not names:
        raise ConfigError(
            "scANVI needs cells with a label",
            found=f"none in obs column {columns.label!r}" if columns.label else "none in the store",
            do="name another column with label_key (--label-key), or give labels with "
            "`atlas annotate` or `atlas seed-labels`",
            path=store.path,
        )
    tree = label_tree(names, hierarchy, unobserved)
    if len(tree.leaves) < 2:  # the model refuses it too, but knows no column
        where = f"in obs column {columns.label!r}" if columns.label else "among the store's labels"
        raise ConfigError(
            "scANVI needs two classes of cells at least",
            found=f"one class, {tree.classes[0]!r}, {where}",
            do="give labels of two types, or --unobserved-classes for types without a label",
            path=store.path,
        )
    return tree
