"""The loop: what it logs, saves, refuses, and keeps; on a small scVI and counts in memory."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from atlas.config import ScviConfig, TrainConfig
from atlas.errors import CheckpointError, ConfigError, TrainingError
from atlas.models.base import Conditions, Inputs, Losses, Model
from atlas.models.build import build_model
from atlas.training.checkpoint import load_checkpoint
from atlas.training.history import History
from atlas.training.inputs import InputsBuilder
from atlas.training.loop import fit
from atlas.training.state import seeded_generator
from loaders import ArraySource, SequentialLoader

N_OBS, N_VARS = 300, 20
TRAIN, HELD_OUT = [(0, 90), (100, 280)], [(90, 100), (280, 300)]
CONFIG = TrainConfig(max_epochs=3, minibatch_size=64, device="cpu", lr=0.01, warmup_share=0.5)
SCVI = ScviConfig(n_layers=1, n_hidden=8, n_latent=2)
STEPS = -(-270 // 64)


def make_source(seed: int = 0) -> ArraySource:
    rng = np.random.default_rng(seed)
    cell_type = rng.integers(0, 3, N_OBS)
    means = rng.gamma(1.0, 2.0, (3, N_VARS))[cell_type]
    codes = {
        "batch": rng.integers(0, 2, N_OBS).astype(np.int32),
        "study": (np.arange(N_OBS) >= 100).astype(np.int32),
    }
    return ArraySource(rng.poisson(means), codes, segments=(0, 100, N_OBS))


SOURCE = make_source()


def make_model(seed: int = 0, **changes: Any) -> Model:
    return build_model(replace(SCVI, **changes), N_VARS, 2, seed)


def train(
    out: Path,
    model: Model | None = None,
    config: TrainConfig = CONFIG,
    *,
    source: ArraySource = SOURCE,
    resume: bool = False,
    presence: npt.NDArray[np.bool_] | None = None,
    **changes: Any,
) -> History:
    arguments: dict[str, Any] = {
        "train_rows": TRAIN,
        "validation_rows": HELD_OUT,
        "describe": {"genes": [f"g{i}" for i in range(N_VARS)], "model": "tiny"},
        "progress": False,
    }
    return fit(
        make_model() if model is None else model,
        source,
        presence=presence,
        config=config,
        out=out,
        resume=resume,
        **(arguments | changes),
    )


def final_files(out: Path) -> dict[str, bytes]:
    (folder,) = (out / "checkpoints").iterdir()
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


class Hooked(Model):
    """A model that calls back before each training loss, to disturb a training from inside."""

    def __init__(self, inner: Model, before: Callable[[int], None]) -> None:
        super().__init__()
        self.inner, self.before, self.calls = inner, before, 0
        self.takes_sparse = inner.takes_sparse  # type: ignore[misc]
        self.n_genes, self.n_batch, self.n_latent = inner.n_genes, inner.n_batch, inner.n_latent
        self.kl_weights: list[float] = []
        self.inputs: list[Inputs] = []

    def loss(
        self,
        inputs: Inputs,
        kl_weight: torch.Tensor | float = 1.0,
        generator: torch.Generator | None = None,
        progress: float = 1.0,
    ) -> Losses:
        if self.training:
            self.calls += 1
            self.kl_weights.append(float(kl_weight))
            self.inputs.append(inputs)
            self.before(self.calls)
        return self.inner.loss(inputs, kl_weight, generator)

    def encode(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.encode(inputs)

    def decode(self, z: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return self.inner.decode(z, conditions)

    def log_weight(self, inputs: Inputs, generator: torch.Generator) -> torch.Tensor:
        return self.inner.log_weight(inputs, generator)


def nothing(_call: int) -> None:
    pass


def test_a_run_records_each_epoch(tmp_path: Path) -> None:
    model = Hooked(make_model(), nothing)
    history = train(tmp_path, model)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == history.to_json()
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert lines[-1]["validation_bound"] < lines[0]["validation_bound"]
    # 15 steps, of which round(7.5) rise to 1.
    assert model.kl_weights == [min(1.0, i / 8) for i in range(15)]
    assert [line["kl_weight"] for line in lines] == [4 / 8, 1.0, 1.0]
    last = history.records[-1]
    assert last.train_loss == pytest.approx(last.reconstruction_loss + last.kl)
    assert last.cells_per_second == pytest.approx(270 / last.seconds)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.progress.finished
    assert checkpoint.run["describe"]["genes"][3] == "g3"
    assert checkpoint.environment.threads == torch.get_num_threads()


def test_losses_are_means_over_cells_however_long_the_last_minibatch(tmp_path: Path) -> None:
    seen: list[tuple[float, float, float, int]] = []

    class Spy(Hooked):
        def loss(self, inputs: Inputs, *args: Any, **kwargs: Any) -> Losses:
            losses = super().loss(inputs, *args, **kwargs)
            if self.training:
                parts = (losses.objective, losses.reconstruction_loss.mean(), losses.kl.mean())
                a, b, c = (part.item() for part in parts)
                seen.append((a, b, c, len(inputs.batch)))
            return losses

    history = train(tmp_path, Spy(make_model(), nothing), replace(CONFIG, max_epochs=1))
    cells = np.array([n for *_, n in seen])
    assert sorted(cells)[:2] == [270 % 64, 64]
    means = np.average([row[:3] for row in seen], axis=0, weights=cells)
    record = history.records[0]
    found = (record.train_loss, record.reconstruction_loss, record.kl)
    np.testing.assert_allclose(found, means, rtol=1e-6)


def test_training_sees_the_training_rows_and_their_codes(tmp_path: Path) -> None:
    model = Hooked(make_model(), nothing)
    presence = np.ones((2, N_VARS), dtype=bool)
    presence[1, :5] = False
    train(tmp_path, model, replace(CONFIG, max_epochs=1), presence=presence)
    block = {i: SOURCE.read_rows(i, i + 1) for i in range(N_OBS)}
    expected = []
    for start, stop in TRAIN:
        for row in range(start, stop):
            counts = np.zeros(N_VARS, np.float32)
            counts[block[row].indices] = block[row].data
            study = SOURCE.obs_codes["study"][row]
            expected.append((*counts, SOURCE.obs_codes["batch"][row], *presence[study]))
    found = []
    for inputs in model.inputs:
        assert inputs.counts.dtype == torch.float32
        assert inputs.batch.dtype == torch.int64
        assert inputs.present is not None
        parts = (inputs.counts.to_dense(), inputs.batch[:, None], inputs.present)
        found += map(tuple, torch.cat([part.double() for part in parts], dim=1).tolist())
    assert sorted(found) == sorted(tuple(map(float, row)) for row in expected)


def test_complete_presence_is_no_mask(tmp_path: Path) -> None:
    model = Hooked(make_model(), nothing)
    train(tmp_path, model, presence=np.ones((2, N_VARS), dtype=bool))
    assert all(inputs.present is None for inputs in model.inputs)


def test_the_validation_bound_is_that_of_the_held_out_cells(tmp_path: Path) -> None:
    model = make_model()
    history = train(tmp_path, model, replace(CONFIG, max_epochs=2))
    model.eval()
    with torch.no_grad():
        bounds = [
            model.loss(
                Inputs(minibatch.to_torch(), torch.from_numpy(minibatch.obs["batch"]).long()),
                1.0,
                seeded_generator(torch.device("cpu"), CONFIG.seed, 2, 3, number),
            ).negative_bound
            for number, minibatch in enumerate(
                SequentialLoader(SOURCE, CONFIG.minibatch_size, rows=HELD_OUT)
            )
        ]
    assert history.records[-1].validation_bound == pytest.approx(torch.cat(bounds).mean().item())


def test_validation_does_not_change_the_training(tmp_path: Path) -> None:
    train(tmp_path / "with")
    history = train(tmp_path / "without", validation_rows=[(90, 90)])
    assert [record.validation_bound for record in history.records] == [None] * 3
    assert final_files(tmp_path / "with") == final_files(tmp_path / "without")


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    torch.manual_seed(1)
    train(tmp_path / "a")
    torch.manual_seed(2)
    train(tmp_path / "b")
    train(tmp_path / "c", config=replace(CONFIG, seed=1))
    assert final_files(tmp_path / "a") == final_files(tmp_path / "b")
    assert final_files(tmp_path / "a") != final_files(tmp_path / "c")


@pytest.mark.parametrize("stop_at", [1, STEPS - 1, STEPS, STEPS + 2, 3 * STEPS])
def test_ctrl_c_saves_the_step_in_progress(tmp_path: Path, stop_at: int) -> None:
    train(tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)

    def press(call: int) -> None:
        if call == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    hooked = Hooked(make_model(), press)
    hooked.state_dict = hooked.inner.state_dict  # type: ignore[method-assign]
    hooked.load_state_dict = hooked.inner.load_state_dict  # type: ignore[method-assign]
    hooked.named_parameters = hooked.inner.named_parameters  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match=f"after step {stop_at}; --resume goes on"):
        train(tmp_path / "cut", hooked)
    assert signal.getsignal(signal.SIGINT) == before
    checkpoint = load_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    assert checkpoint.progress.step == stop_at
    resumed = make_model(seed=5)
    history = train(tmp_path / "cut", resumed, resume=True)
    assert final_files(tmp_path / "cut") == final_files(tmp_path / "whole")
    assert [record.step for record in history.records] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    first = make_model()
    history = train(tmp_path, first)
    written = final_files(tmp_path)

    def fail(_call: int) -> None:
        raise AssertionError("trained again")

    again = make_model(seed=9)
    again.loss = fail  # type: ignore[method-assign, assignment]
    assert train(tmp_path, again, resume=True) == history
    assert final_files(tmp_path) == written
    for name, value in again.state_dict().items():
        assert torch.equal(value, first.state_dict()[name])


def test_resume_on_an_empty_folder_starts(tmp_path: Path) -> None:
    assert len(train(tmp_path / "new", resume=True).records) == 3


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(CheckpointError, match=r"not empty.*\n.*\n.*--resume, or train into"):
        train(tmp_path)


def test_a_run_that_failed_before_it_saved_is_begun_again(tmp_path: Path) -> None:
    def fail(*_: object) -> Losses:
        raise RuntimeError("no memory left")

    broken = make_model()
    broken.loss = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="no memory left"):
        train(tmp_path, broken)
    assert len(train(tmp_path).records) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": replace(CONFIG, max_epochs=4)}, "max_epochs: 3 in the checkpoint, 4 asked for"),
        ({"config": replace(CONFIG, lr=0.1)}, "train.lr: 0.01 in the checkpoint, 0.1 asked for"),
        ({"source": make_source(1)}, "source: "),
        ({"describe": {"model": "x"}}, 'describe.model: "tiny" in the checkpoint, "x" asked for'),
        ({"train_rows": [(0, 90)]}, "train_rows: 2 entries in the checkpoint, 1 entries"),
        ({"presence": np.eye(2, N_VARS, dtype=bool)}, "presence: null in the checkpoint"),
        ({"model": build_model(SCVI, N_VARS, 3, 0)}, "weights of another model"),
        ({"model": make_model(gene_likelihood="nb")}, r"found: zero_inflation.bias: \(20,\)"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    train(tmp_path, config=CONFIG)
    written = final_files(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path, resume=True, **changes)
    assert final_files(tmp_path) == written


def test_how_often_to_save_may_change(tmp_path: Path) -> None:
    history = train(tmp_path)
    config = replace(CONFIG, checkpoint_steps=1, checkpoint_minutes=1.0, device="auto")
    if not torch.cuda.is_available():
        assert train(tmp_path, config=config, resume=True) == history


def test_checkpoints_come_by_steps(tmp_path: Path) -> None:
    steps: list[int] = []

    def look(call: int) -> None:
        if (found := load_checkpoint(tmp_path)) is not None and call > 1:
            steps.append(found.progress.step)

    train(tmp_path, Hooked(make_model(), look), replace(CONFIG, checkpoint_steps=2, max_epochs=2))
    # Five steps an epoch: every second step, and the end of the epoch.
    assert steps == [2, 2, 4, 5, 6, 6, 8, 8]


def test_the_average_of_the_weights_is_validated_and_kept(tmp_path: Path) -> None:
    averaged, last = make_model(), make_model()
    mean = train(tmp_path / "averaged", averaged, replace(CONFIG, average_steps=10))
    raw = train(tmp_path / "last", last, replace(CONFIG, average_steps=0))
    found = load_checkpoint(tmp_path / "averaged")
    assert found is not None
    assert found.average is not None
    for name, value in averaged.state_dict().items():
        assert torch.equal(value, found.average[name])
        assert torch.equal(found.weights[name], last.state_dict()[name])  # the steps are the same
    assert [r.train_loss for r in mean.records] == [r.train_loss for r in raw.records]
    bounds = [[r.validation_bound for r in history.records] for history in (mean, raw)]
    assert bounds[0] != bounds[1]


def test_early_stopping_keeps_the_best_weights(tmp_path: Path) -> None:
    config = replace(
        CONFIG,
        max_epochs=60,
        lr=0.3,
        early_stopping=True,
        patience=3,
        warmup_share=0.0,
        average_steps=0,
    )
    weights: list[dict[str, torch.Tensor]] = []
    model = make_model()

    def remember(call: int) -> None:
        if call > 1 and (call - 1) % STEPS == 0:
            weights.append({k: v.clone() for k, v in model.state_dict().items()})

    history = train(tmp_path, Hooked(model, remember), config)
    bounds = [record.validation_bound for record in history.records]
    best = int(np.argmin(np.array(bounds, dtype=float)))
    assert len(bounds) < 60
    assert len(bounds) == best + 1 + 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[best][name])
    again = Hooked(make_model(seed=3), nothing)
    assert train(tmp_path, again, config, resume=True) == history
    for name, value in again.inner.state_dict().items():
        assert torch.equal(value, weights[best][name])


def test_early_stopping_needs_validation(tmp_path: Path) -> None:
    config = replace(CONFIG, early_stopping=True)
    with pytest.raises(ConfigError, match="needs cells that are held out"):
        train(tmp_path / "run", config=config, validation_rows=[])
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    seen: list[list[int]] = []
    take = InputsBuilder.__call__

    def taking(self: InputsBuilder, minibatch: Any) -> Inputs:
        seen.append(minibatch.rows.tolist())
        return take(self, minibatch)

    monkeypatch.setattr(InputsBuilder, "__call__", taking)

    def spoil(call: int) -> None:
        if call == STEPS + 3:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)

    with pytest.raises(TrainingError, match="nan at step 8, epoch 2") as caught:
        train(tmp_path, Hooked(model, spoil), replace(CONFIG, checkpoint_steps=1))
    assert "the last checkpoint is as it was" in str(caught.value)
    told = json.loads((tmp_path / "not_finite.json").read_text())
    assert (told["epoch"], told["step"]) == (2, 8)
    assert told["rows"] == seen[-1]
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.progress.step == 7
    assert all(torch.isfinite(value).all() for value in checkpoint.weights.values())
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = make_model()
    # The gradient is spoilt and the loss is not yet.
    parameter = model.get_parameter("scale.bias")
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match="A weight is not finite"):
        train(tmp_path, model, replace(CONFIG, checkpoint_steps=1))
    assert load_checkpoint(tmp_path) is None


def test_bfloat16_trains(tmp_path: Path) -> None:
    config = replace(CONFIG, precision="bfloat16", max_epochs=4)
    history = train(tmp_path / "bfloat16", config=config)
    exact = train(tmp_path / "float32", config=replace(config, precision="float32"))
    assert history.records[-1].train_loss < history.records[0].train_loss
    assert history.records[-1].train_loss == pytest.approx(exact.records[-1].train_loss, rel=0.02)
    assert final_files(tmp_path / "bfloat16") != final_files(tmp_path / "float32")
    checkpoint = load_checkpoint(tmp_path / "bfloat16")
    assert checkpoint is not None
    assert {value.dtype for value in checkpoint.weights.values()} == {torch.float32}


def test_batch_norm_never_meets_a_minibatch_of_one(tmp_path: Path) -> None:
    model = Hooked(make_model(norm="batch"), nothing)
    train(tmp_path, model, train_rows=[(0, 65)])
    assert {len(inputs.batch) for inputs in model.inputs} == {33, 32}
    pairs = Hooked(make_model(norm="batch"), nothing)
    train(tmp_path / "pairs", pairs, replace(CONFIG, minibatch_size=2), train_rows=[(0, 5)])
    assert {len(inputs.batch) for inputs in pairs.inputs} == {2}
    with pytest.raises(ConfigError, match="too few cells to train on"):
        train(tmp_path / "one", make_model(norm="batch"), train_rows=[(0, 1)])
    assert not (tmp_path / "one").exists()
    train(tmp_path / "layer", train_rows=[(0, 1)])


def test_progress_shows_epoch_step_loss_speed_and_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas.training.trainer._READ_SECONDS", 0.0)
    train(tmp_path, progress=True)
    line = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    for part in ("epoch 3/3", "step 15", "loss ", "cells/s", "ETA", "100 %"):
        assert part in line
    train(tmp_path, resume=True, progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_trains_as_the_cpu_does(tmp_path: Path, precision: Any) -> None:
    config = replace(CONFIG, max_epochs=5, precision=precision)
    on_cpu = train(tmp_path / "cpu", config=replace(config, precision="float32"))
    on_cuda = train(tmp_path / "cuda", config=replace(config, device="cuda"))
    last = on_cpu.records[-1].train_loss
    assert on_cuda.records[-1].train_loss == pytest.approx(last, rel=0.03)
    again = train(tmp_path / "cuda", config=replace(config, device="cuda"), resume=True)
    assert again == on_cuda
