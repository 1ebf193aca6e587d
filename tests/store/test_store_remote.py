"""Stores by URL, over S3 on loopback: the same rows, whatever the server does."""

from __future__ import annotations

import http.client
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from torch.utils.data import DataLoader

import atlas
from atlas.cli import main
from atlas.codecs import remote as remotes
from atlas.errors import (
    AtlasError,
    ConfigError,
    CorruptStoreError,
    FormatError,
    NotAStoreError,
    RemoteError,
    StoreError,
)
from atlas.store import layout, write_inventory
from loaders import MinibatchLoader, TorchDataset

pytestmark = pytest.mark.timeout(200)
KEYS = {"batch_key": "batch", "label_key": "cell_type"}


@pytest.fixture(scope="module")
def local(real_data, tmp_path_factory) -> atlas.CountStore:
    """Real counts in many small shards."""
    adata = ad.read_h5ad(real_data("pbmc_4batch_3study.h5ad"))[::12, 100:700].copy()
    adata.layers["raw"] = adata.X.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK", 256)
        patch.setattr(layout, "SHARD", 4096)
        store = atlas.create_store(tmp_path_factory.mktemp("local") / "store")
        store.append(adata[:700].copy(), study="one", **KEYS, keep_layers=["raw"])
        store.append(adata[700:].copy(), study="two", **KEYS, profile="portable")
    return store


@pytest.fixture(scope="module")
def url(object_store, local) -> str:
    return object_store.upload(local.path, "atlas")


@pytest.fixture
def remote(object_store, url, tmp_path):
    """Opens the store with a cache of its own."""
    object_store.proxy.fault = lambda path, range: None
    object_store.proxy.log.clear()

    def opened(where: str = url, **options) -> atlas.CountStore:
        options = {"options": object_store.options, "cache_folder": tmp_path / "cache"} | options
        return atlas.open_store(where, **options)

    yield opened
    object_store.proxy.fault = lambda path, range: None


def matrix(store: atlas.CountStore, starts: list[int], stops: list[int]) -> np.ndarray:
    block = store.read_rows(np.array(starts), np.array(stops))
    shape = (block.n_rows, store.n_vars)
    return sp.csr_matrix((block.data, block.indices, block.indptr), shape).toarray()


def forget() -> None:
    """As a new process would."""
    remotes._remotes.clear()


def test_rows_are_those_of_the_store(object_store, local, remote, url):
    store = remote()
    assert (store.url, store.n_obs, store.fingerprint) == (url, local.n_obs, local.fingerprint)
    assert store.obs().equals(local.obs())
    assert url in repr(store)
    object_store.proxy.gets()
    some = [3, 40, 300], [17, 200, 420]
    np.testing.assert_array_equal(matrix(store, *some), matrix(local, *some))
    asked = object_store.proxy.gets()
    assert all("/c/" in path and range is not None for path, range in asked)
    indptr = local.study("one").counts.indptr
    n_chunks = sum(
        2 * (int(indptr[b] - 1) // 256 - int(indptr[a]) // 256 + 1)
        for a, b in zip(*some, strict=True)
    )
    assert n_chunks > 80
    assert len(asked) < n_chunks / 2  # an index and a joined range for each shard
    np.testing.assert_array_equal(matrix(store, *some), matrix(local, *some))
    assert object_store.proxy.gets() == []
    forget()
    again = remote()
    np.testing.assert_array_equal(matrix(again, *some), matrix(local, *some))
    assert all("list-type" in path for path, _ in object_store.proxy.gets())


def test_an_epoch_is_that_of_the_store(local, remote):
    ours, theirs = (MinibatchLoader(s, 64, block_size=32, seed=3) for s in (remote(), local))
    assert "in joined ranges, through a cache of 10 GB" in ours.describe()
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(found.rows, expected.rows)
        assert (found.to_scipy() != expected.to_scipy()).nnz == 0
    assert (atlas.to_anndata(remote()).X != atlas.to_anndata(local).X).nnz == 0


def test_training_is_that_of_the_store(local, remote, tmp_path):
    genes = atlas.select_genes(local, n=100, record=False)
    options = {"n_hidden": 16, "n_latent": 4, "device": "cpu", "max_epochs": 2, "genes": genes}
    ours = atlas.train(remote(), out=tmp_path / "ours", **options)
    atlas.train(local, out=tmp_path / "theirs", **options)
    weights = [
        next((tmp_path / run).rglob("weights.safetensors")).read_bytes()
        for run in ("ours", "theirs")
    ]
    assert weights[0] == weights[1]
    assert atlas.embed(ours, remote(), name=None).shape == (local.n_obs, 4)
    with pytest.raises(ConfigError, match="can only be read"):
        atlas.embed(ours, remote())


def test_errors_and_stalls_do_not_show(object_store, local, remote):
    store = remote(timeout=0.7, deadline=60)
    rng, lock, faults = np.random.default_rng(0), threading.Lock(), []

    def fault(path: str, range: str | None) -> str | None:
        with lock:
            kind = rng.choice(["500", "stall", "cut", ""], p=[0.25, 0.1, 0.15, 0.5])
            faults.append(str(kind))
        return str(kind) or None

    object_store.proxy.fault = fault
    seen = np.zeros(local.n_obs, int)
    expected = np.concatenate([matrix(local, [0], [700]), matrix(local, [700], [local.n_obs])])
    for minibatch in MinibatchLoader(store, 100, block_size=32):
        np.testing.assert_array_equal(minibatch.to_scipy().toarray(), expected[minibatch.rows])
        seen[minibatch.rows] += 1
    assert (seen == 1).all()
    assert {"500", "stall", "cut"} <= set(faults)


def test_no_answer_and_no_leave(object_store, remote):
    store = remote(timeout=0.5, deadline=1.5)
    object_store.proxy.fault = lambda path, range: "500"
    started = time.monotonic()
    with pytest.raises(RemoteError, match=r"does not answer\n  found: \d+ errors in 1.5 s"):
        store.read_rows(0, 50)
    assert time.monotonic() - started < 10
    object_store.proxy.fault = lambda path, range: "403"
    with pytest.raises(RemoteError, match=r"no leave to read(.*\n)*.*AWS_ACCESS_KEY_ID"):
        store.read_rows(0, 50)
    object_store.proxy.fault = lambda path, range: "500" if "/c/" in str(path) else None
    with pytest.raises(RemoteError, match="does not answer"):
        list(MinibatchLoader(store, 32))
    object_store.proxy.fault = lambda path, range: None
    assert store.read_rows(0, 50).n_rows == 50


def test_the_cache_keeps_to_its_bytes(local, remote, tmp_path):
    budget = 20_000
    store = remote(cache=budget)
    long_ones = ("/X/indices/c/", "/X/data/c/")
    largest = 0
    everything = [np.arange(a, b) for a, b in zip(local.segments, local.segments[1:], strict=False)]
    for rows in everything:
        for start in range(int(rows[0]), int(rows[-1]), 60):
            stop = min(start + 60, int(rows[-1]) + 1)
            np.testing.assert_array_equal(
                matrix(store, [start], [stop]), matrix(local, [start], [stop])
            )
            there = [
                p
                for p in (tmp_path / "cache").rglob("*")
                if any(part in str(p) for part in long_ones)
            ]
            largest = max(largest, sum(p.stat().st_blocks * 512 for p in there))
    whole = sum(
        p.stat().st_size for p in local.path.rglob("*") if any(part in str(p) for part in long_ones)
    )
    assert whole > 3 * budget
    # blocks of the file system, and the shards of the last read
    assert largest < 4 * budget
    remote_ = remotes.remote_of(store.path / "manifests")
    assert remote_._bytes <= budget + 20_000


def test_several_threads(local, remote):
    store = remote(cache=100_000)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 600, 200)

    def check(start: int) -> bool:
        return bool(
            (matrix(store, [start], [start + 40]) == matrix(local, [start], [start + 40])).all()
        )

    with ThreadPoolExecutor(8) as workers:
        assert all(workers.map(check, starts.tolist()))


def test_what_is_missing_changed_or_damaged(object_store, local, remote, url):
    prefix = "changing"
    where = object_store.upload(local.path, prefix)
    store = remote(where)
    shard = local.path / "studies/one/X/data/c/2"
    key = f"{prefix}/studies/one/X/data/c/2"
    object_store.delete(key)
    with pytest.raises(CorruptStoreError, match=r"missing(.*\n)*.*data/c/2"):
        store.read_rows(0, 700)
    object_store.put(key, shard.read_bytes())
    store.read_rows(0, 20)
    # a part of the shard is known, and another object takes its place
    first = int(np.searchsorted(local.study("one").counts.indptr, 2 * 4096 + 300))
    store.read_rows(first, first + 1)
    object_store.put(key, shard.read_bytes()[::-1])
    with pytest.raises(CorruptStoreError, match="changed while it was read"):
        store.read_rows(0, 700)
    object_store.put(key, shard.read_bytes())
    forget()
    store = remote(where)
    expected = matrix(local, [0], [700])
    np.testing.assert_array_equal(matrix(store, [0], [700]), expected)
    # the copy here is damaged: it is fetched again; the object is: it is an error
    copy = store.path / "studies/one/X/data/c/2"
    for at in (100, shard.stat().st_size - 10):  # in a chunk, and in the index
        data = bytearray(copy.read_bytes())
        data[at] ^= 255
        copy.write_bytes(data)
        forget()
        np.testing.assert_array_equal(matrix(remote(where), [0], [700]), expected)
    broken = bytearray(shard.read_bytes())
    broken[100] ^= 255
    object_store.put(key, bytes(broken))
    forget()
    with pytest.raises(CorruptStoreError, match="another checksum in chunk"):
        remote(where).read_rows(0, 700)


def test_a_state_that_is_new(object_store, local, remote, make_study, tmp_path):
    store = atlas.create_store(tmp_path / "grows")
    store.append(make_study(), study="one", **KEYS)
    where = object_store.upload(store.path, "grows")
    assert remote(where).studies == ("one",)
    store.append(make_study(seed=1, prefix="b"), study="two", **KEYS)
    object_store.upload(store.path, "grows")
    object_store.proxy.gets()
    assert remote(where).studies == ("one", "two")
    fetched = [path for path, _ in object_store.proxy.gets() if "list-type" not in path]
    assert not any("studies/one" in path for path in fetched)
    assert remote(where, number=2).studies == ("one",)


def test_it_is_not_written_to(local, remote, make_study):
    store = remote()
    z = np.zeros((store.n_obs, 2), np.float32)
    for work in (
        lambda: store.append(make_study(), study="three"),
        lambda: store.write_embedding("z", z, {}),
        lambda: atlas.select_genes(store, n=50),
        lambda: store.drop("one"),
    ):
        with pytest.raises(StoreError, match="by URL can only be read"):
            work()
    assert len(atlas.select_genes(store, n=50, record=False)) == 50


def test_a_web_server(object_store, local, remote, tmp_path):
    object_store.upload(local.path, "web")
    where = f"{object_store.proxy.endpoint}/atlastests/web"
    with pytest.raises(NotAStoreError, match="atlas inventory STORE"):
        remote(where, options={})
    assert main(["inventory", str(local.path)]) == 0
    try:
        object_store.put("web/files.json", (local.path / "files.json").read_bytes())
    finally:
        (local.path / "files.json").unlink()
    store = remote(where, options={})
    np.testing.assert_array_equal(matrix(store, [10], [600]), matrix(local, [10], [600]))
    # published anew with one file written again, of the same size
    manifest = max((local.path / "manifests").glob("*.json"))
    os.utime(manifest, ns=(1, 1))
    try:
        write_inventory(local.path)
        object_store.put("web/files.json", (local.path / "files.json").read_bytes())
    finally:
        (local.path / "files.json").unlink()
    object_store.proxy.gets()
    remote(where, options={})
    asked = [path.removeprefix("/atlastests/web/") for path, _ in object_store.proxy.gets()]
    assert asked == ["files.json", f"manifests/{manifest.name}"]
    object_store.put("web/files.json", b'{"format": "other"}')
    with pytest.raises(FormatError, match="list of files cannot be read"):
        remote(where, options={})


def test_google_cloud_storage(object_store, local, remote, url, monkeypatch, tmp_path):
    """By gs://, whose XML interface is that of S3 for what is used here."""
    key = tmp_path / "key.json"
    account = {"gcs_base_url": object_store.proxy.endpoint, "disable_oauth": True}
    nobody = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    key.write_text(json.dumps(account | nobody))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(key))
    store = remote(url.replace("s3://", "gs://"), options={})
    np.testing.assert_array_equal(matrix(store, [10], [600]), matrix(local, [10], [600]))


def test_objects_in_place_of_folders(object_store, local, remote):
    where = object_store.upload(local.path, "marked")
    for folder in ("", "studies/", "studies/one/", "studies/one/X/data/c/"):
        object_store.put(f"marked/{folder}", b"")
    store = remote(where)
    np.testing.assert_array_equal(matrix(store, [10], [600]), matrix(local, [10], [600]))


def test_the_proxy_does_what_it_is_told(object_store, remote):
    object_store.put("told", b"0123456789")
    where = f"{object_store.proxy.endpoint}/atlastests/told"

    def get() -> bytes:
        with urllib.request.urlopen(where, timeout=1) as answer:
            return answer.read()

    assert get() == b"0123456789"
    for fault, error in (
        ("500", urllib.error.HTTPError),
        ("403", urllib.error.HTTPError),
        ("cut", http.client.IncompleteRead),
        ("stall", TimeoutError),
    ):
        object_store.proxy.fault = lambda path, range, fault=fault: fault
        with pytest.raises(error):
            get()
    assert len(object_store.proxy.gets()) == 5


def test_other_processes(local, remote):
    store = remote()
    expected = matrix(local, [5], [25])
    np.testing.assert_array_equal(matrix(store, [5], [25]), expected)
    code = (
        "import pickle, sys; store = pickle.loads(sys.stdin.buffer.read());"
        "sys.stdout.write(str(store.read_rows(300, 360).data.sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True, check=True
    )
    assert float(done.stdout) == matrix(local, [300], [360]).sum()
    assert sum(len(minibatch["rows"]) for minibatch in _in_a_worker(store)) == local.n_obs


def _in_a_worker(store: atlas.CountStore) -> DataLoader:
    """A worker of torch's, forked after requests were made here; nothing is in its cache."""
    for path in store.path.rglob("c/*"):
        if path.parents[1].name in ("indices", "data") and path.parents[2].name == "X":
            path.unlink()
    loader = MinibatchLoader(store, 64, block_size=32)
    dataset = TorchDataset(loader)
    return DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")


@pytest.mark.timeout(100)
def test_a_helper_that_dies_is_replaced(local, remote, monkeypatch):
    from atlas.codecs import connection, fetching

    monkeypatch.setattr(connection, "_used_by", os.getpid() + 1)  # as a fork sees it
    forget()
    store = remote()
    helpers = remotes.remote_of(store.path / "x").connection._requests
    assert isinstance(helpers, fetching.Helpers)
    expected = matrix(local, [0], [700])
    np.testing.assert_array_equal(matrix(store, [0], [100]), expected[:100])
    helper = helpers._idle.get()
    helper.kill()
    helper.wait()
    helpers._idle.put(helper)
    np.testing.assert_array_equal(matrix(store, [0], [700]), expected)
    forget()


def test_the_command_line(object_store, url, remote, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AWS_ENDPOINT", object_store.proxy.endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["info", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == url
    assert main(["convert", url, str(tmp_path / "whole")]) == 0
    assert main(["verify", str(tmp_path / "whole")]) == 0
    assert main(["annotate", url, "nothing.csv"]) == 2


def test_wrong_use(object_store, local, remote, tmp_path, make_study):
    cases: list[tuple[str, dict[str, object], type[AtlasError], str]] = [
        ("s3://atlastests/nowhere", {}, NotAStoreError, "no store at this URL"),
        ("s3://atlastests/atlas/studies", {}, NotAStoreError, "none of them manifests"),
        ("s3://no-such-bucket/atlas", {}, StoreError, "no-such-bucket"),
        ("ftp://host/atlas", {"options": {}}, ConfigError, "cannot be connected to"),
        ("https://me:secret@host/atlas", {}, ConfigError, "query or a password is not taken"),
        ("https://host/atlas?signature=x", {}, ConfigError, "query or a password is not taken"),
        ("s3://atlastests/atlas", {"cache": "lots"}, ConfigError, "no number of bytes"),
        (
            "s3://atlastests/atlas",
            {"options": {"secret_access_key": "x"}},
            ConfigError,
            "Secrets are not taken(.*\n)*.*AWS_SECRET_ACCESS_KEY",
        ),
        ("s3://atlastests/atlas", {"options": {"no_such": "x"}}, ConfigError, "connected to"),
    ]
    for where, options, error, message in cases:
        object_store.proxy.log.clear()
        with pytest.raises(error, match=message):
            remote(where, **options)
        assert len(object_store.proxy.log) <= 1, "what is wrong is not asked again"
    pytest.importorskip("tiledb", reason="the extra tiledb is not installed")
    store = atlas.create_store(tmp_path / "tiles", format="tiledb")
    store.append(make_study(), study="one")
    with pytest.raises(FormatError, match=r"Only stores of the format zarr(.*\n)*.*convert"):
        remote(object_store.upload(store.path, "tiles"))
