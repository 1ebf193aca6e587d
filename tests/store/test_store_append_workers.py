"""Whoever does the work, the store is the same; and memory stays in its budget."""

from __future__ import annotations

import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from atlas.errors import ConfigError, CountsError
from atlas.store import create_store, layout
from atlas.store.workers import Workers

MakeStudy = Callable[..., AnnData]


def content(root: Path) -> dict[str, bytes]:
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and not p.name.startswith("writer.") and p.parent.name != "manifests"
    }


def _ingest_with(
    tmp_path: Path, make_study: MakeStudy, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK", 64)
    monkeypatch.setattr(layout, "SHARD", 256)
    adata = make_study(200, 40)
    adata.layers["half"] = adata.X * 0.5
    adata.write_h5ad(tmp_path / "a.h5ad")
    other = make_study(100, 40, seed=1, prefix="other")
    other.X = other.X.tocsc()
    other.layers["half"] = other.X * 0.5
    other.write_h5ad(tmp_path / "b.h5ad")
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    stores = {}
    for name, who in (("threads", None), ("others", scheduler)):
        stores[name] = create_store(tmp_path / f"{name}.atlas")
        stores[name].append(
            paths,
            study="s",
            batch_key="batch",
            scheduler=who,
            keep_layers=["half"],
            memory=256 * 6 * 3,
        )
    assert content(stores["threads"].path) == content(stores["others"].path)
    with pytest.raises(ConfigError, match="in memory, or a URI, cannot be read by other processes"):
        stores["others"].append(adata, study="t", scheduler=scheduler)
    adata.X.data[3] = 0.5
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(CountsError, match=r"fractions\n  found: value 0.5 at row cell0"):
        stores["others"].append(tmp_path / "a.h5ad", study="t", scheduler=scheduler)
    assert not (stores["others"].path / "scratch").exists()


def test_a_dask_scheduler(
    tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        _ingest_with(tmp_path, make_study, cluster.scheduler_address, monkeypatch)


@pytest.mark.long
def test_processes(tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    _ingest_with(tmp_path, make_study, "processes", monkeypatch)


def test_after_an_error_nothing_is_at_work_any_more() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        if item == 5:
            raise ValueError("five")
        return item

    drawn: list[int] = []

    def items() -> object:
        for item in range(100):
            drawn.append(item)
            yield item

    with Workers() as workers:
        with pytest.raises(ValueError, match="five"):
            list(workers.run(work, items()))
        assert running == 0
        assert len(drawn) < 20
        assert most <= workers.number
        assert sorted(workers.run(work, range(5), at_once=1)) == [0, 1, 2, 3, 4]


def test_one_item_lies_ready_while_all_workers_are_at_work() -> None:
    drawn = threading.Event()

    def work(_: int) -> bool:
        return drawn.wait(30)  # of each worker, until there is an item more than workers

    with Workers() as workers:

        def items() -> Iterator[int]:
            yield from range(workers.number)
            drawn.set()
            yield workers.number

        assert list(workers.run(work, items())) == [True] * (workers.number + 1)


def test_a_budget_too_small_names_the_least(tmp_path: Path, make_study: MakeStudy) -> None:
    store = create_store(tmp_path / "s.atlas")
    with pytest.raises(ConfigError, match="memory is too small") as caught:
        store.append(make_study(), study="s", memory="10kB")
    least = int(re.findall(r"at least ([\d,]+) bytes", str(caught.value))[0].replace(",", ""))
    assert least == 60 * 30 * 6 * 5 // 2
    with pytest.raises(ConfigError, match="memory is too small"):
        store.append(make_study(), study="s", memory=least - 1)
    with pytest.raises(ConfigError, match=r"no number of bytes\n  found: 'much'"):
        store.append(make_study(), study="s", memory="much")
    store.append(make_study(), study="s", memory=least)
    other = create_store(tmp_path / "other.atlas")
    other.append(make_study(), study="s")
    assert content(other.path) == content(store.path)


def test_memory_stays_in_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK", 4096)
    monkeypatch.setattr(layout, "SHARD", 65_536)
    n_obs, n_vars, memory = 6_000, 1_000, 4_000_000
    generator = np.random.default_rng(0)
    counts = sp.random(n_obs, n_vars, 0.4, "csr", np.float32, generator)
    counts.data = np.ceil(counts.data * 9).astype(np.float32)
    names = pd.DataFrame(index=[f"c{i}" for i in range(n_obs)])
    AnnData(counts, obs=names).write_h5ad(tmp_path / "x.h5ad")
    assert 8 * counts.nnz > 4 * memory
    del counts
    create_store(tmp_path / "first.atlas").append(  # compiles and imports
        tmp_path / "x.h5ad", study="s", memory=memory
    )
    store = create_store(tmp_path / "s.atlas")
    tracemalloc.start()
    try:
        store.append(tmp_path / "x.h5ad", study="s", memory=memory)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < memory + 500 * n_obs + 2_000_000
