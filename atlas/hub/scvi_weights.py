"""Weights of scVI under the names that scvi-tools gives them, and under ours.

scvi-tools appends the one-hot batch to the input of a layer; here the batch has a matrix of its own
(:class:`atlas.models.layers.ConditionalLinear`). All else is the same under another name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from atlas.models.layers import ConditionalLinear, Encoder, HiddenStack
from atlas.models.scanvi import SCANVI
from atlas.models.scvi import SCVI

_NORM_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _stack(prefix: str, hidden: HiddenStack) -> Iterator[tuple[str, nn.Module]]:
    for i, (linear, norm) in enumerate(zip(hidden.linears, hidden.norms, strict=True)):
        yield f"{prefix}.fc_layers.Layer {i}.0", linear
        if isinstance(norm, nn.BatchNorm1d):
            yield f"{prefix}.fc_layers.Layer {i}.1", norm


def _encoder(prefix: str, of: Encoder, kind: str = "encoder") -> Iterator[tuple[str, nn.Module]]:
    assert isinstance(of.hidden, HiddenStack)
    yield from _stack(f"{prefix}.{kind}", of.hidden)
    yield f"{prefix}.mean_{kind}", of.mean
    yield f"{prefix}.var_{kind}", of.log_variance


def _class_layers(module: SCANVI) -> Iterator[tuple[str, nn.Module]]:
    """The layers of what is above z, by their name in scvi-tools."""
    yield from _encoder("encoder_z2_z1", module.u_encoder)
    yield from _encoder("decoder_z1_z2", module.z_decoder, "decoder")
    classifier = module.classifier
    for hidden in classifier.hidden:
        assert isinstance(hidden, HiddenStack)
        yield from _stack("classifier.classifier.0", hidden)
    yield f"classifier.classifier.{len(classifier.hidden)}", classifier.logits[0]


def _layers(module: SCVI) -> Iterator[tuple[str, nn.Module]]:
    """Linear and normalising layers of a module by their name in scvi-tools."""

    yield from _encoder("z_encoder", module.encoder)
    if module.config.library == "latent":
        yield from _encoder("l_encoder", module.library_encoder)
    yield from _stack("decoder.px_decoder", module.decoder)
    yield "decoder.px_scale_decoder.0", module.scale
    if module.config.gene_likelihood == "zinb":
        yield "decoder.px_dropout_decoder", module.zero_inflation


@torch.no_grad()
def to_ours(module: SCVI | SCANVI, theirs: Mapping[str, Tensor]) -> None:
    """Fill a module with weights of scvi-tools.

    Its p(z | u, c) of scANVI has no floor of the variance; here 1e-4 is added.

    Raises
    ------
    KeyError, RuntimeError
        A weight is missing, or is of another shape.
    """
    layers = _layers(module) if isinstance(module, SCVI) else _layers(module.scvi)
    if isinstance(module, SCANVI):
        layers = chain(layers, _class_layers(module))
        module = module.scvi
    for name, layer in layers:
        if isinstance(layer, ConditionalLinear):
            n_in = layer.weight.shape[1]
            weight = theirs[f"{name}.weight"]
            _fill(layer.weight, weight[:, :n_in])
            if layer.sees_batch:
                _fill(layer.batch_weight, weight[:, n_in:].T)
            elif weight.shape[1] != n_in:
                raise RuntimeError(f"shape {tuple(weight.shape)} where {n_in} columns are expected")
            _fill(layer.bias, theirs[f"{name}.bias"])
        else:
            layer.load_state_dict({k: theirs[f"{name}.{k}"] for k in layer.state_dict()})
    if module.config.gene_likelihood != "poisson":
        _fill(module.log_inverse_dispersion, theirs["px_r"].movedim(0, -1))


def _fill(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:  # copy_ would broadcast
        raise RuntimeError(f"shape {tuple(theirs.shape)} where {tuple(ours.shape)} is expected")
    ours.copy_(theirs)


def to_theirs(module: SCVI) -> dict[str, Tensor]:
    """The weights of a module for scvi-tools' ``VAE``; layers that it has and does not use are 0.

    Returns
    -------
    Tensors on the CPU, by name.
    """
    out: dict[str, Tensor] = {}
    for name, layer in _layers(module):
        if isinstance(layer, ConditionalLinear):
            weight: Tensor = layer.weight
            if layer.sees_batch:
                weight = torch.cat([weight, layer.batch_weight.T], dim=1)
            out[f"{name}.weight"] = weight
            out[f"{name}.bias"] = layer.bias
        else:
            out |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    out["px_r"] = torch.zeros(module.n_genes)
    if module.config.gene_likelihood != "poisson":
        out["px_r"] = module.log_inverse_dispersion.movedim(-1, 0)
    if module.library_prior is not None:
        out["library_log_means"] = module.library_prior[:, 0][None]
        out["library_log_vars"] = module.library_prior[:, 1][None]
    n_hidden = module.config.n_hidden
    for unused in ("decoder.px_r_decoder", "decoder.px_dropout_decoder"):
        out.setdefault(f"{unused}.weight", torch.zeros(module.n_genes, n_hidden))
        out.setdefault(f"{unused}.bias", torch.zeros(module.n_genes))
    if module.config.library == "observed":
        out |= _unused_library_encoder(module)
    return {name: value.detach().cpu().clone().contiguous() for name, value in out.items()}


def _unused_library_encoder(module: SCVI) -> dict[str, Tensor]:
    """That which scvi-tools makes even where the library is observed: zeros, and unit norms."""
    config, prefix = module.config, "l_encoder"
    n_in = module.n_genes + (module.n_batch if config.encode_batch else 0)
    out = {
        f"{prefix}.encoder.fc_layers.Layer 0.0.weight": torch.zeros(config.n_hidden, n_in),
        f"{prefix}.encoder.fc_layers.Layer 0.0.bias": torch.zeros(config.n_hidden),
    }
    if config.norm == "batch":
        norm = nn.BatchNorm1d(config.n_hidden).state_dict()
        out |= {f"{prefix}.encoder.fc_layers.Layer 0.1.{key}": norm[key] for key in _NORM_STATE}
    for part in ("mean_encoder", "var_encoder"):
        out[f"{prefix}.{part}.weight"] = torch.zeros(1, config.n_hidden)
        out[f"{prefix}.{part}.bias"] = torch.zeros(1)
    return out
