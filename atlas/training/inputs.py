"""From a minibatch of the loader to the inputs of a model, on its device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atlas.models.base import Inputs
from loaders import DeviceFeed, Minibatch


class InputsBuilder:
    """Densify a minibatch on a device and add what the model must know of each cell.

    Parameters
    ----------
    device
        Where the model is.
    presence
        Which study measured which modelled gene: bool, (n_studies, n_genes). None where all did.
    """

    def __init__(self, device: torch.device, presence: npt.NDArray[np.bool_] | None) -> None:
        self._device = device
        self._feed = DeviceFeed(device)
        complete = presence is None or bool(presence.all())
        self._presence = None if complete else torch.as_tensor(presence, device=device)

    def __call__(self, minibatch: Minibatch) -> Inputs:
        """The inputs; on CUDA every copy is from pinned memory and none waits for the device."""
        return Inputs(
            counts=self._feed(minibatch),
            batch=self._codes(minibatch.obs["batch"]),
            present=None
            if self._presence is None
            else self._presence[self._codes(minibatch.obs["study"])],
        )

    def _codes(self, codes: npt.NDArray[np.int32]) -> Tensor:
        host = torch.from_numpy(codes.astype(np.int64))
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)
