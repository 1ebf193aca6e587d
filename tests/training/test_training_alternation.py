"""The classifier's turn in scANVI's alternating training: which cells, and which z."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from atlas.config import ScanviConfig, TrainConfig
from atlas.models import SCANVI, LabelTree, build_model
from atlas.training.alternation import Alternation
from atlas.training.inputs import CellColumns, InputsBuilder
from loaders import ArraySource

N_VARS = 12
TREE = LabelTree.make(["common", "rare"])


def make(
    label: np.ndarray, rows: list[tuple[int, int]], **changes: object
) -> tuple[SCANVI, Alternation]:
    """A scANVI, and the turn of its classifier."""
    counts = np.random.default_rng(0).poisson(2.0, (len(label), N_VARS))
    codes = {"batch": np.zeros(len(label), int), "study": np.zeros(len(label), int)}
    source = ArraySource(counts, codes, segments=(0, len(label)))
    config = ScanviConfig(n_hidden=8, n_latent=3, **changes)  # type: ignore[arg-type]
    model = build_model(config, N_VARS, 1, seed=0, labels=TREE)
    assert isinstance(model, SCANVI)
    columns = CellColumns(label=label.astype(np.int32))
    to_inputs = InputsBuilder(torch.device("cpu"), None, columns)
    training = TrainConfig(device="cpu", threads=1, lr=1e-9)
    return model, Alternation(model, source, rows, to_inputs, columns, training)


@pytest.mark.parametrize("unlabelled", [False, True])
def test_each_label_comes_equally_often(unlabelled: bool) -> None:
    """19 of 20 labelled cells have the one label; cells without any take no part."""
    rng = np.random.default_rng(1)
    label = np.where(rng.random(2000) < 0.05, 1, 0)
    if unlabelled:
        label[rng.random(2000) < 0.5] = -1
    _, turn = make(label, [(0, 1500)])
    _, _, drawn = turn._encode(epoch=3)
    assert len(drawn) == (label[:1500] >= 0).sum()
    assert set(drawn.tolist()) == {0, 1}
    assert 0.4 < float(drawn.double().mean()) < 0.6


def test_each_step_draws_z_from_the_posterior_anew() -> None:
    """Sums of z over the cells, one a pass, have the mean and variance that the posterior has."""
    passes = 500
    model, turn = make(np.arange(12) % 2, [(0, 12)], classifier_epochs=passes)
    mean, variance, label = turn._encode(epoch=0)
    assert len(label) == 12  # one minibatch a pass
    seen: list[Tensor] = []

    def keep(_: object, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0].detach().clone())

    hook = model.classifier.register_forward_pre_hook(keep)
    turn.run(epoch=0)
    hook.remove()
    sums = torch.stack([z.sum(0) for z in seen])
    assert sums.shape == (passes, 3)
    expected = variance.sum(0)
    torch.testing.assert_close(sums.var(0), expected, rtol=0.35, atol=0)
    distance = (sums.mean(0) - mean.sum(0)) / (expected / passes).sqrt()
    assert distance.abs().max() < 4.5
