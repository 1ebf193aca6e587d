"""Training in several processes: which of them this one is, and what they tell each other.

Each process is a *rank*: it has a part of every minibatch (:mod:`loaders.plan`), the same weights,
and the same random numbers (:mod:`atlas.models.noise`). In each step the gradients of the ranks
are added up once all of them are there: the models are small, and one message of their size takes
less than many beside the backward pass. So all ranks stand alike after each step, any of them could
write the checkpoint, and a run may go on with another number of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from atlas.errors import ConfigError, TrainingError
from atlas.models.base import Model
from atlas.models.layers import BatchNorm

_OF_PEERS = ("gloo", "nccl", "connection", "peer", "socket")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that train together; by default one alone.

    Attributes
    ----------
    rank
        Number of this process, from 0.
    world_size
        How many there are.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.world_size == 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all are here."""
        if not self.alone:
            with told_of_peers():
                dist.barrier()

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, written into it."""
        if not self.alone:
            with told_of_peers():
                dist.all_reduce(tensor)
        return tensor

    def add_up_step(self, parameters: Sequence[torch.nn.Parameter], parts: Tensor) -> Tensor:
        """Add up the gradients, in place, and some numbers along with them, in one message.

        Parameters
        ----------
        parameters
            Whose gradients to add up; each has one.
        parts
            float32, (n,).

        Returns
        -------
        The sums of ``parts``.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        sums = self.add_up(torch.cat([parts, *(g.reshape(-1) for g in gradients)]))
        at = len(parts)
        for gradient in gradients:
            gradient.copy_(sums[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()
        return sums[: len(parts)]

    @contextmanager
    def sharing(self, model: Model) -> Iterator[None]:
        """Have a model's statistics of minibatches taken over all ranks, inside the block.

        Raises
        ------
        ConfigError
            Its loss is no mean over cells.
        """
        if not (self.alone or model.over_ranks):
            raise ConfigError(
                "This model is not trained by several processes",
                found=f"{type(model).__name__}, {self.world_size} processes",
                expected="scvi or cvae, whose loss is a mean over cells",
                do="start it without torchrun; it uses all cores of the machine by itself",
            )
        norms = [part for part in model.modules() if isinstance(part, BatchNorm)]
        for norm in norms:
            norm.add_up = None if self.alone else _add_up_with_gradient
        try:
            yield
        finally:
            for norm in norms:
                norm.add_up = None


def _add_up_with_gradient(tensor: Tensor) -> Tensor:
    summed: Tensor = all_reduce(tensor)  # type: ignore[no-untyped-call]
    return summed


@contextmanager
def told_of_peers() -> Iterator[None]:
    """Say it in our words where another rank is gone.

    Raises
    ------
    TrainingError
        What is sent does not arrive any more.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in _OF_PEERS):
            raise
        raise TrainingError(
            "Another process of this training is gone",
            found=str(error).splitlines()[0],
            expected=f"{os.environ.get('WORLD_SIZE', 'all')} processes until the end",
            do="look at what it printed; then start all again with --resume, the last checkpoint "
            "is as it was",
        ) from error


def first_rank() -> bool:
    """Whether this process is the one that writes and prints, before it has joined the others."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return not _started_by_torchrun() or os.environ["RANK"] == "0"


def _started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started this process among; alone without it.

    A process group that is there already is used and left as it is. Each rank has a CUDA device of
    its own where the device is CUDA, and talks by NCCL then, else by gloo.

    Parameters
    ----------
    device
        As the configuration names it.

    Raises
    ------
    ConfigError
        The device names one GPU for all ranks.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if not _started_by_torchrun():
        yield Ranks()
        return
    if device.startswith("cuda:"):
        raise ConfigError(
            "Several processes cannot train on one GPU",
            found=f"device {device}, {os.environ['WORLD_SIZE']} processes",
            do="leave out --device: each process then takes its own GPU",
        )
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with told_of_peers():
        dist.init_process_group("nccl" if on_cuda else "gloo")
    yield Ranks(dist.get_rank(), dist.get_world_size())
    # After an error the others may wait for this process, or be gone: it ends with them.
    dist.destroy_process_group()
