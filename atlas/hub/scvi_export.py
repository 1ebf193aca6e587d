"""Models as scvi-tools saves them, for ``scvi.model.SCVI.load``."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from atlas import files
from atlas.errors import ModelError
from atlas.hub.scvi_file import FILE
from atlas.hub.scvi_weights import to_theirs
from atlas.models import SCVI, TrainedModel

VERSION: Final = "1.4.2"
"""Of scvi-tools, whose form is written."""


def export_scvi(
    model: TrainedModel, folder: str | PathLike[str], *, batch_key: str = "batch"
) -> None:
    """Write a model so that ``scvi.model.SCVI.load(folder, adata=adata)`` reads it.

    Parameters
    ----------
    model
        A trained scVI.
    folder
        Must not hold a model yet.
    batch_key
        The obs column of the batch in the AnnData that it will be loaded with; its values are the
        model's ``batches``.

    Raises
    ------
    ModelError
        There is a model already; or the model was trained on studies without some of its genes,
        which scvi-tools would take for zeros.
    """
    path = Path(folder) / FILE
    if path.exists():
        raise ModelError(
            "There is a model here already", do="choose another folder, or remove it", path=path
        )
    module = model.module
    if type(module) is not SCVI or module.config.library == "size-factor" or _covariates(model):
        raise ModelError(
            "Only scVI without further covariates is written for scvi-tools",
            found=f"{model.name}, covariates {', '.join(_covariates(model)) or 'none'}",
            expected="scVI with the batch alone and a library that is observed or latent",
            path=path,
        )
    if not model.presence.all():
        study, gene = (int(k) for k in np.argwhere(~model.presence)[0])
        raise ModelError(
            "scvi-tools has no genes that a study did not measure",
            found=f"{model.genes[gene]} was not measured in {model.studies[study]}",
            expected="a model whose genes all studies have",
            do="train on the genes that all studies share",
            path=path,
        )
    buffer = io.BytesIO()
    torch.save(_content(model, module, batch_key), buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_bytes(path, buffer.getvalue())


def _covariates(model: TrainedModel) -> list[str]:
    return [*(name for name, _ in model.columns.categorical), *model.columns.continuous]


def _content(model: TrainedModel, module: SCVI, batch_key: str) -> dict[str, Any]:
    config, genes = module.config, np.array(model.genes, object)
    norms = ("both", "none") if config.norm == "batch" else ("none", "both")
    arguments = {
        "n_hidden": config.n_hidden,
        "n_latent": config.n_latent,
        "n_layers": config.n_layers,
        "dropout_rate": config.dropout_rate,
        "dispersion": config.dispersion,
        "gene_likelihood": config.gene_likelihood,
        "use_observed_lib_size": config.library == "observed",
        "latent_distribution": "normal",
    }
    passed_on = {
        "use_batch_norm": norms[0],
        "use_layer_norm": norms[1],
        "encode_covariates": config.encode_batch,
    }
    setup = {
        "layer": None,
        "batch_key": batch_key,
        "labels_key": None,
        "size_factor_key": None,
        "categorical_covariate_keys": None,
        "continuous_covariate_keys": None,
    }
    registry = {
        "scvi_version": VERSION,
        "model_name": "SCVI",
        "setup_args": setup,
        "field_registries": _fields(model, genes, batch_key),
        "setup_method_name": "setup_anndata",
    }
    return {
        "model_state_dict": {**to_theirs(module), "pyro_param_store": _PYRO},
        "var_names": genes,
        "attr_dict": {
            "init_params_": {"kwargs": {"kwargs": passed_on}, "non_kwargs": arguments},
            "is_trained_": True,
            "registry_": registry,
            "history_": {},
            "train_indices_": np.empty(0, np.int64),
            "validation_indices_": np.empty(0, np.int64),
            "test_indices_": np.empty(0, np.int64),
            "run_id_": "",
            "run_name_": "",
        },
    }


_PYRO: Final[dict[str, Any]] = {"params": {}, "constraints": {}}


def _fields(model: TrainedModel, genes: Any, batch_key: str) -> dict[str, Any]:
    def column(name: str, values: list[str] | np.ndarray[Any, Any], key: str) -> dict[str, Any]:
        return {
            "data_registry": {"attr_name": "obs", "attr_key": f"_scvi_{name}"},
            "state_registry": {
                "categorical_mapping": np.array(values, object),
                "original_key": key,
            },
            "summary_stats": {f"n_{name}": len(values)},
        }

    void: dict[str, Any] = {"data_registry": {}, "state_registry": {}, "summary_stats": {}}
    return {
        "X": {
            "data_registry": {"attr_name": "X", "attr_key": None},
            "state_registry": {"n_obs": 0, "n_vars": len(genes), "column_names": genes},
            "summary_stats": {"n_vars": len(genes), "n_cells": 0},
        },
        "batch": column("batch", list(model.batches), batch_key),
        "labels": column("labels", np.zeros(1, np.int64), "_scvi_labels"),
        "size_factor": void,
        "extra_categorical_covs": {**void, "summary_stats": {"n_extra_categorical_covs": 0}},
        "extra_continuous_covs": {**void, "summary_stats": {"n_extra_continuous_covs": 0}},
    }
