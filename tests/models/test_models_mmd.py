"""The discrepancy of batches, against loops over pairs of cells in double precision."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch

from atlas.models import mmd
from atlas.models.mmd import SCALES, batch_discrepancy, multi_scale_kernel

Floats = npt.NDArray[np.float64]


def _mean_kernel(x: Floats, y: Floats) -> float:
    """Mean over pairs of cells of the sum over scales, one at a time."""
    total = 0.0
    for a in x:
        for b in y:
            squared = float(((a - b) ** 2).sum())
            total += sum(np.exp(-squared / (2 * scale)) for scale in SCALES)
    return total / (len(x) * len(y))


def _expected(x: Floats, batch: npt.NDArray[np.int64]) -> float:
    """Over pairs of batches with two cells or more, one at a time."""
    groups = [x[batch == code] for code in np.unique(batch) if (batch == code).sum() >= 2]
    pairs = [
        _mean_kernel(a, a) + _mean_kernel(b, b) - 2 * _mean_kernel(a, b)
        for a, b in itertools.combinations(groups, 2)
    ]
    return sum(pairs) / max(1, len(pairs))


@pytest.mark.parametrize("spread", [1e-3, 0.3, 3.0, 300.0])
@pytest.mark.parametrize("n_batch", [2, 5, 40])
def test_it_is_the_double_loop(n_batch: int, spread: float) -> None:
    rng = np.random.default_rng(n_batch)
    batch = rng.integers(0, n_batch, 48)
    batch[batch == 1] = 0
    batch[:1] = 1  # alone in its batch, and left out
    x = rng.normal(0, spread, (48, 7)) + 0.5 * spread * batch[:, None]
    x[5] = x[6]
    x = x.astype(np.float32).astype(np.float64)
    expected = _expected(x, batch)
    assert (expected > 0) == (n_batch > 2)
    # Of two equal cells that lie 10,000 from the origin the squares cancel to 1e-8 or so.
    for dtype, tolerance in (
        (torch.float64, 1e-9 if spread < 100 else 1e-5),
        (torch.float32, 1e-4),
    ):
        found = batch_discrepancy(torch.from_numpy(x).to(dtype), torch.from_numpy(batch))
        assert found.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_a_batch_of_one_cell_is_left_out() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(9, 3)))
    batch = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    with_one = torch.cat([x, x[:1] + 7])
    found = batch_discrepancy(with_one, torch.cat([batch, torch.tensor([3])]))
    torch.testing.assert_close(found, batch_discrepancy(x, batch))
    assert batch_discrepancy(x, torch.arange(9)) == 0  # nothing to compare
    assert batch_discrepancy(x, torch.zeros(9, dtype=torch.int64)) == 0


def test_gradients_by_finite_differences_and_where_cells_are_equal() -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(8, 3))).requires_grad_()
    batch = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
    # The derivatives at the smallest scales are hundreds of thousands, but only at close cells.
    assert torch.autograd.gradcheck(lambda x: batch_discrepancy(x, batch), x, eps=1e-6, atol=1e-5)
    equal = torch.ones(8, 3, requires_grad=True)
    batch_discrepancy(equal, batch).backward()
    assert equal.grad is not None
    assert equal.grad.abs().max() < 1e-6


def test_it_is_zero_for_the_same_cells_and_falls_as_batches_meet() -> None:
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(size=(60, 4)))
    batch = torch.arange(2).repeat_interleave(60)
    by_distance = [batch_discrepancy(torch.cat([x, x + d]), batch).item() for d in (0, 0.3, 1, 3)]
    assert by_distance[0] == pytest.approx(0, abs=1e-9)
    assert by_distance == sorted(by_distance)


def test_each_kernel_value_is_computed_once_however_many_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        kernel = multi_scale_kernel(x)
        sizes.append(tuple(kernel.shape))
        return kernel

    monkeypatch.setattr(mmd, "multi_scale_kernel", counted)
    x = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    batch_discrepancy(x, torch.arange(600) % 300)  # 44,850 pairs of batches
    assert sizes == [(600, 600)]


def test_half_precision_is_widened() -> None:
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = batch_discrepancy(x, torch.arange(10) % 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, batch_discrepancy(x.float(), torch.arange(10) % 2))
