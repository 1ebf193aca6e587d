"""A projection is the selection that it was made of: the same rows and fingerprint, or an error."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import filelock
import numpy as np
import pytest
import scipy.sparse as sp
import zarr
from anndata import AnnData

import atlas
from atlas import files
from atlas.cli import main
from atlas.codecs import fused
from atlas.errors import (
    ConfigError,
    CorruptStoreError,
    FormatError,
    LockedError,
    NotAStoreError,
    StoreError,
)
from atlas.store import CountStore, Projection, create_store, open_projection, open_store
from atlas.store import projection_writer as writing
from atlas.store.layout import Layout
from atlas.store.packed_matrix import PackedMatrix
from loaders import LoaderError, MinibatchLoader, RowBlock, RowSource

MakeStudy = Callable[..., AnnData]
GENES = ["gene31", "gene2", "gene17", "gene5", "gene29"]
"""In no order, and gene31 is measured in one study only."""


@pytest.fixture
def store(tmp_path: Path, make_study: MakeStudy) -> CountStore:
    store = create_store(tmp_path / "s.atlas")
    store.append(make_study(n=120), study="one", batch_key="batch", label_key="cell_type")
    genes = [f"gene{i}" for i in range(40, 0, -1)]
    store.append(make_study(n=90, genes=genes, prefix="o", seed=2), study="two", batch_key="batch")
    store.append(make_study(n=1, prefix="p", seed=3), study="three")
    return store


@pytest.fixture(params=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, shards and blocks as they are, and so small that there are many."""
    if request.param == "pieces":
        monkeypatch.setattr(writing, "CHUNK", 16)
        monkeypatch.setattr(writing, "SHARD", 64)
        monkeypatch.setattr(writing, "_BLOCK", 200)


def _matrix(block: RowBlock, n_vars: int) -> np.ndarray:
    shape = (block.n_rows, n_vars)
    return sp.csr_matrix((block.data, block.indices, block.indptr), shape).toarray()


def _content(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "writer.lock"
    }


def _same(projection: Projection, store: CountStore, genes: list[str]) -> None:
    view = store.select(genes)
    assert isinstance(projection, RowSource)
    for name in ("n_obs", "n_vars", "segments", "fingerprint", "narrow"):
        assert getattr(projection, name) == getattr(view, name), name
    np.testing.assert_array_equal(projection.presence, view.presence)
    assert projection.obs_codes.keys() == view.obs_codes.keys()
    for name, codes in view.obs_codes.items():
        np.testing.assert_array_equal(projection.obs_codes[name], codes)
    for a, b in zip(view.segments[:-1], view.segments[1:], strict=True):
        for start, stop in ((a, b), (a, a), (a, a + 1), (b - 1, b), ((a + b) // 2, b)):
            mine, theirs = projection.read_rows(start, stop), view.read_rows(start, stop)
            np.testing.assert_array_equal(_matrix(mine, view.n_vars), _matrix(theirs, view.n_vars))
            assert mine.narrow == theirs.narrow
            for i in range(stop - start):
                row = mine.indices[mine.indptr[i] : mine.indptr[i + 1]].astype(int)
                assert (np.diff(row) > 0).all()
            counted = projection.count_values(np.array([start]), np.array([stop]))
            assert list(counted) == [len(mine.data)]


@pytest.mark.usefixtures("pieces")
def test_it_is_the_selection(store: CountStore, tmp_path: Path) -> None:
    projection = atlas.project(store, GENES, tmp_path / "p")
    _same(projection, store, GENES)
    _same(open_projection(tmp_path / "p", store), store, GENES)
    _same(open_projection(tmp_path / "p", open_store(store.path)), store, GENES)
    assert "from a projection of 5 genes" in projection.reading
    assert ("in one compiled call" in projection.reading) == fused.AVAILABLE
    with pytest.raises(IndexError, match="do not lie in one study"):
        projection.read_rows(119, 121)
    assert not list((tmp_path / "p").glob("begun*"))
    assert projection.nnz == sum(
        len(projection.read_rows(a, b).data) for a, b in ((0, 120), (120, 210), (210, 211))
    )


@pytest.mark.usefixtures("pieces")
def test_all_genes_and_wide_counts(
    store: CountStore, make_study: MakeStudy, tmp_path: Path
) -> None:
    adata = make_study(n=50, prefix="w")
    adata.X.data[3] = 70_000
    store.append(adata, study="wide")
    genes = list(store.var.index)
    projection = atlas.project(store, genes, tmp_path / "p", threads=1)
    assert not projection.narrow
    _same(projection, store, genes)


def test_records_are_as_documented_in_plain_zarr(store: CountStore, tmp_path: Path) -> None:
    projection = atlas.project(store, GENES, tmp_path / "p")
    for i, (start, stop) in enumerate(((0, 120), (120, 210), (210, 211))):
        group = zarr.open_group(tmp_path / "p" / f"{i:04d}", mode="r")
        indptr, offsets, records = (group[a][:] for a in ("indptr", "offsets", "records"))
        assert (np.diff(offsets) == 2 * np.diff(indptr)).all()  # small counts: no high bytes
        assert records.dtype == np.uint8
        matrix = np.zeros(group.attrs["shape"])
        for row, (at, n) in enumerate(zip(offsets, np.diff(indptr), strict=False)):
            matrix[row, np.cumsum(records[at : at + n])] = records[at + n : at + 2 * n]
        np.testing.assert_array_equal(matrix, _matrix(projection.read_rows(start, stop), 5))


class Framed(Layout):
    """Not compressed, but in Blosc's frames, as the first version of the format had it."""

    @property
    def _blosc(self) -> tuple[str, int]:
        return "lz4", 0

    def create(
        self, group: zarr.Group, name: str, n: int, shards: Path | None = None
    ) -> zarr.Array[Any]:
        return super().create(group, name, n)


def write_first_version(patch: pytest.MonkeyPatch) -> None:
    """Have projections written as by the first version of the format: CSR in frames."""

    def framed(*arguments: Any, compressed: bool = True) -> Layout:
        return (
            Layout(*arguments) if compressed else Framed(arguments[0], "portable", *arguments[2:])
        )

    patch.setattr(writing, "_packs", lambda *types: False)
    patch.setattr(writing, "VERSION", 1)
    patch.setattr(writing, "Layout", framed)


@pytest.fixture
def first_version(monkeypatch: pytest.MonkeyPatch) -> None:
    write_first_version(monkeypatch)


@pytest.mark.usefixtures("first_version")
def test_the_first_version_is_read_and_other_readers_understand_it(
    store: CountStore, tmp_path: Path
) -> None:
    projection = atlas.project(store, GENES, tmp_path / "p")
    _same(projection, store, GENES)
    for name in ("data", "indices"):
        meta = json.loads((tmp_path / "p/0000" / name / "zarr.json").read_bytes())
        inner = meta["codecs"][0]["configuration"]["codecs"]
        assert [c["name"] for c in inner] == ["bytes", "blosc", "crc32c"]
    record = json.loads((tmp_path / "p/projection.json").read_bytes())
    assert record["version"] == 1
    one = tmp_path / "p/0000"
    small = [one / "zarr.json", one / "indptr", one / "data/zarr.json", one / "indices/zarr.json"]
    assert record["matrices"][0]["digest"] == files.digest_tree(small, one)
    for i, (start, stop) in enumerate(((0, 120), (120, 210), (210, 211))):
        group = zarr.open_group(tmp_path / "p" / f"{i:04d}", mode="r")
        theirs = anndata.io.read_elem(group)
        np.testing.assert_array_equal(
            theirs.toarray(), _matrix(projection.read_rows(start, stop), 5)
        )
        assert theirs.indices.dtype == theirs.data.dtype == np.uint16


def test_one_that_an_earlier_version_began_is_gone_on_with(
    store: CountStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writing.ProjectionWriter._study

    def interrupt(self: writing.ProjectionWriter, name: str, *arguments: object) -> object:
        if name == "two":
            raise KeyboardInterrupt
        return real(self, name, *arguments)

    with monkeypatch.context() as patch:
        write_first_version(patch)
        patch.setattr(writing.ProjectionWriter, "_study", interrupt)
        with pytest.raises(KeyboardInterrupt):
            atlas.project(store, GENES, tmp_path / "p")
    _same(atlas.project(store, GENES, tmp_path / "p"), store, GENES)
    arrays = [sorted(p.name for p in (tmp_path / f"p/000{i}").iterdir()) for i in (0, 1)]
    assert [a[:2] for a in arrays] == [["data", "indices"], ["indptr", "offsets"]]


def test_one_that_a_newer_version_began_is_refused(store: CountStore, tmp_path: Path) -> None:
    atlas.project(store, GENES, tmp_path / "p")
    whole = tmp_path / "p" / "projection.json"
    record = json.loads(whole.read_bytes()) | {"version": writing.VERSION + 1}
    whole.unlink()
    (tmp_path / "p" / "begun.json").write_text(json.dumps(record))
    before = _content(tmp_path / "p")
    with pytest.raises(FormatError, match="newer format"):
        atlas.project(store, GENES, tmp_path / "p")
    assert _content(tmp_path / "p") == before


@pytest.mark.parametrize("weights", [None, [90.0, *[1.0] * 210]])
def test_a_shard_in_the_place_of_another_is_told(
    store: CountStore, tmp_path: Path, weights: list[float] | None
) -> None:
    """Its checksums hold, and its length is the same."""
    projection = atlas.project(store, GENES, tmp_path / "p")
    shards = [tmp_path / f"p/000{i}/records/c/0" for i in (0, 1)]
    assert shards[0].stat().st_size == shards[1].stat().st_size
    shards[0].write_bytes(shards[1].read_bytes())
    assert isinstance(open_projection(tmp_path / "p", store), Projection)
    with pytest.raises(CorruptStoreError, match=r"(?s)projection.*write it again"):
        projection.read_rows(0, 120)
    with pytest.raises(CorruptStoreError, match=r"(?s)projection.*write it again"):
        list(MinibatchLoader(projection, 16, weights=weights))


def test_records_that_do_not_fit_their_pointers_are_told(store: CountStore, tmp_path: Path) -> None:
    """They are unpacked by address: with nothing looked at the process would crash."""
    projection = atlas.project(store, GENES, tmp_path / "p")
    counts = projection._counts[0]
    assert isinstance(counts, PackedMatrix)
    offsets = counts._offsets.copy()
    offsets[1:-1] += 1
    counts.__dict__["_offsets"] = offsets
    with pytest.raises(CorruptStoreError, match=r"(?s)do not fit.*write it again"):
        projection.read_rows(0, 120)
    with pytest.raises(LoaderError, match="records that do not fit"):
        list(MinibatchLoader(projection, 16))


def test_a_loader_goes_on_from_either(store: CountStore, tmp_path: Path) -> None:
    projection = atlas.project(store, GENES, tmp_path / "p")
    view = store.select(GENES)
    first, second = MinibatchLoader(view, 32, seed=1), MinibatchLoader(projection, 32, seed=1)
    expected = [(m.rows, m.to_scipy().toarray()) for m in MinibatchLoader(view, 32, seed=1)]
    seen = 0
    for step, minibatch in enumerate(first):
        np.testing.assert_array_equal(minibatch.rows, expected[step][0])
        seen += 1
        if seen == 3:
            state = first.state_dict()
            break
    second.load_state_dict(state)
    for step, minibatch in enumerate(second, start=3):
        np.testing.assert_array_equal(minibatch.rows, expected[step][0])
        np.testing.assert_array_equal(minibatch.to_scipy().toarray(), expected[step][1])
        seen += 1
    assert seen == len(expected)


class FailingWrites:
    """Lets n writes pass; the next one fails as a full disk does, half written."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.real = files.write_bytes

    def __call__(self, path: Path, data: bytes, *, exclusive: bool = False) -> None:
        self.left -= 1
        if self.left < 0:
            self.real(path, bytes(data)[: len(data) // 2], exclusive=exclusive)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        self.real(path, data, exclusive=exclusive)


def test_half_of_one_is_never_taken_for_a_whole_one(
    store: CountStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at every write in turn; the next call makes the same of what is left."""
    expected = _content(atlas.project(store, GENES, tmp_path / "expected").path)
    n, folder = 0, tmp_path / "p"
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_bytes", FailingWrites(n))
            try:
                atlas.project(store, GENES, folder)
                break
            except StoreError as error:
                message = str(error)
        assert "No space left on device" in message
        with pytest.raises(StoreError, match="not whole" if n else "no projection here"):
            open_projection(folder, store)
        atlas.project(store, GENES, folder)
        assert _content(folder) == expected, f"write {n} failed"
        n += 1
    assert n > 20
    assert _content(folder) == expected


def test_studies_that_are_whole_are_not_written_again(
    store: CountStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "p"
    real, read = writing._select, []

    def interrupt(*arguments: object) -> object:
        if len(read) == 1:
            raise KeyboardInterrupt
        read.append(1)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_select", interrupt)
        with pytest.raises(KeyboardInterrupt):
            atlas.project(store, GENES, folder, threads=1)
    first = (folder / "0000/study.json").stat().st_mtime_ns
    assert not (folder / "0001/study.json").exists()
    atlas.project(store, GENES, folder)
    assert (folder / "0000/study.json").stat().st_mtime_ns == first
    whole = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    _same(atlas.project(store, GENES, folder), store, GENES)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == whole


_PROJECT = """
import sys
from atlas.store import open_store, projection_writer
from atlas.store.projection import write_projection
real = projection_writer._MatrixWriter.close
def close(self):
    print("go", flush=True)
    sys.stdin.readline()
    return real(self)
projection_writer._MatrixWriter.close = close
write_projection(open_store(sys.argv[1]), sys.argv[3:], sys.argv[2])
"""


def test_a_kill_leaves_what_the_next_call_goes_on_with(store: CountStore, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _PROJECT, str(store.path), str(folder), *GENES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"go\n"
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"go\n"  # the first study is whole, the second is not
    with pytest.raises(LockedError, match="Another process is writing"):
        atlas.project(store, GENES, folder)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    with pytest.raises(StoreError, match=r"(?s)not whole.*goes on where it was"):
        open_projection(folder, store)
    assert (folder / "0000/study.json").exists()
    _same(atlas.project(store, GENES, folder), store, GENES)


def test_another_one_is_refused_showing_both_sides(
    store: CountStore, make_study: MakeStudy, tmp_path: Path
) -> None:
    folder = tmp_path / "p"
    atlas.project(store, GENES, folder)
    with pytest.raises(
        StoreError, match=r"(?s)another projection here.*found: 5 genes, e.g. gene31.*: 2 genes"
    ):
        atlas.project(store, GENES[:2], folder)
    with pytest.raises(StoreError, match="another projection"):
        atlas.project(store, GENES[::-1], folder)
    old = open_store(store.path)
    store.append(make_study(prefix="more"), study="four")
    with pytest.raises(
        StoreError,
        match=r"(?s)another state.*found: 211 cells of one, two, three, f.*: 271 cells of one, two,"
        r" three, four",
    ):
        open_projection(folder, store)
    with pytest.raises(StoreError, match="another projection here"):
        atlas.project(store, GENES, folder)
    _same(open_projection(folder, old), old, GENES)
    strangers = create_store(tmp_path / "t.atlas")
    strangers.append(make_study(genes=["A", "gene2"]), study="one")
    with pytest.raises(StoreError, match=r"another store(?s:.*)4 genes that are not here"):
        open_projection(folder, strangers)


def test_folders_that_hold_something_else(store: CountStore, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match=r"cannot be written here\n  found: thesis.txt"):
        atlas.project(store, GENES, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"cannot be written here\n  found: a file"):
        atlas.project(store, GENES, tmp_path / "file")
    with pytest.raises(StoreError, match="no projection here"):
        open_projection(tmp_path / "nowhere", store)
    with pytest.raises(StoreError, match="cannot be selected"):
        atlas.project(store, ["nope"], tmp_path / "p")
    with pytest.raises(ConfigError, match="No genes are chosen"):
        atlas.project(store, None, tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "file",
    [
        "0001/records/c/0",
        "0000/offsets/c/0",
        "0001/indptr/c/0",
        "0002/records/zarr.json",
        "0003/data/c/0",
        "0003/indices/c/0",
    ],
)
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove"])
def test_damage_is_an_error_when_opened_or_read(
    store: CountStore, make_study: MakeStudy, tmp_path: Path, file: str, fault: str
) -> None:
    wide = make_study(n=20, prefix="w")
    wide.X.data[:] += 70_000
    store.append(wide, study="wide")
    folder = tmp_path / "p"
    atlas.project(store, GENES, folder)
    path = folder / file
    content = bytearray(path.read_bytes())
    if fault == "remove":
        path.unlink()
    elif fault == "truncate":
        path.write_bytes(content[:-3])
    else:
        content[10] ^= 1
        path.write_bytes(content)

    def read() -> None:
        projection = open_projection(folder, store)
        for start, stop in ((0, 120), (120, 210), (210, 211), (211, 231)):
            projection.read_rows(start, stop)

    with pytest.raises(CorruptStoreError, match=rf"(?s)path: .*{file[:4]}"):
        read()


def test_its_description_is_checked(store: CountStore, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    atlas.project(store, GENES, folder)
    path = folder / "projection.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "version": 3}))
    with pytest.raises(FormatError, match=r"(?s)format version 3.*at most 2"):
        open_projection(folder, store)
    path.write_text(json.dumps({**values, "genes": []}))
    with pytest.raises(CorruptStoreError, match="does not follow its schema"):
        open_projection(folder, store)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(CorruptStoreError, match="not JSON"):
        open_projection(folder, store)


def test_one_writer_at_a_time(store: CountStore, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    with (
        filelock.FileLock(tmp_path / "p/writer.lock"),
        pytest.raises(LockedError, match="Another process is writing this projection"),
    ):
        atlas.project(store, GENES, tmp_path / "p")


def test_the_command(store: CountStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p"
    (tmp_path / "genes.txt").write_text("\n".join(GENES))
    command = ["project", str(store.path), "--out", str(out)]
    assert main(command) == 2
    assert "No genes are chosen" in capsys.readouterr().err
    assert main([*command, "--genes", str(tmp_path / "genes.txt")]) == 0
    captured = capsys.readouterr()
    assert "211 cells × 5 genes" in captured.out
    assert "project: 100%" in captured.err
    _same(open_projection(out, store), store, GENES)
    store.record_genes(["gene1", "gene2"], "seurat_v3", 2)
    assert main(["project", str(store.path), "--out", str(tmp_path / "q")]) == 0
    _same(open_projection(tmp_path / "q", store), store, ["gene1", "gene2"])


def test_a_projection_is_not_taken_for_a_store(store: CountStore, tmp_path: Path) -> None:
    atlas.project(store, GENES, tmp_path / "projected")
    with pytest.raises(NotAStoreError, match="a projection of a store, not a store"):
        open_store(tmp_path / "projected")


def test_sources_go_to_another_process(store: CountStore, tmp_path: Path) -> None:
    sources = [store, store.select(GENES), atlas.project(store, GENES, tmp_path / "projected")]
    for source in sources:
        source.read_rows(0, 5)  # with files open
        copy = pickle.loads(pickle.dumps(source))
        assert copy.fingerprint == source.fingerprint
        assert {k: v.tolist() for k, v in copy.obs_codes.items()} == {
            k: v.tolist() for k, v in source.obs_codes.items()
        }
        for mine, theirs in zip(
            MinibatchLoader(source, 50), MinibatchLoader(copy, 50), strict=True
        ):
            assert (mine.to_scipy() != theirs.to_scipy()).nnz == 0


def test_the_same_genes_chosen_again_add_no_state(store: CountStore) -> None:
    store.record_genes(["gene1", "gene2"], "seurat_v3", 2)
    number, stale = store.manifest.number, open_store(store.path)
    store.record_genes(["gene1", "gene2"], "seurat_v3", 2)
    assert store.manifest.number == open_store(store.path).manifest.number == number
    store.record_genes(["gene3"], "seurat_v3", 1)
    stale.record_genes(["gene1", "gene2"], "seurat_v3", 2)  # others chose in between
    assert open_store(store.path).genes == ("gene1", "gene2")
