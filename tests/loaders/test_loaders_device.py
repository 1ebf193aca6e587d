"""Minibatches as tensors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders_helpers import counts, source

from loaders import ArraySource, Minibatch, MinibatchLoader, RowBlock

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
        ],
    ),
]


class Unsorted(ArraySource):
    """Gives the columns of a block in falling order."""

    def read_rows(self, starts, stops) -> RowBlock:
        block = super().read_rows(starts, stops)
        rows = np.repeat(np.arange(block.n_rows), np.diff(block.indptr))
        order = np.lexsort((-block.indices, rows))
        return RowBlock(block.indptr, block.indices[order], block.data[order])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("kind", [ArraySource, Unsorted])
def test_tensors_agree_with_scipy(kind, device):
    matrix = counts(500)
    for minibatch in MinibatchLoader(kind(matrix), 64):
        expected = matrix[minibatch.rows].toarray()
        assert np.array_equal(minibatch.to_scipy().toarray(), expected)
        dense = minibatch.to_torch(device)
        assert (dense.dtype, dense.layout, dense.device.type) == (
            torch.float32,
            torch.strided,
            device,
        )
        assert np.array_equal(dense.cpu().numpy(), expected)
        sparse = minibatch.to_torch(device, dense=False)
        assert (sparse.dtype, sparse.layout) == (torch.float32, torch.sparse_csr)
        torch._validate_sparse_csr_tensor_args(
            sparse.crow_indices(), sparse.col_indices(), sparse.values(), sparse.shape
        )
        assert np.array_equal(sparse.to_dense().cpu().numpy(), expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("device", DEVICES)
def test_positions_beyond_32_bits(device):
    columns = np.array([7, 2, 2**30 - 1, 0, 9, 3], dtype=np.int32)
    minibatch = Minibatch(
        np.array([0, 0, 0, 0, 3, 6]),
        columns,
        np.arange(6, dtype=np.float32),
        np.arange(5),
        {},
        n_vars=2**30,
    )
    sparse = minibatch.to_torch(device, dense=False)
    assert sparse.col_indices().tolist() == [2, 7, 2**30 - 1, 0, 3, 9]
    assert sparse.values().tolist() == [1, 0, 2, 3, 5, 4]


def test_rows_without_counts():
    minibatch = next(iter(MinibatchLoader(ArraySource(np.zeros((5, 4))), 3)))
    assert torch.equal(minibatch.to_torch(), torch.zeros(3, 4))


def test_writing_into_a_tensor_leaves_the_minibatch_alone():
    minibatch = next(iter(MinibatchLoader(source(), 30)))
    before = minibatch.to_scipy()
    minibatch.to_torch().add_(1)
    minibatch.to_torch(dense=False).values().add_(1)
    assert (minibatch.to_scipy() != before).nnz == 0


def test_torch_is_imported_only_when_asked_for():
    code = "import sys, loaders; sys.exit('torch' in sys.modules or 'atlas' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
