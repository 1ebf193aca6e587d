"""Where the time of a training goes."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import atlas
from atlas.cli import main
from atlas.store import CountStore
from atlas.training.clock import STAGES, Clock
from loaders.stalls import Stalls


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CountStore:
    store = atlas.create_store(tmp_path_factory.mktemp("clock") / "s.atlas")
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(2.0, (200, 30)).astype(np.float32))
    adata = ad.AnnData(counts)
    adata.obs["batch"] = "one"
    store.append(adata, study="one", batch_key="batch")
    atlas.select_genes(store, n=20)
    return store


def test_the_stages_make_up_the_training(
    store: CountStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["train", str(store.path), "--out", str(out), "--epochs", "3", "--device", "cpu"]
    began = time.perf_counter()
    assert main([*command, "--n-hidden", "8", "--profile"]) == 0
    passed = time.perf_counter() - began
    told = json.loads((out / "profile.json").read_text())
    assert set(told["seconds"]) == set(STAGES)
    assert all(seconds > 0 for seconds in told["seconds"].values())
    assert sum(told["seconds"].values()) < passed
    assert told["reading"] > 0
    assert told["gathering"] > 0
    assert told["cells"] % 3 == 0
    assert told["cells"] > 3 * 150
    shown = capsys.readouterr().err
    assert all(stage in shown for stage in STAGES)


def test_it_changes_nothing_and_is_not_there_unless_asked_for(
    store: CountStore, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "device": "cpu", "n_hidden": 8, "threads": 1}
    runs = tmp_path / "with", tmp_path / "without"
    atlas.train(store, out=runs[0], profile=True, **options)
    atlas.train(store, out=runs[1], **options)
    assert not (runs[1] / "profile.json").exists()
    one, other = ((run / "weights.safetensors").read_bytes() for run in runs)
    assert one == other


@pytest.mark.parametrize(
    ("waited", "seconds", "warns"), [(4.0, 10.0, True), (2.0, 10.0, False), (2.0, 4.0, False)]
)
def test_a_loader_that_starves_the_training_is_told_once(
    waited: float, seconds: float, warns: bool
) -> None:
    stalls = Stalls()
    stalls.add("wait_for_minibatch", waited)
    clock = Clock(torch.device("cpu"), on=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            clock.end_epoch(stalls, seconds, 100)
    assert [("--project" in str(w.message)) for w in told] == [True] * warns
