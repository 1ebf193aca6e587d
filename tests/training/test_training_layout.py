"""Weights that lie by columns, for sparse counts, are trained as those that lie by rows."""

from __future__ import annotations

import pytest
import torch

from atlas.config import ScviConfig, TrainConfig
from atlas.models import build_model
from atlas.training.state import TrainingState
from loaders import ArraySource, MinibatchLoader


@pytest.mark.parametrize("by_columns", [False, True])
def test_fused_adam_follows_the_layout(by_columns: bool) -> None:
    """It walks through parameter, gradient and moments side by side in memory."""
    generator = torch.Generator().manual_seed(0)
    start, curve = torch.randn(2, 5, 70, generator=generator)
    results = []
    for fused in (False, True):
        parameter = torch.nn.Parameter(
            start.t().contiguous().t() if by_columns and fused else start.clone()
        )
        optimizer = torch.optim.Adam([parameter], lr=0.1, weight_decay=0.1, fused=fused)
        for _ in range(5):
            optimizer.zero_grad()
            (curve * parameter.square()).sum().backward()
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_the_first_layer_and_its_moments_lie_by_columns_after_a_resume_too() -> None:
    model = build_model(ScviConfig(n_hidden=4, n_layers=1), 6, 2, seed=0)
    source = ArraySource(torch.ones(8, 6).numpy(), {"batch": [0, 1] * 4})
    config = TrainConfig(device="cpu")
    state = TrainingState.start(model, MinibatchLoader(source, 4, 0), config, torch.device("cpu"))
    weight = model.encoder.hidden.linears[0].weight
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    # As a file has them: by rows.
    state._restore_adam({name: value.contiguous() for name, value in state._adam_state().items()})
    moments = state.optimizer.state[weight]
    for values in (weight, moments["exp_avg"], moments["exp_avg_sq"]):
        assert values.t().is_contiguous()
