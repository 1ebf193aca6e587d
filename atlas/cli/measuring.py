"""The commands that measure embeddings, and the baselines to measure them beside."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from atlas.cli.text import number

if TYPE_CHECKING:
    from atlas.evaluation.metrics import Difference, Metrics
    from atlas.evaluation.scib_table import ScibTable

# torch, zarr and the rest are imported by the command that needs them, so that --help is quick


def _measuring(options: argparse.Namespace) -> dict[str, Any]:
    """What `evaluate` and `report` measure."""
    names = ["reference", "query", "individual", "before", "protein"]
    names += ["queries", "graph_cells", "seed"]
    return {name: getattr(options, name) for name in names}


def _check_outputs(options: argparse.Namespace) -> None:
    """Files that cannot be written are refused before minutes of measuring."""
    from atlas import workflows

    for path in filter(None, (options.json, options.csv)):
        workflows.check_file(path)


def evaluate(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    _check_outputs(options)
    store = open_store(options.store)
    metrics = workflows.evaluate(store, embedding=options.embedding, **_measuring(options))
    for measure in metrics.measures:
        error = f" ± {measure.standard_error:.4f}" if measure.standard_error is not None else ""
        value = f"{measure.value:.4f}{error} {measure.unit}" if measure.value is not None else "–"
        print(f"{measure.title:<48} {value}{f'  ({measure.skipped})' if measure.skipped else ''}")
    _print_scores({options.embedding: metrics})
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
    for pair, rows in _by_pair(found.differences).items():
        print(f"{pair[0]} less {pair[1]}")
        for row in rows:
            said = f"  {row.favours} is better" if row.favours else ""
            interval = f"{row.value:+.4f}  ({row.low:+.4f} to {row.high:+.4f})"
            k = f" (k {row.k})" if row.k is not None else ""
            print(f"  {row.title + k:<52} {interval} {row.unit}{said}")
    scores = _print_scores(found.metrics)
    for path in options.scib:
        workflows.write_scores(scores, path)
    if options.json:
        workflows.write_json(options.json, found.to_json())
    if options.csv:
        workflows.write_text(options.csv, found.to_csv())


def _print_scores(metrics: Mapping[str, Metrics]) -> ScibTable:
    """scib-metrics' aggregate scores of each embedding."""
    from atlas.evaluation.scib_table import scib_table

    table = scib_table(metrics)
    aggregates = [s for s in table.scores if s.part == "Aggregate score"]
    if any(score.value is not None for score in aggregates):
        print("scores as scib-metrics adds them up")
        for score in aggregates:
            error = f" ± {score.standard_error:.4f}" if score.standard_error is not None else ""
            value = "–" if score.value is None else f"{score.value:.4f}{error}"
            told = f"  ({score.skipped})" if score.skipped else ""
            print(f"  {score.embedding + ', ' + score.title.lower():<52} {value}{told}")
    return table


def _by_pair(differences: Iterable[Difference]) -> dict[tuple[str, str], list[Difference]]:
    pairs: dict[tuple[str, str], list[Difference]] = {}
    for difference in differences:
        pairs.setdefault((difference.first, difference.second), []).append(difference)
    return pairs


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
    sub.add_argument("store")
    sub.add_argument("--embedding", required=True)
    _add_measuring(sub)
    sub.add_argument("--json", metavar="FILE", help="write the measures as JSON")
    sub.add_argument("--csv", metavar="FILE", help="write them as CSV, by batch and label too")

    sub = command("compare", compare, "measure embeddings on the same cells, differences paired")
    sub.add_argument("store")
    sub.add_argument("--embedding", required=True, nargs="+", metavar="NAME", help="two or more")
    _add_measuring(sub)
    sub.add_argument("--json", metavar="FILE", help="write measures and differences as JSON")
    sub.add_argument("--csv", metavar="FILE", help="write the differences as CSV")
    sub.add_argument(
        "--scib",
        nargs="+",
        default=(),
        metavar="FILE",
        help="write scib-metrics' aggregate table: .csv, or drawn as .svg, .png or .pdf",
    )

    sub = command("baseline", baseline, "embed all cells by a method without a model, to compare")
    sub.add_argument("store")
    sub.add_argument("--method", choices=("pca", "harmony"), default="pca")
    sub.add_argument("--name", help="name to keep it under; the method's if not given")
    sub.add_argument("--components", type=number(1), help="axes; 50 if not given, 10 per batch")
    sub.add_argument(
        "--per-batch", action="store_true", help="PCA of each batch on its own, for --individual"
    )
    sub.add_argument("--seed", type=number(0, 2**32 - 1), default=0, help="of Harmony")

    sub = command("report", report, "write a self-contained HTML report")
    sub.add_argument("store")
    sub.add_argument("--embedding", required=True)
    sub.add_argument(
        "--beside", nargs="+", default=(), metavar="NAME", help="embeddings to compare it with"
    )
    _add_measuring(sub)
    sub.add_argument("--out", required=True, metavar="FILE")


def _add_measuring(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--reference", help="cells whose labels are carried over: column=value,value")
    sub.add_argument("--query", help="cells that get labels: column=value,value")
    sub.add_argument(
        "--individual", metavar="NAME", help="embedding of each batch on its own, for kNN purity"
    )
    sub.add_argument(
        "--before", metavar="NAME", help="embedding before integration, for the PCR comparison"
    )
    sub.add_argument(
        "--protein",
        metavar="NAME",
        help="obsm array of proteins (CITE-seq), for common neighbours; counts or normalised",
    )
    sub.add_argument(
        "--queries",
        type=number(2),
        default=5000,
        help="cells that are sampled, searched among all",
    )
    sub.add_argument(
        "--graph-cells",
        type=number(0),
        default=1_000_000,
        help="leave graph connectivity out above so many cells; it needs the neighbours of all",
    )
    sub.add_argument("--seed", type=number(0, 2**32 - 1), default=0, help="of samples and clusters")
