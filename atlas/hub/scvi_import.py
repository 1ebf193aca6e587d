"""Models saved by scvi-tools 1.x, with the same latent space here.

:mod:`atlas.hub.scvi_file` reads the file; this makes a model of what it holds, and believes none of
it without a look.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from atlas.config import ScanviConfig, ScviConfig
from atlas.errors import ConfigError, ModelError
from atlas.hub import scvi_file
from atlas.hub.scvi_weights import to_ours
from atlas.models import SCANVI, LabelTree, TrainedModel, build_model
from atlas.models.scvi import SCVI

_MODELS: Final = ("SCVI", "SCANVI")
_DAMAGE: Final = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError)
"""What fails where a file does not hold what it should."""

# Arguments of scvi-tools' VAE: those that the configuration here has, and the only values of others
# that mean what is done here.
_OURS: Final = {
    "n_hidden",
    "n_latent",
    "n_layers",
    "dropout_rate",
    "dispersion",
    "gene_likelihood",
    "use_observed_lib_size",
    "use_batch_norm",
    "use_layer_norm",
    "encode_covariates",
}
_FIXED: Final[dict[str, tuple[Any, ...]]] = {
    "latent_distribution": ("normal",),
    "deeply_inject_covariates": (True,),
    "log_variational": (True,),
    "batch_representation": ("one-hot",),
    "use_size_factor_key": (False,),
    "var_activation": (None,),
    "extra_encoder_kwargs": (None, {}),
    "extra_decoder_kwargs": (None, {}),
}
_COVARIATES: Final = ("size_factor", "extra_categorical_covs", "extra_continuous_covs")
_NO_MATTER: Final = {
    # of the classifier of SCANVI, and of what it was trained on
    "linear_classifier",
    "use_posterior_mean",
    "classifier_parameters",
    "unlabeled_category",
    "datamodule",
}


def import_scvi(
    folder: str | PathLike[str], *, batches: Mapping[str, str] | None = None
) -> TrainedModel:
    """Read an SCVI or SCANVI model that scvi-tools 1.x saved.

    SCANVI comes with its classifier; of one with a single class the model of counts is taken.

    Parameters
    ----------
    folder
        What ``model.save(folder)`` wrote; holds ``model.pt``.
    batches
        Names that its batches are to have here, by their names there: a store calls them
        ``study/batch``. As they are by default.

    Returns
    -------
    TrainedModel
        Its ``embed`` gives what scvi-tools' ``get_latent_representation`` gives.

    Raises
    ------
    ModelError
        There is no model, it cannot be read safely, was written by another version, or does what
        no model here does: covariates, size factors, another likelihood, …; or several of its
        genes or batches have the same name.
    ConfigError
        ``batches`` names a batch that the model does not have, or gives two the same name.
    """
    saved, path = scvi_file.read(Path(folder)), Path(folder) / scvi_file.FILE
    try:
        registry, attributes = saved["attr_dict"]["registry_"], saved["attr_dict"]
        state: dict[str, Tensor] = saved["model_state_dict"]
        kind, version = str(registry["model_name"]), str(registry["scvi_version"])
        fields: Mapping[str, Any] = registry["field_registries"]
        mapping = fields["batch"]["state_registry"]["categorical_mapping"]
        genes, names = scvi_file.names(saved["var_names"]), scvi_file.names(mapping)
        arguments = _flat(attributes["init_params_"])
        covariates = [name for name in _COVARIATES if fields.get(name, {}).get("data_registry")]
    except _DAMAGE as error:
        raise ModelError(
            "The file is not a model of scvi-tools 1.x",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            expected="weights, var_names, and a registry",
            path=path,
        ) from None
    if kind not in _MODELS or not version.startswith("1."):
        raise ModelError(
            "This model of scvi-tools cannot be imported",
            found=f"{kind} of version {version}",
            expected=f"{' or '.join(_MODELS)} of version 1.x",
            path=path,
        )
    if covariates:
        raise ModelError(
            "The model has inputs that no model here has",
            found=", ".join(covariates),
            expected="counts and batch alone",
            do="train it without them",
            path=path,
        )
    for what, of in (("genes", genes), ("batches", names)):
        if len(set(of)) < len(of):
            raise ModelError(
                f"Several {what} of the model have the same name",
                found=", ".join(sorted({name for name in of if of.count(name) > 1})[:5]),
                do="make the names unique, and train it again",
                path=path,
            )
    try:
        config, labels = _config(arguments, path), None
        if kind == "SCANVI":
            config, labels = _classes(config, fields["labels"]["state_registry"], state)
        module = _module(config, state, len(genes), len(names), labels)
    except _DAMAGE as error:
        raise ModelError(
            "The weights are not those of the architecture that the file names",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            expected=f"{kind} of {len(genes)} genes and {len(names)} batches, made with "
            + ", ".join(f"{name}={value!r:.40}" for name, value in arguments.items()),
            path=path,
        ) from None
    return TrainedModel(
        module=module,
        genes=tuple(genes),
        batches=_renamed(names, batches),
        studies=("scvi-tools",),
        presence=np.ones((1, len(genes)), bool),
        labels=labels,
        training={"imported": {"model": kind, "scvi_version": version, "from": str(path)}},
    )


def _classes(
    config: ScviConfig, labels: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[ScviConfig, LabelTree | None]:
    """The configuration of scANVI and its classes, in scvi-tools' order: the unlabeled is last."""
    names = scvi_file.names(labels["categorical_mapping"])
    names = [name for name in names if name != str(labels["unlabeled_category"])]
    if len(names) < 2:
        return config, None
    first = "classifier.classifier.0.fc_layers.Layer {}.0.weight"
    n_layers = next(i for i in count() if first.format(i) not in state)
    hidden = state[first.format(0)].shape[0] if n_layers else config.n_hidden
    scanvi = ScanviConfig(
        **config.to_json(),
        training="scvi-tools",
        classifier_layers=n_layers,
        classifier_hidden=hidden,
    )
    return scanvi, LabelTree(tuple(names), (-1,) * len(names))


def _module(
    config: ScviConfig,
    state: Mapping[str, Tensor],
    n_genes: int,
    n_batch: int,
    labels: LabelTree | None,
) -> SCVI | SCANVI:
    """The module with the weights; sizes are looked at before memory is taken for them."""
    n_latent, n_hidden = state["z_encoder.mean_encoder.weight"].shape
    if (n_latent, n_hidden) != (config.n_latent, config.n_hidden) or config.n_layers > len(state):
        raise ValueError(f"weights of n_latent={n_latent}, n_hidden={n_hidden}")
    prior = None
    if config.library == "latent":
        prior = torch.stack([state["library_log_means"][0], state["library_log_vars"][0]], dim=1)
    module = build_model(config, n_genes, n_batch, seed=0, library_prior=prior, labels=labels)
    assert isinstance(module, SCVI | SCANVI)
    to_ours(module, state)
    return module.eval()


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model, those passed on to its module included."""
    flat = dict(given["non_kwargs"])
    for more in given["kwargs"].values():
        flat |= more
    return flat


def _config(arguments: Mapping[str, Any], path: Path) -> ScviConfig:
    wrong = [
        f"{name}={value!r}"
        for name, value in arguments.items()
        if name not in _OURS | _NO_MATTER and value not in _FIXED.get(name, ())
    ]
    norms = (
        arguments.get("use_batch_norm", "both"),
        arguments.get("use_layer_norm", "none"),
    )
    norm = {("both", "none"): "batch", ("none", "both"): "layer"}.get(norms)
    if norm is None:
        wrong.append(f"use_batch_norm={norms[0]!r}, use_layer_norm={norms[1]!r}")
    if arguments.get("gene_likelihood", "zinb") not in ("zinb", "nb", "poisson"):
        wrong.append(f"gene_likelihood={arguments['gene_likelihood']!r}")
    if arguments.get("dispersion", "gene") not in ("gene", "gene-batch"):
        wrong.append(f"dispersion={arguments['dispersion']!r}")
    if wrong:
        raise ModelError(
            "The model was made with options that no model here has",
            found=", ".join(wrong),
            expected="nb, zinb or poisson, dispersion gene or gene-batch, a normal latent space, "
            "and batch or layer norm in encoder and decoder alike",
            path=path,
        )
    return ScviConfig(
        n_layers=int(arguments.get("n_layers", 1)),
        n_hidden=int(arguments.get("n_hidden", 128)),
        n_latent=int(arguments.get("n_latent", 10)),
        dropout_rate=float(arguments.get("dropout_rate", 0.1)),
        gene_likelihood=arguments.get("gene_likelihood", "zinb"),
        dispersion=arguments.get("dispersion", "gene"),
        norm=norm,  # type: ignore[arg-type]
        encode_batch=bool(arguments.get("encode_covariates", False)),
        library="observed" if arguments.get("use_observed_lib_size", True) else "latent",
    )


def _renamed(names: list[str], batches: Mapping[str, str] | None) -> tuple[str, ...]:
    unknown = sorted(set(batches or ()) - set(names))
    if unknown:
        raise ConfigError(
            "The model has no such batches",
            found=", ".join(unknown[:5]),
            expected="some of " + ", ".join(names[:8]),
        )
    renamed = tuple((batches or {}).get(name, name) for name in names)
    if len(set(renamed)) < len(renamed):
        raise ConfigError(
            "Two batches would have the same name", found=", ".join(sorted(renamed)[:8])
        )
    return renamed
