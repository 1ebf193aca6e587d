"""From an embedding to measures and a report."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories
from atlas.evaluation.figures import LossRecord
from atlas.evaluation.measures import Options, compare_embeddings, evaluate_embedding
from atlas.evaluation.metrics import Comparison, Difference, Metrics
from atlas.evaluation.report import ReportInputs, write_report
from atlas.evaluation.scib_table import ScibTable, scib_table
from atlas.evaluation.score_figure import FigureFormat, draw_scores
from atlas.provenance import command, versions
from atlas.store import CountStore
from atlas.store.manifest import history, now
from atlas.workflows import measuring
from atlas.workflows.added import added_studies
from atlas.workflows.measuring import Searcher
from atlas.workflows.output import check_file, check_suffix, write_bytes, write_text
from atlas.workflows.proteins import proteins_of
from atlas.workflows.rows import Rows, rows_where

QUERIES = Options().max_queries
GRAPH_CELLS = Options().graph_cells
MIXING_K = tuple(Options().mixing_k)


def check_scores_path(path: str | PathLike[str]) -> None:
    """Refuse a file that the table of scores cannot be written to, before anything is measured.

    Raises
    ------
    ConfigError
        Its name ends in none of .csv, .svg, .png and .pdf.
    OutputError
        Its folder is not there, or it is a folder itself.
    """
    check_file(path)
    check_suffix(path, ("csv", *get_args(FigureFormat)), "the table of scores")


def write_scores(table: ScibTable, path: str | PathLike[str]) -> None:
    """Write scib-metrics' aggregate table, whole or not at all: .csv, or drawn as .svg, .png, .pdf.

    Raises
    ------
    ConfigError
        Another name.
    """
    check_scores_path(path)
    suffix: Any = Path(path).suffix.removeprefix(".")
    if suffix == "csv":
        write_text(path, table.to_csv())
    else:
        write_bytes(path, draw_scores(table, suffix))


def evaluate(
    store: CountStore,
    *,
    embedding: str,
    reference: Rows | None = None,
    query: Rows | None = None,
    individual: str | None = None,
    before: str | None = None,
    protein: str | None = None,
    k: Sequence[int] = MIXING_K,
    queries: int = QUERIES,
    graph_cells: int = GRAPH_CELLS,
    backend: Searcher = "auto",
    seed: int = 0,
) -> Metrics:
    """Measure an embedding: mixing of batches, label transfer, silhouettes, and more.

    Parameters
    ----------
    store
        An open store.
    embedding
        Name of an embedding kept with it.
    reference, query
        Cells whose labels are carried over, and to which, by an obs column; without them each
        labeled cell is predicted from all others.
    individual
        Name of an embedding of each batch on its own, for kNN purity and k-means conservation;
        without it ``"pca_batch"`` of :func:`atlas.baseline`, where that is kept with the store and
        of the same cells and batches.
    before
        Name of an embedding before integration, for the PCR comparison; without it ``"pca"``, in
        the same way.
    protein
        Name of an obsm array of proteins measured in the same cells (CITE-seq), for the common
        neighbours; counts are taken as centred log ratios. Studies without it are left out.
    k
        Neighbours for the entropy of batch mixing: one number or more, from 10 to 500.
    queries
        Cells above this number are sampled; they are searched among all. The standard errors that
        this leaves are told.
    graph_cells
        Graph connectivity is left out where there are more cells.
    backend
        What searches: ``"faiss"`` or ``"torch"``, exactly; ``"index"``, the index kept with the
        embedding, whose recall is told; ``"auto"``, that index where it is exact, else exact
        search (but for graph connectivity of many cells, whose recall is told). Among some of the
        cells, as a batch or the labeled ones, the search is always exact.
    seed
        Of the samples.

    Raises
    ------
    ConfigError
        An option out of range, an embedding of each batch on its own where one of all cells is
        asked for, or no index to search.
    ModelError
        An embedding that is not finite.
    """
    z = measuring.joint(store, embedding)
    search, index = measuring.searcher(store, embedding, z, backend)
    return evaluate_embedding(
        z,
        **_categories(store, reference, query),
        **_held_against(store, individual, before, protein),
        index=index,
        mixing_k=k,
        max_queries=queries,
        graph_cells=graph_cells,
        backend=search,
        seed=seed,
    )


def compare(
    store: CountStore,
    embeddings: Sequence[str],
    *,
    reference: Rows | None = None,
    query: Rows | None = None,
    individual: str | None = None,
    before: str | None = None,
    protein: str | None = None,
    k: Sequence[int] = MIXING_K,
    queries: int = QUERIES,
    graph_cells: int = GRAPH_CELLS,
    backend: Searcher = "auto",
    seed: int = 0,
) -> Comparison:
    """Measure several embeddings on the same cells, and their differences with paired errors.

    Parameters
    ----------
    store
        An open store.
    embeddings
        Names of embeddings kept with it, two or more.
    reference, query, individual, before, protein, k, queries, graph_cells, backend, seed
        As in :func:`evaluate`.

    Raises
    ------
    ConfigError, ModelError
        As :func:`evaluate`; and fewer than two embeddings, or one named twice.
    """
    if len(set(embeddings)) < len(embeddings):
        raise ConfigError(
            "an embedding is named twice",
            found=", ".join(embeddings),
            expected="two embeddings or more, each once",
        )
    values = {name: measuring.joint(store, name) for name in embeddings}
    searchers = {name: measuring.searcher(store, name, z, backend) for name, z in values.items()}
    return compare_embeddings(
        values,
        **_categories(store, reference, query),
        **_held_against(store, individual, before, protein),
        indices={name: index for name, (_, index) in searchers.items() if index is not None},
        options=Options(
            mixing_k=k,
            max_queries=queries,
            graph_cells=graph_cells,
            backend=next((search for search, _ in searchers.values()), "auto"),
            seed=seed,
        ),
    )


def _held_against(
    store: CountStore, own: str | None, before: str | None, protein: str | None
) -> dict[str, Any]:
    """What embeddings are measured beside."""
    own, before = measuring.beside(store, own, before)
    return {
        "individual": measuring.individual(store, own),
        "before": None if before is None else measuring.joint(store, before),
        "proteins": None if protein is None else proteins_of(store, protein),
    }


def _categories(store: CountStore, reference: Rows | None, query: Rows | None) -> dict[str, Any]:
    """Batches, labels and masks of all cells of a store."""
    return {
        "batches": Categories(store.obs_codes["batch"], store.batches),
        "labels": Categories(store.obs_codes["label"], store.labels) if store.labels else None,
        "reference": None if reference is None else rows_where(store, reference),
        "query": None if query is None else rows_where(store, query),
    }


def report(
    store: CountStore,
    *,
    embedding: str,
    out: str | PathLike[str],
    reference: Rows | None = None,
    query: Rows | None = None,
    individual: str | None = None,
    before: str | None = None,
    protein: str | None = None,
    k: Sequence[int] = MIXING_K,
    queries: int = QUERIES,
    graph_cells: int = GRAPH_CELLS,
    backend: Searcher = "auto",
    beside: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Write the report of an embedding: one self-contained HTML file.

    Parameters are those of :func:`evaluate`; ``out`` is the file, and ``beside`` names embeddings
    whose differences to this one are told. The losses, options and versions
    are those kept with the embedding, the commands those that made the store.

    Raises
    ------
    OutputError
        The file cannot be written; this is tried before anything is measured.
    """
    check_file(out)
    how = store.embedding_details(embedding)
    training = how.get("training", {})
    model = how.get("model", {})
    settings = {**model, **training.get("config", {})}
    commands = [state.command for state in history(store.path)]
    commands += [training["command"]] if training.get("command") else []
    options: dict[str, Any] = {
        "reference": reference,
        "query": query,
        "individual": individual,
        "before": before,
        "protein": protein,
        "k": k,
        "queries": queries,
        "graph_cells": graph_cells,
        "backend": backend,
        "seed": seed,
    }
    differences: tuple[Difference, ...] = ()
    if beside:
        compared = compare(store, [embedding, *beside], **options)
        measured = compared.metrics
        differences = tuple(d for d in compared.differences if d.first == embedding)
    else:
        measured = {embedding: evaluate(store, embedding=embedding, **options)}
    metrics = measured[embedding]
    own, before = measuring.beside(store, individual, before)
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
        metrics=metrics,
        individual_name=own,
        before_name=before,
        differences=differences,
        scores=scib_table(measured) if metrics["nmi_kmeans"].value is not None else None,
        added=added_studies(store, embedding),
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
