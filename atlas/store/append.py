"""Appending a study: read once in blocks, sort out of core, write whole, commit in one step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData

from atlas.config import Profile
from atlas.errors import ConfigError, MissingColumnError, StudyExistsError
from atlas.ingest.genes import align
from atlas.ingest.orthologs import align_orthologs, read_orthologs
from atlas.ingest.study import FILE_COLUMN, Reading, StudyCounts, open_study
from atlas.store import layout
from atlas.store import manifest as manifests
from atlas.store.arrays import read_array, write_part
from atlas.store.codes import batch_names, extend, label_names, obs_column
from atlas.store.journal import Journal
from atlas.store.manifest import INGEST, SCRATCH
from atlas.store.options import bytes_of, check_name
from atlas.store.schema import Manifest, StudyEntry
from atlas.store.study_writer import StudyWriter, check_memory
from atlas.store.tiledb_array import tiledb
from atlas.store.workers import Workers
from atlas.store.zarr_study import digests

Codes32: TypeAlias = npt.NDArray[np.int32]

Source: TypeAlias = str | PathLike[str] | AnnData
DEFAULT_MEMORY = "512MB"
_NAMES_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Request:
    """What to append and how; the fields are those of :meth:`atlas.store.CountStore.append`."""

    study: str
    batch_keys: tuple[str, ...] = ()
    label_key: str | None = None
    unlabeled: str = "Unknown"
    profile: Profile = "fast"
    layer: str | None = None
    use_raw: bool = False
    round_counts: bool = False
    feature_type: str = "Gene Expression"
    transpose: bool = False
    gene_lengths: str | None = None
    measurement: str | None = None
    obs_filter: str | None = None
    keep_layers: tuple[str, ...] = ()
    prefix_rows: bool = False
    genes_of_all: bool = False
    memory: str | int = DEFAULT_MEMORY
    scheduler: str | None = None
    fresh: bool = False
    progress: bool = False
    orthologs: str | None = None


@dataclass(frozen=True, slots=True)
class AppendReport:
    """What an append did.

    Attributes
    ----------
    study, n_obs, nnz
        Name, cells, non-zero counts.
    new_genes
        Genes that the gene table gained.
    missing_genes
        Genes of the store that the study did not measure.
    same_counts
        For each other study that has some: cells with the very same counts as a cell of this one.
    same_names
        For each other study that has some: cells of the same row name.
    notes
        What is worth saying: feature types left out, an interrupted ingest gone on with.
    seconds
        Wall time.
    """

    study: str
    n_obs: int
    nnz: int
    new_genes: int
    missing_genes: int
    same_counts: Mapping[str, int]
    same_names: Mapping[str, int]
    notes: tuple[str, ...]
    seconds: float


def append_study(
    root: Path, sources: Source | Sequence[Source], request: Request
) -> tuple[Manifest, AppendReport]:
    """Append a study to the store at ``root``; see :meth:`atlas.store.CountStore.append`.

    Returns
    -------
    The new state of the store, and what was done.
    """
    started = time.monotonic()
    check_name(request.study, "study")
    if request.profile not in get_args(Profile):
        raise ConfigError(
            "There is no such profile",
            found=repr(request.profile),
            expected=" or ".join(map(repr, get_args(Profile))),
        )
    memory = bytes_of("memory", request.memory)
    with Workers(request.scheduler) as workers:
        reading = Reading(
            layer=request.layer,
            use_raw=request.use_raw,
            round_counts=request.round_counts,
            feature_type=request.feature_type,
            memory=_share(memory, workers),
            folder=root / SCRATCH,
            transpose=request.transpose,
            gene_lengths=None if request.gene_lengths is None else Path(request.gene_lengths),
            measurement=request.measurement,
            obs_filter=request.obs_filter,
        )
        with open_study(
            sources, reading, prefix_rows=request.prefix_rows, genes_of_all=request.genes_of_all
        ) as counts:
            check_memory(counts, memory)
            if not workers.local and counts.files is None:
                raise ConfigError(
                    "An AnnData in memory, or a URI, cannot be read by other processes",
                    found=f"scheduler={request.scheduler!r}",
                    expected="paths of files",
                    do="save it first, or leave the scheduler out",
                )
            state, report = _append(root, counts, request, memory, workers)
    return state, replace(report, seconds=time.monotonic() - started)


def _append(
    root: Path, counts: StudyCounts, request: Request, memory: int, workers: Workers
) -> tuple[Manifest, AppendReport]:
    study = request.study
    of_batch = {key: _column(counts, key, "batch") for key in request.batch_keys}
    own_batches = batch_names(of_batch, counts.n_obs, study, counts.path)
    key = request.label_key
    of_label = None if key is None else _column(counts, key, "label")
    own_labels = label_names(of_label, counts.n_obs, request.unlabeled)
    _check_layers(counts, request.keep_layers)
    left = (root / SCRATCH / INGEST).exists()
    with manifests.writer(root, f"append {study}") as newest:
        if study in (entry.name for entry in newest.studies):
            raise StudyExistsError(
                "The study is in the store already",
                found=study,
                expected="a name not among " + ", ".join(entry.name for entry in newest.studies),
                do="choose another name; a study is never changed once written",
                path=root,
            )
        if newest.backend == "tiledb":
            tiledb()  # said before anything is read
            if request.profile != "fast":
                raise ConfigError(
                    "A store of the format tiledb has no compression profiles",
                    found=f"profile={request.profile!r}",
                    do="leave the profile out, or make a Zarr store",
                    path=root,
                )
        fixed = newest.gene_mode == "given" or (newest.gene_mode == "first" and newest.studies)
        old_table = manifests.read_gene_table(root, newest)
        said: list[str] = []
        if request.orthologs is None:
            table, columns, _ = align(old_table, counts.var, mode="fixed" if fixed else "union")
        else:
            partners = read_orthologs(request.orthologs)
            table, columns, _, told = align_orthologs(
                old_table, counts.var, partners, fixed=bool(fixed)
            )
            said.append(told)
        batches, batch_codes = extend(newest.batches, *own_batches)
        labels, label_codes = extend(newest.labels, *own_labels)

        asked = _fingerprint(counts, request, _share(memory, workers), columns)
        journal, notes = Journal.open(root, newest.number, asked, fresh=request.fresh, left=left)
        folder = manifests.study_folder(root, newest, study)
        writer = StudyWriter(
            root,
            study,
            folder,
            counts,
            columns,
            batch_codes,
            request.profile,
            memory,
            workers,
            journal,
            request.progress,
            tiled=newest.backend == "tiledb",
        )
        with _kept_when_interrupted(journal):
            index = writer.write(request.keep_layers)
            order = index["input_position"]
            index |= {"genes": columns, "batch": batch_codes[order], "label": label_codes[order]}
            entry = StudyEntry(
                name=study,
                path=f"studies/{folder}",
                n_obs=counts.n_obs,
                nnz=writer.nnz,
                profile="tiledb" if writer.tiled else request.profile,
                source=counts.name,
                digests=digests(writer.folder),
                parts={
                    "index": write_part(root, f"parts/{folder}/index", index),
                    "statistics": write_part(
                        root, f"parts/{folder}/statistics", writer.statistics()
                    ),
                },
            )
            genes = newest.genes
            if table != old_table:
                genes = manifests.write_gene_table(root, newest.number + 1, table)
            state = manifests.commit(
                root,
                newest,
                f"append {study}",
                genes=genes,
                studies=(*newest.studies, entry),
                batches=batches,
                labels=labels,
            )
    return state, AppendReport(
        study,
        counts.n_obs,
        writer.nnz,
        len(table) - len(old_table),
        len(table) - len(np.unique(columns[columns >= 0])),
        _common(root, newest, index["content_hash"], "content_hash"),
        _common(root, newest, index["name_hash"], "name_hash"),
        (*counts.notes, *said, *notes),
        0.0,
    )


@contextmanager
def _kept_when_interrupted(journal: Journal) -> Iterator[None]:
    """Keep what was done for the same command to go on with; after an error, nothing."""
    try:
        yield
    except Exception:
        journal.remove()
        raise
    except BaseException as interrupt:
        if journal.request is None:
            journal.remove()
            raise
        journal.write()
        if isinstance(interrupt, KeyboardInterrupt):
            raise KeyboardInterrupt(
                "(what was done is kept: the same command goes on, --fresh starts anew)"
            ) from None
        raise


def _share(memory: int, workers: Workers) -> int:
    """Bytes of a block of rows.

    Each worker has one, one lies ready for them, and where rows come in order one is being read.
    """
    return memory // (workers.number + 2)


def _fingerprint(
    counts: StudyCounts, request: Request, block: int, columns: Codes32
) -> dict[str, Any] | None:
    """What has to be the same for an ingest to go on; None where the inputs are not files."""
    if counts.files is None:
        return None
    tables = hashlib.sha256(columns.tobytes())
    for names in (counts.obs.index, counts.var.index):
        for start in range(0, len(names), _NAMES_AT_ONCE):
            some = names[start : start + _NAMES_AT_ONCE]
            tables.update("".join(f"{name}\0" for name in some).encode())
    options = asdict(request)
    for name in ("scheduler", "fresh", "progress", "memory"):
        del options[name]
    stats = [path.stat() for path in counts.files]
    return {
        **options,
        "block": block,
        "shard": [layout.CHUNK, layout.SHARD],
        "files": [str(path.absolute()) for path in counts.files],
        "sizes": [stat.st_size for stat in stats],
        "times": [stat.st_mtime_ns for stat in stats],
        "tables": tables.hexdigest(),
    }


def _check_layers(counts: StudyCounts, names: tuple[str, ...]) -> None:
    if unknown := [name for name in names if name not in counts.layers]:
        raise MissingColumnError(
            "There is no such layer to keep",
            found=", ".join(unknown),
            expected="one of " + (", ".join(counts.layers) or "(there are none)"),
            path=counts.path,
        )


def _column(counts: StudyCounts, key: str, what: str) -> pd.Series[Any]:
    if key == FILE_COLUMN and key not in counts.obs and counts.path is not None:
        return pd.Series(counts.path.stem, counts.obs.index)  # one file, as one of several
    return obs_column(counts.obs, key, what, counts.path)


def _common(
    root: Path, manifest: Manifest, hashes: npt.NDArray[np.uint64], name: str
) -> dict[str, int]:
    """How many rows of each study have a hash that is among ``hashes``; 0 (empty cells) aside."""
    out: dict[str, int] = {}
    if not manifest.studies:
        return out
    mine = np.unique(hashes[hashes != 0])
    for study in manifest.studies:
        theirs = read_array(root, study.parts["index"], name)
        if n := int(np.isin(theirs, mine).sum()):
            out[study.name] = n
    return out
