"""Models saved by scvi-tools 1.x, read without running anything that the file says.

``model.pt`` is a pickle. It is read by torch's ``weights_only`` reader, which builds tensors and
plain containers alone; NumPy arrays are let through besides, and the tables of the training history
(pandas) are replaced by an object that does nothing. A file that names anything else is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.dtypes
import torch
from torch import Tensor

from atlas.config import ScviConfig
from atlas.errors import ConfigError, ModelError
from atlas.hub.scvi_weights import to_ours
from atlas.models import TrainedModel, build_model

FILE: Final = "model.pt"
_MODELS: Final = ("SCVI", "SCANVI")


class _Ignored:
    """Stands for what is not needed: takes everything and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _dict(*_: Any) -> dict[Any, Any]:
    return {}


_IGNORED: Final = (
    "pandas.core.frame.DataFrame",
    "pandas.core.series.Series",
    "pandas.core.indexes.base.Index",
    "pandas.core.indexes.range.RangeIndex",
    "pandas.core.indexes.base._new_Index",
    "pandas.core.internals.managers.BlockManager",
    "pandas.core.internals.managers.SingleBlockManager",
    "pandas._libs.internals._unpickle_block",
    "builtins.slice",
)
_reconstruct, _scalar = np._core.multiarray._reconstruct, np._core.multiarray.scalar
_ALLOWED: Final[list[Any]] = [
    bytes,
    dict,
    np.ndarray,
    np.dtype,
    *((_reconstruct, f"{core}.multiarray._reconstruct") for core in ("numpy._core", "numpy.core")),
    *((_scalar, f"{core}.multiarray.scalar") for core in ("numpy._core", "numpy.core")),
    *(getattr(numpy.dtypes, n) for n in numpy.dtypes.__all__ if n.endswith("DType")),
    (_dict, "collections.defaultdict"),
    *((_Ignored, name) for name in _IGNORED),
]

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
    "linear_classifier": (True, False),
    "datamodule": (None,),
    "use_posterior_mean": (True, False),
    "classifier_parameters": (None, {}),
}


def import_scvi(
    folder: str | PathLike[str], *, batches: Mapping[str, str] | None = None
) -> TrainedModel:
    """Read an SCVI or SCANVI model that scvi-tools 1.x saved.

    Of SCANVI the encoder of z and the decoder of counts are taken, which give its latent space; its
    classifier is left behind.

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
        Its ``embed_counts`` gives what scvi-tools' ``get_latent_representation`` gives.

    Raises
    ------
    ModelError
        There is no model, it cannot be read safely, was written by another version, or does what
        no model here does: covariates, size factors, another likelihood, …
    ConfigError
        ``batches`` names a batch that the model does not have.
    """
    path = Path(folder) / FILE
    saved = _read(path)
    try:
        registry, attributes = saved["attr_dict"]["registry_"], saved["attr_dict"]
        state: dict[str, Tensor] = saved["model_state_dict"]
        genes = tuple(map(str, saved["var_names"]))
        kind, version = str(registry["model_name"]), str(registry["scvi_version"])
        fields, given = registry["field_registries"], attributes["init_params_"]
        arguments = _flat(given)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "The file is not a model of scvi-tools 1.x",
            found=f"{type(error).__name__}: {error}",
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
    _check_covariates(fields, path)
    config = _config(arguments, state, len(genes), path)
    names = [str(name) for name in fields["batch"]["state_registry"]["categorical_mapping"]]
    prior = None
    if config.library == "latent":
        prior = torch.stack([state["library_log_means"][0], state["library_log_vars"][0]], dim=1)
    module = build_model(config, len(genes), len(names), seed=0, library_prior=prior)
    try:
        to_ours(module, state)
    except (KeyError, RuntimeError) as error:
        raise ModelError(
            "The weights are not those of the architecture that the file names",
            found=str(error)[:300],
            expected=f"{kind} with {config}",
            path=path,
        ) from None
    module.eval()
    return TrainedModel(
        module=module,
        genes=genes,
        batches=_renamed(names, batches),
        studies=("scvi-tools",),
        presence=np.ones((1, len(genes)), bool),
        training={"imported": {"model": kind, "scvi_version": version, "from": str(path)}},
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        older = (path.parent / "model_params.pt").exists()
        raise ModelError(
            "There is no model of scvi-tools here",
            found="a model of before version 0.15" if older else f"no {FILE}",
            expected=f"a folder with {FILE}",
            do="load it in scvi-tools 1.x and save it again" if older else "check the folder",
            path=path.parent,
        )
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        OSError,
        RuntimeError,
        EOFError,
        zipfile.BadZipFile,
        TypeError,
    ) as error:
        raise ModelError(
            "The file cannot be read safely",
            found=_reason(path) or f"{type(error).__name__}: {str(error)[:200]}",
            expected="tensors, arrays and plain values, as scvi-tools writes them",
            do="copy the file again; if it comes from someone else, do not load it at all",
            path=path,
        ) from None
    if not isinstance(saved, dict):
        raise ModelError("The file is not a model of scvi-tools", found=type(saved), path=path)
    return saved


def _reason(path: Path) -> str | None:
    """What the file names that nobody needs for a model."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # a file that is damaged can fail in any way
        return None
    known = {one[1] if isinstance(one, tuple) else _name(one) for one in _ALLOWED}
    other = sorted(set(named) - known)
    return f"it asks for {', '.join(other[:5])}" if other else None


def _name(one: Any) -> str:
    return f"{one.__module__}.{one.__qualname__}"


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model, those passed on to its module included."""
    flat = dict(given["non_kwargs"])
    for more in given["kwargs"].values():
        flat |= more
    return flat


def _check_covariates(fields: Mapping[str, Any], path: Path) -> None:
    for name in ("size_factor", "extra_categorical_covs", "extra_continuous_covs"):
        if fields.get(name, {}).get("data_registry"):
            raise ModelError(
                "The model has inputs that no model here has",
                found=name,
                expected="counts and batch alone",
                do="train it without them",
                path=path,
            )


def _config(
    arguments: Mapping[str, Any], state: Mapping[str, Tensor], n_genes: int, path: Path
) -> ScviConfig:
    wrong = [
        f"{name}={value!r}"
        for name, value in arguments.items()
        if name not in _OURS and value not in _FIXED.get(name, ())
    ]
    norms = (
        arguments.get("use_batch_norm", "both"),
        arguments.get("use_layer_norm", "none"),
    )
    norm = {("both", "none"): "batch", ("none", "both"): "layer"}.get(norms)
    if norm is None:
        wrong.append(f"use_batch_norm={norms[0]!r}, use_layer_norm={norms[1]!r}")
    if arguments.get("gene_likelihood", "zinb") not in ("zinb", "nb"):
        wrong.append(f"gene_likelihood={arguments['gene_likelihood']!r}")
    if arguments.get("dispersion", "gene") not in ("gene", "gene-batch"):
        wrong.append(f"dispersion={arguments['dispersion']!r}")
    if wrong:
        raise ModelError(
            "The model was made with options that no model here has",
            found=", ".join(wrong),
            expected="nb or zinb, dispersion gene or gene-batch, a normal latent space, and batch "
            "or layer norm in encoder and decoder alike",
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
    return tuple((batches or {}).get(name, name) for name in names)
