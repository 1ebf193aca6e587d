"""From a trained reference and new studies to a model of both."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from atlas.config import Initialisation, LibraryKind, MissingGenes, Strategy, TrainConfig
from atlas.errors import ConfigError
from atlas.ingest.orthologs import read_orthologs
from atlas.models import Inputs, TrainedModel, load_model
from atlas.models.apart import Companions, KeepApart, principal_components
from atlas.models.base import evaluating
from atlas.models.expression import log_normalized
from atlas.models.lineage import Surgery
from atlas.models.parts import Growth, Reference, part_of, put_back
from atlas.models.surgery import check_reference, graft, merged, n_trainable, remarks
from atlas.provenance import command, versions
from atlas.store import CountStore, CountView
from atlas.training.environment import resolve_device
from atlas.training.inputs import CellColumns, InputsBuilder
from atlas.training.loop import fit
from atlas.training.run import check_run_folder
from atlas.workflows.columns import cell_columns, warn_of_unseen
from atlas.workflows.genes import GenesInStore, check_overlap
from atlas.workflows.growing import (
    Codes,
    grown_columns,
    grown_labels,
    known_studies,
    new_batches,
    new_studies,
    part_for,
    values_in_part,
)
from atlas.workflows.rows import split_within
from atlas.workflows.starting import library_prior, weights_digest
from atlas.workflows.streaming import CellStream
from loaders import SequentialLoader

LR = 0.01
"""Few parameters are trained, in few steps: ten times the learning rate of a whole model."""

_APART, _APART_FROM_KNOWN = 1.7, 20.0
"""Weights in nats: see "bench_surgery, bench_transfer and bench_updates" in benchmarks/LOG.md."""
_COMPONENTS = 20
"""Principal components by which batches are kept apart."""

_COMPANIONS = 1024
"""Cells of studies known before from which new ones are kept apart."""

_TRIED = 1000
"""Cells of a new batch by which its nearest one is chosen."""


def extend_reference(
    model: TrainedModel | str | PathLike[str],
    store: CountStore,
    studies: Sequence[str] | None = None,
    *,
    out: str | PathLike[str],
    strategy: Strategy = "conditions",
    initialisation: Initialisation = "nearest",
    label_key: str | None = None,
    orthologs: str | PathLike[str] | None = None,
    missing: MissingGenes = "mask",
    keep_apart: float | None = None,
    apart_from: str | Sequence[str] = (),
    force: bool = False,
    max_epochs: int = 5,
    seed: int = 0,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> TrainedModel:
    """Add studies to a trained reference by architectural surgery; the reference is untouched.

    Each batch of the studies gets a row of weights of its own in every layer that sees the batch,
    and only these rows are trained, on the studies' cells alone (scArches, Lotfollahi et al. 2022,
    Methods). With the default strategy the embedding of the reference's cells by the new model is
    what it was, bit for bit on the same processor. Studies that were added before take no part, but
    for categories and labels that came with them and that the new ones have too; so the order of
    studies that are mapped one by one makes no difference.

    Parameters
    ----------
    model
        The reference, or its run folder.
    store
        A store that has the studies; it need not have the reference's.
    studies
        Which; all that the model does not know when None.
    out
        The run folder of the new model.
    strategy
        ``"conditions"`` trains the new rows only; ``"input_layers"`` the first layers of encoder
        and decoder too, ``"all"`` everything: with these two the reference moves.
    initialisation
        Of the new rows; see :func:`atlas.models.surgery.graft`.
    label_key
        For scANVI: the obs column of the studies' labels; the reference's when None, and then they
        have none in a store without it. ``"atlas_label"`` takes the labels that they were ingested
        with. Labels that the reference does not have become classes at the root, in none of the
        groups of its hierarchy.
    orthologs
        Of a store of another species: a CSV or TSV of its genes and the model's, by name or Ensembl
        id. One-to-one pairs are used, other genes are taken as not measured
        (:mod:`atlas.ingest.orthologs`); the pairs are kept with the model.
    missing
        What to do with genes of the model that a study lacks: ``"mask"`` leaves them out of
        likelihood and softmax, as in training; ``"zero"`` takes them as measured and zero.
    keep_apart
        Weight of the penalty on batches of the studies that come nearer to each other than their
        expression is (:class:`atlas.models.apart.KeepApart`), so that a stimulation is not taken
        for a batch effect; 0 is the paper's form. Without effect on a single batch. By default 1.7,
        and 20 with ``apart_from``, whose cells no gradient moves.
    apart_from
        Studies that the model knows and the store has, of which the new ones are a condition, such
        as the control of a stimulation: they are kept apart from these too. A thousand cells of
        them are read.
    force
        Go on with a study that has less than half of the model's genes.
    max_epochs
        Passes over the studies' cells.
    seed
        Of new rows, noise and order.
    resume
        Go on with the run in ``out``; start it where there is none.
    progress
        Show loss, cells/s and the time left on stderr, and what stays as it is beside the weights.
    **options
        Fields of :class:`atlas.config.TrainConfig`; by default the learning rate is 0.01 here, and
        weight decay 0.

    Returns
    -------
    TrainedModel
        Of reference and studies, also kept in ``out``; ``surgery`` has what was added and how many
        parameters were trained.

    Raises
    ------
    ModelError
        The encoder of the reference does not see the batch, a study is in the model already, or
        has too few of its genes.
    ConfigError
        There is no such study or option.
    CheckpointError
        ``out`` holds another run, or one and ``resume`` is False.
    """
    trained = model if isinstance(model, TrainedModel) else load_model(model)
    folder = Path(out)
    config = _training_config({"lr": LR, "weight_decay": 0.0, **options}, max_epochs, seed)
    check_reference(trained.module)
    names = new_studies(trained, store, studies)
    beside = known_studies(trained, store, apart_from, keep_apart)
    if keep_apart is None:
        keep_apart = _APART_FROM_KNOWN if beside else _APART
    check_run_folder(folder, resume=resume)
    if orthologs is None:
        genes = GenesInStore.of(trained, store)
    else:
        genes = GenesInStore.of_orthologs(trained, store, read_orthologs(orthologs))
    view = genes.select(store)
    assert isinstance(view, CountView)
    study_codes = store.obs_codes["study"]
    chosen = np.isin(study_codes, [store.studies.index(name) for name in names])
    presence = view.presence
    shares = {name: float(presence[store.studies.index(name)].mean()) for name in names}
    check_overlap(trained, shares, store, orthologs, force)
    if missing == "zero":
        presence[:] = True

    batches, codes = new_batches(trained, store, chosen)
    columns = grown_columns(trained, store, chosen, label_key)
    asked = label_key is not None
    labels, own_labels = grown_labels(trained, store, columns, chosen, asked=asked)
    old = () if trained.labels is None else trained.labels.names
    new_labels = () if labels is None else labels.names[len(old) :]
    values = cell_columns(store, columns, None, chosen)
    values = dataclasses.replace(values, batch=codes, label=own_labels)
    growth = Growth(
        batches=batches,
        categories=tuple(
            grown[len(own) :]
            for (_, own), (_, grown) in zip(
                trained.columns.categorical, columns.categorical, strict=True
            )
        ),
        labels=new_labels,
        library_prior=_new_prior(trained, view, codes, chosen, len(batches)),
    )
    module = trained.module.cpu()  # where parts are taken and put back
    whole = Reference(module, len(trained.batches), trained.columns.sizes, trained.labels)
    part = part_for(trained, values, chosen)
    reference = part_of(whole, part)
    values = values_in_part(trained, part, values)
    to_inputs = InputsBuilder(
        resolve_device(config.device), None if presence.all() else presence, values
    )
    nearest = None
    if initialisation == "nearest":
        nearest = _nearest(reference, view, values, to_inputs, chosen, len(batches))
    tuned = graft(
        reference,
        growth,
        strategy=strategy,
        initialisation=initialisation,
        nearest=nearest,
        seed=seed,
    )
    n_trained = n_trainable(tuned)
    if progress:
        for line in remarks(trained.module, strategy):
            print(line, file=sys.stderr)
    penalty = None
    if keep_apart > 0 and (len(batches) > 1 or beside):
        cells = (to_inputs(minibatch) for minibatch in SequentialLoader(view, 4096, rows=chosen))
        inputs, companions = _companions(trained, store, beside)
        found = principal_components(chain(cells, inputs), _COMPONENTS)
        penalty = KeepApart(*found, keep_apart, companions)
    split = split_within(store.split(config.validation_share), chosen)
    warn_of_unseen(labels, own_labels, split.train, new=len(old))
    record = fit(
        tuned,
        view,
        train_rows=split.train,
        validation_rows=split.validation,
        presence=None if presence.all() else presence,
        config=config,
        out=folder,
        resume=resume,
        describe={
            "reference": weights_digest(trained.module),
            "genes": list(trained.genes),
            "orthologs": [list(pair) for pair in genes.orthologs],
            "batches": list(batches),
            "strategy": strategy,
            "initialisation": initialisation,
            "keep_apart": keep_apart,
            "apart_from": list(beside),
            "labels": None if labels is None else labels.to_json(),
            "start": weights_digest(tuned),
        },
        columns=values,
        penalty=penalty,
        progress=progress,
    )
    rows = presence[[store.studies.index(name) for name in names]]
    surgery = Surgery(
        studies=names,
        batches=batches,
        labels=new_labels,
        strategy=strategy,
        initialisation=initialisation,
        keep_apart=keep_apart,
        apart_from=beside,
        zero_filled=missing == "zero",
        n_trained=n_trained,
        orthologs=genes.orthologs,
        n_categories=tuple(map(len, growth.categories)),
    )
    extended = TrainedModel(
        module=put_back(merged(tuned.cpu(), reference, growth), whole, part, growth),
        genes=trained.genes,
        batches=(*trained.batches, *batches),
        studies=(*trained.studies, *names),
        presence=np.concatenate([trained.presence, rows]),
        gene_ids=trained.gene_ids,
        labels=labels,
        columns=columns,
        surgery=(*trained.surgery, surgery),
        training={
            "config": config.to_json(),
            "history": record.to_json(),
            "reference": trained.training,
            "reference_weights": weights_digest(trained.module),
            "store": str(store.path),
            "manifest": store.number,
            "versions": versions(),
            "command": command(),
        },
    )
    extended.save(folder)
    return extended


def _training_config(options: dict[str, Any], max_epochs: int, seed: int) -> TrainConfig:
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(options) - known):
        raise ConfigError(
            "Surgery has no such options",
            found=", ".join(unknown),
            expected="some of " + ", ".join(sorted(known)),
        )
    return TrainConfig(**{**options, "max_epochs": max_epochs, "seed": seed})


def _new_prior(
    model: TrainedModel,
    view: CountView,
    codes: Codes,
    chosen: npt.NDArray[np.bool_],
    n_batches: int,
) -> torch.Tensor | None:
    """Mean and variance of the log library size in each new batch, for a latent library."""
    kind: LibraryKind | None = getattr(model.config, "library", None)
    if kind != "latent":
        return None
    first = len(model.batches)
    return library_prior(view, codes - first, n_batches, chosen)


def _companions(
    model: TrainedModel, store: CountStore, studies: Sequence[str]
) -> tuple[list[Inputs], Companions | None]:
    """At most 1,024 cells of studies that the model knows, evenly spread, and where they lie."""
    if not studies:
        return [], None
    rows = np.flatnonzero(
        np.isin(store.obs_codes["study"], [store.studies.index(name) for name in studies])
    )
    mask = np.zeros(store.n_obs, bool)
    mask[rows[np.linspace(0, len(rows) - 1, min(_COMPANIONS, len(rows))).astype(np.int64)]] = True
    inputs, z = [], []
    for cells in CellStream(model, store, rows=mask, device="cpu"):
        inputs.append(cells.inputs.first(cells.n_cells))
        with evaluating(model.module):
            z.append(model.module.encode(inputs[-1])[0])
    return inputs, Companions(
        expression=torch.cat([log_normalized(one) for one in inputs]),
        z=torch.cat(z),
        batch=-1 - torch.cat([one.batch for one in inputs]),  # not a code of the new cells
    )


def _nearest(
    reference: Reference,
    view: CountView,
    values: CellColumns,
    to_inputs: InputsBuilder,
    chosen: npt.NDArray[np.bool_],
    n_batches: int,
) -> list[int]:
    """For each new batch, the reference's one by whose weights its cells are most likely.

    By the bound of at most a thousand cells, with z and library at their posterior means. Cells of
    a category that the reference does not know are taken for such of the first one.
    """
    sizes = torch.tensor(reference.covariates.n_categories)
    assert values.batch is not None
    first = reference.n_batch
    best = []
    module, device = reference.module, torch.device("cpu")
    for code in range(first, first + n_batches):
        rows = np.flatnonzero(chosen & (values.batch == code))
        mask = np.zeros(len(chosen), bool)
        mask[rows[:: max(1, len(rows) // _TRIED)]] = True
        sums = np.zeros(first)
        for minibatch in SequentialLoader(view, 512, rows=mask):
            inputs = dataclasses.replace(to_inputs(minibatch).to(device), label=None)
            if (categories := inputs.categories) is not None:
                known = categories.where(categories < sizes, 0)
                inputs = dataclasses.replace(inputs, categories=known)
            for candidate in range(first):
                batch = torch.full_like(inputs.batch, candidate)
                with evaluating(module):
                    losses = module.loss(dataclasses.replace(inputs, batch=batch))
                sums[candidate] += float(losses.negative_bound.sum())
        best.append(int(sums.argmin()))
    return best
