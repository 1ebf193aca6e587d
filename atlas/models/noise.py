"""Random draws for the cells of a minibatch, also where several processes share its cells."""

from __future__ import annotations

import torch
from torch import Tensor

from atlas.errors import ModelError


class SharedGenerator(torch.Generator):
    """A generator that stands alike in all processes that train together.

    Each draws for all cells of a minibatch and keeps what belongs to its own: what a cell is given
    does not depend on how many processes there are, and afterwards the generators stand alike.

    Attributes
    ----------
    own
        Where the cells of this process are in the whole minibatch: int64, (n_own,).
    n_cells
        Cells of the whole minibatch.
    """

    own: Tensor
    n_cells: int


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal draws in the shape, dtype and place of a tensor, (n_cells, …)."""
    shape = _drawn(like, generator)
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    return _kept(noise, generator)


def kept(like: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """False for a share ``rate`` of the elements of a tensor, (n_cells, …): bool.

    The share is rounded to a multiple of 2⁻³²: one draw of 64 bits then serves two elements, where
    one an element took longer than the product of a layer.
    """
    shape = _drawn(like, generator)
    n = shape.numel()
    draws = torch.empty(-(-n // 2), dtype=torch.int64, device=like.device)
    bits = draws.random_(-(2**63), None, generator=generator).view(torch.int32)
    return _kept(bits[:n].view(shape), generator) >= _threshold(rate) - 2**31


def kept_share(rate: float) -> float:
    """The share of elements that :func:`kept` leaves True."""
    return (2**32 - _threshold(rate)) / 2**32


def _threshold(rate: float) -> int:
    return min(round(rate * 2**32), 2**32 - 1)


def _drawn(like: Tensor, generator: torch.Generator) -> torch.Size:
    if not isinstance(generator, SharedGenerator):
        return like.shape
    if len(like) != len(generator.own):
        raise ModelError(
            "Noise that several processes share is drawn for the cells of a minibatch",
            found=f"{len(like)} rows",
            expected=f"{len(generator.own)} cells",
        )
    return torch.Size((generator.n_cells, *like.shape[1:]))


def _kept(drawn: Tensor, generator: torch.Generator) -> Tensor:
    return drawn[generator.own] if isinstance(generator, SharedGenerator) else drawn
