"""Steps of the optimiser beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from atlas.models.threads import threads
from atlas.training.adam import Stepper
from atlas.training.averaging import WeightAverage


class _Parts(nn.Module):
    """Parameters of several layouts, one of them large, one without gradient, and a buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Parameter(torch.randn(7, 5, dtype=dtype))
        self.columns = nn.Parameter(torch.randn(200, 301, dtype=dtype).t())
        self.bias = nn.Parameter(torch.randn(11, dtype=dtype))
        self.scalar = nn.Parameter(torch.randn((), dtype=dtype))
        self.unused = nn.Parameter(torch.randn(3, dtype=dtype))
        self.frozen = nn.Parameter(torch.randn(3, dtype=dtype), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2, dtype=dtype))
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))


def _optimizer(module: nn.Module, weight_decay: float) -> torch.optim.Adam:
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.Adam(trained, lr=0.01, eps=0.01, weight_decay=weight_decay)


def _gradients(module: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.requires_grad and name != "unused" and (name != "bias" or number > 2):
            # by rows, also where the parameter lies by columns
            parameter.grad = drawn.to(parameter.dtype).contiguous()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_it_is_torchs_adam_and_average(
    weight_decay: float, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas.training.adam._A_THREAD", 1000)
    ours, theirs = _Parts(), _Parts(torch.float64)
    theirs.load_state_dict(ours.state_dict())
    averages = [WeightAverage(module, 5) for module in (ours, theirs)]
    optimizers = [_optimizer(module, weight_decay) for module in (ours, theirs)]
    stepper = Stepper(optimizers[0], averages[0], ours)
    with threads(1, heavy=n_threads):
        for number in range(8):
            for module in (ours, theirs):
                _gradients(module, number)
                module.seen += 1
                module.counted += 1
            stepper.step(number)
            optimizers[1].step()
            averages[1].update(theirs, number)
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, expected in theirs.state_dict().items():
        pairs.append((ours.state_dict()[name], expected))
        pairs.append((averages[0].weights[name], averages[1].weights[name]))
    for own, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert optimizers[0].state[own].keys() == optimizers[1].state[its].keys()
        pairs += [(optimizers[0].state[own][k], v) for k, v in optimizers[1].state[its].items()]
    assert len(pairs) == 2 * 8 + 3 * 4
    for found, expected in pairs:
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas.training.adam._A_THREAD", 1000)
    found = []
    for n_threads in (1, 2, 3):
        module = _Parts()
        average = WeightAverage(module, 5)
        stepper = Stepper(_optimizer(module, 0.1), average, module)
        with threads(1, heavy=n_threads):
            for number in range(3):
                _gradients(module, number)
                stepper.step(number)
        found.append({**module.state_dict(), **{f"a {k}": v for k, v in average.weights.items()}})
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_other_types_take_torchs_way() -> None:
    ours, theirs = _Parts(torch.float64), _Parts(torch.float64)
    optimizers = [_optimizer(module, 0.0) for module in (ours, theirs)]
    average = WeightAverage(ours, 5)
    stepper = Stepper(optimizers[0], average, ours)
    for number in range(3):
        for module in (ours, theirs):
            _gradients(module, number)
        stepper.step(number)
        optimizers[1].step()
    for own, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own, its)
    assert not torch.equal(average.weights["rows"], theirs.rows)
