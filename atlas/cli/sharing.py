"""The commands that give a reference away and take one in: their options, and what each does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from atlas.cli.text import printable
from atlas.config import BatchNames
from atlas.errors import ConfigError, InputError

Command = Callable[[str, Callable[[argparse.Namespace], int | None], str], Any]


def add_commands(command: Command) -> None:
    """Add the commands to the parser."""
    sub = command(
        "share",
        share,
        "write a model with its reference's embedding and labels, for others to map onto",
    )
    sub.add_argument("store")
    sub.add_argument(
        "--model", required=True, metavar="RUN|NAME", help="its run folder, or its name if kept"
    )
    sub.add_argument(
        "--to", required=True, metavar="OUT", help="a new folder, or OUT.tar.gz or OUT.zip"
    )
    sub.add_argument("--embedding", metavar="NAME", help="the model's if not given")
    sub.add_argument(
        "--label-key", metavar="COLUMN", help="obs column of the labels; the model's if not given"
    )
    sub.add_argument(
        "--obs-columns",
        metavar="A,B",
        help="give these obs columns away too; else study, batch and label alone",
    )
    sub.add_argument(
        "--counts", action="store_true", help="give the counts of the model's genes away too"
    )
    sub.add_argument(
        "--batch-names",
        choices=get_args(BatchNames),
        default="no-donors",
        help="which names of batches leave, the others become STUDY/batch 1 …; by default all but "
        "those that look like donors, whose column is not in --obs-columns",
    )
    sub.add_argument("--title", help="one line; made of the studies' names if not given")
    sub.add_argument("--description", metavar="FILE", help="Markdown for the model card")
    sub.add_argument("--licence", help="such as CC-BY-4.0")
    sub.add_argument("--citation", help="what to cite")
    sub.add_argument("--yes", action="store_true", help="do not ask before writing")
    sub.add_argument(
        "--dry-run", action="store_true", help="say what would leave, and write nothing"
    )

    sub = command("fetch", fetch, "take in a reference that was shared, and check all of it")
    sub.add_argument("source", help="a folder or an archive, or the URL of an archive")
    sub.add_argument("--to", required=True, metavar="DIR", help="a new folder")
    sub.add_argument("--sha256", help="the digest that was announced")
    sub.add_argument(
        "--max-bytes", default="16GB", help="what the archive, and what is in it, may have"
    )
    sub.add_argument("--timeout", type=float, default=30.0, help="seconds to wait for a server")


def share(options: argparse.Namespace) -> int:
    from atlas import open_store, workflows

    workflows.check_target(options.to)
    description = None
    if options.description:
        file = Path(options.description)
        if not file.is_file():
            raise InputError("There is no such file", expected="a description", path=file)
        description = file.read_text()
    shipment = workflows.prepare_share(
        open_store(options.store),
        options.model,
        embedding=options.embedding,
        label_key=options.label_key,
        obs_columns=options.obs_columns.split(",") if options.obs_columns else (),
        counts=options.counts,
        batch_names=options.batch_names,
        title=options.title,
        description=description,
        licence=options.licence,
        citation=options.citation,
    )
    print("This leaves the machine:")
    for name, what in shipment.listing():
        print(printable(f"  {name:<20} {what}"))
    if options.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    if not options.yes and not _agreed(options.to):
        print("nothing was written")
        return 1
    shared = shipment.write(options.to)
    print(f"{shared.path}: {len(shared.manifest.parts) + 1} files, {shared.bytes / 1e6:,.1f} MB")
    print(f"announce with it: SHA-256 {shared.sha256}")
    return 0


def _agreed(to: str) -> bool:
    """Ask; only a terminal can answer.

    Raises
    ------
    ConfigError
        There is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise ConfigError(
            "Somebody has to agree to what leaves the machine",
            found="no terminal to ask at",
            do="look at the list above, then add --yes",
        )
    return input(f"Write it to {to}? [y/N] ").strip().lower() in ("y", "yes")


def fetch(options: argparse.Namespace) -> None:
    import atlas

    package = atlas.fetch(
        options.source,
        options.to,
        sha256=options.sha256,
        max_bytes=options.max_bytes,
        timeout=options.timeout,
        progress=True,
    )
    model, about, labels = package.model, package.about, package.labels
    print(printable(about.title))
    print(
        f"{model.name}: {len(model.genes):,} genes, {len(model.batches):,} batches; "
        f"{package.n_obs:,} cells, "
        + ("no labels" if labels is None else f"{len(labels.names):,} labels")
    )
    index = package.manifest.index
    how = f"{index.n_lists:,} lists" if index.has_lists else f"none, search is exact: {index.why}"
    print(f"index: {printable(how)}")
    print(f"licence: {printable(about.licence or 'none was given')}")
    print(f"citation: {printable(about.citation or 'none was given')}")
    print(f"{options.to}: every digest is as declared; card.md tells more, model/ is the model")
