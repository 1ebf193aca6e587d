"""Checking all that a store holds against its manifests, in parallel; nothing stops at a fault."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr
from tqdm import tqdm

from atlas.errors import AtlasError, NotAStoreError
from atlas.store import manifest as manifests
from atlas.store import models
from atlas.store.arrays import DETAILS, checked_folder, read_array, read_details
from atlas.store.findings import Finding, Findings, VerifyReport, ingest_again, only_old
from atlas.store.parallel import ordered_map, resolve_threads
from atlas.store.schema import Manifest, ModelEntry, Part, StudyEntry
from atlas.store.verify_matrix import MatrixCheck, Task, caught, fault
from atlas.store.zarr_study import ZarrStudy


def verify_store(root: Path, *, progress: bool = False, threads: int | None = None) -> VerifyReport:
    """Check a store: manifests, digests, and every chunk of every array that a state names.

    Parameters
    ----------
    root
        Folder of the store. Its newest manifest may be broken.
    progress
        Show chunks, bytes a second and the time left on stderr.
    threads
        By default as many as cores.

    Raises
    ------
    NotAStoreError
        There is no store at ``root``.
    """
    there = manifests.numbers(root)
    if not there:
        manifests.read(root)  # raises, and says what is there instead
        raise NotAStoreError("This is no store", path=root)
    findings, states = Findings(), []
    for number in there:
        try:
            states.append(manifests.read(root, number))
        except (AtlasError, OSError) as error:
            path = manifests.manifest_path(root, number)
            findings.add(_of_manifest(error, path, number == there[-1], there[0] < number))
    return _verify(root, states, findings, progress, threads)


def verify_state(
    root: Path, state: Manifest, *, progress: bool = False, threads: int | None = None
) -> VerifyReport:
    """Check what one state of a store names, as :func:`verify_store` checks all of them."""
    return _verify(root, [state], Findings(), progress, threads)


def _verify(
    root: Path,
    states: Sequence[Manifest],
    findings: Findings,
    progress: bool,
    threads: int | None,
) -> VerifyReport:
    began = time.monotonic()
    checks = list(_checks(root, states))
    n_chunks = n_bytes = 0
    with tqdm(
        total=sum(check.bytes for check in checks),
        desc="verify",
        unit="B",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        tasks = ((check, task) for check in checks for task in check.tasks())
        work = ordered_map(lambda item: item[1].run(), tasks, resolve_threads(threads))
        for (check, task), faults in work:
            for error in [*faults, *task.after()]:
                findings.add(check.finding(error))
            n_chunks += task.chunks
            n_bytes += task.bytes
            if progress:
                bar.set_postfix_str(f"{n_chunks:,} chunks", refresh=False)
            bar.update(task.bytes)
    return VerifyReport(
        path=str(root),
        manifest=states[-1].number if states else 0,
        states=len(states),
        studies=sum(check.study is not None and check.is_study for check in checks),
        chunks=n_chunks,
        bytes=n_bytes,
        seconds=time.monotonic() - began,
        findings=tuple(findings.kept),
        unlisted=findings.unlisted,
    )


def _of_manifest(error: Exception, path: Path, newest: bool, has_older: bool) -> Finding:
    """A manifest that cannot be read."""
    do = "restore it from a copy"
    if not newest:
        do += f", or give this older state up, on which no other depends: rm {path}"
    elif has_older:
        do += f", or give up this state, and what only it holds, for the one before it: rm {path}"
    if isinstance(error, AtlasError):
        found = None if error.found is None else str(error.found)
        expected = None if error.expected is None else str(error.expected)
        return Finding(None, str(path), error.what, found, expected, do)
    return Finding(None, str(path), "The manifest cannot be read", str(error), None, do)


@dataclass(frozen=True, slots=True)
class _Check:
    """Tasks about one thing, and what to do where they find a fault."""

    study: str | None
    do: str
    tasks: Callable[[], Iterator[Task]]
    bytes: int
    is_study: bool = False

    def finding(self, error: AtlasError) -> Finding:
        found = None if error.found is None else str(error.found)
        expected = None if error.expected is None else str(error.expected)
        return Finding(self.study, str(error.path), error.what, found, expected, self.do)


def _checks(root: Path, states: Sequence[Manifest]) -> Iterator[_Check]:
    """What to check: each thing once, those of the newest state first."""
    if not states:
        return
    done: set[str] = set()
    for state in reversed(states):
        if state.genes.path not in done:
            done.add(state.genes.path)
            do = _advice(
                root,
                states,
                lambda s, path=state.genes.path: s.genes.path == path,  # type: ignore[misc]
                "restore it from a copy: all studies need it",
            )
            yield _Check(None, do, partial(_gene_table, root, state), 0)
        for entry in state.studies:
            if entry.path not in done:
                done.add(entry.path)
                do = _advice(
                    root,
                    states,
                    lambda s, path=entry.path: path in s.paths,  # type: ignore[misc]
                    ingest_again(root, entry, states),
                )
                size = sum(p.stat().st_size for p in _shards(root / entry.path))
                tasks = partial(_study, root, state, entry)
                yield _Check(entry.name, do, tasks, size, is_study=True)
            for name, part in entry.parts.items():
                if part.path in done:
                    continue
                done.add(part.path)
                if name.startswith("embedding:"):
                    own = name.removeprefix("embedding:")
                    do = _embed_again(root, states, state, own, part.path)
                    tasks = partial(_embedding, root, state, entry, own, part)
                    yield _Check(entry.name, do, tasks, 0)
                else:
                    do = ingest_again(root, entry, states)
                    if name == "obs":
                        do = f"restore it from a copy, or annotate again: atlas annotate {root} …"
                    do = _advice(
                        root,
                        states,
                        lambda s, path=part.path: path in s.paths,  # type: ignore[misc]
                        do,
                    )
                    tasks = partial(_part, root, state, entry, part)
                    yield _Check(entry.name, do, tasks, 0)
        for name, embedding in state.embeddings.items():
            if embedding.details.path not in done:
                done.add(embedding.details.path)
                do = _embed_again(root, states, state, name, embedding.details.path)
                yield _Check(None, do, partial(_details, root, embedding.details), 0)
            if embedding.index is not None and embedding.index.path not in done:
                done.add(embedding.index.path)
                do = _embed_again(root, states, state, name, embedding.index.path)
                yield _Check(None, do, partial(_index, root, name, embedding.index), 0)
        for name, model in state.models.items():
            if model.part.path not in done:
                done.add(model.part.path)
                do = _advice(
                    root,
                    states,
                    lambda s, path=model.part.path: path in s.paths,  # type: ignore[misc]
                    f"restore it from a copy, or keep the model again: atlas keep {root} RUN "
                    f"--name {name}",
                )
                yield _Check(None, do, partial(_model, root, name, model), 0)


def _advice(
    root: Path, states: Sequence[Manifest], needs: Callable[[Manifest], bool], do: str
) -> str:
    """``do`` where the newest state needs it; else what to do about older states."""
    needing = [state.number for state in states if needs(state)]
    return do if states[-1].number in needing else only_old(root, needing)


def _embed_again(
    root: Path, states: Sequence[Manifest], state: Manifest, name: str, path: str
) -> str:
    do = (
        f"restore it from a copy, or make the embedding again: atlas embed RUN {root} --name {name}"
    )
    return _advice(root, states, lambda s: path in s.paths, do)


def _shards(folder: Path) -> Iterator[Path]:
    for matrix in (folder / "X", *folder.glob("layers/*")):
        yield from (p for p in matrix.glob("*/c/*") if p.is_file())
        yield from matrix.glob("*.tiledb/__fragments/*/*.tdb")


def _gene_table(root: Path, state: Manifest) -> Iterator[Task]:
    def check() -> None:
        table = manifests.read_gene_table(root, state)
        if len(table.names) != state.genes.n_vars:
            raise fault(
                "The gene table has another length than the manifest says",
                root / state.genes.path,
                len(table.names),
                state.genes.n_vars,
            )

    yield Task(lambda: caught(check))


def _details(root: Path, part: Part) -> Iterator[Task]:
    yield Task(lambda: caught(lambda: read_details(root, part)))


def _index(root: Path, name: str, part: Part) -> Iterator[Task]:
    yield Task(lambda: caught(lambda: checked_folder(root, part, f"the index of {name!r}")))


def _model(root: Path, name: str, entry: ModelEntry) -> Iterator[Task]:
    yield Task(lambda: caught(lambda: models.folder_of(root, name, entry)))


def _embedding(
    root: Path, state: Manifest, entry: StudyEntry, name: str, part: Part
) -> Iterator[Task]:
    def check() -> None:
        z = read_array(root, part, "z")
        known = state.embeddings.get(name)
        expected = (entry.n_obs, known.n_latent if known else z.shape[-1])
        if z.shape != expected:
            raise fault(
                f"The embedding {name!r} does not fit its study",
                root / part.path / "z.npy",
                z.shape,
                expected,
            )

    yield Task(lambda: caught(check))


def _study(root: Path, state: Manifest, entry: StudyEntry) -> Iterator[Task]:
    """The files of one study itself."""
    study = ZarrStudy(root, entry)
    if not study.folder.is_dir():
        missing = fault("The folder of a study is missing", study.folder)
        yield Task(lambda: [missing])
    else:
        for what, path in (("metadata", ""), ("obs", "obs"), ("indptr", "X/indptr")):
            yield Task(partial(_digest, study, what, study.folder / path))
        yield Task(partial(_tables, study))
    if study.folder.is_dir():
        n_vars = _n_vars(root, entry)
        yield from MatrixCheck(
            study.folder / "X", entry.n_obs, n_vars, entry.nnz, positive=True
        ).tasks()
        for layer in study.layers:
            folder = study.folder / "layers" / layer
            yield from MatrixCheck(folder, entry.n_obs, n_vars, None, positive=False).tasks()


def _part(root: Path, state: Manifest, entry: StudyEntry, part: Part) -> Iterator[Task]:
    """The index, the statistics, or the annotated columns of a study."""
    for file in sorted(part.files):
        if file == DETAILS:
            yield Task(lambda: caught(lambda: read_details(root, part)))
        else:
            yield Task(partial(_array, root, state, entry, part, file.removesuffix(".npy")))


def _digest(study: ZarrStudy, what: str, path: Path) -> list[AtlasError]:
    """A digest over several files; the fault names what they are together."""
    faults = caught(lambda: study.check(what))
    return [fault(error.what, path, error.found, error.expected) for error in faults]


def _n_vars(root: Path, entry: StudyEntry) -> int:
    """Columns of a study; where the table of its genes is broken, as many as an index can name."""
    try:
        return len(read_array(root, entry.parts["index"], "genes"))
    except AtlasError:
        return 2**32


def _tables(study: ZarrStudy) -> list[AtlasError]:
    """obs and X have the rows that the manifest says, as any reader of AnnData sees them."""
    try:
        group = zarr.open_group(study.folder, mode="r")
        index = str(group["obs"].attrs.asdict()["_index"])
        n_obs = cast("zarr.Array[Any]", group[f"obs/{index}"]).shape[0]
        rows = int(cast("Sequence[int]", group["X"].attrs.asdict()["shape"])[0])
    except Exception as error:  # zarr raises whatever its parsers raise
        found = f"{type(error).__name__}: {error}"
        return [fault("The metadata of a study cannot be read", study.folder, found)]
    return [
        fault(
            f"{name} has another number of rows than the manifest says",
            study.folder / name,
            f"{n:,}",
            f"{study.entry.n_obs:,}",
        )
        for name, n in (("obs", n_obs), ("X", rows))
        if n != study.entry.n_obs
    ]


def _array(
    root: Path, state: Manifest, entry: StudyEntry, part: Part, name: str
) -> list[AtlasError]:
    """An array of the index or the statistics: its digest, length, and range of values."""
    try:
        values = read_array(root, part, name)
    except AtlasError as error:
        return [error]
    path = root / part.path / f"{name}.npy"
    if part is entry.parts["statistics"]:
        return []
    what = "index" if part is entry.parts["index"] else "annotation"
    if name != "genes" and len(values) != entry.n_obs:
        return [
            fault(
                f"An array of the {what} has another length than the study",
                path,
                f"{len(values):,}",
                f"{entry.n_obs:,} rows",
            )
        ]
    limits = {"genes": state.genes.n_vars, "batch": len(state.batches), "label": len(state.labels)}
    if name in limits and not _within(values, -1 if name != "batch" else 0, limits[name]):
        return [
            fault(
                "An array of the index has values out of range",
                path,
                f"{values.min()} to {values.max()}",
                f"below {limits[name]}",
            )
        ]
    if name == "row_hash" and (values[1:] < values[:-1]).any():
        return [fault("The hashes of the rows do not rise", path)]
    if name == "input_position" and not np.array_equal(np.sort(values), np.arange(len(values))):
        return [fault("The input positions are no permutation of the rows", path)]
    return []


def _within(values: npt.NDArray[Any], low: int, high: int) -> bool:
    return not len(values) or bool(values.min() >= low and values.max() < high)
