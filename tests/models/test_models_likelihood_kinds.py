"""Poisson and normal likelihoods, and means that are given by their logarithm, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import softmax

from atlas.models.likelihood import (
    gaussian_loss,
    log_means,
    log_softplus,
    nb_loss,
    poisson_loss,
    zinb_loss,
)

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(3.0, (5, 7)).astype(np.float64)
LOGITS = RNG.normal(0, 2, (5, 7))
LIBRARY = RNG.normal(3, 1, (5, 1))
LOG_THETA = RNG.normal(0, 1, 7)
PRESENT = RNG.random((5, 7)) > 0.3


def tensors(*values: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(value) for value in values]


def means(link: str, present: np.ndarray | None) -> np.ndarray:
    if link == "log":
        return np.exp(LOGITS + LIBRARY)
    masked = LOGITS if present is None else np.where(present, LOGITS, -np.inf)
    return softmax(masked, axis=1) * np.exp(LIBRARY)


@pytest.mark.parametrize("link", ["softmax", "log"])
@pytest.mark.parametrize("present", [None, PRESENT], ids=["all", "some"])
def test_poisson(link: str, present: np.ndarray | None) -> None:
    mask = None if present is None else torch.from_numpy(present)
    found = poisson_loss(*tensors(COUNTS, LOGITS, LIBRARY), mask, link)
    expected = -stats.poisson.logpmf(COUNTS, np.maximum(means(link, present), 1e-300))
    expected = expected if present is None else expected * present
    np.testing.assert_allclose(found.numpy(), expected.sum(1), rtol=1e-10)


@pytest.mark.parametrize("present", [None, PRESENT], ids=["all", "some"])
def test_negative_binomials_of_given_means(present: np.ndarray | None) -> None:
    mask = None if present is None else torch.from_numpy(present)
    theta, mean = np.exp(LOG_THETA), means("log", None)
    p = stats.nbinom.pmf(COUNTS, theta, theta / (theta + mean))
    arguments = tensors(COUNTS, LOGITS, LIBRARY, LOG_THETA)
    keep = np.ones_like(COUNTS) if present is None else present
    found = nb_loss(*arguments, mask, "log")
    np.testing.assert_allclose(found.numpy(), -(np.log(p) * keep).sum(1), rtol=1e-10)
    found = zinb_loss(*arguments, torch.zeros(5, 7, dtype=torch.float64), mask, "log")
    mixed = np.log(0.5 * (COUNTS == 0) + 0.5 * p)
    np.testing.assert_allclose(found.numpy(), -(mixed * keep).sum(1), rtol=1e-10)


@pytest.mark.parametrize("link", ["softmax", "log"])
@pytest.mark.parametrize("kind", ["poisson", "nb", "zinb"])
def test_gradients_are_those_of_finite_differences(kind: str, link: str) -> None:
    counts, *leaves = tensors(COUNTS, LOGITS, LIBRARY, LOG_THETA, LOGITS[::-1].copy())
    loss = {"poisson": poisson_loss, "nb": nb_loss, "zinb": zinb_loss}[kind]
    leaves = leaves[: {"poisson": 2, "nb": 3, "zinb": 4}[kind]]
    mask = torch.from_numpy(PRESENT)

    def of(*values: torch.Tensor) -> torch.Tensor:
        return loss(counts, *values, mask, link)

    assert torch.autograd.gradcheck(of, [leaf.requires_grad_() for leaf in leaves])


def test_the_poisson_is_a_negative_binomial_without_dispersion() -> None:
    counts, logits, library = tensors(COUNTS, LOGITS, LIBRARY)
    many = torch.full((7,), 16.0, dtype=torch.float64)
    torch.testing.assert_close(
        poisson_loss(counts, logits, library),
        nb_loss(counts, logits, library, many),
        rtol=1e-3,
        atol=0,
    )


def test_float32_holds_for_large_counts() -> None:
    counts = torch.tensor([[1e6, 0.0, 3.0]])
    logits, library = torch.tensor([[10.0, -5.0, -3.0]]), torch.tensor([[13.8]])
    exact = poisson_loss(counts.double(), logits.double(), library.double())
    assert abs(poisson_loss(counts, logits, library).double() - exact) < 1e-5 * 1e6


@pytest.mark.parametrize("present", [None, PRESENT], ids=["all", "some"])
def test_normal(present: np.ndarray | None) -> None:
    mask = None if present is None else torch.from_numpy(present)
    x, mean, log_variance = tensors(COUNTS, LOGITS, LOG_THETA)
    found = gaussian_loss(x, mean, log_variance, mask)
    expected = -stats.norm.logpdf(COUNTS, LOGITS, np.exp(LOG_THETA / 2))
    expected = expected if present is None else expected * present
    np.testing.assert_allclose(found.numpy(), expected.sum(1), rtol=1e-12)


def test_log_softplus_neither_underflows_nor_loses_digits() -> None:
    x = torch.tensor([-1e4, -90.0, -21.0, -19.0, 0.0, 5.0, 1e4], requires_grad=True)
    exact = np.log(np.logaddexp(0, x.detach().double().numpy()), where=x.detach().numpy() > -80)
    exact = np.where(x.detach().numpy() > -80, exact, x.detach().numpy())
    found = log_softplus(x)
    np.testing.assert_allclose(found.detach().numpy(), exact, rtol=1e-6)
    found.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_means_are_those_of_the_loss() -> None:
    mask = torch.from_numpy(PRESENT)
    found = log_means(*tensors(LOGITS, LIBRARY), mask).exp().numpy()
    np.testing.assert_allclose(found, means("softmax", PRESENT), rtol=1e-12)
    assert (found[~PRESENT] == 0).all()
