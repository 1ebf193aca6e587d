"""Everything of a training that changes from step to step, into a checkpoint and out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from atlas.config import TrainConfig
from atlas.errors import CheckpointError
from atlas.models.base import Model
from atlas.models.noise import SharedGenerator
from atlas.training.averaging import WeightAverage
from atlas.training.checkpoint import Checkpoint, Progress
from atlas.training.environment import Environment
from atlas.training.history import History
from loaders import LoaderError, MinibatchLoader

Generator = TypeVar("Generator", bound=torch.Generator)


def seeded_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator of its own for each key of integers; nearby keys give unrelated streams."""
    return seeded(torch.Generator(device), *key)


def seeded(generator: Generator, *key: int) -> Generator:
    """Set a generator to the stream of a key; returns it."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    # torch takes seeds below 2^63 on every device.
    generator.manual_seed(int(seed) >> 1)
    return generator


@dataclass
class TrainingState:
    """The state of a training between two steps.

    Attributes
    ----------
    model, optimizer, loader, generator
        The things that carry state of their own; the generator draws noise and dropout.
    sums
        float64 (4,), on the device: objective, reconstruction loss, KL divergence and penalty,
        summed over the cells of the epoch in progress.
    step
        Steps done since training began.
    epoch_cells, epoch_seconds
        Training cells seen and wall time spent in the epoch in progress.
    history
        The epochs completed.
    average
        Moving average of the weights, unless it is turned off.
    best
        Weights of the best epoch, with early stopping only.
    finished
        Whether there is nothing left to do.
    """

    model: Model
    optimizer: torch.optim.Adam
    loader: MinibatchLoader
    generator: torch.Generator
    sums: Tensor
    step: int = 0
    epoch_cells: int = 0
    epoch_seconds: float = 0.0
    history: History = field(default_factory=History)
    average: WeightAverage | None = None
    best: dict[str, Tensor] | None = None
    finished: bool = False

    @classmethod
    def start(
        cls,
        model: Model,
        loader: MinibatchLoader,
        config: TrainConfig,
        device: torch.device,
        *,
        shared: bool = False,
    ) -> TrainingState:
        """The state before the first step; moves the model to ``device``.

        ``shared`` is whether other processes have a part of each minibatch.
        """
        model.to(device)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(
            trainable,
            lr=config.lr,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        return cls(
            model=model,
            optimizer=optimizer,
            loader=loader,
            generator=seeded(
                SharedGenerator(device) if shared else torch.Generator(device), config.seed
            ),
            sums=torch.zeros(4, dtype=torch.float64, device=device),
            average=WeightAverage(model, config.average_steps) if config.average_steps else None,
        )

    def forget_epoch(self) -> None:
        """Begin the sums of the next epoch."""
        self.sums.zero_()
        self.epoch_cells = 0
        self.epoch_seconds = 0.0

    def keep_weights(self) -> None:
        """Remember the weights as they are now: those of the best epoch so far."""
        self.best = {name: value.clone() for name, value in self.final_weights().items()}

    def final_weights(self) -> dict[str, Tensor]:
        """The weights that are validated and kept."""
        return self.model.state_dict() if self.average is None else self.average.weights

    def checkpoint(self, run: Mapping[str, Any], environment: Environment) -> Checkpoint:
        """All of this with its tensors on the CPU, not copied where they are there: save it now."""
        return Checkpoint(
            weights=_to_cpu(self.model.state_dict()),
            optimizer=_to_cpu(self._adam_state()),
            state={"generator": self.generator.get_state(), "sums": self.sums.cpu()},
            average=None if self.average is None else _to_cpu(self.average.weights),
            best=None if self.best is None else _to_cpu(self.best),
            progress=Progress(self.step, self.finished, self.epoch_cells, self.epoch_seconds),
            history=self.history,
            loader=self.loader.state_dict(),
            run=run,
            environment=environment,
        )

    def restore(self, checkpoint: Checkpoint, path: Path) -> None:
        """Become what a checkpoint holds.

        Raises
        ------
        CheckpointError
            Its weights are those of another model, or its rows came in another order.
        """
        self._check_weights(checkpoint.weights, path)
        try:
            self.loader.load_state_dict(checkpoint.loader)
        except LoaderError as error:
            raise CheckpointError(
                "The checkpoint does not fit the loader",
                found=error,
                do="resume with the store and the version of the run, or train anew into another "
                "folder",
                path=path,
            ) from error
        self.model.load_state_dict(dict(checkpoint.weights))
        self._restore_adam(checkpoint.optimizer)
        self.generator.set_state(checkpoint.state["generator"])
        self.sums.copy_(checkpoint.state["sums"])
        if self.average is not None and checkpoint.average is not None:
            self.average.restore(checkpoint.average)
        if checkpoint.best is not None:
            self.best = {k: v.to(self.sums.device) for k, v in checkpoint.best.items()}
        self.step = checkpoint.progress.step
        self.finished = checkpoint.progress.finished
        self.epoch_cells = checkpoint.progress.epoch_cells
        self.epoch_seconds = checkpoint.progress.epoch_seconds
        self.history = checkpoint.history

    def _trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Name and parameter, in the order that the optimiser numbers them."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _adam_state(self) -> dict[str, Tensor]:
        """Adam's tensors by "<moment>/<parameter>"."""
        return {
            f"{moment}/{name}": value
            for name, parameter in self._trainable()
            for moment, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _restore_adam(self, tensors: Mapping[str, Tensor]) -> None:
        numbered = {name: (i, p) for i, (name, p) in enumerate(self._trainable())}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            moment, name = key.split("/", maxsplit=1)
            number, parameter = numbered[name]
            # A copy, because Adam writes in place, and what was read from a file shares a buffer;
            # laid out as the parameter is, because fused Adam goes through both side by side.
            like = parameter.detach() if value.shape == parameter.shape else value
            state.setdefault(number, {})[moment] = torch.empty_like(like).copy_(value)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _check_weights(self, weights: Mapping[str, Tensor], path: Path) -> None:
        recorded = {name: tuple(value.shape) for name, value in weights.items()}
        expected = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        for name in sorted({*recorded, *expected}):
            if recorded.get(name) != expected.get(name):
                raise CheckpointError(
                    "The checkpoint holds the weights of another model",
                    found=f"{name}: {recorded.get(name, 'absent')}",
                    expected=f"{name}: {expected.get(name, 'absent')}",
                    do="resume with the model of the run, or train into another folder",
                    path=path,
                )


def _to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
