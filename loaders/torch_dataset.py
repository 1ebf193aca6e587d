"""A loader as a ``torch.utils.data.IterableDataset``, for loops and frameworks that want one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from loaders.errors import LoaderError
from loaders.loader import MinibatchLoader


class TorchDataset(IterableDataset[dict[str, Tensor]]):
    """The epochs of a loader, one an iteration, as dicts of tensors.

    To be given to ``torch.utils.data.DataLoader(dataset, batch_size=None)``. The loader has threads
    of its own, so ``num_workers=0`` is the fastest; one worker gives the same minibatches in the
    same order. The number of the epoch lives in memory that workers share, so that each epoch has
    an order of its own though a worker is made anew for it. A worker runs ahead of its consumer, so
    there is a state within an epoch only with ``num_workers=0``; an epoch that is left early with a
    worker begins anew.

    Yields ``{"X": float32 (n_rows, n_vars), "rows": int64 (n_rows,)}`` and each obs code as int64
    (n_rows,).

    Parameters
    ----------
    loader
        What to iterate over.
    dense
        Whether ``X`` is dense, or in ``torch.sparse_csr`` layout (which cannot leave a worker).
    """

    def __init__(self, loader: MinibatchLoader, *, dense: bool = True) -> None:
        super().__init__()
        if not isinstance(loader, MinibatchLoader):
            raise LoaderError(
                "a TorchDataset is made of a loader",
                found=type(loader).__name__,
                expected="a MinibatchLoader",
                do="TorchDataset(MinibatchLoader(source, minibatch_size))",
            )
        self._loader = loader
        self._dense = dense
        # The epoch, and whether a worker is in the midst of one.
        self._shared = torch.tensor([loader.epoch, 0], dtype=torch.int64)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Minibatches in an epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The next epoch, or the rest of the one that a restored state is in.

        Raises
        ------
        LoaderError
            There is more than one worker.
        """
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise LoaderError(
                "a loader cannot be shared by several workers of a DataLoader",
                found=f"num_workers={worker.num_workers}",
                expected="num_workers of 0 or 1",
                do="take num_workers=0: the loader reads in threads of its own (threads=…)",
            )
        loader = self._loader
        loader.skip_to_epoch(int(self._shared[0]))
        self._shared[1] = worker is not None
        for minibatch in loader:
            yield {
                "X": minibatch.to_torch(dense=self._dense),
                "rows": torch.from_numpy(minibatch.rows.copy()),
                **{name: torch.from_numpy(codes).long() for name, codes in minibatch.obs.items()},
            }
        self._shared[0] += 1
        self._shared[1] = 0

    def state_dict(self) -> dict[str, Any]:
        """The state of the loader: see :meth:`MinibatchLoader.state_dict`.

        Raises
        ------
        LoaderError
            A worker is in the midst of an epoch.
        """
        if self._shared[1]:
            raise LoaderError(
                "a worker of a DataLoader is in the midst of an epoch",
                found=f"epoch {int(self._shared[0])}, at a step that only the worker knows",
                expected="an epoch that is over, or num_workers=0",
                do="take num_workers=0: the loader reads in threads of its own (threads=…)",
            )
        if self._loader.epoch < int(self._shared[0]):  # a worker was there
            self._loader.skip_to_epoch(int(self._shared[0]))
        return self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved state."""
        self._loader.load_state_dict(state)
        self._shared[0], self._shared[1] = self._loader.epoch, 0
