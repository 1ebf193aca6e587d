"""Checkpoints: what is written comes back, and no fault leaves less than the one before."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas import files
from atlas.errors import CheckpointError
from atlas.training.checkpoint import (
    Checkpoint,
    Progress,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from atlas.training.environment import Environment
from atlas.training.history import EpochRecord, History, write_log


def checkpoint(step: int = 7, *, best: bool = True) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "linear.weight": torch.randn(3, 2, generator=generator),
        "norm.num_batches_tracked": torch.tensor(step),
    }
    record = EpochRecord(1, 4, 12.5, 11.0, 1.5, 0.0, 0.1 + 0.2, None, 0.25, 1e4)
    return Checkpoint(
        weights=weights,
        optimizer={"step/linear.weight": torch.tensor(4.0), "exp_avg/linear.weight": torch.ones(2)},
        state={"generator": generator.get_state(), "sums": torch.rand(3, dtype=torch.float64)},
        average=weights if best else None,
        best=weights if best else None,
        progress=Progress(step, False, 100, 0.5),
        history=History((record,)),
        loader={"epoch": 1, "step": 3, "fingerprint": "abc"},
        run={"train": {"seed": 0}, "describe": {"genes": ["A", "B"]}},
        environment=Environment("2.0", "2.0", "0.1", "3.11", "AVX512", "cpu", 2),
    )


def assert_same(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    for name in ("weights", "optimizer", "state", "average", "best"):
        a, b = getattr(found, name), getattr(expected, name)
        if b is None:
            assert a is None
            continue
        assert set(a) == set(b)
        assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in b)
    for name in ("progress", "history", "loader", "run", "environment"):
        assert getattr(found, name) == getattr(expected, name)


def only_folder(out: Path) -> Path:
    (folder,) = (out / "checkpoints").iterdir()
    return folder


@pytest.mark.parametrize("best", [True, False])
def test_round_trip(tmp_path: Path, best: bool) -> None:
    expected = checkpoint(best=best)
    save_checkpoint(tmp_path, expected)
    assert_same(load_checkpoint(tmp_path), expected)


def test_the_latest_replaces_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = save_checkpoint(tmp_path, checkpoint(step))
        assert only_folder(tmp_path) == path
    assert_same(load_checkpoint(tmp_path), checkpoint_with_sums(tmp_path, 3))


def checkpoint_with_sums(out: Path, step: int) -> Checkpoint:
    """The checkpoint of ``step`` with the (unseeded) sums that were written."""
    found = load_checkpoint(out)
    assert found is not None
    return replace(checkpoint(step), state=found.state)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    before = checkpoint(1)
    kept = save_checkpoint(tmp_path, before)
    write = files.write_bytes
    for n in range(1, 6):
        calls = 0

        def fail_at_n(path: Path, data: bytes, *, exclusive: bool = False, n: int = n) -> None:
            nonlocal calls
            calls += 1
            if calls == n:
                write(path, data[: len(data) // 2])
                raise OSError(error, "injected")
            write(path, data, exclusive=exclusive)

        monkeypatch.setattr(files, "write_bytes", fail_at_n)
        with pytest.raises(CheckpointError, match=r"could not be written\n  found: injected"):
            save_checkpoint(tmp_path, checkpoint(2))
        monkeypatch.undo()
        assert only_folder(tmp_path) == kept
        assert_same(load_checkpoint(tmp_path), before)
    # Four safetensors and the document: a sixth write does not exist.
    assert calls == 5


@pytest.mark.parametrize("failing", ["sync_folder"])
def test_a_sync_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = checkpoint(1)
    save_checkpoint(tmp_path, before)

    def fail(_path: Path) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(files, failing, fail)
    with pytest.raises(CheckpointError, match="injected"):
        save_checkpoint(tmp_path, checkpoint(2))
    monkeypatch.undo()
    assert_same(load_checkpoint(tmp_path), before)


def test_a_crash_at_any_moment_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        """Not an Exception: nothing may clean up after it, as after SIGKILL."""

    write, sync = files.write_bytes, files.sync_folder
    for n in range(1, 10):
        out = tmp_path / str(n)
        before, after = checkpoint(1), checkpoint(2)
        out.mkdir()
        save_checkpoint(out, before)
        calls = 0

        def crash(n: int = n) -> None:
            nonlocal calls
            calls += 1
            if calls == n:
                raise Crash

        def crashing_write(path: Path, data: bytes, *, exclusive: bool = False) -> None:
            write(path, data[: len(data) // 2])
            crash()
            write(path, data)

        def crashing_sync(path: Path) -> None:
            crash()
            sync(path)

        monkeypatch.setattr(files, "write_bytes", crashing_write)
        monkeypatch.setattr(files, "sync_folder", crashing_sync)
        crashed = False
        try:
            save_checkpoint(out, after)
        except Crash:
            crashed = True
        monkeypatch.undo()
        # Six files, the folder; the eighth comes after the rename; there is no ninth.
        assert crashed == (n <= 8)
        assert_same(load_checkpoint(out), before if n <= 7 else after)
        remove_leftovers(out)
        assert_same(load_checkpoint(out), before if n <= 7 else after)
        assert only_folder(out).name.isdecimal()
        save_checkpoint(out, before)
        assert_same(load_checkpoint(out), before)


def truncate(data: bytes) -> bytes:
    return data[:-1]


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def empty(_data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncate, flip, empty])
@pytest.mark.parametrize("name", ["weights", "optimizer", "state", "best"])
def test_damaged_tensors_are_refused(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    path = save_checkpoint(tmp_path, checkpoint()) / f"{name}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="is not what was written") as caught:
        load_checkpoint(tmp_path)
    assert caught.value.path == path
    assert "train anew" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint())
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read\n  found: No such file"):
        load_checkpoint(tmp_path)
    (path / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_every_flipped_bit_of_the_document_is_an_error(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint()) / "checkpoint.json"
    written = path.read_bytes()
    before = json.loads(written)
    for position in range(0, len(written), 3):
        flipped = bytearray(written)
        flipped[position] ^= 1 << (position % 7)
        path.write_bytes(flipped)
        try:
            harmless = json.loads(flipped) == before  # one kind of white space for another
        except ValueError:
            harmless = False
        if harmless:
            load_checkpoint(tmp_path)
        else:
            with pytest.raises(CheckpointError):
                load_checkpoint(tmp_path)


def edit(path: Path, **changes: object) -> None:
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint()) / "checkpoint.json"
    edit(path, version=3)
    with pytest.raises(CheckpointError, match=r"'atlas-checkpoint', 3.*\n.*'atlas-checkpoint', 2"):
        load_checkpoint(tmp_path)


def test_the_schema_is_enforced(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint()) / "checkpoint.json"
    edit(path, progress={"step": -1})
    with pytest.raises(CheckpointError, match=r"does not follow its schema\n  found: \$\.progress"):
        load_checkpoint(tmp_path)


def test_the_log_holds_the_history_and_nothing_else(tmp_path: Path) -> None:
    history = checkpoint().history
    path = tmp_path / "log.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    write_log(tmp_path, history)
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == history.to_json()
    assert History.from_json([json.loads(line) for line in lines]) == history
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_log_that_cannot_be_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(tmp_path, checkpoint().history)
    before = (tmp_path / "log.jsonl").read_bytes()

    def full(_path: Path, _data: bytes, *, exclusive: bool = False) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_log(tmp_path, History())
    assert (tmp_path / "log.jsonl").read_bytes() == before
