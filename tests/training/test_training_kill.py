"""Training killed at random moments and resumed ends with the very same bytes.

The test runs this file as a script in a fresh process, which imports torch once, never computes
itself, and forks a child for each attempt: so many kills cost little.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from atlas import files
from atlas.config import (
    Architecture,
    CvaeConfig,
    DavaeConfig,
    ScanviConfig,
    ScviConfig,
    TrainConfig,
    TrvaeConfig,
)
from atlas.models import LabelTree
from atlas.models.base import Model
from atlas.models.build import build_model
from atlas.training.checkpoint import load_checkpoint
from atlas.training.inputs import CellColumns
from atlas.training.loop import fit
from loaders import ArraySource

N_OBS, N_VARS = 600, 60
TRAIN, HELD_OUT = [(0, 200), (250, 600)], [(200, 250)]
STEPS_PER_EPOCH = -(-550 // 64)
CONFIG = TrainConfig(
    max_epochs=6,
    minibatch_size=64,
    checkpoint_steps=3,
    early_stopping=True,
    device="cpu",
    threads=1,
)

MODELS: dict[str, Architecture] = {
    "scvi": ScviConfig(n_hidden=32),
    "scanvi": ScanviConfig(n_hidden=32, classifier_epochs=3),
    "trvae": TrvaeConfig(n_hidden=32),
    "cvae": CvaeConfig(n_hidden=32),
    "davae": DavaeConfig(),
}
LABELS = LabelTree.make(["a", "b", "c"], {"a": "ab", "b": "ab", "c": "c "})


def make_source() -> ArraySource:
    rng = np.random.default_rng(0)
    means = rng.gamma(1.0, 2.0, (4, N_VARS))[rng.integers(0, 4, N_OBS)]
    codes = {"batch": rng.integers(0, 3, N_OBS), "study": (np.arange(N_OBS) >= 250).astype(int)}
    return ArraySource(rng.poisson(means), codes, segments=(0, 250, N_OBS))


def make_model(kind: str, seed: int) -> Model:
    labels = LABELS if kind == "scanvi" else None
    return build_model(MODELS[kind], N_VARS, 3, seed, labels=labels)


def train(out: Path, model: Model) -> None:
    presence = np.ones((2, N_VARS), dtype=bool)
    presence[1, ::3] = False
    label = np.random.default_rng(1).integers(-1, len(LABELS.names), N_OBS).astype(np.int32)
    fit(
        model,
        make_source(),
        train_rows=TRAIN,
        validation_rows=HELD_OUT,
        presence=presence,
        config=CONFIG,
        out=out,
        resume=True,
        describe={"model": model.config.to_json()},
        columns=CellColumns(label=label) if isinstance(model.config, ScanviConfig) else None,
        progress=False,
    )


def train_and_die(
    kind: str, out: Path, *, at_event: int | None = None, after: float | None = None
) -> None:
    """Train until the n-th step, write or sync, or so many seconds; then SIGKILL this process."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    events = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events == at_event:
            die()

    write, sync = files.write_bytes, files.sync_folder

    def torn_write(path: Path, data: bytes, *, exclusive: bool = False) -> None:
        write(path, data[: len(data) // 2], exclusive=exclusive)
        event()
        write(path, data)

    def counted_sync(path: Path) -> None:
        event()
        sync(path)

    # Another seed each time: what a resumed model starts with must not matter.
    start = 0 if load_checkpoint(out) is None else os.getpid()
    model = make_model(kind, start)
    loss: Callable[..., object] = model.loss

    def counted_loss(*args: object) -> object:
        event()
        return loss(*args)

    if at_event is not None:
        files.write_bytes, files.sync_folder = torn_write, counted_sync  # type: ignore[assignment]
        model.loss = counted_loss  # type: ignore[method-assign, assignment]
    if after is not None:
        timer = threading.Timer(after, die)
        timer.daemon = True
        timer.start()
    train(out, model)


def in_child(body: Callable[[], None]) -> bool:
    """Run in a forked process; whether it was killed. Any other failure is an error here."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise RuntimeError(f"training failed with status {status}")
    return False


def step_of(out: Path) -> int:
    """The step that a resume would go on from."""
    checkpoint = load_checkpoint(out)
    return 0 if checkpoint is None else checkpoint.progress.step


def main(kind: str, folder: Path, seed: int, kills: int) -> None:
    """Train once undisturbed and once with kills; print where each resume began."""
    # The first optimiser imports much of torch: once here, not in every child.
    torch.optim.Adam([torch.zeros(1)])
    in_child(lambda: train_and_die(kind, folder / "whole"))
    draw = random.Random(seed)
    out = folder / "killed"
    steps: list[int] = []
    for kill in range(kills):
        if kill % 3:
            at_event = draw.randint(1, 40)
            killed = in_child(lambda n=at_event: train_and_die(kind, out, at_event=n))  # type: ignore[misc]
        else:
            after = draw.uniform(0.05, 0.6)
            killed = in_child(lambda s=after: train_and_die(kind, out, after=s))  # type: ignore[misc]
        if not killed:
            break
        steps.append(step_of(out))
    in_child(lambda: train_and_die(kind, out))
    print(json.dumps(steps))


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "seed"),
    [("scvi", 0), ("scvi", 1), ("scanvi", 0), ("trvae", 0), ("cvae", 0), ("davae", 0)],
)
def test_killed_and_resumed_is_the_same_to_the_byte(tmp_path: Path, kind: str, seed: int) -> None:
    command = [sys.executable, __file__, kind, str(tmp_path), str(seed), "10"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    steps = json.loads(found.stdout)
    # The kills did what they are for: they came in many places, within epochs too.
    assert len(set(steps)) >= 4
    assert any(step % STEPS_PER_EPOCH for step in steps)

    whole, killed = (load_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert whole is not None
    assert killed is not None
    assert whole.progress.finished
    assert killed.progress.finished
    written = {
        name: {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.safetensors")}
        for name in ("whole", "killed")
    }
    assert set(written["whole"]) == {
        f"{part}.safetensors" for part in ("weights", "optimizer", "state", "average", "best")
    }
    assert written["whole"] == written["killed"]

    def without_times(lines: list[str]) -> list[dict[str, object]]:
        records = map(json.loads, lines)
        times = ("seconds", "cells_per_second")
        return [{k: v for k, v in record.items() if k not in times} for record in records]

    logs = [
        (tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")
    ]
    assert len(logs[0]) == CONFIG.max_epochs
    assert without_times(logs[0]) == without_times(logs[1])
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob(".*")] == []


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
