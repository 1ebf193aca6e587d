"""An ingest that was interrupted goes on, to the same bytes; or starts anew, and says why."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anndata import AnnData

from atlas import files, workflows
from atlas.errors import CountsError, StoreError
from atlas.ingest import CountsSource
from atlas.store import CountStore, create_store, journal, layout, open_store, study_tasks
from atlas.store import append as append_module

MakeStudy = Callable[..., AnnData]
MEMORY = 256 * 6 * 5 // 2


def content(root: Path) -> dict[str, bytes]:
    """All files but those with a time in them."""
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and not p.name.startswith("writer.") and p.parent.name != "manifests"
    }


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK", 64)
    monkeypatch.setattr(layout, "SHARD", 256)
    monkeypatch.setattr(journal, "INTERVAL", 0.0)


@pytest.fixture
def path(tmp_path: Path, make_study: MakeStudy) -> Path:
    adata = make_study(300, 40)
    adata.layers["half"] = adata.X * 0.5
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def append(store: CountStore, path: Path | list[Path], **options: Any) -> Any:
    return store.append(path, **{"study": "s", "batch_key": "batch", "memory": MEMORY, **options})


class Counted:
    """Calls of a function, of which the n-th is interrupted."""

    def __init__(self, function: Callable[..., Any], interrupt: int | None = None) -> None:
        self.function = function
        self.interrupt = interrupt
        self.calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls - 1 == self.interrupt:
            raise KeyboardInterrupt
        return self.function(*arguments, **options)


def interrupted(
    store: CountStore, path: Path | list[Path], at: str, n: int, **options: Any
) -> None:
    """Interrupt an append at the n-th run or shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_tasks, at, Counted(getattr(study_tasks, at), n))
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            append(store, path, **options)
    assert (store.path / "scratch" / "ingest" / "journal.json").exists()
    assert open_store(store.path).studies == ()
    open_store(store.path).verify()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counted]:
    """Counts of blocks read and shards written."""
    counted = {
        "read": Counted(study_tasks.write_run),
        "shards": Counted(study_tasks.write_shard),
    }
    monkeypatch.setattr(study_tasks, "write_run", counted["read"])
    monkeypatch.setattr(study_tasks, "write_shard", counted["shards"])
    return counted


@pytest.mark.parametrize(("at", "n"), [("write_run", 3), ("write_run", 20), ("write_shard", 13)])
@pytest.mark.parametrize("several", [False, True])
def test_it_goes_on_to_the_same_bytes(
    tmp_path: Path, path: Path, make_study: MakeStudy, at: str, n: int, several: bool
) -> None:
    inputs: Path | list[Path] = path
    if several:
        other = make_study(100, 40, seed=1, prefix="other")[:, ::-1].copy()
        other.layers["half"] = other.X * 0.5
        other.write_h5ad(tmp_path / "other.h5ad")
        inputs = [path, tmp_path / "other.h5ad"]
    whole = create_store(tmp_path / "whole.atlas")
    append(whole, inputs, keep_layers=["half"])
    store = create_store(tmp_path / "s.atlas")
    interrupted(store, inputs, at, n, keep_layers=["half"])
    report = append(store, inputs, keep_layers=["half"])
    assert any("going on" in note for note in report.notes)
    assert content(store.path) == content(whole.path)
    store.verify()


def test_what_was_done_is_not_done_again(
    tmp_path: Path, path: Path, calls: dict[str, Counted]
) -> None:
    append(create_store(tmp_path / "whole.atlas"), path)
    total = {name: counted.calls for name, counted in calls.items()}
    assert min(total.values()) > 15
    for name, at in (("read", "write_run"), ("shards", "write_shard")):
        store = create_store(tmp_path / f"{name}.atlas")
        interrupted(store, path, at, 12)
        before = {name: counted.calls for name, counted in calls.items()}
        append(store, path)
        again = {name: counted.calls - before[name] for name, counted in calls.items()}
        if name == "read":
            assert again["read"] <= total["read"] - 12 + 4
        else:  # a few were at work when it was interrupted
            assert again == {"read": 0, "shards": again["shards"]}
            assert again["shards"] <= total["shards"] - 12 + 8


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("file", "another sizes"),
        ("touch", "another times"),
        ("option", "another label_key"),
        ("study", "another study"),
        ("journal", "its journal is missing or damaged"),
        ("schema", "its journal is damaged"),
        ("fresh", "--fresh was given"),
        ("object", "another study or input"),
    ],
)
def test_it_starts_anew_where_something_differs(
    tmp_path: Path, path: Path, make_study: MakeStudy, change: str, why: str
) -> None:
    store = create_store(tmp_path / "s.atlas")
    interrupted(store, path, "write_shard", 5)
    options: dict[str, Any] = {}
    source: Any = path
    noted = store.path / "scratch" / "ingest" / "journal.json"
    if change == "file":
        other = make_study(301, 40, seed=3)
        other.write_h5ad(path)
    elif change == "touch":
        path.touch()
    elif change == "option":
        options["label_key"] = "cell_type"
    elif change == "study":
        options["study"] = "t"
    elif change == "journal":
        noted.write_bytes(noted.read_bytes()[:-20])
    elif change == "schema":
        noted.write_text(json.dumps({**json.loads(noted.read_text()), "matrices": {"X": 3}}))
    elif change == "fresh":
        options["fresh"] = True
    else:
        source = make_study(300, 40)
    report = append(store, source, **options)
    assert any("not gone on with" in note and why in note for note in report.notes)
    whole = create_store(tmp_path / "whole.atlas")
    append(whole, source, **options)
    assert content(store.path) == content(whole.path)


@pytest.mark.parametrize("what", ["runs", "shards"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove"])
def test_damaged_runs_and_shards_are_made_again(
    tmp_path: Path, path: Path, what: str, fault: str
) -> None:
    store = create_store(tmp_path / "s.atlas")
    interrupted(store, path, "write_shard", 12)
    damaged = sorted(p for p in (store.path / "scratch/ingest" / what).rglob("*") if p.is_file())
    for file in damaged[::3]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        if fault == "remove":
            file.unlink()
        else:
            file.write_bytes(data if fault == "flip" else data[:-1])
    append(store, path)
    whole = create_store(tmp_path / "whole.atlas")
    append(whole, path)
    assert content(store.path) == content(whole.path)


def test_another_commit_ends_it_and_nothing_else_does(
    tmp_path: Path, path: Path, make_study: MakeStudy
) -> None:
    store = create_store(tmp_path / "s.atlas")
    append(store, make_study(20, 40, prefix="first"), study="first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_tasks, "write_shard", Counted(study_tasks.write_shard, 5))
        with pytest.raises(KeyboardInterrupt):
            append(store, path)
    scratch = store.path / "scratch"
    (scratch / "else").mkdir()
    with pytest.raises(StoreError):
        store.record_genes(["no such gene"], "seurat_v3", 1)
    with pytest.raises(StoreError, match="does not fit"):
        store.write_embedding("z", np.zeros((1, 2), np.float32), {})
    assert (scratch / "ingest").exists()
    store.record_genes(["gene1"], "seurat_v3", 1)
    assert not scratch.exists()
    report = append(store, path)
    assert report.notes == ()


@pytest.mark.parametrize(("door", "stride"), [("write_bytes", 17), ("write_scratch", 7)])
def test_a_full_disk_leaves_nothing(tmp_path: Path, path: Path, door: str, stride: int) -> None:
    store = create_store(tmp_path / "s.atlas")
    before = content(store.path)
    real, n = getattr(files, door), 0
    while True:
        calls = 0

        def full(*arguments: Any, n: int = n, **options: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > n:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, door, full)
            try:
                append(store, path)
                break
            except StoreError as error:
                message = str(error)
        assert "the store is as it was\n  found: [Errno 28]" in message
        assert content(store.path) == before
        n += stride
    assert n > 2 * stride
    store.verify()


@pytest.mark.parametrize("n", [0, 1])
def test_an_interrupt_after_the_study_was_moved_in_place(
    tmp_path: Path, path: Path, n: int
) -> None:
    store = create_store(tmp_path / "s.atlas")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(append_module, "write_part", Counted(append_module.write_part, n))
        with pytest.raises(KeyboardInterrupt, match="goes on"):
            append(store, path)
    assert not list((store.path / "studies").iterdir())
    append(store, path)
    whole = create_store(tmp_path / "whole.atlas")
    append(whole, path)
    assert content(store.path) == content(whole.path)


def test_progress_goes_on_too(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = create_store(tmp_path / "s.atlas")
    interrupted(store, path, "write_shard", 12)
    append(store, path, progress=True)
    shown = capsys.readouterr().err
    assert "s: reading: 100%" in shown
    assert "s: writing: 100%" in shown


def test_bad_input_and_objects_leave_nothing(
    tmp_path: Path, path: Path, make_study: MakeStudy
) -> None:
    store = create_store(tmp_path / "s.atlas")
    before = content(store.path)
    bad = make_study(300, 40)
    bad.X.data[-1] = 0.5
    bad.write_h5ad(tmp_path / "bad.h5ad")
    with pytest.raises(CountsError):
        append(store, tmp_path / "bad.h5ad")
    assert content(store.path) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_tasks, "write_shard", Counted(study_tasks.write_shard, 5))
        with pytest.raises(KeyboardInterrupt) as caught:
            append(store, make_study(300, 40))
    assert not str(caught.value)
    assert content(store.path) == before


def test_the_first_study_of_a_store_goes_on(tmp_path: Path, path: Path) -> None:
    def run(**options: Any) -> Any:
        return workflows.ingest(
            tmp_path / "s.atlas", path, study="s", first=True, memory=MEMORY, **options
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_tasks, "write_shard", Counted(study_tasks.write_shard, 5))
        with pytest.raises(KeyboardInterrupt, match="goes on"):
            run()
    assert any("going on" in note for note in run().notes)
    assert open_store(tmp_path / "s.atlas").n_obs == 300


def test_columns_by_columns_go_on_too(tmp_path: Path, make_study: MakeStudy) -> None:
    adata = make_study(300, 40)
    adata.X = adata.X.tocsc()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    store = create_store(tmp_path / "s.atlas")
    interrupted(store, tmp_path / "cells.h5ad", "write_run", 6)
    append(store, tmp_path / "cells.h5ad")
    whole = create_store(tmp_path / "whole.atlas")
    append(whole, tmp_path / "cells.h5ad")
    assert content(store.path) == content(whole.path)


def test_reading_the_file_is_not_begun_where_all_is_read(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(tmp_path / "s.atlas")
    interrupted(store, path, "write_shard", 5)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the counts were read again")

    monkeypatch.setattr(CountsSource, "read", refuse)
    append(store, path)


_INGEST = """
import sys
from atlas.store import open_store, journal, layout
layout.CHUNK, layout.SHARD, journal.INTERVAL = 512, 4096, 0.0
store = open_store(sys.argv[1])
print("go", flush=True)
report = store.append(sys.argv[2], study="s", batch_key="batch", memory=4096 * 6 * 5 // 2)
print(report.notes, flush=True)
"""


@pytest.mark.long
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(
    tmp_path: Path, make_study: MakeStudy
) -> None:
    make_study(2500, 200).write_h5ad(tmp_path / "cells.h5ad")
    generator = np.random.default_rng()
    stores = [create_store(tmp_path / f"{name}.atlas") for name in ("whole", "a", "b")]

    def run(root: Path, delay: float | None) -> str | None:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _INGEST, str(root), tmp_path / "cells.h5ad"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        try:
            out, errors = process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            open_store(root).verify()
            return None
        assert process.returncode == 0, errors
        return out

    assert run(stores[0].path, None) == "()\n"
    went_on = killed = 0
    for store in stores[1:]:
        for delay in [*generator.uniform(0.1, 0.8, 4), None]:
            out = run(store.path, delay)
            killed += out is None
            if out is not None:
                went_on += "going on" in out
                break
        assert content(store.path) == content(stores[0].path)
        open_store(store.path).verify()
    assert killed >= 2
    assert went_on >= 1
