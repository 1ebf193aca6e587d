"""From a minibatch of the loader to the inputs of a model, on its device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atlas.models.base import Inputs
from atlas.models.sparse import csr, with_sorted_columns
from loaders import DeviceFeed, Minibatch


@dataclass(frozen=True, slots=True)
class CellColumns:
    """What a model is told of each row of the source, beside its counts.

    Attributes
    ----------
    batch
        The model's code of its batch: int32, (n_obs,); None where the source's codes are the
        model's.
    label
        Class, -1 for none: int32, (n_obs,).
    categories
        Codes of the categorical covariates: int32, (n_obs, n_covariates).
    continuous
        float32, (n_obs, n_covariates).
    size_factor
        float32, (n_obs,).
    """

    batch: npt.NDArray[np.int32] | None = None
    label: npt.NDArray[np.int32] | None = None
    categories: npt.NDArray[np.int32] | None = None
    continuous: npt.NDArray[np.float32] | None = None
    size_factor: npt.NDArray[np.float32] | None = None

    def digests(self) -> dict[str, str]:
        """What identifies the values, by name."""
        return {
            field.name: hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
            for field in fields(self)
            if (values := getattr(self, field.name)) is not None
        }


class InputsBuilder:
    """Take a minibatch to a device and add what the model must know of each cell.

    Parameters
    ----------
    device
        Where the model is.
    presence
        Which study measured which modelled gene: bool, (n_studies, n_genes). None where all did.
    columns
        What the model is told of each row besides.
    sparse
        Leave the counts in ``torch.sparse_csr`` layout, for a model that takes them so.
    """

    def __init__(
        self,
        device: torch.device,
        presence: npt.NDArray[np.bool_] | None,
        columns: CellColumns | None = None,
        sparse: bool = False,
    ) -> None:
        self._device = device
        self._sparse = sparse
        self._feed = DeviceFeed(device)
        self._columns = CellColumns() if columns is None else columns
        complete = presence is None or bool(presence.all())
        self._presence = None if complete else torch.as_tensor(presence, device=device)

    def __call__(self, minibatch: Minibatch) -> Inputs:
        """The inputs; on CUDA every copy is from pinned memory and none waits for the device."""
        columns, rows = self._columns, minibatch.rows
        return Inputs(
            counts=sparse_counts(minibatch) if self._sparse else self._feed(minibatch),
            batch=self._codes(
                minibatch.obs["batch"] if columns.batch is None else columns.batch[rows]
            ),
            present=None
            if self._presence is None
            else self._presence[self._codes(minibatch.obs["study"])],
            label=None if columns.label is None else self._codes(columns.label[rows]),
            categories=None
            if columns.categories is None
            else self._codes(columns.categories[rows]),
            continuous=None
            if columns.continuous is None
            else self._moved(torch.from_numpy(columns.continuous[rows])),
            size_factor=None
            if columns.size_factor is None
            else self._moved(torch.from_numpy(columns.size_factor[rows])),
        )

    def _codes(self, codes: npt.NDArray[np.int32]) -> Tensor:
        return self._moved(torch.from_numpy(codes.astype(np.int64)))

    def _moved(self, host: Tensor) -> Tensor:
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)


def sparse_counts(minibatch: Minibatch, n_rows: int | None = None) -> Tensor:
    """The counts in ``torch.sparse_csr`` layout, whose columns rise.

    Parameters
    ----------
    minibatch
        The counts.
    n_rows
        Rows of the tensor: empty ones follow those of the minibatch.
    """
    indptr, indices, values = with_sorted_columns(
        minibatch.indptr, minibatch.indices, minibatch.data, minibatch.n_vars
    )
    n_rows = minibatch.n_rows if n_rows is None else n_rows
    indptr = np.pad(indptr, (0, n_rows - minibatch.n_rows), mode="edge")
    return csr(
        torch.from_numpy(indptr.astype(np.int32)),
        torch.from_numpy(indices.astype(np.int32, copy=False)),
        torch.from_numpy(values.astype(np.float32, copy=False)),
        torch.Size((n_rows, minibatch.n_vars)),
    )
