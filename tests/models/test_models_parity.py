"""Given the same weights and noise, forward pass and loss are those of scvi-tools' module."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atlas.config import ScviConfig
from atlas.models import SCVI, CovariateSizes, Inputs, build_model
from atlas.models.layers import ConditionalLinear, Encoder, HiddenStack

scvi_module = pytest.importorskip("scvi.module")

N_CELLS, N_GENES, N_BATCH = 24, 50, 3
BASE = ScviConfig(n_hidden=20, n_latent=5)
SETTINGS = {
    "default": {},
    "nb": {"gene_likelihood": "nb"},
    "gene-batch": {"dispersion": "gene-batch"},
    "nb, gene-batch, one layer": {
        "gene_likelihood": "nb",
        "dispersion": "gene-batch",
        "n_layers": 1,
    },
    "scvi-tools' defaults": {"n_layers": 1, "norm": "batch", "encode_batch": False},
    "batch norm, two layers": {"norm": "batch"},
    "encoder without batch": {"encode_batch": False},
    "latent library": {"library": "latent"},
    "latent library, batch norm, nb": {
        "library": "latent",
        "norm": "batch",
        "gene_likelihood": "nb",
        "encode_batch": False,
    },
}


def _peer(config: ScviConfig, prior: Tensor | None) -> nn.Module:
    norms = {
        "use_batch_norm": "both" if config.norm == "batch" else "none",
        "use_layer_norm": "both" if config.norm == "layer" else "none",
    }
    if prior is not None:
        norms["library_log_means"] = prior[:, 0].numpy()[None]
        norms["library_log_vars"] = prior[:, 1].numpy()[None]
    return scvi_module.VAE(
        n_input=N_GENES,
        n_batch=N_BATCH,
        n_hidden=config.n_hidden,
        n_latent=config.n_latent,
        n_layers=config.n_layers,
        dropout_rate=config.dropout_rate,
        dispersion=config.dispersion,
        gene_likelihood=config.gene_likelihood,
        encode_covariates=config.encode_batch,
        use_observed_lib_size=prior is None,
        **norms,
    )


def _copy_linear(ours: nn.Module, theirs: nn.Linear) -> None:
    if isinstance(ours, ConditionalLinear):
        n_in = ours.weight.shape[1]
        ours.weight.copy_(theirs.weight[:, :n_in])
        if ours.sees_batch:
            ours.batch_weight.copy_(theirs.weight[:, n_in:].T)
        ours.bias.copy_(theirs.bias)
    else:
        ours.load_state_dict(theirs.state_dict())


def _copy_stack(ours: HiddenStack, theirs: nn.Module) -> None:
    layers = list(theirs.fc_layers)
    assert len(layers) == len(ours.linears)
    for linear, norm, layer in zip(ours.linears, ours.norms, layers, strict=True):
        _copy_linear(linear, layer[0])
        if isinstance(norm, nn.BatchNorm1d):
            norm.load_state_dict(layer[1].state_dict())


def _copy_encoder(ours: Encoder, theirs: nn.Module) -> None:
    _copy_stack(ours.hidden, theirs.encoder)
    _copy_linear(ours.mean, theirs.mean_encoder)
    _copy_linear(ours.log_variance, theirs.var_encoder)


@torch.no_grad()
def _copy(ours: SCVI, theirs: nn.Module) -> None:
    _copy_encoder(ours.encoder, theirs.z_encoder)
    if ours.config.library == "latent":
        _copy_encoder(ours.library_encoder, theirs.l_encoder)
    _copy_stack(ours.decoder, theirs.decoder.px_decoder)
    _copy_linear(ours.scale, theirs.decoder.px_scale_decoder[0])
    if ours.config.gene_likelihood == "zinb":
        _copy_linear(ours.zero_inflation, theirs.decoder.px_dropout_decoder)
    ours.log_inverse_dispersion.copy_(theirs.px_r.movedim(0, -1))


@pytest.fixture
def forked() -> None:
    """The peer draws from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _fit_a_little(peer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Move weights and running statistics off their initial values."""
    optimizer = torch.optim.Adam(peer.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        peer(tensors)[2].loss.backward()
        optimizer.step()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_forward_and_loss_agree(setting: str, training: bool) -> None:
    config = dataclasses.replace(BASE, dropout_rate=0.0 if training else 0.1, **SETTINGS[setting])
    prior = torch.tensor([[4.0, 0.3], [5.0, 0.6], [4.5, 1.0]])
    prior = prior if config.library == "latent" else None
    rng = np.random.default_rng(1)
    counts = torch.from_numpy(
        rng.negative_binomial(0.5, 0.1, (N_CELLS, N_GENES)).astype(np.float32)
    )
    counts[0, 0] = 3000  # above this the peer's own log-gammas lose the fourth digit
    batch = torch.from_numpy(rng.integers(0, N_BATCH, N_CELLS))
    tensors = {
        "X": counts,
        "batch": batch.unsqueeze(1),
        "labels": torch.zeros(N_CELLS, 1, dtype=torch.int64),
    }
    peer = _peer(config, prior)
    _fit_a_little(peer, tensors)
    ours = build_model(config, N_GENES, N_BATCH, seed=0, library_prior=prior)
    _copy(ours, peer)
    peer.train(training)
    ours.train(training)

    # The peer has sampled z (and the library) already: replace its samples by the means.
    inference = peer.inference(counts, tensors["batch"])
    inference["z"] = inference["qz"].loc
    if prior is not None:
        inference["library"] = inference["ql"].loc
    generative = peer.generative(inference["z"], inference["library"], tensors["batch"])
    expected = peer.loss(tensors, inference, generative, kl_weight=0.3)
    # BatchNorm in training mode sees the minibatch in both; its running values are not used.
    out = ours(Inputs(counts, batch))
    losses = ours.loss(Inputs(counts, batch), 0.3)

    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(out.z_mean, inference["qz"].loc, **close)
    torch.testing.assert_close(out.z_variance, inference["qz"].variance, **close)
    torch.testing.assert_close(out.log_library, inference["library"], **close)
    if prior is not None:
        torch.testing.assert_close(out.library_variance, inference["ql"].variance, **close)
    px = generative["px"]
    shares = ours.scale(out.decoded.h).softmax(-1)
    torch.testing.assert_close(shares, px.scale, rtol=1e-4, atol=1e-8)
    theta = out.decoded.log_inverse_dispersion.exp().expand(N_CELLS, N_GENES)
    torch.testing.assert_close(theta, px.theta.expand(N_CELLS, N_GENES), **close)
    if config.gene_likelihood == "zinb":
        dropout = ours.zero_inflation(out.decoded.h)
        torch.testing.assert_close(dropout, px.zi_logits, rtol=1e-4, atol=1e-5)
    (reconstruction_loss,) = expected.reconstruction_loss.values()
    torch.testing.assert_close(losses.reconstruction_loss, reconstruction_loss, **close)
    kl = sum(expected.kl_local.values())
    torch.testing.assert_close(losses.kl, kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.objective, expected.loss, rtol=1e-4, atol=0)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("setting", ["default", "nb, gene-batch, one layer"])
def test_gradients_agree(setting: str) -> None:
    """With one minibatch and no noise, the gradients of the weights that both have are the same."""
    config = dataclasses.replace(BASE, dropout_rate=0.0, **SETTINGS[setting])
    rng = np.random.default_rng(2)
    counts = torch.from_numpy(rng.negative_binomial(1, 0.3, (N_CELLS, N_GENES)).astype(np.float32))
    batch = torch.from_numpy(rng.integers(0, N_BATCH, N_CELLS))
    peer = _peer(config, None)
    ours = build_model(config, N_GENES, N_BATCH, seed=0)
    _copy(ours, peer)
    inference = peer.inference(counts, batch.unsqueeze(1))
    inference["z"] = inference["qz"].loc
    generative = peer.generative(inference["z"], inference["library"], batch.unsqueeze(1))
    tensors = {"X": counts, "batch": batch.unsqueeze(1)}
    peer.loss(tensors, inference, generative).loss.backward()
    ours.loss(Inputs(counts, batch)).objective.backward()

    close = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(
        ours.log_inverse_dispersion.grad, peer.px_r.grad.movedim(0, -1), **close
    )
    torch.testing.assert_close(
        ours.scale.weight.grad, peer.decoder.px_scale_decoder[0].weight.grad, **close
    )
    first, theirs = ours.encoder.hidden.linears[0], peer.z_encoder.encoder.fc_layers[0][0]
    torch.testing.assert_close(first.weight.grad, theirs.weight.grad[:, :N_GENES], **close)
    torch.testing.assert_close(first.batch_weight.grad, theirs.weight.grad[:, N_GENES:].T, **close)


@pytest.mark.usefixtures("forked")
def test_covariates_agree() -> None:
    """Two categorical covariates beside the batch; scvi-tools appends their one-hots to it."""
    peer = scvi_module.VAE(
        N_GENES,
        n_batch=N_BATCH,
        n_hidden=20,
        n_latent=5,
        n_layers=2,
        n_cats_per_cov=[3, 2],
        encode_covariates=True,
        dropout_rate=0.1,
        use_batch_norm="none",
        use_layer_norm="both",
    ).eval()
    config = dataclasses.replace(BASE, encode_batch=True, encode_covariates=True)
    sizes = CovariateSizes((3, 2))
    ours = build_model(config, N_GENES, N_BATCH, seed=0, covariates=sizes).eval()
    rng = np.random.default_rng(1)
    counts = torch.from_numpy(rng.poisson(2.0, (N_CELLS, N_GENES)).astype(np.float32))
    batch = torch.from_numpy(rng.integers(0, N_BATCH, N_CELLS))
    categories = torch.from_numpy(rng.integers(0, [3, 2], (N_CELLS, 2)))
    tensors = {
        "X": counts,
        "batch": batch[:, None],
        "labels": torch.zeros(N_CELLS, 1, dtype=torch.int64),
        "extra_categorical_covs": categories,
    }
    with torch.no_grad():
        stacks = [
            (ours.encoder.hidden, peer.z_encoder.encoder),
            (ours.decoder, peer.decoder.px_decoder),
        ]
        for mine, theirs in stacks:
            for linear, layer in zip(mine.linears, theirs.fc_layers, strict=True):
                parts = layer[0].weight.split([linear.weight.shape[1], N_BATCH, 3, 2], dim=1)
                linear.weight.copy_(parts[0])
                linear.batch_weight.copy_(parts[1].T)
                for own, part in zip(linear.category_weights, parts[2:], strict=True):
                    own.copy_(part.T)
                linear.bias.copy_(layer[0].bias)
        _copy_linear(ours.encoder.mean, peer.z_encoder.mean_encoder)
        _copy_linear(ours.encoder.log_variance, peer.z_encoder.var_encoder)
        _copy_linear(ours.scale, peer.decoder.px_scale_decoder[0])
        _copy_linear(ours.zero_inflation, peer.decoder.px_dropout_decoder)
        ours.log_inverse_dispersion.copy_(peer.px_r)
        inference = peer.inference(counts, batch[:, None], cat_covs=categories)
        inference["z"] = inference["qz"].loc
        generative = peer.generative(
            inference["z"], inference["library"], batch[:, None], cat_covs=categories
        )
        expected = peer.loss(tensors, inference, generative, kl_weight=0.3)
        losses = ours.loss(Inputs(counts, batch, categories=categories), 0.3)
    torch.testing.assert_close(losses.objective, expected.loss, rtol=1e-4, atol=0)
