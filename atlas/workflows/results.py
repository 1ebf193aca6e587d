"""From an embedding to measures and a report."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from atlas.evaluation.codes import Categories
from atlas.evaluation.figures import LossRecord
from atlas.evaluation.measures import evaluate_embedding
from atlas.evaluation.metrics import Metrics
from atlas.evaluation.report import ReportInputs, write_report
from atlas.provenance import command, versions
from atlas.store import CountStore
from atlas.store.manifest import history, now
from atlas.workflows.rows import Rows, rows_where


def evaluate(
    store: CountStore,
    *,
    embedding: str,
    reference: Rows | None = None,
    query: Rows | None = None,
    seed: int = 0,
) -> Metrics:
    """Measure an embedding: mixing of batches, label transfer, silhouettes.

    Parameters
    ----------
    store
        An open store.
    embedding
        Name of an embedding kept with it.
    reference, query
        Cells whose labels are carried over, and to which, by an obs column; without them each
        labeled cell is predicted from all others.
    seed
        Of the samples.
    """
    return evaluate_embedding(
        store.embedding(embedding),
        Categories(store.obs_codes["batch"], store.batches),
        Categories(store.obs_codes["label"], store.labels) if store.labels else None,
        reference=None if reference is None else rows_where(store, reference),
        query=None if query is None else rows_where(store, query),
        seed=seed,
    )


def report(
    store: CountStore,
    *,
    embedding: str,
    out: str | PathLike[str],
    reference: Rows | None = None,
    query: Rows | None = None,
    seed: int = 0,
) -> Path:
    """Write the report of an embedding: one self-contained HTML file.

    Parameters are those of :func:`evaluate`; ``out`` is the file. The losses, options and versions
    are those kept with the embedding, the commands those that made the store.
    """
    how = store.embedding_details(embedding)
    training = how.get("training", {})
    model = how.get("model", {})
    settings = {**model, **training.get("config", {})}
    commands = [state.command for state in history(store.path)]
    commands += [training["command"]] if training.get("command") else []
    inputs = ReportInputs(
        title=store.path.name,
        embedding_name=embedding,
        embedding=store.embedding(embedding),
        studies=Categories(store.obs_codes["study"], store.studies),
        batches=Categories(store.obs_codes["batch"], store.batches),
        labels=Categories(store.obs_codes["label"], store.labels) if store.labels else None,
        n_genes=store.n_vars,
        n_modelled_genes=len(how.get("genes", [])),
        study_genes=tuple(int(n) for n in store.presence().sum(axis=1)),
        metrics=evaluate(store, embedding=embedding, reference=reference, query=query, seed=seed),
        history=tuple(
            LossRecord(r["epoch"], r["train_loss"], r["validation_bound"])
            for r in training.get("history", [])
        ),
        commands=(*dict.fromkeys(commands), command()),
        settings={name: str(value) for name, value in settings.items()},
        versions=how.get("versions", versions()),
        created=now(),
    )
    return write_report(inputs, out, seed=seed)
