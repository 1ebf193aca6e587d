"""The moving average of a model's weights, which is what is validated and kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from atlas.models.base import Model


class WeightAverage:
    """Exponential moving average of parameters and buffers over the steps of a training.

    The weights of single steps scatter around what the training converges to; their average
    (Polyak and Juditsky 1992) lies nearer to it: benchmarks/LOG.md has what it gains.

    Parameters
    ----------
    model
        The model; the average starts from its weights.
    steps
        Steps that the average reaches back: the decay is ``1 - 1 / steps``, less at the beginning,
        so that the first weights are soon forgotten.
    """

    def __init__(self, model: Model, steps: int) -> None:
        self._steps = steps
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}

    def share(self, step: int) -> float:
        """How far the average moves towards the weights after ``step`` steps."""
        return max(1 / self._steps, 9 / (step + 10))

    @torch.no_grad()
    def update(self, model: Model, step: int, names: Collection[str] | None = None) -> None:
        """Take in the weights after ``step`` steps, all or those of some names.

        Nothing here waits for the device.
        """
        share, own = self.share(step), model.state_dict()
        if names is not None:
            own = {name: own[name] for name in names}
        moving = [name for name, value in own.items() if value.is_floating_point()]
        averages, values = [self.weights[name] for name in moving], [own[name] for name in moving]
        torch._foreach_lerp_(averages, values, share)
        for name in own.keys() - set(moving):  # BatchNorm counts its minibatches
            self.weights[name].copy_(own[name])

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Become what a checkpoint holds."""
        for name, value in weights.items():
            self.weights[name].copy_(value)

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        """The model with the averaged weights, and its own again afterwards."""
        own = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.weights)
        try:
            yield
        finally:
            model.load_state_dict(own)
