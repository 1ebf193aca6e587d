"""The commands and their options."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, get_args, get_type_hints

from atlas.cli import applied, benching, commands, living, measuring, sharing, transfer
from atlas.cli.helping import Formatter, architecture_help, field_help
from atlas.config import (
    ARCHITECTURES,
    Initialisation,
    MissingGenes,
    Profile,
    StoreFormat,
    Strategy,
    TrainConfig,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atlas", description="Train on single-cell atlases that do not fit in memory."
    )
    parser.add_argument("--version", action="version", version=version("atlas-trainer"))
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], help: str, *aliases: str
    ) -> Any:
        sub = subparsers.add_parser(
            name,
            aliases=aliases,
            help=help,
            description=help,
            formatter_class=Formatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "ingest", commands.ingest, "append a study to a store, which is made where there is none"
    )
    sub.add_argument("store")
    sub.add_argument(
        "source",
        nargs="+",
        help="an .h5ad, 10x .h5, .loom, .csv or .tsv file, an AnnData in Zarr, a 10x (mtx) or "
        "Visium folder, or a SOMA experiment; several become one study",
    )
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
    sub.add_argument("--feature-type", default="Gene Expression", help="of a 10x file or folder")
    sub.add_argument(
        "--transpose", action="store_true", help="of a table in text: a gene on each line"
    )
    sub.add_argument(
        "--gene-lengths",
        metavar="FILE",
        help="genes and lengths; divide counts of whole transcripts (Smart-seq2) by them",
    )
    living.add_orthologs(sub)
    sub.add_argument("--measurement", metavar="NAME", help="of a SOMA experiment, e.g. RNA")
    sub.add_argument(
        "--obs-filter", metavar="CONDITION", help="of a SOMA experiment: \"tissue == 'lung'\""
    )
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
    sub.add_argument(
        "--format", choices=get_args(StoreFormat), help="of a new store: zarr if not given"
    )
    new = sub.add_mutually_exclusive_group()
    new.add_argument("--genes", metavar="FILE", help="of a new store: hold these, one a line")
    new.add_argument("--first", action="store_true", help="of a new store: hold this study's only")

    sub = command("info", commands.info, "show what a store holds")
    sub.add_argument("store")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command(
        "verify", commands.verify, "check all that a store holds; code 1 where it is broken"
    )
    sub.add_argument("store")
    sub.add_argument("--threads", type=int, help="as many as cores if not given")
    sub.add_argument("--json", metavar="FILE", help="write the report as JSON")

    sub = command(
        "annotate", commands.annotate, "add or correct obs columns; older states keep the old ones"
    )
    sub.add_argument("store")
    sub.add_argument("table", help="a .csv or .tsv file: row names first, then the columns")
    sub.add_argument("--study", help="whose cells they are, where row names repeat")
    sub.add_argument("--batch-key", help="obs column that becomes the batch of these studies")
    sub.add_argument("--label-key", help="obs column that becomes the label of these studies")
    sub.add_argument("--unlabeled", default="Unknown", help="value that stands for no label")

    says = "take a study out of a store, and say what depended on it; older states keep it"
    sub = command("drop", commands.drop, says, "remove-study")
    sub.add_argument("store")
    sub.add_argument("study")
    sub.add_argument(
        "--purge",
        action="store_true",
        help="remove the older states that hold it, versions of models that only these have, and "
        "its files",
    )
    living.add_unfinished(sub)

    sub = command("genes", commands.genes, "choose and record the genes to model")
    sub.add_argument("store")
    sub.add_argument("--n", type=int, default=2000, help="how many")
    sub.add_argument("--flavour", choices=("seurat_v3", "dispersion"), default="seurat_v3")
    sub.add_argument("--list", action="store_true", help="print the names")

    sub = command(
        "project", commands.project, "write a training store of chosen genes, quicker to read"
    )
    sub.add_argument("store")
    sub.add_argument(
        "--genes", default="chosen", metavar="FILE|chosen", help="names, one a line; or as recorded"
    )
    sub.add_argument("--out", required=True, metavar="PATH")
    sub.add_argument("--threads", type=int, help="as many as cores if not given")

    benching.add_bench(command)

    sub = command("train", commands.train, "train a model on all studies of a store")
    sub.add_argument("store")
    sub.add_argument("--model", choices=tuple(ARCHITECTURES), default="scvi")
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
    sub.add_argument("--label-key", help="scanvi: obs column of the labels; else the store's own")
    sub.add_argument(
        "--unlabeled", default="Unknown", help="of that column: value that stands for no label"
    )
    sub.add_argument(
        "--hierarchy",
        metavar="FILE",
        help="scanvi: the parent of each label; JSON, or a table whose first line is child,parent",
    )
    sub.add_argument(
        "--from", dest="start_from", metavar="RUN", help="scanvi: a trained scvi to start from"
    )
    sub.add_argument(
        "--categorical-covariates", metavar="A,B", help="scvi, scanvi: obs columns besides batch"
    )
    sub.add_argument("--continuous-covariates", metavar="A,B", help="the same, of numbers")
    sub.add_argument("--size-factor", metavar="COLUMN", help="scvi, scanvi: obs column")
    _add_architectures(sub)
    _add_fields(sub, TrainConfig, {"max_epochs"})

    sub = command("extend", commands.extend, "add studies to a trained reference, left as it is")
    sub.add_argument("model", help="the run folder of the reference")
    sub.add_argument("store", help="a store that has the studies")
    sub.add_argument("--study", nargs="+", help="which; all that the model does not know if none")
    sub.add_argument("--out", required=True, metavar="RUN", help="run folder of the new model")
    sub.add_argument("--resume", action="store_true", help="go on where it was interrupted")
    sub.add_argument(
        "--strategy",
        choices=get_args(Strategy),
        default="conditions",
        help="train the new rows of weights only; or first layers, or all, which moves the "
        "reference",
    )
    sub.add_argument(
        "--initialisation",
        choices=get_args(Initialisation),
        default="nearest",
        help="of the new rows",
    )
    sub.add_argument(
        "--keep-apart",
        type=float,
        help="weight of a penalty on batches that come nearer to each other than their expression "
        "is (default: 1.7, and 20 with --apart-from); 0: none, as in the paper",
    )
    living.add_apart_from(sub)
    sub.add_argument("--label-key", help="obs column of labels, for a scanvi")
    living.add_orthologs(sub)
    sub.add_argument(
        "--missing",
        choices=get_args(MissingGenes),
        default="mask",
        help="leave genes that a study lacks out, or take them as zero",
    )
    sub.add_argument("--force", action="store_true", help="with less than half of the genes too")
    sub.add_argument("--max-epochs", type=int, default=5, help="passes over the studies' cells")
    sub.add_argument("--lr", type=float, default=0.01, help="of Adam")
    _add_fields(sub, TrainConfig, {"max_epochs", "weight_decay", "lr", "project"})
    sub.add_argument("--weight-decay", type=float, default=0.0, help="of Adam")

    sub = command("embed", commands.embed, "embed all cells of a store")
    sub.add_argument("model", help="a run folder")
    sub.add_argument("store")
    sub.add_argument(
        "--name", default="", help="name to keep the embedding under; the model's if not given"
    )
    applied.add_device(sub)
    reading = sub.add_mutually_exclusive_group()
    reading.add_argument(
        "--projection",
        metavar="DIR",
        help="read the counts from this projection of the store to the model's genes: quicker",
    )
    reading.add_argument(
        "--per-batch",
        metavar="DIR",
        help="train the model anew on each batch alone, in DIR, and embed the batch by that, for "
        "--individual",
    )
    sub.add_argument("--max-epochs", type=int, help="per batch; the model's if not given")
    sub.add_argument("--resume", action="store_true", help="per batch: go on with the runs in DIR")

    applied.add_commands(command)
    transfer.add_command(command)
    living.add_commands(command)

    measuring.add_commands(command)

    sub = command(
        "seed-labels", commands.seed_labels, "label the cells that fit signatures of types best"
    )
    sub.add_argument("store")
    sub.add_argument(
        "signatures",
        help='a text file with lines such as "CD4 Naive: CCR7+ CD4+ CD69-", or a .json file',
    )
    sub.add_argument("--name", default="seed", help="obs column for the labels")
    sub.add_argument("--top", type=int, default=50, help="seeds of a signature")
    sub.add_argument("--rows", help="the cells, by an obs column: column=value,value")
    sub.add_argument("--aliases", metavar="TABLE", help="a line for each gene: all its names")
    sub.add_argument(
        "--ignore-missing", action="store_true", help="leave out genes that the store lacks"
    )
    sub.add_argument(
        "--as-label", action="store_true", help="make them the labels in place of those there are"
    )
    sub.add_argument("--unlabeled", default="Unknown", help="what cells that are no seeds have")

    sub = command("export", commands.export, "write cells as AnnData")
    sub.add_argument("store")
    sub.add_argument("out", metavar="OUT.h5ad")
    sub.add_argument("--embedding", help="add it as obsm['X_NAME']")
    sub.add_argument("--rows", help="cells by an obs column: column=value,value")
    sub.add_argument("--order", choices=("store", "input"), default="store")

    sub = command("import-scvi", commands.import_scvi, "take in a model that scvi-tools 1.x saved")
    sub.add_argument("folder", help="what model.save(folder) wrote")
    sub.add_argument("--out", required=True, help="folder of the model here")
    sub.add_argument(
        "--study", help="put STUDY/ before the names of its batches, as a store names them"
    )

    sub = command("export-scvi", commands.export_scvi, "write a model as scvi-tools saves it")
    sub.add_argument("model", help="a run folder")
    sub.add_argument("--out", required=True, help="folder for scvi.model.SCVI.load")
    sub.add_argument("--batch-key", default="batch", help="obs column of the batch there")

    sharing.add_commands(command)

    sub = command("convert", commands.convert, "write a store in another format or compression")
    sub.add_argument("store")
    sub.add_argument("out", help="a new store; or OUT.h5ad, as export writes it")
    sub.add_argument("--format", choices=get_args(StoreFormat), default="zarr")
    sub.add_argument("--profile", choices=get_args(Profile), default="fast", help="compression")
    sub.add_argument("--threads", type=int, help="as many as cores if not given")

    sub = command(
        "inventory",
        commands.inventory,
        "list the files of a store beside it, so that it can be read from a web server",
    )
    sub.add_argument("store")

    sub = command(
        "simulate", commands.simulate, "write studies of simulated cells whose truth is known"
    )
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
    sub.add_argument(
        "--varying-genes",
        type=float,
        help="share that differs between states; .2 by default, .98 with --tree",
    )
    sub.add_argument(
        "--process",
        choices=("zinb", "umi", "reads"),
        default="zinb",
        help="what counts come from; umi and reads: bursts, capture, PCR, sequencing",
    )
    sub.add_argument(
        "--tree", action="store_true", help="cells along a tree; the end points are the types"
    )
    sub.add_argument(
        "--new-type", action="store_true", help="the last study has a type that the others lack"
    )
    sub.add_argument("--seed", type=int, default=0)
    return parser


def _add_architectures(sub: argparse.ArgumentParser) -> None:
    """One option per field of the models' configurations; what is not given is not there."""
    fields: dict[str, list[str]] = {}
    for model, kind in ARCHITECTURES.items():
        for field in dataclasses.fields(kind):
            fields.setdefault(field.name, []).append(model)
    for name, models in fields.items():
        hints = [get_type_hints(ARCHITECTURES[model])[name] for model in models]
        text = architecture_help(name, models)
        flag = "--" + name.replace("_", "-")
        shared: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": name}
        if hints[0] is bool:
            sub.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        elif get_args(hints[0]):
            choices = dict.fromkeys(choice for hint in hints for choice in get_args(hint))
            sub.add_argument(flag, choices=tuple(choices), **shared)
        else:
            sub.add_argument(flag, type=hints[0], **shared)


def _add_fields(sub: argparse.ArgumentParser, kind: type[Any], without: Any) -> None:
    """One option per field of a configuration, ``n_layers`` as ``--n-layers``."""
    hints, helps = get_type_hints(kind), field_help(kind)
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
