"""Architectural surgery: new conditions beside the fixed weights of a trained reference.

scArches (Lotfollahi et al. 2022), Methods: "we add m new dimensions to s in both the encoder and
decoder networks … the m new randomly initialized weight vectors are also added to the first layer
… we fine-tune the new model by only training the weights connected to the last … dimensions".
Each covariate of Atlas's layers has a table with a row for each of its categories, so a new
condition is a new row of every such table. While it is tuned, a table is the reference's rows,
which are no parameters, with the new rows, which are one, below: nothing can move the reference,
neither weight decay nor a running statistic, and no hook is needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from atlas.config import (
    Architecture,
    DavaeConfig,
    Initialisation,
    ScanviConfig,
    Strategy,
)
from atlas.errors import ConfigError, ModelError
from atlas.models.base import Model
from atlas.models.davae import DAVAE
from atlas.models.layers import ConditionalLinear, Encoder, HiddenStack, TaperedStack
from atlas.models.parts import Growth, Reference, Table, build_grown

_DISPERSION = "log_inverse_dispersion"


def check_reference(module: Model) -> None:
    """Refuse a model on which surgery would do nothing.

    Raises
    ------
    ModelError
        The encoder does not see the batch (scvi-tools #2331: mapping is then a silent no-op).
    """
    if not getattr(module.config, "encode_batch", True):
        raise ModelError(
            "The encoder of the reference does not see the batch, so no new batch can be mapped",
            found="a reference trained with encode_batch=False",
            expected="encode_batch=True",
            do="train the reference with --encode-batch --norm layer (for scvi and scanvi the "
            "defaults)",
        )


def graft(
    reference: Reference,
    growth: Growth,
    *,
    strategy: Strategy = "conditions",
    initialisation: Initialisation = "random",
    nearest: Sequence[int] | None = None,
    seed: int = 0,
) -> Model:
    """The reference with new conditions, ready to be tuned; the reference is left as it is.

    Parameters
    ----------
    reference, growth
        What grows, and by what.
    strategy
        What is to be trained besides the new rows: nothing (``"conditions"``), the first layer of
        encoder and decoder (``"input_layers"``), or everything (``"all"``): the three of the paper
        (Figure 2a–c).
    initialisation
        Of the new rows: as a new layer draws them (``"random"``, the paper's), ``"zero"``, the
        mean of the reference's (``"mean"``), or the row of the reference's batch that suits the new
        one best (``"nearest"``). Dispersions are not drawn but begin at the mean but for
        ``"nearest"``.
    nearest
        For each new batch the reference's batch to begin from.
    seed
        Of random rows, which depend on it and the condition's name alone.

    Raises
    ------
    ModelError
        The encoder does not see the batch.
    """
    module = reference.module
    check_reference(module)
    _check_choice("strategy", strategy, get_args(Strategy))
    _check_choice("initialisation", initialisation, get_args(Initialisation))
    if not growth.batches:
        raise ConfigError("No new batch is given", do="name studies that the model does not know")
    grown = build_grown(reference, growth, _tuning_config(module.config))
    trained = dict(module.state_dict())
    rows = _Rows(reference, growth, initialisation, nearest, seed)
    state = {}
    for name, value in grown.state_dict().items():
        old = trained[name]
        if old.shape != value.shape:
            old = torch.cat([old, rows.new(name, old, value[len(old) :])])
        state[name] = old.clone()
    grown.load_state_dict(state)
    if strategy != "all":
        _freeze(grown, trained, strategy)
    return grown


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        expected = ", ".join(map(repr, known))
        raise ConfigError(f"There is no such {name}", found=repr(value), expected=expected)


def merged(tuned: Model, reference: Reference, growth: Growth) -> Model:
    """A tuned model as a plain one: the tables whole, all parameters as in any trained model."""
    plain = build_grown(reference, growth, reference.module.config)
    plain.load_state_dict({name: _value_of(tuned, name) for name in plain.state_dict()})
    return plain.eval()


def n_trainable(module: Model) -> int:
    """Number of parameters that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def remarks(module: Model, strategy: Strategy) -> list[str]:
    """What surgery does to a model beside the weights of its layers, in words."""
    out = []
    if any(isinstance(part, nn.BatchNorm1d) for part in module.modules()):
        moves = strategy == "all"
        out.append(
            "BatchNorm: its running statistics go with the new cells, as all of the model does"
            if moves
            else "BatchNorm: its running statistics stay the reference's, or its cells would move"
        )
    if isinstance(module, DAVAE):
        out.append(
            "DAVAE: the domain classifier gets an output for each new batch and is not trained; "
            "without cells of the reference it has nothing to tell the new ones from"
        )
    return out


def _tuning_config(config: Architecture) -> Architecture:
    """The configuration while new conditions are tuned.

    A scANVI whose classifier had turns of its own gets the joint objective, in which the labels of
    the query, where there are some, reach the new rows. A DAVAE loses its adversary: what a
    minibatch of the query alone teaches the domain classifier says nothing of the reference.
    """
    if isinstance(config, ScanviConfig) and config.training == "alternating":
        return dataclasses.replace(config, training="joint")
    if isinstance(config, DavaeConfig):
        return dataclasses.replace(config, adversary_weight=0.0)
    return config


class _Rows:
    """Initial values of new rows."""

    def __init__(
        self,
        reference: Reference,
        growth: Growth,
        initialisation: Initialisation,
        nearest: Sequence[int] | None,
        seed: int,
    ) -> None:
        self._reference, self._growth = reference, growth
        self._initialisation, self._nearest, self._seed = initialisation, nearest, seed

    def new(self, name: str, trained: Tensor, built: Tensor) -> Tensor:
        """New rows of one table, given the reference's and those that were built: as the latter."""
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "library_prior":
            assert self._growth.library_prior is not None
            return self._growth.library_prior.to(trained)
        if name.startswith("domain_classifier."):
            return torch.zeros_like(built)  # the adversary has no part in surgery
        table = Table.named(name)
        if self._initialisation == "nearest" and table.kind == "batch":
            assert self._nearest is not None
            return trained[list(self._nearest)]
        if leaf == _DISPERSION or self._initialisation == "mean":
            return trained.mean(dim=0, keepdim=True).expand_as(built)
        if self._initialisation == "zero":
            return torch.zeros_like(built)
        bound = self._bound(name, len(trained))
        drawn = [self._drawn(f"{name}/{row}", built.shape[1:], bound) for row in self._names(table)]
        return torch.stack(drawn).to(trained)

    def _names(self, table: Table) -> tuple[str, ...]:
        """Names of the conditions that the new rows are of."""
        if table.kind == "category":
            return self._growth.categories[table.number]
        return self._growth.batches if table.kind == "batch" else self._growth.labels

    def _bound(self, name: str, n_rows: int) -> float:
        """Limit of the uniform distribution that the reference's own rows were drawn from."""
        owner = name.removesuffix(".batch_weight").split(".category_weights.")[0]
        owner = owner.removesuffix(".bias").removesuffix(".weight")
        layer = self._reference.module.get_submodule(owner)
        if isinstance(layer, ConditionalLinear):
            own = self._reference.covariates
            n = n_rows
            if len(layer.category_weights) or layer.sees_continuous:
                batches = self._reference.n_batch if layer.sees_batch else 0
                n = batches + sum(own.n_categories) + own.n_continuous
            return 1 / math.sqrt(layer.weight.shape[1] + n)
        assert isinstance(layer, nn.Linear)
        return 1 / math.sqrt(layer.in_features)

    def _drawn(self, key: str, shape: torch.Size, bound: float) -> Tensor:
        digest = hashlib.sha256(f"{self._seed}/{key}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        return torch.from_numpy(generator.uniform(-bound, bound, tuple(shape)).astype(np.float32))


class _Below(nn.Module):
    """A table of fixed rows with those of a parameter below."""

    fixed: Tensor

    def __init__(self, fixed: Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed", fixed)

    def forward(self, added: Tensor) -> Tensor:
        return torch.cat([self.fixed, added])

    def right_inverse(self, table: Tensor) -> Tensor:
        return table[len(self.fixed) :].clone()


class _FixedBatchNorm(nn.BatchNorm1d):
    """BatchNorm that stays in evaluation mode: its statistics are the reference's."""

    def train(self, mode: bool = True) -> _FixedBatchNorm:
        super().train(False)
        return self


def _freeze(module: Model, trained: dict[str, Tensor], strategy: Strategy) -> None:
    """Leave to train the rows that the reference lacks and, by strategy, the first layers."""
    module.requires_grad_(False)
    opened = list(_first_layers(module)) if strategy == "input_layers" else []
    for layer in opened:
        layer.requires_grad_(True)
    whole = {id(p) for layer in opened for p in layer.parameters()}
    grown = [
        name
        for name, p in module.named_parameters()
        if p.shape != trained[name].shape and id(p) not in whole
    ]
    for name in grown:
        if name.startswith("domain_classifier."):
            continue
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        getattr(owner, leaf).requires_grad_(True)
        parametrize.register_parametrization(
            owner, leaf, _Below(trained[name].clone()), unsafe=True
        )
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.BatchNorm1d):
                fixed = _FixedBatchNorm(child.num_features, child.eps, child.momentum)
                fixed.load_state_dict(child.state_dict())
                setattr(part, name, fixed.requires_grad_(False).train())
    if isinstance(module, DAVAE):
        module.variance_is_fixed = True


def _first_layers(module: Model) -> Iterator[ConditionalLinear]:
    """The first layers of the encoders of x and of the decoder."""
    for name, part in module.named_modules():
        stack = part.hidden if isinstance(part, Encoder) else part
        if not isinstance(stack, HiddenStack | TaperedStack):
            continue
        if name.rsplit(".", 1)[-1] not in ("encoder", "library_encoder", "decoder"):
            continue
        first = stack.first if isinstance(stack, TaperedStack) else stack.linears[0]
        assert isinstance(first, ConditionalLinear)
        yield first


def _value_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name, a table that is in two parts as one."""
    path, _, leaf = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(path), leaf)
    return value.detach()
