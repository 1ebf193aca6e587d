"""Adding and correcting obs columns of cells: a new state, and studies' own files as they were."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import ConfigError, InputError, MissingColumnError, StoreError, listed
from atlas.store import manifest as manifests
from atlas.store import obs_part
from atlas.store.arrays import read_array, write_part
from atlas.store.codes import extend, label_names, text_of
from atlas.store.schema import Manifest, StudyEntry
from atlas.store.statistics import gene_statistics
from atlas.store.tables import kind_of
from atlas.store.zarr_study import ZarrStudy, storable

STUDY_COLUMN = "atlas_study"
_EXAMPLES = 5

Table = pd.DataFrame | str | PathLike[str]


@dataclass(frozen=True, slots=True)
class AnnotateReport:
    """What an annotation did.

    Attributes
    ----------
    columns
        Names of the columns added or corrected.
    cells
        Cells in the table, by study.
    manifest
        Number of the newest state now.
    """

    columns: tuple[str, ...]
    cells: dict[str, int]
    manifest: int


@dataclass(frozen=True, slots=True)
class Request:
    """What :meth:`atlas.store.CountStore.annotate` was asked for."""

    study: str | None
    batch_key: str | None
    label_key: str | None
    unlabeled: str


def annotate(root: Path, table: Table, request: Request) -> tuple[Manifest, AnnotateReport]:
    """Commit a state with new values; see :meth:`atlas.store.CountStore.annotate`."""
    with manifests.writer(root, "annotate") as newest:
        entries = _asked(root, newest, request.study)
        frames = {entry.name: ZarrStudy(root, entry).obs() for entry in entries}
        path = None if isinstance(table, pd.DataFrame) else Path(table)
        given = table if isinstance(table, pd.DataFrame) else _read_table(Path(table), frames)
        named = _studies_named(given, request.study, frames, path)
        given = given.drop(columns=STUDY_COLUMN, errors="ignore")
        _check_columns(given, path)
        places = _places(given.index, named, frames, path)
        given = storable(given, "table", path)
        touched = [entry for entry in entries if (places[entry.name] >= 0).any()]
        merged = {
            entry.name: _merged(frames[entry.name], given, places[entry.name], entry.name, path)
            for entry in touched
        }
        batches, labels = newest.batches, newest.labels
        codes: dict[str, dict[str, npt.NDArray[np.int32]]] = {name: {} for name in merged}
        for entry in touched:
            frame, own = merged[entry.name], codes[entry.name]
            if request.batch_key is not None:
                column = _key(frame, request.batch_key, "batch", entry.name, path)
                batches, own["batch"] = _batch_codes(batches, column, entry.name, path)
            if request.label_key is not None:
                column = _key(frame, request.label_key, "label", entry.name, path)
                texts = label_names(column, len(column), request.unlabeled)
                labels, own["label"] = extend(labels, *texts)
        # all is checked; from here on it is written
        number = newest.number + 1
        changed = {
            entry.name: _write(
                root, number, entry, merged[entry.name], list(given.columns), codes[entry.name]
            )
            for entry in touched
        }
        state = manifests.commit(
            root,
            newest,
            "annotate " + ", ".join(given.columns),
            studies=tuple(changed.get(entry.name, entry) for entry in newest.studies),
            batches=batches,
            labels=labels,
        )
    cells = {entry.name: int((places[entry.name] >= 0).sum()) for entry in touched}
    return state, AnnotateReport(tuple(given.columns), cells, state.number)


def _asked(root: Path, newest: Manifest, study: str | None) -> list[StudyEntry]:
    entries = [entry for entry in newest.studies if study in (None, entry.name)]
    if not entries:
        raise StoreError(
            "The store has no such study" if newest.studies else "The store holds no study",
            found=study,
            expected="one of " + ", ".join(e.name for e in newest.studies)
            if newest.studies
            else None,
            do=None if newest.studies else "ingest one first",
            path=root,
        )
    return entries


def _read_table(path: Path, frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A table in text: row names first; what is text in the store is read as text."""
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".txt") else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, delimiter=delimiter)
            header = next(lines, [])
            for line in lines:
                if line and len(line) != len(header):
                    raise ValueError(
                        f"{len(line)} values in line {lines.line_num}, {len(header)} in the header"
                    )
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise InputError(
                "The table has columns of the same name",
                found=", ".join(map(repr, twice)),
                expected="each once",
                path=path,
            )
        text = {STUDY_COLUMN} | {
            name for frame in frames.values() for name in frame if kind_of(frame[name]) == "other"
        }
        frame: pd.DataFrame = pd.read_csv(
            path,
            sep=delimiter,
            encoding="utf-8-sig",
            low_memory=False,
            index_col=False,
            dtype={i: str for i, name in enumerate(header) if not i or name in text},
        )
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            "The table cannot be read",
            found=f"{type(error).__name__}: {error}",
            expected="CSV, or TSV by the ending .tsv or .txt: a header, then a line for each cell, "
            "its row name first",
            path=path,
        ) from error
    return frame.set_index(frame.columns[0]) if len(frame.columns) else frame


def _check_columns(given: pd.DataFrame, path: Path | None) -> None:
    reserved = [c for c in given.columns if isinstance(c, str) and c.startswith("atlas_")]
    if reserved or not len(given.columns) or not len(given):
        raise InputError(
            "The table has reserved columns" if reserved else "The table gives no values",
            found=", ".join(reserved) or f"{len(given)} cells, {len(given.columns)} columns",
            expected="names that do not start with 'atlas_' (but for 'atlas_study')"
            if reserved
            else "row names, and at least one column besides",
            do="rename them" if reserved else "is it separated by commas, or a .tsv by tabs?",
            path=path,
        )


def _studies_named(
    given: pd.DataFrame, study: str | None, frames: dict[str, pd.DataFrame], path: Path | None
) -> npt.NDArray[np.object_] | None:
    """The study that each row of the table names; None where it names none."""
    if STUDY_COLUMN not in given.columns:
        return None
    if study is not None:
        raise ConfigError(
            "The study is given twice",
            found=f"study={study!r}, and a column {STUDY_COLUMN!r} in the table",
            do="leave one of them out",
            path=path,
        )
    named = given[STUDY_COLUMN].to_numpy(object)
    if unknown := list(dict.fromkeys(str(name) for name in named if name not in frames)):
        raise InputError(
            f"The column {STUDY_COLUMN!r} of the table names studies that are not in the store",
            found=_some(unknown),
            expected="one of " + ", ".join(frames),
            path=path,
        )
    return named


def _places(
    names: pd.Index[Any],
    named: npt.NDArray[np.object_] | None,
    frames: dict[str, pd.DataFrame],
    path: Path | None,
) -> dict[str, npt.NDArray[np.int64]]:
    """For each study the row of the table that each of its cells takes, -1 for none."""
    keys = pd.DataFrame({"name": np.asarray(names, object), "study": named})
    if (missing := keys["name"].isna()).any():
        raise InputError(
            "Rows of the table have no row name", found=f"{int(missing.sum())} rows", path=path
        )
    if (twice := keys.duplicated()).any():
        raise InputError(
            "Cells are in the table more than once",
            found=_some(keys["name"][twice].unique()),
            expected="a line for each cell",
            do="remove the lines that are too many",
            path=path,
        )
    hits = np.zeros(len(keys), np.int64)
    out = {}
    for study, frame in frames.items():
        at = frame.index.get_indexer(pd.Index(keys["name"]))
        if named is not None:
            at[named != study] = -1
        hits += at >= 0
        place = np.full(len(frame), -1, np.int64)
        place[at[at >= 0]] = np.flatnonzero(at >= 0)
        out[study] = place
    if (hits == 0).any():
        example = next((frame.index[0] for frame in frames.values() if len(frame)), None)
        raise InputError(
            "Cells of the table are not in the store",
            found=f"{int((hits == 0).sum()):,} of {len(keys):,}, e.g. "
            + _some(keys["name"][hits == 0]),
            expected=f"row names of {', '.join(frames)}, such as {example}",
            do="leave these lines out, or mend their names",
            path=path,
        )
    if (hits > 1).any():
        raise InputError(
            "Row names of the table are those of cells in several studies",
            found=f"{int((hits > 1).sum()):,} of {len(keys):,}, e.g. "
            + _some(keys["name"][hits > 1]),
            do=f"name the study with --study, or in a column {STUDY_COLUMN!r} of the table",
            path=path,
        )
    return out


def _some(values: Any) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts[:_EXAMPLES]) + (", …" if len(texts) > _EXAMPLES else "")


def _merged(
    frame: pd.DataFrame,
    given: pd.DataFrame,
    place: npt.NDArray[np.int64],
    study: str,
    path: Path | None,
) -> pd.DataFrame:
    """The obs of one study with the values given."""
    out = frame.copy(deep=False)
    for name in given.columns:
        new, taken = given[name], place >= 0
        values = new.take(place[taken])
        old = frame[name][~taken] if name in frame else None
        if old is not None and old.notna().any() and values.notna().any():
            _check_kinds(old, values, study, path)
        column = pd.Series(None, index=np.arange(len(frame)), dtype=object)
        column[taken] = _objects(values)
        if old is not None:
            column[~taken] = _objects(old)
        whole = [part for part in (old, values) if part is not None and part.notna().any()]
        out[name] = _typed(column, whole or [values]).set_axis(frame.index)
    return out


def _objects(column: pd.Series[Any]) -> npt.NDArray[np.object_]:
    return column.astype(object).where(column.notna(), None).to_numpy(object)


def _check_kinds(old: pd.Series[Any], new: pd.Series[Any], study: str, path: Path | None) -> None:
    kinds = [_kind(old), _kind(new)]
    if kinds[0] != kinds[1] and not set(kinds) <= {"integer", "float"}:
        raise InputError(
            f"The column {new.name!r} would mix types",
            found=f"{kinds[1]}, e.g. {_some(new.dropna().iloc[:3])}",
            expected=f"{kinds[0]}, as cells of study {study} have that are not in the table, "
            f"e.g. {_some(old.dropna().iloc[:3])}",
            do="convert the column, give all cells of the study, or choose another name",
            path=path,
        )


def _kind(column: pd.Series[Any]) -> str:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return "text" if column.cat.categories.dtype.kind == "O" else "categories of numbers"
    kind = kind_of(column)
    return "text" if kind == "other" else kind


def _typed(column: pd.Series[Any], parts: Sequence[pd.Series[Any]]) -> pd.Series[Any]:
    """Values of a column in the type of the parts it was put together of."""
    kinds = {_kind(part) for part in parts}
    if kinds <= {"text", "categories of numbers"}:
        there = [p.cat.categories if hasattr(p, "cat") else p.dropna().unique() for p in parts]
        categories = list(dict.fromkeys(value for values in there for value in values))
        ordered = len(parts) == 1 and bool(getattr(parts[0].dtype, "ordered", False))
        return column.astype(pd.CategoricalDtype(pd.Index(categories), ordered=ordered))
    if "float" in kinds:
        return column.astype(float)
    whole = bool(column.notna().all())
    if kinds == {"boolean"}:
        return column.astype("bool" if whole else "boolean")
    return column.astype("int64" if whole else "Int64")


def _key(frame: pd.DataFrame, key: str, what: str, study: str, path: Path | None) -> pd.Series[Any]:
    if key not in frame:
        raise MissingColumnError(
            f"There is no obs column for the {what}",
            found=repr(key),
            expected=f"a column of the table or of study {study}: {listed(frame.columns, key)}",
            path=path,
        )
    return frame[key]


def _batch_codes(
    names: tuple[str, ...], column: pd.Series[Any], study: str, path: Path | None
) -> tuple[tuple[str, ...], npt.NDArray[np.int32]]:
    codes, values = pd.factorize(column)
    if missing := int((codes < 0).sum()):
        raise InputError(
            "Some cells would have no batch",
            found=f"{missing:,} cells of study {study} without a value in {column.name!r}, e.g. "
            + _some(column.index[codes < 0]),
            expected="a batch for every cell of the studies in the table",
            do="give these cells too",
            path=path,
        )
    own = [f"{study}/{text_of(value)}" for value in values]
    return extend(names, own, codes.astype(np.int64))


def _write(
    root: Path,
    number: int,
    entry: StudyEntry,
    frame: pd.DataFrame,
    columns: Sequence[str],
    codes: dict[str, npt.NDArray[np.int32]],
) -> StudyEntry:
    """Write the new parts of one study; columns annotated before go on in the new part."""
    where = f"parts/{Path(entry.path).name}"
    parts = dict(entry.parts)
    before = obs_part.read(root, parts["obs"]) if "obs" in parts else {}
    own = {name: frame[name] for name in dict.fromkeys([*before, *columns])}
    parts["obs"] = obs_part.write(root, f"{where}/obs-{number:06d}", own)
    index = entry.parts["index"]
    arrays = {
        name: read_array(root, index, name)
        for name in (file.removesuffix(".npy") for file in index.files)
    }
    new = {name: own for name, own in codes.items() if not np.array_equal(own, arrays[name])}
    if new:
        parts["index"] = write_part(root, f"{where}/index-{number:06d}", arrays | new)
    if "batch" in new:
        batches, batch_codes = np.unique(new["batch"], return_inverse=True)
        study = ZarrStudy(root, entry)
        found = gene_statistics(
            study.counts.read, entry.n_obs, len(arrays["genes"]), batch_codes.astype(np.int32)
        )
        parts["statistics"] = write_part(
            root,
            f"{where}/statistics-{number:06d}",
            {**found.to_arrays(), "batches": batches.astype(np.int32)},
        )
    return replace(entry, parts=parts)
