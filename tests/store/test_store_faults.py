"""Whatever breaks, a store is as it was: full disks, kills, flipped bits, two writers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData

from atlas import files
from atlas.errors import (
    CorruptStoreError,
    FormatError,
    LockedError,
    NotAStoreError,
    StoreError,
)
from atlas.store import CountStore, create_store, embeddings, open_store, to_anndata
from atlas.store import manifest as manifests

MakeStudy = Callable[..., AnnData]


def _content(root: Path) -> dict[str, bytes]:
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and not p.name.startswith("writer.")
    }


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


@pytest.fixture
def store(tmp_path: Path, make_study: MakeStudy) -> CountStore:
    store = create_store(tmp_path / "s.atlas")
    store.append(make_study(), study="one", batch_key="batch", label_key="cell_type")
    return store


@pytest.mark.parametrize(
    ("step", "stride"),
    [
        ("append", 7),
        pytest.param("append", 1, marks=pytest.mark.long),
        ("embed", 1),
        ("genes", 1),
    ],
)
def test_a_full_disk_at_any_write_leaves_the_store_as_it_was(
    store: CountStore,
    make_study: MakeStudy,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    stride: int,
) -> None:
    """A stride of 1 lets each write of the step fail in turn, a larger one every so many."""
    second = make_study(prefix="other", genes=40)

    def run(at: CountStore) -> None:
        if step == "append":
            at.append(second, study="two", batch_key="batch", label_key="cell_type")
        elif step == "embed":
            at.write_embedding("z", np.zeros((60, 2), np.float32), {"made": "by hand"})
        else:
            at.record_genes(["gene1"], "seurat_v3", 1)

    before = _content(store.path)
    n = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_bytes", FailingWrites(n))
            try:
                run(store)
                break
            except StoreError as error:
                message = str(error)
        assert "the store is as it was\n  found: [Errno 28] No space left" in message
        assert _content(store.path) == before, f"write {n} failed"
        n += stride
    assert n >= {"append": 30, "embed": 3, "genes": 1}[step]
    open_store(store.path).verify()
    assert open_store(store.path).manifest.number == 3


_APPEND = """
import sys
import numpy as np
from anndata import AnnData
from atlas.store import open_store
store = open_store(sys.argv[1])
adata = AnnData(np.random.default_rng(0).poisson(1, (4000, 300)).astype(np.float32))
adata.obs_names = [f"c{i}" for i in range(4000)]
adata.var_names = [f"gene{i}" for i in range(300)]
print("go", flush=True)
store.append(adata, study="two")
"""


@pytest.mark.long
def test_a_killed_append_leaves_a_store_that_opens_and_verifies(
    store: CountStore, make_study: MakeStudy
) -> None:
    rng = np.random.default_rng(0)
    killed = 0
    # The shortest first: an append that ends leaves nothing to kill.
    for delay in [*sorted(rng.uniform(0, 0.6, 8)), 60]:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _APPEND, str(store.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        try:
            _, errors = process.communicate(timeout=delay)
            assert process.returncode == 0, errors.decode()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
        now = open_store(store.path)
        now.verify()
        if now.studies == ("one", "two"):
            break
        assert now.studies == ("one",)
    assert killed >= 3
    assert now.studies == ("one", "two")
    assert now.n_obs == 4060
    # One that is killed after it was published may leave scratch, which the next writer removes.
    now.append(make_study(prefix="third", n=5), study="three")
    assert not list(store.path.glob("scratch"))
    assert not list(store.path.rglob("*.partial"))


def test_what_a_crash_left_is_removed_by_the_next_writer(
    store: CountStore, make_study: MakeStudy
) -> None:
    root = store.path
    shutil.copytree(root / "studies" / "one", root / "studies" / "two")
    shutil.copytree(root / "parts" / "one", root / "parts" / "two")
    (root / "genes" / "000003.json").write_text("{")
    (root / "manifests" / ".000003.json.1.partial").write_text("{")
    (root / "scratch").mkdir()
    open_store(root).verify()
    store.append(make_study(prefix="other", n=5), study="two")
    assert store.n_obs == 65
    assert not (root / "scratch").exists()
    assert not list((root / "manifests").glob(".*"))
    store.verify()


def test_a_second_writer_is_told_who_the_first_is(store: CountStore, make_study: MakeStudy) -> None:
    with manifests.writer(store.path, "append something"):
        process = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _APPEND, str(store.path)],
            capture_output=True,
            text=True,
        )
        assert "LockedError" in process.stderr
        assert f"process {os.getpid()} on " in process.stderr
        assert "append something" in process.stderr
        with pytest.raises(LockedError, match=f"process {os.getpid()}"):
            store.append(make_study(), study="two")
        assert open_store(store.path).n_obs == 60  # readers are not affected
    store.append(make_study(prefix="o"), study="two")


def test_an_interrupt_leaves_nothing_behind(
    store: CountStore, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _content(store.path)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("atlas.store.study_writer.statistics_of_sums", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.append(make_study(), study="two")
    assert _content(store.path) == before


@pytest.mark.parametrize("profile", ["fast", "portable", "small"])
@pytest.mark.parametrize("array", ["indices", "data", "indptr"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove", "absent chunk"])
def test_a_damaged_shard_is_an_error_when_read(
    tmp_path: Path, make_study: MakeStudy, profile: str, array: str, fault: str
) -> None:
    store = create_store(tmp_path / "s.atlas")
    store.append(make_study(), study="one", profile=profile)
    shard = tmp_path / "s.atlas/studies/one/X" / array / "c/0"
    content = bytearray(shard.read_bytes())
    if fault == "flip":
        content[20] ^= 1
        shard.write_bytes(content)
    elif fault == "truncate":
        shard.write_bytes(content[:-10])
    elif fault == "remove":
        shard.unlink()
    else:  # the shard's index says that the chunk was never written, which Zarr reads as zeros
        import google_crc32c

        index = bytearray(content[-(64 * 16 + 4) : -4])
        index[:16] = b"\xff" * 16
        content[-(64 * 16 + 4) : -4] = index
        content[-4:] = google_crc32c.value(bytes(index)).to_bytes(4, "little")
        shard.write_bytes(content)
    with pytest.raises(CorruptStoreError, match=r"(?s)what to do: restore.*path: .*c/0"):
        open_store(store.path).read_rows(0, 60)
    with pytest.raises(CorruptStoreError):
        open_store(store.path).verify()


def test_every_other_file_is_covered_by_a_digest(store: CountStore) -> None:
    store.write_embedding("z", np.zeros((60, 2), np.float32), {})
    spared = {"manifests", "writer.lock"}
    damaged = 0
    for path in sorted(p for p in store.path.rglob("*") if p.is_file()):
        where = path.relative_to(store.path)
        if where.parts[0] in spared or where.as_posix() == "genes/000001.json":
            continue
        content = path.read_bytes()
        for change in (content[:-1] + bytes([content[-1] ^ 1]), None):
            if change is None:
                path.unlink()
            else:
                path.write_bytes(change)
            with pytest.raises((CorruptStoreError, FormatError)):
                open_store(store.path).verify()
            path.write_bytes(content)
        damaged += 1
    assert damaged > 40
    open_store(store.path).verify()


def test_folders_that_are_no_stores(tmp_path: Path, store: CountStore) -> None:
    with pytest.raises(NotAStoreError, match=r"found: no such folder\n.*\n  path: .*nowhere"):
        open_store(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAStoreError, match="a folder without manifests"):
        open_store(tmp_path / "empty")
    newest = manifests.manifest_path(store.path, 2)
    values = json.loads(newest.read_text())
    newest.write_text(json.dumps({**values, "version": 3, "shape": "new"}))
    with pytest.raises(FormatError, match=r"newer format\n  found: format version 3"):
        open_store(store.path)
    newest.write_text(json.dumps({**values, "studies": [{"name": 3}]}))
    with pytest.raises(CorruptStoreError, match=r"schema\n  found: \$\.studies\[0\]"):
        open_store(store.path)
    newest.write_text(json.dumps(values)[:-30])
    with pytest.raises(CorruptStoreError, match="not JSON"):
        open_store(store.path)
    assert open_store(store.path, number=1).n_obs == 0


def test_a_large_embedding_is_mapped_from_a_file(
    store: CountStore, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append(make_study(prefix="o"), study="two")
    z = np.random.default_rng(0).normal(size=(store.n_obs, 3)).astype(np.float32)
    store.write_embedding("scvi", z, {})
    monkeypatch.setattr(embeddings, "IN_MEMORY", 0)
    mapped = store.embedding("scvi")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, z)


def test_embeddings_keep_their_history_and_say_when_they_are_old(
    store: CountStore, make_study: MakeStudy
) -> None:
    z = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    store.write_embedding("scvi", z, {"epochs": 3})
    old = open_store(store.path)
    store.write_embedding("scvi", z + 1, {"epochs": 4})
    np.testing.assert_array_equal(old.embedding("scvi"), z)
    np.testing.assert_array_equal(store.embedding("scvi"), z + 1)
    assert (old.embedding_details("scvi"), store.embedding_details("scvi")) == (
        {"epochs": 3},
        {"epochs": 4},
    )
    export = to_anndata(store, embedding="scvi", order="input")
    position = store.index_array("input_position")
    np.testing.assert_array_equal(export.obsm["X_scvi"][position], z + 1)
    store.append(make_study(prefix="o"), study="two")
    with pytest.raises(
        StoreError, match=r"does not cover study 'two'(?s:.*)run `atlas embed RUN .* --name scvi`"
    ):
        store.embedding("scvi")
    with pytest.raises(
        StoreError, match=r"no such embedding\n  found: pca\n  expected: one of scvi"
    ):
        store.embedding("pca")
    with pytest.raises(StoreError, match=r"does not fit the store\n  found: shape \(60, 3\)"):
        store.write_embedding("scvi", z, {})


def test_an_embedding_that_is_not_finite_is_refused_and_leaves_nothing(
    store: CountStore, make_study: MakeStudy
) -> None:
    store.append(make_study(prefix="o"), study="two")
    z = np.zeros((120, 3), np.float32)
    store.write_embedding("z", z, {})
    number = store.manifest.number
    z[[70, 71], 1] = np.nan, np.inf
    said = r"not finite.*\n  found: 2 of 180 values, the first in row 10 of study 'two'\n"
    with pytest.raises(StoreError, match=said):
        store.write_embedding("z", z, {})
    with pytest.raises(StoreError, match=said):
        store.extend_embedding("z", "two", z[60:], {})
    assert open_store(store.path).manifest.number == number
    np.testing.assert_array_equal(store.embedding("z"), np.zeros((120, 3)))
    assert not open_store(store.path).verify().findings
