"""A store as data for scvi-tools: its SCVI and SCANVI train on it, out of core.

Form: scvi-tools 1.4, ``setup_datamodule`` registries as its own ``MappedCollectionDataModule`` has
them; counts come through :class:`loaders.MinibatchLoader`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atlas.errors import ConfigError
from atlas.hub.scvi_export import VERSION
from atlas.store import CountStore
from loaders import Minibatch, MinibatchLoader, SequentialLoader
from loaders.memory import parse_bytes

try:
    from lightning.pytorch import LightningDataModule
except ImportError as missing:
    raise ConfigError(
        "Training with scvi-tools needs the package scvi-tools",
        found=missing,
        do="pip install 'atlas-trainer[scvi]'",
    ) from None

Batch = dict[str, Tensor | None]


class ScviDataModule(LightningDataModule):
    """Minibatches of a store, for ``model.train(datamodule=…)`` of scvi-tools.

    Epochs have new orders, and Lightning's checkpoints hold the place in the epoch.

    Parameters
    ----------
    store
        An open store.
    model
        ``"SCVI"`` or ``"SCANVI"``; for the latter each minibatch comes with one of labeled cells.
    genes
        The genes to model; those recorded by :func:`atlas.select_genes` when None.
    minibatch_size
        Cells of one step.
    validation
        Share of the cells, by row hash, to validate on and not to train on.
    unlabeled
        The name of the category of cells without a label.
    seed
        Of the order.
    memory
        What the loader may hold, e.g. ``"512MB"``; for SCANVI, its two loaders together.

    Raises
    ------
    ConfigError
        No genes are chosen, there is no such model, SCANVI has no labeled cell to train on, a study
        did not measure one of the genes (scvi-tools would take it for zeros), or ``unlabeled`` is
        the name of a label.
    LoaderError
        Too little memory.

    Examples
    --------
    >>> data = atlas.ScviDataModule(store)
    >>> model = scvi.model.SCVI(registry=data.registry)
    >>> model.train(datamodule=data, max_epochs=20)
    >>> z = model.get_latent_representation(dataloader=data.inference_dataloader())
    """

    def __init__(
        self,
        store: CountStore,
        model: Literal["SCVI", "SCANVI"] = "SCVI",
        *,
        genes: Sequence[str] | None = None,
        minibatch_size: int = 128,
        validation: float = 0.1,
        unlabeled: str = "Unknown",
        seed: int = 0,
        memory: str | int | None = None,
    ) -> None:
        super().__init__()
        chosen = store.genes if genes is None else tuple(map(str, genes))
        if chosen is None:
            raise ConfigError(
                "No genes are chosen",
                do="choose them with atlas.select_genes, or give genes=",
                path=store.path,
            )
        if model not in ("SCVI", "SCANVI"):
            raise ConfigError(
                "There is no such model", found=repr(model), expected="'SCVI' or 'SCANVI'"
            )
        self.model_name = model
        self.unlabeled_category = unlabeled
        self._store, self._genes, self._size = store, chosen, minibatch_size
        self._view = store.select(chosen)
        if not self._view.presence.all():
            study, gene = (int(k) for k in np.argwhere(~self._view.presence)[0])
            raise ConfigError(
                "scvi-tools has no genes that a study did not measure",
                found=f"{chosen[gene]} was not measured in {store.studies[study]}",
                expected="genes that all studies have",
                do="give these as genes=, or train with atlas.train",
                path=store.path,
            )
        if unlabeled in store.labels:
            raise ConfigError(
                "The name of cells without a label is that of a label",
                found=repr(unlabeled),
                do="give another as unlabeled=",
                path=store.path,
            )
        split = store.split(validation)
        self._held_out = split.validation
        if memory is not None and model == "SCANVI":
            memory = parse_bytes(memory) // 2  # for two loaders
        options: dict[str, Any] = {"seed": seed, "memory": memory}
        self._loader = MinibatchLoader(self._view, minibatch_size, rows=split.train, **options)
        self._labeled: MinibatchLoader | None = None
        if model == "SCANVI":
            mask = np.zeros(store.n_obs, bool)
            for start, stop in split.train:
                mask[start:stop] = True
            mask &= store.obs_codes["label"] >= 0
            if not mask.any():
                raise ConfigError(
                    "SCANVI has no labeled cell to train on",
                    do="ingest with --label-key, or train SCVI",
                    path=store.path,
                )
            options["seed"] = seed + 1
            self._labeled = MinibatchLoader(self._view, minibatch_size, rows=mask, **options)

    # what scvi-tools asks

    @property
    def n_obs(self) -> int:
        """Cells."""
        return self._view.n_obs

    @property
    def n_vars(self) -> int:
        """Genes."""
        return self._view.n_vars

    @property
    def n_batch(self) -> int:
        """Batches."""
        return len(self._store.batches)

    @property
    def n_labels(self) -> int:
        """Labels, that of cells without one included."""
        return len(self.labels)

    @property
    def n_samples(self) -> int:
        """No samples."""
        return 0

    @property
    def var_names(self) -> npt.NDArray[Any]:
        """Names of the genes."""
        return np.array(self._genes, object)

    @property
    def labels(self) -> npt.NDArray[Any]:
        """Names of the labels; cells without one are the last."""
        return np.array([*self._store.labels, self.unlabeled_category], object)

    @property
    def labels_(self) -> npt.NDArray[Any]:
        """The label of each cell, by name."""
        return self.labels[self._store.obs_codes["label"]]

    @property
    def batch_labels(self) -> npt.NDArray[Any]:
        """Names of the batches."""
        return np.array(self._store.batches, object)

    @property
    def label_keys(self) -> npt.NDArray[Any]:
        """Names of the labels."""
        return self.labels

    @property
    def registry(self) -> dict[str, Any]:
        """What a model of scvi-tools is made from."""
        void: dict[str, Any] = {"data_registry": {}, "state_registry": {}, "summary_stats": {}}

        def column(name: str, names: npt.NDArray[Any], key: str, **more: str) -> dict[str, Any]:
            return {
                "data_registry": {"attr_name": "obs", "attr_key": f"_scvi_{name}"},
                "state_registry": {"categorical_mapping": names, "original_key": key, **more},
                "summary_stats": {f"n_{name}": len(names)},
            }

        return {
            "scvi_version": VERSION,
            "model_name": self.model_name,
            "setup_args": {
                "layer": None,
                "batch_key": "atlas_batch",
                "labels_key": "atlas_label",
                "size_factor_key": None,
                "categorical_covariate_keys": None,
                "continuous_covariate_keys": None,
            },
            "field_registries": {
                "X": {
                    "data_registry": {"attr_name": "X", "attr_key": None},
                    "state_registry": {
                        "n_obs": self.n_obs,
                        "n_vars": self.n_vars,
                        "column_names": self.var_names,
                    },
                    "summary_stats": {"n_vars": self.n_vars, "n_cells": self.n_obs},
                },
                "batch": column("batch", self.batch_labels, "atlas_batch"),
                "labels": column(
                    "labels",
                    self.labels,
                    "atlas_label",
                    unlabeled_category=self.unlabeled_category,
                ),
                "size_factor": void,
                "extra_categorical_covs": {
                    **void,
                    "summary_stats": {"n_extra_categorical_covs": 0},
                },
                "extra_continuous_covs": {**void, "summary_stats": {"n_extra_continuous_covs": 0}},
            },
            "setup_method_name": "setup_datamodule",
        }

    # data

    def train_dataloader(self) -> Epochs:
        """One epoch at each iteration."""
        return Epochs(self, self._loader, self._labeled)

    def val_dataloader(self) -> Epochs | list[Any]:
        """The cells held out, in the order of the store."""
        if not self._held_out:
            return []
        return Epochs(self, SequentialLoader(self._view, self._size, rows=self._held_out))

    def inference_dataloader(self) -> Epochs:
        """All cells in the order of the store, for ``dataloader=`` of scvi-tools' functions."""
        return Epochs(self, SequentialLoader(self._view, self._size))

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch."""
        state = {"loader": self._loader.state_dict()}
        if self._labeled is not None:
            state["labeled"] = self._labeled.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a place that was saved."""
        self._loader.load_state_dict(state_dict["loader"])
        if self._labeled is not None:
            self._labeled.load_state_dict(state_dict["labeled"])

    def tensors(self, minibatch: Minibatch) -> Batch:
        """A minibatch as scvi-tools names its parts: float32 (n_cells, n_vars), int64 codes."""
        label = minibatch.obs["label"].astype(np.int64)
        label[label < 0] = self.n_labels - 1
        batch = minibatch.obs["batch"].astype(np.int64)
        return {
            "X": minibatch.to_torch(),
            "batch": torch.from_numpy(batch)[:, None],
            "labels": torch.from_numpy(label)[:, None],
            "extra_categorical_covs": None,
            "extra_continuous_covs": None,
        }


class Epochs:
    """An iterable of minibatches for Lightning; with labeled ones beside them where given."""

    def __init__(
        self,
        data: ScviDataModule,
        loader: MinibatchLoader | SequentialLoader,
        labeled: MinibatchLoader | None = None,
    ) -> None:
        self._data, self._loader, self._labeled = data, loader, labeled

    def __len__(self) -> int:
        """Minibatches of an epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch | tuple[Batch, Batch]]:
        """One epoch, or the rest of one."""
        loader = self._loader
        if isinstance(loader, MinibatchLoader) and loader.step == len(loader):
            # Lightning counts, and does not come back for the end of an epoch
            loader.skip_to_epoch(loader.epoch + 1)
        if self._labeled is None:
            for minibatch in self._loader:
                yield self._data.tensors(minibatch)
            return
        beside = _again_and_again(self._labeled)
        for minibatch in self._loader:
            yield self._data.tensors(minibatch), self._data.tensors(next(beside))


def _again_and_again(loader: MinibatchLoader) -> Iterator[Minibatch]:
    while True:
        yield from loader
