"""What an ingest has done so far, so that the same command goes on after it was killed.

::

    STORE/scratch/ingest/journal.json      the request, and the runs and shards that are whole
    STORE/scratch/ingest/runs/MATRIX/…     rows read, checked and sorted (atlas.store.spill)
    STORE/scratch/ingest/shards/MATRIX/…   shards that will be moved into the study
    STORE/scratch/ingest/study/            the study without its matrices, always written anew

The journal is replaced in one step, at most once a second. A run or shard that it names is believed
when its size and crc32c are those noted. It counts for one state of the store: a commit by another
writer ends it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from atlas import files
from atlas.store.manifest import INGEST, JOURNAL, SCRATCH
from atlas.store.matrix_writer import Written
from atlas.store.spill import Run, RunResult, checksum, read_run

FORMAT = "atlas-ingest-journal"
VERSION = 1
INTERVAL = 1.0
"""Seconds between two replacements of the journal."""

_NUMBER = {"type": "integer", "minimum": 0}
_RUN = {
    "type": "object",
    "required": list(Run.__slots__),
    "additionalProperties": False,
    "properties": {
        **dict.fromkeys(("first", "n_rows", "nnz", "size", "crc32c"), _NUMBER),
        "index_type": {"type": "string", "pattern": "^[<|][iu][1248]$"},
        "value_type": {"type": "string", "pattern": "^[<|][iuf][1248]$"},
        "largest": {"type": "number"},
    },
}
_SHARDS = {
    "type": "array",
    "items": {"type": "array", "items": _NUMBER, "minItems": 3, "maxItems": 3},
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["format", "version", "manifest", "request", "matrices"],
    "additionalProperties": False,
    "properties": {
        "format": {"const": FORMAT},
        "version": {"const": VERSION},
        "manifest": _NUMBER,
        "request": {"type": "object"},
        "matrices": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["runs", "types", "indices", "data"],
                "additionalProperties": False,
                "properties": {
                    "runs": {"type": "array", "items": _RUN},
                    "types": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
                    "indices": _SHARDS,
                    "data": _SHARDS,
                },
            },
        },
    },
}
_VALIDATOR = Draft202012Validator(SCHEMA)


class Journal:
    """The journal of one ingest; :meth:`open` gives the one to go on with.

    Parameters
    ----------
    root
        The store.
    manifest
        Number of its newest manifest.
    request
        What is ingested and how, plain JSON; None for an ingest that cannot go on (an AnnData in
        memory), of which no journal is written.
    """

    def __init__(self, root: Path, manifest: int, request: Mapping[str, Any] | None) -> None:
        self.folder = root / SCRATCH / INGEST
        self.path = self.folder / JOURNAL
        self.manifest = manifest
        self.request = request
        self._matrices: dict[str, dict[str, Any]] = {}
        self._written = 0.0

    @classmethod
    def open(
        cls,
        root: Path,
        manifest: int,
        request: Mapping[str, Any] | None,
        *,
        fresh: bool = False,
        left: bool = False,
    ) -> tuple[Journal, list[str]]:
        """The journal to go on with, or a new one; and what the user should know.

        Parameters
        ----------
        root, manifest, request
            Of the journal.
        fresh
            Do not go on.
        left
            An ingest had left something, before leftovers were removed.
        """
        journal = cls(root, manifest, request)
        why: str | None = None
        if journal.path.exists():
            why = "--fresh was given" if fresh else journal._read()
            if why is None:
                return journal, ["going on with the ingest that was interrupted"]
            journal._matrices = {}
        elif left:
            why = "its journal is missing or damaged, or the store has changed since"
        notes = [] if why is None else [f"an interrupted ingest was not gone on with: {why}"]
        journal.remove()
        journal.folder.mkdir(parents=True)
        journal.write()
        return journal, notes

    def _read(self) -> str | None:
        """Take what the file says; returns why it cannot be used."""
        try:
            values = json.loads(self.path.read_bytes())
        except ValueError:
            return "its journal is damaged"
        if wrong := best_match(_VALIDATOR.iter_errors(values)):
            return f"its journal is damaged ({wrong.json_path})"
        if values["manifest"] != self.manifest:
            return "the store has changed since"
        if self.request is None:
            return "it was of another study or input"
        wanted = json.loads(json.dumps(self.request))
        different = [key for key in wanted if values["request"].get(key) != wanted[key]]
        if different or set(values["request"]) != set(wanted):
            return f"it was of another {', '.join(different) or 'request'}"
        self._matrices = values["matrices"]
        return None

    def write(self) -> None:
        """Replace the file."""
        if self.request is None:
            return
        values = {
            "format": FORMAT,
            "version": VERSION,
            "manifest": self.manifest,
            "request": self.request,
            "matrices": self._matrices,
        }
        files.replace_bytes(self.path, json.dumps(values).encode())
        self._written = time.monotonic()

    def _touch(self) -> None:
        if time.monotonic() - self._written >= INTERVAL:
            self.write()

    def remove(self) -> None:
        """Remove everything the ingest has written so far."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _matrix(self, name: str) -> dict[str, Any]:
        return self._matrices.setdefault(name, {"runs": [], "types": [], "indices": [], "data": []})

    def runs_folder(self, matrix: str) -> Path:
        """Where the runs of a matrix are; it is there afterwards."""
        folder = self.folder / "runs" / matrix
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def shards_folder(self, matrix: str) -> Path:
        """Where the shards of a matrix are, in ``indices`` and ``data``; both are there then."""
        folder = self.folder / "shards" / matrix
        for array in ("indices", "data"):
            (folder / array).mkdir(parents=True, exist_ok=True)
        return folder

    def runs(self, matrix: str) -> Iterator[RunResult]:
        """Runs that are whole; those that are not are forgotten."""
        whole = []
        for values in self._matrix(matrix)["runs"]:
            if (found := read_run(self.runs_folder(matrix), Run(**values))) is not None:
                whole.append(values)
                yield found
        self._matrix(matrix)["runs"] = whole

    def add_run(self, matrix: str, run: Run) -> None:
        """Note a run that was written."""
        self._matrix(matrix)["runs"].append(asdict(run))
        self._touch()

    def shards(self, matrix: str, types: tuple[str, str]) -> set[int]:
        """Numbers of the shards that are whole in both arrays, if written in these types."""
        noted = self._matrix(matrix)
        if noted["types"] != list(types):
            noted.update(types=list(types), indices=[], data=[])
        for array in ("indices", "data"):
            folder = self.shards_folder(matrix) / array
            noted[array] = [shard for shard in noted[array] if _is_whole(folder, *shard)]
        done: set[int] = {shard[0] for shard in noted["indices"]}
        return done & {shard[0] for shard in noted["data"]}

    def add_shards(self, matrix: str, indices: Written, data: Written) -> None:
        """Note a shard of each array that was written."""
        self._matrix(matrix)["indices"].append(list(indices))
        self._matrix(matrix)["data"].append(list(data))
        self._touch()


def _is_whole(folder: Path, number: int, size: int, crc32c: int) -> bool:
    path = folder / str(number)
    try:
        data = path.read_bytes() if path.stat().st_size == size else None
    except FileNotFoundError:
        return False
    return data is not None and checksum(data) == crc32c
