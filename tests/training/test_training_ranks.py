"""Several processes train what one process trains: the same losses and weights, to rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file

import atlas
from atlas.errors import ModelError
from atlas.models import noise
from loaders.plan import EpochPlan

COMMAND = [sys.executable, "-m"]
OPTIONS = ["--n-hidden", "16", "--n-latent", "4", "--minibatch-size", "40", "--threads", "1"]
OPTIONS += ["--device", "cpu", "--seed", "3", "--dropout-rate", "0.2", "--average-steps", "5"]


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies, of which one lacks genes; 410 cells, so that the last minibatch is short."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("ranks") / "cells.atlas"
    store = atlas.create_store(path)
    for study, n_genes, n_cells in (("one", 40, 250), ("two", 30, 160)):
        rate = random.gamma(1.0, 2.0, (3, n_genes))[random.integers(3, size=n_cells)]
        obs = pd.DataFrame(
            {
                "batch": [f"{study}{i % 2}" for i in range(n_cells)],
                "cell_type": [f"t{i % 3}" for i in range(n_cells)],
            },
            index=[f"{study}-{i}" for i in range(n_cells)],
        )
        var = pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])
        counts = sp.csr_matrix(random.poisson(rate).astype(np.float32))
        store.append(
            ad.AnnData(counts, obs, var), study=study, batch_key="batch", label_key="cell_type"
        )
    atlas.select_genes(store, n=36)
    return path


def command(ranks: int, *arguments: str, name: str = "train") -> list[str]:
    if ranks == 1:
        return [*COMMAND, "atlas", name, *arguments]
    start = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*COMMAND, *start, "-m", "atlas", name, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def run(
    ranks: int, arguments: Sequence[str], name: str = "train"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, *arguments, name=name),
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=300,
    )


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


MEASURES = ("train_loss", "reconstruction_loss", "kl", "validation_bound", "step", "epoch")
MODELS = {
    "scvi": ["--model", "scvi"],
    "scvi, BatchNorm": ["--model", "scvi", "--norm", "batch", "--library", "latent"],
    "cvae": ["--model", "cvae"],
}


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("scvi", 2),
        pytest.param("scvi, BatchNorm", 2, marks=pytest.mark.long),
        pytest.param("scvi", 4, marks=pytest.mark.long),
        pytest.param("scvi, BatchNorm", 4, marks=pytest.mark.long),
        pytest.param("cvae", 2, marks=pytest.mark.long),
    ],
)
def test_the_trajectory_is_that_of_one_process(
    store_path: Path, tmp_path: Path, name: str, ranks: int
) -> None:
    options = [str(store_path), *MODELS[name], *OPTIONS, "--epochs", "4"]
    outs = {n: tmp_path / str(n) for n in (1, ranks)}
    for n, out in outs.items():
        done = run(n, [*options, "--out", str(out)])
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("trained 4 epochs") == 1  # one process speaks
    one, several = (log(out) for out in outs.values())
    assert len(one) == len(several) == 4
    for own, other in zip(one, several, strict=True):
        for measure in MEASURES:
            assert other[measure] == pytest.approx(own[measure], rel=2e-5), measure
    weights = [load_file(out / "weights.safetensors") for out in outs.values()]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_the_embedding_is_that_of_one_process(store_path: Path, tmp_path: Path) -> None:
    store = atlas.open_store(store_path)
    options: dict[str, Any] = {"max_epochs": 1, "n_hidden": 8, "device": "cpu"}
    atlas.train(store, out=tmp_path / "run", **options)
    found = []
    for ranks in (1, 2):
        given = [str(tmp_path / "run"), str(store_path), "--name", f"z{ranks}", "--device", "cpu"]
        done = run(ranks, given, "embed")
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("410 cells × 10 dimensions") == 1
        found.append(atlas.open_store(store_path).embedding(f"z{ranks}"))
    assert np.array_equal(*found)


@pytest.mark.long
def test_it_goes_on_with_another_number_of_processes(store_path: Path, tmp_path: Path) -> None:
    options = [str(store_path), "--model", "scvi", *OPTIONS, "--epochs", "6"]
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    assert run(1, [*options, "--out", str(whole)]).returncode == 0
    options += ["--out", str(begun), "--resume", "--checkpoint-steps", "7"]
    # each part is killed after a checkpoint, the last one ends
    for ranks, steps in ((2, 14), (1, 28)):
        process = subprocess.Popen(
            command(ranks, *options),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        _wait_for(lambda steps=steps: _steps(begun) >= steps, process)
        _kill_all(process)
    done = run(4, options)
    assert done.returncode == 0, done.stderr[-3000:]
    for own, other in zip(log(whole), log(begun), strict=True):
        for measure in MEASURES:
            assert other[measure] == pytest.approx(own[measure], rel=2e-5), measure


@pytest.mark.long
def test_a_rank_that_dies_ends_the_others(store_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [str(store_path), "--model", "scvi", *OPTIONS, "--epochs", "4000", "--out", str(out)]
    # without torchrun, which would end the other one itself
    port = str(20_000 + os.getpid() % 20_000)
    shared = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            command(1, *options, "--checkpoint-steps", "11"),
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    _wait_for(lambda: _steps(out) > 0, ranks[0])
    ranks[1].kill()
    _, told = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 2
    assert "Another process of this training is gone" in told
    done = run(1, [*options[:-4], "--epochs", "4000", "--out", str(out)])
    assert "go on with the run in it by --resume" in done.stderr


@pytest.mark.long
def test_one_ctrl_c_stops_all_with_a_checkpoint(store_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [str(store_path), "--model", "scvi", *OPTIONS, "--epochs", "4000", "--out", str(out)]
    process = subprocess.Popen(
        command(2, *options, "--checkpoint-steps", "11"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _wait_for(lambda: _steps(out) > 0, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert "--resume goes on from there" in told


@pytest.mark.parametrize(
    ("model", "expected"),
    [("trvae", "not trained by several processes"), ("davae", "not trained by several processes")],
)
@pytest.mark.long
def test_models_whose_loss_is_no_mean_over_cells_are_refused(
    store_path: Path, tmp_path: Path, model: str, expected: str
) -> None:
    options = [str(store_path), "--model", model, "--epochs", "1", "--device", "cpu"]
    done = run(2, [*options, "--out", str(tmp_path / "run")])
    assert done.returncode != 0
    assert expected in done.stderr


@pytest.mark.parametrize("n_rows", [100, 410, 37])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_places_of_ranks_make_up_the_minibatch(n_rows: int, world_size: int) -> None:
    def plan(rank: int, of: int) -> EpochPlan:
        return EpochPlan((0, n_rows), 40, 5, block_size=4, buffer_size=64, rank=rank, world_size=of)

    whole = list(plan(0, 1).minibatches())
    for rank in range(world_size):
        part = plan(rank, world_size)
        for step, rows in enumerate(part.minibatches()):
            assert np.array_equal(whole[step][part.places(step)], rows)
            assert part.rows_of_step(step) == len(whole[step])


def test_noise_is_given_to_cells_and_not_to_processes() -> None:
    whole = torch.Generator().manual_seed(1)
    like = torch.zeros(9, 5)
    wanted = noise.normal(like, whole), noise.kept(like, 0.3, whole), noise.normal(like, whole)
    for own in (torch.tensor([0, 3, 8]), torch.tensor([1, 2, 4, 5, 6, 7])):
        shared = noise.SharedGenerator()
        shared.manual_seed(1)
        shared.own, shared.n_cells = own, 9
        mine = like[own]
        found = (
            noise.normal(mine, shared),
            noise.kept(mine, 0.3, shared),
            noise.normal(mine, shared),
        )
        for one, other in zip(wanted, found, strict=True):
            assert torch.equal(one[own], other)
        with pytest.raises(ModelError, match="share"):
            noise.normal(like[:2], shared)


def _steps(out: Path) -> int:
    """Steps of the newest checkpoint, 0 without one."""
    folder = out / "checkpoints"
    found = [0]
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        try:
            held = json.loads((path / "checkpoint.json").read_text())
        except OSError:  # one that is being written, or was removed meanwhile
            continue
        found.append(held["progress"]["step"])
    return max(found)


def _wait_for(reached: Any, process: subprocess.Popen[Any]) -> None:
    while not reached():
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.05)


def _kill_all(process: subprocess.Popen[Any]) -> None:
    """Kill torchrun and what it started, each in a session of its own."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    for pid in [*found.stdout.split(), str(process.pid)]:
        os.kill(int(pid), signal.SIGKILL)
    process.wait()
