"""The command line: parse, call a workflow, print. Errors of Atlas end with code 2."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

from atlas.config import Profile, ScviConfig, TrainConfig
from atlas.errors import AtlasError

# torch, zarr and the rest are imported by the command that needs them, so that --help is quick


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = _print_warning
    run: Callable[[argparse.Namespace], int | None] = options.run
    try:
        return run(options) or 0
    except KeyboardInterrupt as interrupt:
        print(f"\natlas: interrupted {interrupt}".rstrip(), file=sys.stderr)
        return 130
    except AtlasError as error:
        print(f"atlas: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        from loaders import LoaderError  # the loader knows nothing of Atlas and has its own error

        if not isinstance(error, OSError | LoaderError):
            raise
        print(f"atlas: {error}", file=sys.stderr)
        return 2


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atlas", description="Train on single-cell atlases that do not fit in memory."
    )
    parser.add_argument("--version", action="version", version=version("atlas-trainer"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> Any:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command("ingest", _ingest, "append a study to a store, which is made where there is none")
    sub.add_argument("store")
    sub.add_argument("source", nargs="+", help="an .h5ad or 10x .h5 file; several become one study")
    sub.add_argument("--study", required=True, help="name of the study")
    sub.add_argument(
        "--batch-key",
        help="obs column of the batch; a,b combines two; 'file' is the file a cell came from",
    )
    sub.add_argument("--label-key", help="obs column of the label")
    sub.add_argument("--unlabeled", default="Unknown", help="value that stands for no label")
    sub.add_argument("--profile", choices=get_args(Profile), default="fast", help="compression")
    sub.add_argument("--layer", help="layer that holds the counts")
    sub.add_argument("--use-raw", action="store_true", help="take the counts from raw.X")
    sub.add_argument("--round", action="store_true", help="round counts that have fractions")
    sub.add_argument("--feature-type", default="Gene Expression", help="of a 10x file")
    sub.add_argument("--keep-layers", help="names of layers to keep, a,b")
    sub.add_argument(
        "--prefix-rows", action="store_true", help="put FILE: before the names of cells"
    )
    sub.add_argument(
        "--genes-of-all",
        action="store_true",
        help="keep the genes that all files have, where they differ",
    )
    sub.add_argument("--memory", default="512MB", help="what counts may take at a time")
    sub.add_argument(
        "--scheduler",
        default="threads",
        help="threads, processes, or the address of a dask scheduler that sees the same files",
    )
    sub.add_argument(
        "--fresh", action="store_true", help="do not go on with an ingest that was interrupted"
    )
    new = sub.add_mutually_exclusive_group()
    new.add_argument("--genes", metavar="FILE", help="of a new store: hold these, one a line")
    new.add_argument("--first", action="store_true", help="of a new store: hold this study's only")

    sub = command("info", _info, "show what a store holds")
    sub.add_argument("store")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("verify", _verify, "check all that a store holds; code 1 where it is broken")
    sub.add_argument("store")
    sub.add_argument("--threads", type=int, help="as many as cores if not given")
    sub.add_argument("--json", metavar="FILE", help="write the report as JSON")

    sub = command("drop", _drop, "take a study out of a store; older states keep it")
    sub.add_argument("store")
    sub.add_argument("study")
    sub.add_argument(
        "--purge", action="store_true", help="remove the older states that hold it, and its files"
    )

    sub = command("genes", _genes, "choose and record the genes to model")
    sub.add_argument("store")
    sub.add_argument("--n", type=int, default=2000, help="how many")
    sub.add_argument("--flavour", choices=("seurat_v3", "dispersion"), default="seurat_v3")
    sub.add_argument("--list", action="store_true", help="print the names")

    sub = command("project", _project, "write a training store of chosen genes, quicker to read")
    sub.add_argument("store")
    sub.add_argument(
        "--genes", default="chosen", metavar="FILE|chosen", help="names, one a line; or as recorded"
    )
    sub.add_argument("--out", required=True, metavar="PATH")
    sub.add_argument("--threads", type=int, help="as many as cores if not given")

    sub = command("train", _train, "train a model on all studies of a store")
    sub.add_argument("store")
    sub.add_argument("--model", choices=("scvi",), default="scvi")
    sub.add_argument("--out", required=True, help="run folder: log, checkpoints, model")
    sub.add_argument("--resume", action="store_true", help="go on where it was interrupted")
    sub.add_argument(
        "--hold-out", help="cells to validate on in place of a share: column=value,value"
    )
    sub.add_argument(
        "--epochs",
        dest="max_epochs",
        type=int,
        help="passes over the cells; scvi-tools' rule if not given",
    )
    _add_fields(sub, ScviConfig, {})
    _add_fields(sub, TrainConfig, {"max_epochs"})

    sub = command("embed", _embed, "embed all cells of a store")
    sub.add_argument("model", help="a run folder")
    sub.add_argument("store")
    sub.add_argument("--name", default="scvi", help="name to keep the embedding under")
    sub.add_argument("--device", default="auto")

    sub = command("evaluate", _evaluate, "measure an embedding")
    _add_measuring(sub)
    sub.add_argument("--json", metavar="FILE", help="write the measures as JSON")

    sub = command("report", _report, "write a self-contained HTML report")
    _add_measuring(sub)
    sub.add_argument("--out", required=True, metavar="FILE")

    sub = command("export", _export, "write cells as AnnData")
    sub.add_argument("store")
    sub.add_argument("out", metavar="OUT.h5ad")
    sub.add_argument("--embedding", help="add it as obsm['X_NAME']")
    sub.add_argument("--rows", help="cells by an obs column: column=value,value")
    sub.add_argument("--order", choices=("store", "input"), default="store")

    sub = command("simulate", _simulate, "write studies of simulated cells whose truth is known")
    sub.add_argument("out_dir")
    sub.add_argument("--cells", type=int, default=30_000)
    sub.add_argument("--studies", type=int, default=3)
    sub.add_argument("--genes", type=int, default=2000)
    sub.add_argument("--types", type=int, default=8)
    sub.add_argument("--batches", type=int, default=2, help="in each study")
    sub.add_argument("--library", type=float, default=2000.0, help="median counts of a cell")
    sub.add_argument(
        "--missing-genes", type=float, default=0.0, help="share not measured in the last study"
    )
    sub.add_argument("--seed", type=int, default=0)
    return parser


def _add_fields(sub: argparse.ArgumentParser, kind: type[Any], without: Any) -> None:
    """One option per field of a configuration, ``n_layers`` as ``--n-layers``."""
    hints, helps = get_type_hints(kind), _field_help(kind)
    for field in dataclasses.fields(kind):
        if field.name in without:
            continue
        hint, flag = hints[field.name], "--" + field.name.replace("_", "-")
        default = field.default
        text = helps[field.name]
        if hint is bool:
            action = argparse.BooleanOptionalAction
            sub.add_argument(flag, action=action, default=default, help=text)
        elif choices := get_args(hint):
            sub.add_argument(flag, choices=choices, default=default, help=text)
        else:
            sub.add_argument(flag, type=hint, default=default, help=text)


def _field_help(kind: type[Any]) -> dict[str, str]:
    """What the docstring of a configuration says of each field."""
    _, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes\n----------\n")
    out = {}
    for block in re.split(r"\n(?=\S)", attributes):
        names, _, text = block.partition("\n")
        for name in names.split(", "):
            out[name] = " ".join(text.replace("``", "").replace("%", "%%").split())
    return out


def _add_measuring(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("store")
    sub.add_argument("--embedding", required=True)
    sub.add_argument("--reference", help="cells whose labels are carried over: column=value,value")
    sub.add_argument("--query", help="cells that get labels: column=value,value")
    sub.add_argument("--seed", type=int, default=0)


def _ingest(options: argparse.Namespace) -> None:
    from atlas import workflows

    report = workflows.ingest(
        options.store,
        options.source,
        study=options.study,
        batch_key=options.batch_key.split(",") if options.batch_key else None,
        label_key=options.label_key,
        unlabeled=options.unlabeled,
        profile=options.profile,
        layer=options.layer,
        use_raw=options.use_raw,
        round_counts=options.round,
        feature_type=options.feature_type,
        keep_layers=options.keep_layers.split(",") if options.keep_layers else (),
        prefix_rows=options.prefix_rows,
        genes_of_all=options.genes_of_all,
        memory=options.memory,
        scheduler=options.scheduler,
        fresh=options.fresh,
        genes=Path(options.genes).read_text().split() if options.genes else None,
        first=options.first,
        progress=True,
    )
    speed = report.n_obs / max(report.seconds, 1e-9)
    print(
        f"{report.study}: {report.n_obs:,} cells, {report.nnz:,} counts, {report.new_genes:,} new "
        f"genes, in {report.seconds:.1f} s ({speed:,.0f} cells/s)"
    )
    for note in report.notes:
        print(note)
    if report.missing_genes:
        print(f"{report.missing_genes:,} genes of the store were not measured in this study")
    for name, n in report.same_counts.items():
        print(f"{n:,} cells of study {name} have the very same counts as cells of {report.study}")
    for name, n in report.same_names.items():
        print(f"{n:,} cells of study {name} have the same row names as cells of {report.study}")


def _info(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    info = workflows.info(open_store(options.store))
    if options.json:
        print(json.dumps(dataclasses.asdict(info), indent=1))
        return
    print(f"{info.path}: {info.n_obs:,} cells × {info.n_vars:,} genes, {info.nnz:,} counts")
    print(f"{info.bytes_on_disk / 1e6:,.1f} MB on disk, manifest {info.manifest}")
    for title, rows in (("studies", info.studies), ("batches", info.batches)):
        print(f"\n{title}")
        for row in rows:
            print(f"  {row['name']:<40} {row['cells']:>12,} cells")
    print(f"\nlabels ({info.unlabeled:,} cells without one)")
    for row in info.labels:
        print(f"  {row['name']:<40} {row['cells']:>12,} cells")
    print(f"\ngenes chosen: {info.genes_chosen or 'none yet (atlas genes)'}")
    names = [f"{e['name']} ({e['n_latent']} dimensions)" for e in info.embeddings]
    print(f"embeddings: {', '.join(names) or 'none yet (atlas embed)'}")
    print("\nhistory")
    for line in info.history:
        print(f"  {line}")


def _verify(options: argparse.Namespace) -> int:
    from atlas import workflows

    report = workflows.verify(options.store, progress=True, threads=options.threads)
    for finding in report.findings:
        print(f"{finding.path}: {finding.what}")
        if finding.study is not None:
            print(f"  study: {finding.study}")
        for name, value in (("found", finding.found), ("expected", finding.expected)):
            if value is not None:
                print(f"  {name}: {value}")
        print(f"  what to do: {finding.do}")
    if report.unlisted:
        print(f"… and {report.unlisted:,} more")
    checked = (
        f"{report.states} states, {report.studies} studies, {report.chunks:,} chunks, "
        f"{report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s"
    )
    faults = len(report.findings) + report.unlisted
    print(f"{report.path}: {'whole' if report.whole else f'{faults:,} faults'} ({checked})")
    if options.json:
        workflows.write_json(options.json, report.to_json())
    return 0 if report.whole else 1


def _drop(options: argparse.Namespace) -> None:
    from atlas import open_store

    report = open_store(options.store).drop(options.study, purge=options.purge)
    print(f"{report.study}: {report.n_obs:,} cells dropped, manifest {report.manifest}")
    if report.removed_states:
        gone = ", ".join(map(str, report.removed_states))
        print(f"removed for ever: states {gone}, {report.freed_bytes / 1e6:,.1f} MB")
    if report.kept_states:
        kept = ", ".join(map(str, report.kept_states))
        print(
            f"older states hold it still ({kept}), so {report.kept_bytes / 1e6:,.1f} MB of its "
            "files stay; --purge removes both"
        )
    if report.genes_without_study:
        print(
            f"{report.genes_without_study:,} of the chosen genes were measured in no study that is "
            "left: choose again with `atlas genes`"
        )


def _genes(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    store = open_store(options.store)
    genes = workflows.select_genes(store, options.n, flavour=options.flavour)
    print("\n".join(genes) if options.list else f"{len(genes):,} genes chosen and recorded")


def _project(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    genes = None if options.genes == "chosen" else Path(options.genes).read_text().split()
    made = workflows.project(
        open_store(options.store), genes, options.out, progress=True, threads=options.threads
    )
    print(f"{options.out}: {made.n_obs:,} cells × {made.n_vars:,} genes, {made.nnz:,} counts")


def _train(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    values = vars(options)
    names = {f.name for kind in (ScviConfig, TrainConfig) for f in dataclasses.fields(kind)}
    model = workflows.train(
        open_store(options.store),
        options.model,
        out=options.out,
        hold_out=options.hold_out,
        resume=options.resume,
        progress=True,
        **{name: values[name] for name in names},
    )
    history = model.training["history"]
    bound = history[-1]["validation_bound"]
    print(
        f"trained {len(history)} epochs"
        + (f", held-out bound {bound:.2f} nats per cell" if bound is not None else "")
    )
    print(f"{options.out}: model.json, weights.safetensors, log.jsonl")


def _embed(options: argparse.Namespace) -> None:
    from atlas import load_model, open_store, workflows

    store = open_store(options.store)
    model = load_model(options.model)
    z = workflows.embed(model, store, name=options.name, device=options.device, progress=True)
    print(f"embedding {options.name}: {z.shape[0]:,} cells × {z.shape[1]} dimensions")


def _evaluate(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    metrics = workflows.evaluate(
        open_store(options.store),
        embedding=options.embedding,
        reference=options.reference,
        query=options.query,
        seed=options.seed,
    )
    for measure in metrics.measures:
        error = f" ± {measure.standard_error:.4f}" if measure.standard_error is not None else ""
        value = f"{measure.value:.4f}{error} {measure.unit}" if measure.value is not None else "–"
        print(f"{measure.title:<48} {value}{f'  ({measure.skipped})' if measure.skipped else ''}")
    if options.json:
        workflows.write_json(options.json, metrics.to_json())


def _report(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    path = workflows.report(
        open_store(options.store),
        embedding=options.embedding,
        out=options.out,
        reference=options.reference,
        query=options.query,
        seed=options.seed,
    )
    print(path)


def _export(options: argparse.Namespace) -> None:
    from atlas import open_store, workflows

    adata = workflows.export(
        open_store(options.store),
        options.out,
        embedding=options.embedding,
        rows=options.rows,
        order=options.order,
    )
    print(f"{options.out}: {adata.n_obs:,} cells × {adata.n_vars:,} genes")


def _simulate(options: argparse.Namespace) -> None:
    from atlas.simulate import simulate

    paths = simulate(
        Path(options.out_dir),
        options.cells,
        options.studies,
        options.seed,
        genes=options.genes,
        types=options.types,
        batches=options.batches,
        library=options.library,
        missing_genes=options.missing_genes,
    )
    print("\n".join(map(str, paths)))
