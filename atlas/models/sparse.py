"""Counts that stay sparse on the CPU: their sums, and the linear layer that they enter.

About 7 % of the counts of a cell are above zero, so the first layer of an encoder multiplies mostly
by zero. Here it does not: each count adds a multiple of a row of weights, and so does the gradient,
by the same loop with the counts transposed.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas.models import products
from atlas.models.gathered import WIDTH, add_rows
from atlas.models.threads import in_parts

Array = npt.NDArray[Any]


def is_sparse(counts: Tensor) -> bool:
    """Whether counts are in ``torch.sparse_csr`` layout."""
    return counts.layout == torch.sparse_csr


def csr(indptr: Tensor, indices: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A tensor in ``torch.sparse_csr`` layout of its parts, which are believed."""
    return torch.sparse_csr_tensor(indptr, indices, values, shape, check_invariants=False)


with warnings.catch_warnings():
    # With the first such tensor torch warns that the layout is in beta state. Here it only holds
    # the parts together: no operation of torch's on it takes part in training.
    warnings.simplefilter("ignore", UserWarning)
    csr(torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0), torch.Size((1, 1)))


def masked(counts: Tensor, present: Tensor) -> Tensor:
    """Counts, dense or sparse, with 0 where ``present`` is False."""
    if not is_sparse(counts):
        return counts.masked_fill(~present, 0.0)
    indptr, indices = counts.crow_indices(), counts.col_indices()
    rows = torch.arange(len(present)).repeat_interleave(indptr.diff(), output_size=len(indices))
    values = counts.values() * present[rows, indices.long()]
    return csr(indptr, indices, values, counts.shape)


def log1p(counts: Tensor) -> Tensor:
    """``log(1 + counts)``, dense or sparse as they are."""
    if not is_sparse(counts):
        return counts.log1p()
    values = counts.values().log1p()
    return csr(counts.crow_indices(), counts.col_indices(), values, counts.shape)


def row_sums(counts: Tensor) -> Tensor:
    """Sum of each row, dense or sparse: (n_cells, 1)."""
    if not is_sparse(counts):
        return counts.sum(dim=-1, keepdim=True)
    sums = np.empty(len(counts), np.float32)
    _sum_rows(counts.crow_indices().numpy(), counts.values().numpy(), sums)
    return torch.from_numpy(sums).unsqueeze(-1)


def times_weight(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias``, where x may be sparse.

    Then it is computed in float32, whatever ``torch.autocast`` says, and quicker where the rows of
    ``weight.T`` are contiguous.
    """
    if not is_sparse(x):
        return products.linear(x, weight, bias)
    if x.values().dtype != torch.float32 or weight.dtype != torch.float32:
        return F.linear(x.to_dense(), weight, bias)
    out: Tensor = _SparseLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _SparseLinear(torch.autograd.Function):
    """Sparse counts times dense weights; the counts have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = bias.detach().repeat(len(x), 1)
        add_products(_parts(x), weight.detach().t().contiguous(), out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        by_weight = torch.zeros(x.shape[1], grad_output.shape[1])
        add_products(transposed(*_parts(x), x.shape[1]), grad_output, by_weight)
        return None, by_weight.t(), grad_output.sum(dim=0)


def _parts(x: Tensor) -> tuple[Array, Array, Array]:
    parts = x.crow_indices(), x.col_indices(), x.values()
    indptr, indices, values = (part.contiguous().numpy() for part in parts)
    return indptr, indices, values


def add_products(sparse: tuple[Array, Array, Array], dense: Tensor, out: Tensor) -> None:
    """Add the product of a CSR matrix and a dense one to ``out``, float32, on torch's threads."""
    indptr, indices, values = sparse
    width = out.shape[1]
    spare = -width % WIDTH
    result = F.pad(out, (0, spare)) if spare else out
    blocks = F.pad(dense, (0, spare)).view(len(dense), result.shape[1] // WIDTH, WIDTH)
    blocks = blocks.transpose(0, 1).contiguous()
    table, sums = blocks.numpy(), result.numpy()

    def work(begin: int, end: int) -> None:
        add_rows(begin, end, indptr, indices, values, table, sums)

    in_parts(len(sums), work)
    if spare:
        out.copy_(result[:, :width])


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _sum_rows(indptr: Array, values: Array, out: Array) -> None:
    for i in range(len(out)):
        total = 0.0
        for k in range(indptr[i], indptr[i + 1]):
            total += values[k]
        out[i] = total


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def transposed(
    indptr: Array, indices: Array, values: Array, n_columns: int
) -> tuple[Array, Array, Array]:
    """The transpose of a CSR matrix, in CSR form; its rows are in the order of the columns here."""
    begin = np.zeros(n_columns + 1, np.int64)
    for k in range(len(indices)):
        begin[np.int64(indices[k]) + 1] += 1
    for j in range(n_columns):
        begin[j + 1] += begin[j]
    at = begin[:-1].copy()
    rows, moved = np.empty(len(indices), np.int32), np.empty(len(indices), np.float32)
    for i in range(len(indptr) - 1):
        for k in range(indptr[i], indptr[i + 1]):
            column = np.int64(indices[k])
            rows[at[column]] = i
            moved[at[column]] = values[k]
            at[column] += 1
    return begin, rows, moved


def with_sorted_columns(
    indptr: Array, indices: Array, values: Array, n_columns: int
) -> tuple[Array, Array, Array]:
    """The same CSR matrix, the columns of each row in rising order.

    Sums over a row are then the same to the last bit, however its source had it.
    """
    if _is_sorted(indptr, indices):
        return indptr, indices, values
    there = transposed(indptr, indices, values, n_columns)
    back: tuple[Array, Array, Array] = transposed(*there, len(indptr) - 1)
    return back


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _is_sorted(indptr: Array, indices: Array) -> bool:
    for i in range(len(indptr) - 1):
        falls = 0
        for k in range(indptr[i] + 1, indptr[i + 1]):
            falls += indices[k] <= indices[k - 1]
        if falls:
            return False
    return True


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def from_dense(counts: Array) -> tuple[Array, Array, Array]:
    """CSR form of the elements that are not 0."""
    n = 0
    for i in range(counts.shape[0]):
        for j in range(counts.shape[1]):
            n += counts[i, j] != 0
    indptr = np.zeros(len(counts) + 1, np.int64)
    # One more than is kept: each element is written, and the next in its place where it is 0.
    indices, values = np.empty(n + 1, np.int32), np.empty(n + 1, np.float32)
    at = 0
    for i in range(counts.shape[0]):
        for j in range(counts.shape[1]):
            indices[at] = j
            values[at] = counts[i, j]
            at += counts[i, j] != 0
        indptr[i + 1] = at
    return indptr, indices[:n], values[:n]
