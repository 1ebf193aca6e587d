"""The run folder, what identifies a run, and what it computes with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas.errors import CheckpointError, ConfigError
from atlas.models.threads import heavy_threads
from atlas.training.environment import (
    check_environment,
    check_precision,
    current_environment,
    resolve_device,
    torch_threads,
)
from atlas.training.run import check_run_folder, check_same_run, open_run

CPU = torch.device("cpu")


def test_a_folder_with_content_is_refused_without_resume(tmp_path: Path) -> None:
    check_run_folder(tmp_path / "missing", resume=False)
    check_run_folder(tmp_path, resume=False)
    (tmp_path / "notes.txt").touch()
    check_run_folder(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"not empty\n  found: notes.txt\n.*--resume"):
        check_run_folder(tmp_path, resume=False)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    with (
        open_run(out, resume=False),
        pytest.raises(CheckpointError, match="Another process is training in this folder"),
        open_run(out, resume=True),
    ):
        pass
    with open_run(out, resume=False):
        pass


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with (
        pytest.raises(CheckpointError, match="The run folder cannot be written to"),
        open_run(tmp_path / "run", resume=True),
    ):
        pass


def test_leftovers_go_when_a_run_is_opened(tmp_path: Path) -> None:
    for name in ("00000003", "00000004", ".00000005.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "weights.safetensors").touch()
    (tmp_path / ".log.jsonl.partial").touch()
    (tmp_path / "log.jsonl").touch()
    with open_run(tmp_path, resume=True):
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000004"]
        assert (tmp_path / "log.jsonl").exists()
        assert not (tmp_path / ".log.jsonl.partial").exists()


def test_differences_are_shown_from_both_sides(tmp_path: Path) -> None:
    then = {
        "train": {"max_epochs": 50, "lr": 0.001},
        "source": "abc",
        "describe": {"genes": ["A", "B", "C"], "batches": ["x"], "model": {"n_latent": 10}},
    }
    now = {
        "train": {"max_epochs": 60, "lr": 0.001},
        "source": "abc",
        "describe": {"genes": ["A", "X", "C"], "batches": ["x", "y"], "model": {"norm": "layer"}},
    }
    check_same_run(then, then, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check_same_run(then, now, tmp_path)
    message = str(caught.value)
    assert "train.max_epochs: 50 in the checkpoint, 60 asked for" in message
    assert 'describe.genes[1]: "B" in the checkpoint, "X" asked for' in message
    assert "describe.batches: 1 entries in the checkpoint, 2 entries asked for" in message
    assert 'describe.model.n_latent: 10 in the checkpoint, "absent" asked for' in message
    assert 'describe.model.norm: "absent" in the checkpoint, "layer" asked for' in message
    assert "train.lr" not in message
    assert "source" not in message
    assert str(tmp_path) in message


def test_many_differences_are_counted(tmp_path: Path) -> None:
    then = {str(i): 0 for i in range(9)}
    now = {str(i): 1 for i in range(9)}
    with pytest.raises(CheckpointError, match="; and 4 more differences"):
        check_same_run(then, now, tmp_path)


def test_devices_are_resolved_or_refused() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("meta", "toaster", "cpu:x"):
        with pytest.raises(ConfigError, match="device is not offered"):
            resolve_device(name)
    with pytest.raises(ConfigError, match="There is no such CUDA device"):
        resolve_device("cuda:99")


def test_another_device_is_refused(tmp_path: Path) -> None:
    recorded = replace(current_environment(CPU), device="cuda")
    with pytest.raises(CheckpointError, match="cuda in the checkpoint, cpu now"):
        check_environment(recorded, CPU, tmp_path)


def test_another_torch_is_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    current = current_environment(CPU)
    check_environment(current, CPU, tmp_path)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"torch 1\.0 → .*may differ"):
        check_environment(replace(current, torch="1.0"), CPU, tmp_path)


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_without_instructions_is_a_warning(
    supported: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("atlas.training.environment._has_bfloat16", lambda: supported)
    check_precision("float32", CPU)
    check_precision("bfloat16", torch.device("cuda"))
    assert not recwarn.list
    check_precision("bfloat16", CPU)
    assert len(recwarn.list) == (not supported)
    if not supported:
        assert "Leave out --precision bfloat16" in str(recwarn.list[0].message)


def test_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1, None, tmp_path, 2**40):
        assert torch.get_num_threads() == heavy_threads() == before + 1
    assert torch.get_num_threads() == heavy_threads() == before
    with torch_threads(0, None, tmp_path, 2**40):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("n_values", "threads"), [(1, 1), (128 * 2000, 1), (2**20 + 1, 2), (2**40, 3)]
)
def test_a_small_step_gives_torch_fewer_threads(
    tmp_path: Path, n_values: int, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch_threads(0, None, tmp_path, n_values):
            assert torch.get_num_threads() == threads
            assert heavy_threads() == 3
        with torch_threads(2, None, tmp_path, n_values):
            assert torch.get_num_threads() == min(threads, 2)
            assert heavy_threads() == 2
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_recorded_threads_are_restored_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch_threads(0, 3, tmp_path, 1):
            assert heavy_threads() == 3
        with torch_threads(0, 64, tmp_path, 1):  # parts of a step that wait for a processor
            assert heavy_threads() == 64
        with (
            pytest.raises(CheckpointError, match="64 for a step of the checkpoint, 4 processors"),
            torch_threads(0, 64, tmp_path, 2**40),
        ):
            pass
        with (
            pytest.raises(CheckpointError, match="3 in the checkpoint, 2 asked for"),
            torch_threads(2, 3, tmp_path, 1),
        ):
            pass
    finally:
        torch.set_num_threads(before)
