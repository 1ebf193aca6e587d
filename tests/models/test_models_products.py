"""Linear layers by oneDNN, against float64 and torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from atlas.config import ScviConfig
from atlas.models import build_model, products
from atlas.models.layers import GeneLinear


def _tensors(n_cells: int = 37, n_in: int = 24, n_out: int = 301) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n_cells, n_in), (n_out, n_in), (n_out,))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.skipif(not products._THERE, reason="no AVX-512, or a torch without oneDNN")
@pytest.mark.parametrize("by_columns", [False, True])
def test_products_and_gradients_against_float64(by_columns: bool) -> None:
    x, weight, bias = _tensors()
    if by_columns:
        weight = weight.t().contiguous().t()
    own = [t.clone().requires_grad_() for t in (x, weight, bias)]
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    asked = torch.randn(37, 301, generator=torch.Generator().manual_seed(1))
    out = products.linear(*own)
    assert type(out.grad_fn).__name__ == "_LinearBackward"  # not torch's own
    expected = F.linear(*exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    out.backward(asked)
    expected.backward(asked.double())
    for one, other in zip(own, exact, strict=True):
        assert one.grad is not None
        assert one.grad.stride() == one.stride()  # what fused Adam takes for granted
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def test_what_is_not_asked_for_has_no_gradient() -> None:
    x, weight, bias = _tensors()
    bias.requires_grad_()
    products.linear(x, weight, bias).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(bias.grad, torch.full((301,), 37.0))


def test_other_kinds_are_torchs() -> None:
    x, weight, bias = _tensors()
    double = products.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(double, F.linear(x.double(), weight.double(), bias.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight, bias).dtype == torch.bfloat16
    assert products.linear(x[:0], weight, bias).shape == (0, 301)
    stacked = products.linear(x.expand(2, -1, -1), weight, bias)
    torch.testing.assert_close(stacked[1], F.linear(x, weight, bias))


def test_the_layer_is_drawn_as_torchs_and_lies_by_columns() -> None:
    torch.manual_seed(3)
    expected = torch.nn.Linear(8, 50)
    torch.manual_seed(3)
    layer = GeneLinear(8, 50)
    torch.testing.assert_close(layer.weight, expected.weight, rtol=0, atol=0)
    torch.testing.assert_close(layer.bias, expected.bias, rtol=0, atol=0)
    assert layer.weight.t().is_contiguous()
    model = build_model(ScviConfig(n_hidden=8), 50, 2, seed=0)
    assert {name for name, part in model.named_modules() if isinstance(part, GeneLinear)} == {
        "scale",
        "zero_inflation",
    }
