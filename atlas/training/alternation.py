"""The classifier's turn in the alternating training of scANVI."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import numpy as np
import torch
from torch import Tensor

from atlas.config import TrainConfig
from atlas.errors import ConfigError
from atlas.models import SCANVI
from atlas.models.base import evaluating
from atlas.models.layers import sample_normal
from atlas.training.inputs import CellColumns, InputsBuilder
from atlas.training.state import seeded_generator
from loaders import MinibatchLoader
from loaders.source import RowSource

_DRAWN = 20_000
"""Labelled cells that are drawn for one turn, at most."""

_STEPS = 10
"""Steps in a pass over the cells drawn: more cells make larger minibatches."""

_SMALLEST = 16
"""Cells of a minibatch, at least."""


class Alternation:
    """Trains the classifier of a scANVI on labelled cells, with all else fixed.

    scANVI, Xu et al. 2021, Supplementary Note 3, Algorithm 2: passes over the labelled cells that
    minimise the cross-entropy C by the classifier's parameters. As the encoder is fixed meanwhile,
    the cells are encoded once for all passes, and each step draws z anew. Cells are drawn so that
    each label comes equally often, the loader's weights see to that.

    A turn is a function of the weights, the seed and the number of the epoch, so that a training
    that is killed and resumed repeats it; Adam begins anew with each.

    Parameters
    ----------
    model
        The model, whose classifier the training's own optimiser leaves alone.
    source, rows
        Rows to train on: sorted, disjoint ranges (start, stop).
    to_inputs
        Makes inputs of minibatches.
    columns
        Has the labels.
    config
        Learning rate, seed.

    Raises
    ------
    ConfigError
        None of the rows has a label.
    """

    def __init__(
        self,
        model: SCANVI,
        source: RowSource,
        rows: Sequence[tuple[int, int]],
        to_inputs: InputsBuilder,
        columns: CellColumns,
        config: TrainConfig,
    ) -> None:
        assert columns.label is not None
        self._model, self._source, self._to_inputs = model, source, to_inputs
        self._label, self._config = columns.label, config
        chosen = np.zeros(source.n_obs, bool)
        for start, stop in rows:
            chosen[start:stop] = True
        chosen &= columns.label >= 0
        self._n_labelled = int(chosen.sum())
        if not self._n_labelled:
            raise ConfigError(
                "No cell that is trained on has a label",
                found=f"{int((columns.label >= 0).sum())} labelled cells, all held out",
                expected="labelled cells among those that are trained on",
                do="hold out other cells, or fewer",
            )
        self._rows = chosen

    def run(self, epoch: int) -> None:
        """Train the classifier of the model as it is; the module's flags are as before after it."""
        model, config = self._model, self._config
        device = next(model.parameters()).device
        generator = seeded_generator(device, config.seed, epoch, 1)
        mean, variance, label = self._encode(epoch)
        size = max(_SMALLEST, -(-len(label) // _STEPS))
        classifier = model.classifier
        training = classifier.training
        classifier.train().requires_grad_(True)
        optimizer = torch.optim.Adam(
            classifier.parameters(),
            lr=config.lr,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        for _ in range(model.config.classifier_epochs):
            order = torch.randperm(len(label), generator=generator, device=device)
            for start in range(0, len(label), size):
                at = order[start : start + size]
                if len(at) == 1 and len(label) > 1:
                    continue  # BatchNorm has no variance of one cell; the next pass has another
                z = sample_normal(mean[at], variance[at], generator)
                log_q = classifier(z, generator).gather(-1, label[at].unsqueeze(-1))
                optimizer.zero_grad()
                (-log_q.mean()).backward()
                optimizer.step()
        classifier.train(training).requires_grad_(False)

    def _encode(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior of z, and labels, of cells drawn with each label equally often."""
        (seed,) = np.random.SeedSequence((self._config.seed, epoch, 2)).generate_state(1)
        loader = MinibatchLoader(
            self._source,
            max(self._config.minibatch_size, 512),
            int(seed),
            rows=self._rows,
            balance=self._label,
            rows_per_epoch=min(self._n_labelled, _DRAWN),
        )
        parts = []
        with evaluating(self._model):
            for minibatch in loader:
                inputs = self._to_inputs(minibatch)
                assert inputs.label is not None
                parts.append((*self._model.posterior(inputs), inputs.label))
        mean, variance, label = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return mean, variance, label

    def copy_into(self, weights: MutableMapping[str, Tensor]) -> None:
        """Put the classifier's weights in place of those in a copy of the model's."""
        for name, value in self._model.classifier.state_dict().items():
            weights[f"classifier.{name}"].copy_(value)
