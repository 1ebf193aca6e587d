"""The penalty that keeps batches apart, against loops in float64 and scikit-learn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from atlas.config import ScviConfig
from atlas.models import Inputs, build_model
from atlas.models.apart import Companions, KeepApart, principal_components
from atlas.models.base import evaluating
from atlas.models.expression import log_normalized


def _inputs(n: int, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    batch = np.arange(n) % 3
    rates = rng.gamma(1.0, 2.0, 40) * np.where(np.arange(40) % 3 == batch[:, None], 2, 1)
    counts = torch.from_numpy(rng.poisson(rates).astype(np.float32))
    return Inputs(counts, torch.from_numpy(batch))


def _own_share(x: np.ndarray, batch: np.ndarray) -> np.ndarray:
    out = np.empty(len(x))
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        squared = {j: float(((x[i] - x[j]) ** 2).sum()) for j in others}
        unit = sorted(squared.values())[14]
        weight = {j: np.exp(-2 * squared[j] / unit) for j in others}
        own = sum(weight[j] for j in others if batch[j] == batch[i])
        out[i] = np.clip(own / sum(weight.values()), 1e-4, 1 - 1e-4)
    return out


@pytest.mark.parametrize("one_batch_beside_others", [False, True])
def test_against_loops(one_batch_beside_others: bool) -> None:
    inputs = _inputs(150 if one_batch_beside_others else 64)
    companions = None
    module = build_model(ScviConfig(n_hidden=8, n_latent=3), 40, 3, seed=1)
    mean, components = principal_components([inputs], 5)
    with evaluating(module):
        if one_batch_beside_others:
            beside, inputs = inputs, dataclasses.replace(_inputs(50, 1), batch=torch.full((50,), 2))
            z, _ = module.encode(beside)
            away = beside.batch + 3
            companions = Companions(log_normalized(beside), z, away)
        z, _ = module.encode(inputs)
    penalty = KeepApart(mean, components, 0.7, companions)(module, inputs)
    x, batch = log_normalized(inputs), inputs.batch
    if companions is not None:  # 50 of the 150
        taken = slice(int(inputs.counts.sum()) % 3, None, 3)
        x = torch.cat([x, companions.expression[taken]])
        z = torch.cat([z, companions.z[taken]])
        batch = torch.cat([batch, companions.batch[taken]])
    along = (x.double().numpy() - mean.numpy()) @ components.double().numpy()
    p = _own_share(along, batch.numpy())
    q = _own_share(z.double().numpy(), batch.numpy())
    expected = 0.7 * np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-4)
    penalty.backward()  # type: ignore[no-untyped-call]
    gradient = module.encoder.hidden.linears[0].batch_weight.grad
    assert gradient.abs().max() > 0


def test_nothing_to_keep_apart() -> None:
    inputs = _inputs(64)
    module = build_model(ScviConfig(n_hidden=8, n_latent=3), 40, 3, seed=1)
    penalty = KeepApart(*principal_components([inputs], 5), 1.0)
    assert penalty(module, _inputs(20)) is None
    one = Inputs(inputs.counts, torch.zeros(64, dtype=torch.int64))
    assert penalty(module, one) is None


def test_components_are_those_of_scikit_learn() -> None:
    parts = [_inputs(200, seed) for seed in range(3)]
    mean, components = principal_components(parts, 4)
    x = np.concatenate([log_normalized(part).numpy() for part in parts]).astype(np.float64)
    known = PCA(4, svd_solver="full").fit(x)
    np.testing.assert_allclose(mean, x.mean(axis=0), atol=1e-5)
    alike = np.abs((components.double().numpy() * known.components_.T).sum(axis=0))
    np.testing.assert_allclose(alike, 1, atol=1e-4)
