"""What follows the product of a hidden layer, against torch's operations in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atlas.models import layers, noise
from atlas.models.activation import Dropout, can_fuse_activation, fused_activation
from atlas.models.base import Conditions
from atlas.models.layers import HiddenStack

EPS = 1e-5


def _plain(
    h: Tensor, batch: Tensor, weight: Tensor | None, eps: float, dropout: Dropout | None
) -> Tensor:
    """The same by torch."""
    if weight is not None:
        h = h + F.embedding(batch, weight)
    out = F.relu(F.layer_norm(h, h.shape[1:], eps=eps))
    if dropout is None:
        return out
    return out * (dropout.bits >= dropout.threshold) * dropout.scale


@pytest.mark.parametrize("width", [1, 5, 20, 128, 131])
@pytest.mark.parametrize("with_batch", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_it_is_torchs_operations(width: int, with_batch: bool, rate: float) -> None:
    generator = torch.Generator().manual_seed(width)
    h = torch.randn(33, width, generator=generator) * 3 + 1
    batch = torch.randint(0, 4, (33,), generator=generator)
    weight = torch.randn(5, width, generator=generator) if with_batch else None
    direction = torch.randn(33, width, generator=generator)
    dropout = None
    if rate:
        dropout = Dropout(noise.bits(h, generator), noise.threshold(rate), 1 / (1 - rate))
    results = []
    for function, dtype in ((fused_activation, torch.float32), (_plain, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (h, weight) if x is not None]
        out = function(leaves[0], batch, leaves[1] if with_batch else None, EPS, dropout)
        gradients = torch.autograd.grad((out * direction.to(dtype)).sum(), leaves)
        results.append([out.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == torch.float32
        # of one element the norm is 0, whatever it is: what is left is rounding
        atol = 2e-5 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=atol)
        if width == 1:
            assert (expected == 0).all()


def test_what_is_not_a_number_stays_so() -> None:
    h = torch.randn(4, 8)
    h[1, 3] = torch.nan
    dropout = Dropout(torch.full((4, 8), -(2**31), dtype=torch.int32), 0, 1.0)
    for given in (None, dropout):
        out = fused_activation(h, torch.zeros(4, dtype=torch.int64), None, EPS, given)
        assert torch.equal(out.isnan().any(dim=1), torch.tensor([False, True, False, False]))


def test_a_stack_is_the_same_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws too, with the generator where it would be."""
    torch.manual_seed(0)
    stack = HiddenStack(30, 16, 2, 3, "layer", dropout_rate=0.2)
    x, conditions = torch.randn(50, 30), Conditions(torch.arange(50) % 3)
    results = []
    for fuses in (True, False):
        if not fuses:
            monkeypatch.setattr(layers, "can_fuse_activation", lambda *tensors: False)
        generator = torch.Generator().manual_seed(1)
        out = stack(x, conditions, generator)
        gradients = torch.autograd.grad(out.square().sum(), list(stack.parameters()))
        results.append([out.detach(), *gradients, generator.get_state()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("width", [5, 20, 130])
def test_the_last_bits_do_not_depend_on_where_memory_lies(width: int) -> None:
    torch.manual_seed(0)
    h, batch, weight = torch.randn(9, width), torch.arange(9) % 2, torch.randn(2, width)
    rng, seen = np.random.default_rng(0), []
    for turn in range(40):
        held = [np.full(rng.integers(1, 600), np.nan, np.float32) for _ in range(30)]
        del held[:: 1 + turn % 4]
        leaves = [x.clone().requires_grad_() for x in (h, weight)]
        out = fused_activation(leaves[0], batch, leaves[1], EPS, None)
        seen.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for one in seen for a, b in zip(one, seen[0], strict=True))


def test_other_types_take_torchs_way() -> None:
    h, weight = torch.zeros(2, 3), torch.zeros(1, 3)
    assert can_fuse_activation(h, weight)
    assert not can_fuse_activation(h.double(), weight)
    assert not can_fuse_activation(h, weight.double())
    assert not can_fuse_activation(h.to("meta"), None)
