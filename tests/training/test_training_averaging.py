"""The moving average of the weights."""

from __future__ import annotations

import torch

from atlas.config import ScviConfig
from atlas.models import build_model
from atlas.training.averaging import WeightAverage


def test_the_average_is_the_recursion_and_leaves_the_model_alone() -> None:
    model = build_model(ScviConfig(n_hidden=4, norm="batch"), 5, 2, seed=0)
    average = WeightAverage(model, steps=20)
    expected = {k: v.double().clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        model.encoder.state_dict()  # reading changes nothing
        average.update(model, step)
        share = max(1 / 20, 9 / (step + 10))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] += share * (value.double() - expected[name])
            else:
                expected[name] = value.double()
    for name, value in average.weights.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-4)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with average.applied(model):
        for name, value in model.state_dict().items():
            assert torch.equal(value, average.weights[name])
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name])


def test_of_constant_weights_it_is_these_weights() -> None:
    model = build_model(ScviConfig(n_hidden=4), 5, 2, seed=0)
    average = WeightAverage(model, steps=300)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    for step in range(3000):
        average.update(model, step)
    for name, value in average.weights.items():
        if value.is_floating_point() and name in dict(model.named_parameters()):
            torch.testing.assert_close(value, torch.full_like(value, 2.0), rtol=1e-3, atol=1e-3)


def test_restored_it_goes_on_the_same() -> None:
    model = build_model(ScviConfig(n_hidden=4), 5, 2, seed=0)
    one, other = WeightAverage(model, 10), WeightAverage(model, 10)
    one.update(build_model(ScviConfig(n_hidden=4), 5, 2, seed=1), 50)
    other.restore({name: value.clone() for name, value in one.weights.items()})
    for name, value in one.weights.items():
        assert torch.equal(value, other.weights[name])
