"""Every kind of fault is found, all of them in one go, each with its file, its study and a cure."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import anndata
import google_crc32c
import numpy as np
import pytest
import zarr
from anndata import AnnData

import atlas
from atlas.cli import main
from atlas.codecs import chunks, recipe
from atlas.errors import CorruptStoreError, NotAStoreError
from atlas.store import CountStore, create_store, layout, open_store
from atlas.store import findings as all_findings
from atlas.store.findings import VerifyReport

MakeStudy = Callable[..., AnnData]


@pytest.fixture
def store(tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> CountStore:
    """Two studies in shards of several chunks, with a layer, an embedding, and a replaced one."""
    monkeypatch.setattr(layout, "CHUNK", 128)
    monkeypatch.setattr(layout, "SHARD", 512)
    store = create_store(tmp_path / "s.atlas")
    first = make_study(n=120)
    first.layers["spliced"] = first.X * 0.5
    first.write_h5ad(tmp_path / "one.h5ad")
    store.append(tmp_path / "one.h5ad", study="one", batch_key="batch", keep_layers=["spliced"])
    store.append(make_study(n=80, prefix="o", genes=40), study="two", profile="small")
    store.write_embedding("z", np.zeros((200, 2), np.float32), {})
    store.write_embedding("z", np.ones((200, 2), np.float32), {})
    return store


def _flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _named(report: VerifyReport, root: Path) -> set[tuple[str | None, str]]:
    return {(f.study, Path(f.path).relative_to(root).as_posix()) for f in report.findings}


def test_an_intact_store_is_whole_and_zarr_reads_it(store: CountStore) -> None:
    report = atlas.verify(store.path)
    assert report.whole
    assert report.findings == ()
    assert (report.manifest, report.states, report.studies) == (5, 5, 2)
    shards = [p for p in store.path.rglob("c/*") if p.parts[-4] in ("X", "spliced")]
    assert report.bytes == sum(p.stat().st_size for p in shards)
    n_chunks = 0
    for meta in store.path.rglob("zarr.json"):
        if meta.parent.name in ("indptr", "indices", "data"):
            n_chunks += -(-zarr.open_array(meta.parent, mode="r").shape[0] // 128)
    assert report.chunks == n_chunks > 20
    assert store.verify().chunks == n_chunks
    for name, n in (("one", 120), ("two", 80)):
        assert anndata.io.read_zarr(store.path / "studies" / name).n_obs == n


@pytest.mark.parametrize("study", ["one", "two"])
@pytest.mark.parametrize("array", ["indices", "data", "indptr"])
@pytest.mark.parametrize("fault", ["flip", "index", "truncate", "remove"])
def test_a_damaged_shard_is_named(store: CountStore, study: str, array: str, fault: str) -> None:
    shard = store.path / "studies" / study / "X" / array / "c/0"
    if fault == "flip":
        _flip(shard, 20)
    elif fault == "index":
        _flip(shard, -20)
    elif fault == "truncate":
        shard.write_bytes(shard.read_bytes()[:-10])
    else:
        shard.unlink()
    named = _named(atlas.verify(store.path), store.path)
    here = shard.relative_to(store.path).as_posix()
    assert (study, here) in named
    # row pointers have a digest too; nothing else is accused
    assert named <= {(study, here), (study, str(Path(here).parents[1]))}
    with pytest.raises(CorruptStoreError, match=f"(?s)atlas drop .* {study} --purge"):
        open_store(store.path).verify()


@pytest.mark.parametrize(
    ("file", "named", "study"),
    [
        ("parts/one/index/batch.npy", "parts/one/index/batch.npy", "one"),
        ("parts/two/statistics/mean.npy", "parts/two/statistics/mean.npy", "two"),
        ("parts/one/embedding-z-000005/z.npy", "parts/one/embedding-z-000005/z.npy", "one"),
        ("parts/one/embedding-z-000004/z.npy", "parts/one/embedding-z-000004/z.npy", "one"),
        (
            "parts/.embeddings/z-000005/details.json",
            "parts/.embeddings/z-000005/details.json",
            None,
        ),
        ("genes/000001.json", "genes/000001.json", None),
        ("genes/000003.json", "genes/000003.json", None),
        ("manifests/000002.json", "manifests/000002.json", None),
        ("manifests/000005.json", "manifests/000005.json", None),
        ("studies/one/obs/score/c/0", "studies/one/obs", "one"),
        ("studies/one/layers/spliced/data/c/0", "studies/one/layers/spliced/data/c/0", "one"),
        ("studies/one/X/data/zarr.json", "studies/one", "one"),
        ("studies/two/var/zarr.json", "studies/two", "two"),
    ],
)
@pytest.mark.parametrize("fault", ["flip", "remove"])
def test_a_damaged_file_is_named(
    store: CountStore, file: str, named: str, study: str | None, fault: str
) -> None:
    path = store.path / file
    if fault == "remove" and path.parent.name == "manifests":
        path.unlink()
        assert not atlas.verify(store.path).findings  # a state that was given up is no fault
        return
    if fault == "remove":
        path.unlink()
    else:
        _flip(path, 0)
    report = atlas.verify(store.path)
    assert (study, named) in _named(report, store.path)
    assert {f.study for f in report.findings} == {study}
    assert all(f.do for f in report.findings)


def test_what_to_do_depends_on_what_is_broken(store: CountStore) -> None:
    def advice(file: str) -> str:
        path = store.path / file
        content = path.read_bytes()
        _flip(path, 0)
        (finding,) = atlas.verify(store.path).findings
        path.write_bytes(content)
        return finding.do

    here = store.path
    source = here.parent / "one.h5ad"
    assert advice("parts/one/index/label.npy").endswith(
        f"atlas drop {here} one --purge && atlas ingest {here} {source} --study one"
    )
    assert "AnnData in memory" in advice("parts/two/index/label.npy")
    assert f"atlas embed RUN {here} --name z" in advice("parts/two/embedding-z-000005/z.npy")
    assert advice("parts/two/embedding-z-000004/z.npy").endswith(
        f"rm {here / 'manifests/000004.json'}"
    )
    assert f"rm {here / 'manifests/000005.json'}" in advice("manifests/000005.json")
    assert "all studies need it" in advice("genes/000003.json")
    manifest = here / "manifests/000002.json"
    values = json.loads(manifest.read_text())
    typed = "atlas ingest s.atlas 'my files/one.h5ad' --study one --batch-key batch"
    manifest.write_text(json.dumps({**values, "command": typed}))
    again = typed.replace("s.atlas", str(here))  # where the store is now
    assert advice("parts/one/index/label.npy").endswith(f"--purge && {again}")


def test_several_inputs_are_ingested_again_together(
    store: CountStore, make_study: MakeStudy, tmp_path: Path
) -> None:
    files = [tmp_path / "a.h5ad", tmp_path / "c.h5ad"]
    for file in files:
        make_study(prefix=file.stem).write_h5ad(file)
    store.append(files[1:], study="three")
    store.append(files, study="four")
    for study, again in (("three", "c.h5ad"), ("four", f"a.h5ad {tmp_path}/c.h5ad")):
        path = store.path / f"parts/{study}/index/label.npy"
        _flip(path, 0)
        (finding,) = (f for f in atlas.verify(store.path).findings if f.study == study)
        assert finding.do.endswith(f"ingest {store.path} {tmp_path}/{again} --study {study}")


def test_folders_that_are_gone(store: CountStore) -> None:
    shutil.rmtree(store.path / "studies" / "one")
    assert _named(atlas.verify(store.path), store.path) == {("one", "studies/one")}
    shutil.rmtree(store.path / "studies" / "two" / "X" / "indices")
    shutil.rmtree(store.path / "parts" / "two" / "statistics")
    named = _named(atlas.verify(store.path), store.path)
    assert ("one", "studies/one") in named
    assert ("two", "studies/two/X/indices/zarr.json") in named
    assert ("two", "parts/two/statistics/mean.npy") in named
    shutil.rmtree(store.path)
    with pytest.raises(NotAStoreError, match="no such folder"):
        atlas.verify(store.path)


def test_a_layer_that_is_gone_is_missed(store: CountStore) -> None:
    shutil.rmtree(store.path / "studies/one/layers/spliced")
    assert {f.study for f in atlas.verify(store.path).findings} == {"one"}


def test_all_faults_are_found_at_once_up_to_a_bound(
    store: CountStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = sorted(store.path.glob("studies/*/X/*/c/*"))
    for shard in broken:
        _flip(shard, 20)
    report = atlas.verify(store.path, threads=3)
    named = {path for _, path in _named(report, store.path)}
    assert named >= {shard.relative_to(store.path).as_posix() for shard in broken}
    assert len(broken) > 6
    monkeypatch.setattr(all_findings, "MAX_FINDINGS", 3)
    bounded = atlas.verify(store.path, threads=1)
    assert bounded.findings == report.findings[:3]
    assert bounded.unlisted == len(report.findings) - 3


@pytest.fixture
def unmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which shards are an array's own is not looked at."""
    monkeypatch.setattr(recipe, "SHARDS", "not noted")


def _rewrite(store: CountStore, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change values so that checksums hold: what a bug of a writer would leave."""
    array = zarr.open_array(store.path / "studies/one/X" / name, mode="r+")
    values = array[:]
    change(values)
    array[:] = values


@pytest.mark.usefixtures("unmarked")
@pytest.mark.parametrize("at", ["within a chunk", "between two chunks"])
def test_columns_that_fall_are_found(store: CountStore, at: str) -> None:
    indptr, _, _ = store.study("one").counts.read(0, 120)
    border = 128 * next(k for k in range(1, 99) if 128 * k not in indptr)
    element = border
    if at == "within a chunk":
        element = next(i for i in range(1, 128) if i not in indptr)

    def repeat(values: np.ndarray) -> None:
        values[element] = values[element - 1]
        for i in range(element + 1, int(indptr[np.searchsorted(indptr, element, "right")])):
            values[i] = max(values[i], values[i - 1] + 1)

    _rewrite(store, "indices", repeat)
    report = atlas.verify(store.path)
    (finding,) = report.findings
    row = int(np.searchsorted(indptr, element, side="right")) - 1
    assert finding.what == "The columns of a row do not rise, or one comes twice"
    assert finding.found is not None
    assert finding.found.startswith(f"element {element:,}, row {row:,} in chunk {element // 128}")
    assert finding.study == "one"


@pytest.mark.usefixtures("unmarked")
def test_values_that_cannot_be_are_found(store: CountStore) -> None:
    nnz = len(store.study("one").counts.read(0, 120)[1])

    def too_far(values: np.ndarray) -> None:
        values[nnz - 1] = 30

    def zero(values: np.ndarray) -> None:
        values[200] = 0

    _rewrite(store, "indices", too_far)
    _rewrite(store, "data", zero)
    found = {f.what: f for f in atlas.verify(store.path).findings}
    assert set(found) == {"A column index is out of range", "A stored count is zero"}
    assert f"30 at element {nnz - 1:,}" in str(found["A column index is out of range"].found)
    assert found["A column index is out of range"].expected == "below 30"
    assert "element 200 in chunk 1" in str(found["A stored count is zero"].found)


def test_counts_of_the_manifest_are_compared(store: CountStore) -> None:
    path = store.path / "manifests/000005.json"
    values = json.loads(path.read_text())
    values["studies"][0]["n_obs"] += 1
    values["studies"][1]["nnz"] -= 2
    values["batches"] = values["batches"][:1]
    path.write_text(json.dumps(values))
    named = {(f.study, f.what) for f in atlas.verify(store.path).findings}
    assert named >= {
        ("one", "obs has another number of rows than the manifest says"),
        ("one", "X has another number of rows than the manifest says"),
        ("one", "The row pointers are not as many as the rows"),
        ("one", "An array of the index has another length than the study"),
        ("one", "The embedding 'z' does not fit its study"),
        ("two", "An array has another length than the rows need"),
        ("two", "The row pointers end elsewhere than the manifest says"),
        ("two", "An array of the index has values out of range"),
    }


def test_bytes_that_pass_the_checksum_and_cannot_be_decoded(store: CountStore) -> None:
    shard = store.path / "studies/one/X/data/c/0"
    content = bytearray(shard.read_bytes())
    index = np.frombuffer(content[-(4 * 16 + 4) : -4], "<u8").reshape(-1, 2)
    offset, length = map(int, index[0])
    content[offset : offset + 4] = b"\xff" * 4
    body = bytes(content[offset : offset + length - 4])
    content[offset + length - 4 : offset + length] = google_crc32c.value(body).to_bytes(4, "little")
    shard.write_bytes(content)
    findings = atlas.verify(store.path).findings
    assert findings
    assert {f.study for f in findings} == {"one"}
    assert all("X/data" in f.path for f in findings)


def test_the_command_prints_and_leaves_with_1(
    store: CountStore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    assert main(["verify", str(store.path), "--json", str(report)]) == 0
    captured = capsys.readouterr()
    assert "whole (5 states, 2 studies" in captured.out
    assert "chunks" in captured.err
    assert json.loads(report.read_text())["whole"] is True
    shard = store.path / "studies/two/X/data/c/0"
    shard.unlink()
    assert main(["verify", str(store.path), "--json", str(report), "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert f"{shard}: A shard of the store is missing\n  study: two\n" in out
    assert "  what to do: restore it from a copy" in out
    assert "1 faults" in out
    (finding,) = json.loads(report.read_text())["findings"]
    assert (finding["study"], finding["path"]) == ("two", str(shard))
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert main(["verify", str(store.path), "--threads", "0"]) == 2


_VERIFY = """
import sys, threading
from atlas.codecs import chunks
from atlas.cli import main
real = chunks.ChunkedArray.read
first = threading.Event()
def read(self, start, stop):
    if not first.is_set():
        first.set()
        print("go", flush=True)
    threading.Event().wait(0.05)
    return real(self, start, stop)
chunks.ChunkedArray.read = read
sys.exit(main(["verify", sys.argv[1]]))
"""


def test_it_can_be_interrupted(store: CountStore) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _VERIFY, str(store.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"
    os.kill(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert b"interrupted" in errors
    assert b"whole" not in out


def test_no_more_than_a_few_chunks_are_held(
    store: CountStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lock, inside, most, longest = chunks.ChunkedArray.read, threading.Lock(), 0, 0, 0

    def read(self: chunks.ChunkedArray, start: int, stop: int) -> np.ndarray:
        nonlocal inside, most, longest
        with lock:
            inside += 1
            most = max(most, inside)
            if self.path.name != "indptr":
                longest = max(longest, stop - start)
        try:
            return real(self, start, stop)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(chunks.ChunkedArray, "read", read)
    assert atlas.verify(store.path, threads=2).whole
    assert longest == 128
    assert most <= 3  # two threads, and the row pointers of the next matrix
