"""Training from a projection gives the weights that training from the store gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anndata import AnnData

import atlas
from atlas.cli import main
from atlas.store import CountStore, create_store, projection_writer
from atlas.training import loop
from atlas.workflows import modelling, projecting
from atlas.workflows.projecting import Saving, estimate

MakeStudy = Callable[..., AnnData]
GENES = ["gene21", "gene3", "gene12", "gene7", "gene1", "gene30"]
OPTIONS: dict[str, Any] = {
    "genes": GENES,
    "max_epochs": 3,
    "minibatch_size": 32,
    "n_hidden": 8,
    "n_layers": 1,
    "device": "cpu",
    "threads": 1,
    "average_steps": 4,
}


@pytest.fixture
def store(tmp_path: Path, make_study: MakeStudy) -> CountStore:
    store = create_store(tmp_path / "s.atlas")
    store.append(make_study(n=150), study="one", batch_key="batch")
    genes = [f"gene{i}" for i in range(35, 0, -1)]
    store.append(make_study(n=90, genes=genes, prefix="o", seed=2), study="two", batch_key="batch")
    return store


@pytest.fixture
def weights(store: CountStore, tmp_path: Path) -> bytes:
    """Those of a run that reads the store and is not interrupted."""
    atlas.train(store, out=tmp_path / "plain", **OPTIONS)
    return (tmp_path / "plain/weights.safetensors").read_bytes()


def test_the_weights_are_the_same_and_nothing_is_left(
    store: CountStore, tmp_path: Path, weights: bytes
) -> None:
    atlas.train(store, out=tmp_path / "run", project=True, **OPTIONS)
    assert (tmp_path / "run/weights.safetensors").read_bytes() == weights
    assert not (tmp_path / "run/projected").exists()
    other = {**OPTIONS, "seed": 1}
    atlas.train(store, out=tmp_path / "other", project=True, **other)
    assert (tmp_path / "other/weights.safetensors").read_bytes() != weights


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("stop_at", [4, 11])
def test_a_run_goes_on_from_either(
    store: CountStore,
    tmp_path: Path,
    weights: bytes,
    monkeypatch: pytest.MonkeyPatch,
    first: bool,
    second: bool,
    stop_at: int,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        real = loop.Trainer.step

        def step(self: Any, minibatch: Any) -> None:
            if self.state.step == stop_at:
                raise RuntimeError("the lights went out")
            real(self, minibatch)

        patch.setattr(loop.Trainer, "step", step)
        with pytest.raises(RuntimeError, match="lights"):
            atlas.train(store, out=run, project=first, checkpoint_steps=3, **OPTIONS)
    assert (run / "projected/projection.json").exists() == first
    atlas.train(store, out=run, project=second, resume=True, **OPTIONS)
    assert (run / "weights.safetensors").read_bytes() == weights
    assert not (run / "projected").exists()


def test_it_is_written_once_a_run(
    store: CountStore, tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while it is written, a resume, a kill while training, a resume, and one too many."""
    run, written = tmp_path / "run", []
    real = projection_writer.ProjectionWriter._study

    def study(self: Any, name: str, *arguments: Any) -> Any:
        if not written:
            written.append(name)
            return real(self, name, *arguments)
        if len(written) == 1:
            written.append("stop")
            raise KeyboardInterrupt
        written.append(name)
        return real(self, name, *arguments)

    monkeypatch.setattr(projection_writer.ProjectionWriter, "_study", study)
    with pytest.raises(KeyboardInterrupt):
        atlas.train(store, out=run, project=True, **OPTIONS)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(loop.Trainer, "end_epoch", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                atlas.train(store, out=run, project=True, resume=True, **OPTIONS)
    assert written == ["one", "stop", "two"]
    atlas.train(store, out=run, project=True, resume=True, **OPTIONS)
    assert (run / "weights.safetensors").read_bytes() == weights
    atlas.train(store, out=run, project=True, resume=True, **OPTIONS)  # it is complete
    assert written == ["one", "stop", "two"]


def test_the_estimate() -> None:
    saving = estimate(seconds_per_row=1e-5, n_obs=1_000_000, kept=0.08, epochs=20)
    assert (saving.epoch, saving.writing) == pytest.approx((10, 20))
    assert saving.projected == pytest.approx(1.0)
    assert saving.total == pytest.approx(20 * 9 - 20)
    assert saving.pays
    assert str(saving) == (
        "reading takes about 10 s an epoch; --project would make it 1.0 s after 20 s of writing, "
        "and save up to 160 s over 20 epochs"
    )
    assert not estimate(1e-5, 1_000_000, 0.08, 5).pays  # 25 s
    assert not estimate(1e-5, 1_000_000, 0.9, 2000).pays  # 1,580 s of 20,000
    assert not estimate(1e-5, 1_000_000, 1.0, 400).pays
    assert not Saving(epoch=100, projected=95, writing=100, epochs=100).pays  # 400 s of 10,000
    assert Saving(epoch=100, projected=85, writing=100, epochs=100).pays


def test_what_is_measured(store: CountStore) -> None:
    ticks = iter([10.0, 12.0])
    view = store.select(GENES)
    seconds, kept = projecting.measure(view, clock=lambda: next(ticks))
    size = min(256, view.n_obs)
    assert 2 / (32 * size) <= seconds * projecting.resolve_threads(None) <= 2 / 32
    block = view.read_rows(0, 150)
    stored = view.count_values(np.array([0]), np.array([150]))
    assert kept == pytest.approx(len(block.data) / int(stored[0]), rel=0.3)


def test_it_is_offered_where_it_pays(
    store: CountStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store.record_genes(GENES, "seurat_v3", 6)
    command = ["train", str(store.path), "--epochs", "1", "--n-hidden", "8", "--threads", "1"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert "--project" not in capsys.readouterr().err  # 240 cells are read in no time
    monkeypatch.setattr(projecting, "measure", lambda _: (10.0, 0.1))
    monkeypatch.setattr(projecting, "_WRITING", 0.1)
    assert main([*command, "--out", str(tmp_path / "b")]) == 0
    err = capsys.readouterr().err
    assert err.count("--project would make it 288 s after 240 s of writing") == 1
    assert main([*command, "--out", str(tmp_path / "b"), "--resume"]) == 0
    assert "--project" not in capsys.readouterr().err  # the run is under way
    assert main([*command, "--out", str(tmp_path / "c"), "--project"]) == 0
    err = capsys.readouterr().err
    assert "--project would" not in err
    assert "project: 100%" in err
    monkeypatch.setattr(modelling, "advice", lambda *_: pytest.fail("asked of a quiet run"))
    atlas.train(store, out=tmp_path / "d", **OPTIONS)
