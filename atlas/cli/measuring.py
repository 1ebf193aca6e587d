"""The commands that measure embeddings, and the baselines to measure them beside."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from atlas.cli import tables
from atlas.cli.text import number, printable

if TYPE_CHECKING:
    from atlas.store import CountStore

# torch, zarr and the rest are imported by the command that needs them, so that --help is quick


def _measuring(options: argparse.Namespace) -> dict[str, Any]:
    """What `evaluate`, `compare` and `report` measure."""
    names = ["reference", "query", "individual", "before", "protein"]
    names += ["k", "queries", "graph_cells", "backend", "seed"]
    return {name: getattr(options, name) for name in names}


def _check_outputs(options: argparse.Namespace) -> None:
    """Files that cannot be written are refused before minutes of measuring."""
    from atlas import workflows

    for path in filter(None, (options.json, options.csv)):
        workflows.check_file(path)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(printable(line))


def _print_beside(store: CountStore, options: argparse.Namespace) -> None:
    """Which embeddings the figures are held against, named or found in the store."""
    from atlas import workflows

    own, before = workflows.beside(store, options.individual, options.before)
    if own is not None:
        print(printable(f"kNN purity and k-means conservation: beside {own}"))
    if before is not None:
        print(printable(f"PCR comparison: beside {before}"))


def evaluate(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows
    from atlas.evaluation.scib_table import scib_table

    _check_outputs(options)
    store = open_store(options.store)
    metrics = workflows.evaluate(store, embedding=options.embedding, **_measuring(options))
    _print(tables.of_metrics(metrics))
    _print_beside(store, options)
    _print(tables.of_scores(scib_table({options.embedding: metrics})))
    if options.json:
        workflows.write_json(options.json, metrics.to_json())
    if options.csv:
        workflows.write_text(options.csv, metrics.to_csv())


def compare(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    _check_outputs(options)
    for path in options.scib:
        workflows.check_scores_path(path)
    store = open_store(options.store)
    found = workflows.compare(store, options.embedding, **_measuring(options))
    scores = found.scib_table()
    _print(tables.of_comparison(found))
    _print_beside(store, options)
    _print(tables.of_scores(scores))
    for path in options.scib:
        workflows.write_scores(scores, path)
    if options.json:
        workflows.write_json(options.json, found.to_json())
    if options.csv:
        workflows.write_text(options.csv, found.to_csv())


def baseline(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    name = options.name or ("pca_batch" if options.per_batch else options.method)
    z = workflows.baseline(
        open_store(options.store),
        options.method,
        n_components=options.components,
        per_batch=options.per_batch,
        name=name,
        seed=options.seed,
        progress=True,
    )
    print(f"embedding {name}: {z.shape[0]:,} cells × {z.shape[1]} dimensions")


def report(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    store = open_store(options.store)
    measuring = _measuring(options) | {"embedding": options.embedding, "beside": options.beside}
    print(workflows.report(store, out=options.out, **measuring))


def add_commands(command: Callable[..., Any]) -> None:
    """Their options; ``command`` makes a subparser."""
    sub = command("evaluate", evaluate, "measure an embedding")
    _add_store(sub)
    sub.add_argument("--embedding", required=True, metavar="NAME", help=_EMBEDDING)
    _add_measuring(sub)
    sub.add_argument("--json", metavar="FILE", help="write the measures as JSON")
    sub.add_argument("--csv", metavar="FILE", help="write them as CSV, by batch and label too")

    sub = command("compare", compare, "measure embeddings on the same cells, differences paired")
    _add_store(sub)
    sub.add_argument(
        "--embedding",
        required=True,
        nargs="+",
        metavar="NAME",
        help="names of embeddings kept with the store, two or more",
    )
    _add_measuring(sub)
    sub.add_argument("--json", metavar="FILE", help="write measures and differences as JSON")
    sub.add_argument(
        "--csv", metavar="FILE", help="write the measures of each and the differences as CSV"
    )
    sub.add_argument(
        "--scib",
        nargs="+",
        default=(),
        metavar="FILE",
        help="write scib-metrics' aggregate table: .csv, or drawn as .svg, .png or .pdf",
    )

    sub = command("baseline", baseline, "embed all cells by a method without a model, to compare")
    _add_store(sub)
    sub.add_argument(
        "--method", choices=("pca", "harmony"), default="pca", help="PCA, or Harmony on it"
    )
    sub.add_argument(
        "--name",
        metavar="NAME",
        help="name to keep it under; if not given pca or harmony, pca_batch with --per-batch",
    )
    sub.add_argument(
        "--components",
        type=number(1),
        metavar="N",
        help="axes, at most as many as genes or cells; if not given 50, 10 with --per-batch",
    )
    sub.add_argument(
        "--per-batch",
        action="store_true",
        help="PCA of each batch on its own, which kNN purity and k-means conservation are beside",
    )
    sub.add_argument("--seed", type=number(0, 2**32 - 1), default=0, help="of Harmony")

    sub = command("report", report, "write a self-contained HTML report")
    _add_store(sub)
    sub.add_argument("--embedding", required=True, metavar="NAME", help=_EMBEDDING)
    sub.add_argument(
        "--beside", nargs="+", default=(), metavar="NAME", help="embeddings to compare it with"
    )
    _add_measuring(sub)
    sub.add_argument("--out", required=True, metavar="FILE", help="the HTML file to write")


_EMBEDDING = "name of an embedding kept with the store; `atlas info STORE` lists them"


def _add_store(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("store", help="a store, as `atlas ingest` makes it")


def _add_measuring(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--reference",
        metavar="COLUMN=VALUES",
        help="cells whose labels are carried over: column=value,value; without it and --query each "
        "labeled cell is predicted from all others",
    )
    sub.add_argument(
        "--query", metavar="COLUMN=VALUES", help="cells that get labels: column=value,value"
    )
    sub.add_argument(
        "--individual",
        metavar="NAME",
        help="embedding of each batch on its own, for kNN purity and k-means conservation, made by "
        "`atlas baseline STORE --per-batch` or `atlas embed RUN STORE --per-batch DIR`; pca_batch "
        "if not given and there",
    )
    sub.add_argument(
        "--before",
        metavar="NAME",
        help="embedding before integration, for the PCR comparison, made by `atlas baseline "
        "STORE`; pca if not given and there",
    )
    sub.add_argument(
        "--protein",
        metavar="NAME",
        help="obsm array of proteins (CITE-seq), for common neighbours; counts or normalised",
    )
    sub.add_argument(
        "--k",
        nargs="+",
        type=number(10, 500),
        default=(50, 15),
        metavar="K",
        help="neighbours for the entropy of batch mixing, one number or more from 10 to 500",
    )
    sub.add_argument(
        "--queries",
        type=number(2),
        default=5000,
        metavar="N",
        help="cells that are sampled, searched among all; the standard errors told are what this "
        "leaves, and four times as many cells halve them",
    )
    sub.add_argument(
        "--graph-cells",
        type=number(0),
        default=1_000_000,
        metavar="N",
        help="leave graph connectivity out above so many cells; it needs the neighbours of all",
    )
    sub.add_argument(
        "--backend",
        choices=("auto", "faiss", "torch", "index"),
        default="auto",
        help="what searches: faiss or torch, exactly; index: the one kept with the embedding, "
        "whose recall is told; auto: that one where it is exact, else exact search, but for graph "
        "connectivity of many cells, whose recall is told",
    )
    sub.add_argument(
        "--seed", type=number(0, 2**32 - 1), default=0, help="of samples, clusters and maps"
    )
