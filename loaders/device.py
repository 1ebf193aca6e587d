"""Minibatches on a device: the sparse parts travel, dense rows are made where they are used."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from loaders.minibatch import Minibatch


def to_torch(minibatch: Minibatch, device: torch.device | str, dense: bool) -> torch.Tensor:
    """See :meth:`loaders.Minibatch.to_torch`."""
    target = torch.device(device)
    shape = (minibatch.n_rows, minibatch.n_vars)
    data = _move(minibatch.data, target)
    indptr = _move(minibatch.indptr, target)
    # Positions in the dense tensor can exceed 32 bits; int32 is widened only after the transfer.
    indices = _move(minibatch.indices, target).to(torch.int64)
    # The length is given, because to learn it from the device would wait for all work queued there.
    lengths = indptr.diff()
    rows = torch.arange(minibatch.n_rows, device=target).repeat_interleave(
        lengths, output_size=len(minibatch.data)
    )
    flat = rows * minibatch.n_vars + indices
    if dense:
        counts = torch.zeros(shape[0] * shape[1], dtype=torch.float32, device=target)
        return counts.scatter_(0, flat, data).view(shape)
    # Sparse kernels expect the columns of a row to rise.
    order = flat.argsort()
    return torch.sparse_csr_tensor(
        indptr, indices[order], data[order], size=shape, check_invariants=False
    )


def _move(array: npt.NDArray[Any], target: torch.device) -> torch.Tensor:
    """Copy to the device; to a GPU from pinned memory, so that the host need not wait."""
    tensor = torch.from_numpy(array)
    if target.type != "cuda":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)
