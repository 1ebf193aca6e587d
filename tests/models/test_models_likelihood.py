"""The likelihoods against scipy in double precision, by brute force, and by finite differences."""

from __future__ import annotations

from itertools import product

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit
from torch import Tensor

from atlas.models import likelihood, nb_loss, zinb_loss


def _minibatch(seed: int, n_cells: int = 6, n_genes: int = 9) -> dict[str, Tensor]:
    """Random arguments in float64, about half of the counts zero."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3.0, (n_cells, n_genes)) * rng.integers(0, 2, (n_cells, n_genes))
    return {
        "counts": torch.from_numpy(counts.astype(np.float64)),
        "scale_logits": torch.from_numpy(rng.normal(0, 2, (n_cells, n_genes))),
        "log_library": torch.from_numpy(rng.normal(3, 1, (n_cells, 1))),
        "log_inverse_dispersion": torch.from_numpy(rng.normal(0, 1.5, n_genes)),
        "dropout_logits": torch.from_numpy(rng.normal(0, 2, (n_cells, n_genes))),
    }


def _expected(arguments: dict[str, Tensor], present: Tensor | None = None) -> np.ndarray:
    """The textbook formulas in numpy and scipy: mean, probability, mixture, sum."""
    values = {name: value.double().numpy() for name, value in arguments.items()}
    mask = np.ones(values["counts"].shape, bool) if present is None else present.numpy()
    scale = np.exp(values["scale_logits"] - values["scale_logits"].max(-1, keepdims=True)) * mask
    scale /= scale.sum(-1, keepdims=True)
    mean = np.exp(values["log_library"]) * scale
    theta = np.exp(values["log_inverse_dispersion"]) * np.ones_like(mean)
    probability = stats.nbinom.logpmf(values["counts"], theta, theta / (theta + mean))
    if "dropout_logits" in values:
        zero = expit(values["dropout_logits"])
        mixed = zero * (values["counts"] == 0) + (1 - zero) * np.exp(probability)
        probability = np.log(np.where(mask, mixed, 1.0))
    return -np.where(mask, probability, 0.0).sum(-1)


def _without_dropout(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if name != "dropout_logits"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masked", [False, True])
def test_likelihoods_are_those_of_scipy(seed: int, masked: bool) -> None:
    arguments = _minibatch(seed)
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(arguments["counts"].shape, generator=generator) < 0.7 if masked else None
    nb = _without_dropout(arguments)
    np.testing.assert_allclose(nb_loss(**nb, present=present), _expected(nb, present), rtol=1e-10)
    np.testing.assert_allclose(
        zinb_loss(**arguments, present=present), _expected(arguments, present), rtol=1e-10
    )


def test_dispersion_may_differ_between_cells() -> None:
    arguments = _minibatch(3)
    shape = arguments["counts"].shape
    per_cell = torch.from_numpy(np.random.default_rng(0).normal(size=shape))
    arguments["log_inverse_dispersion"] = per_cell
    np.testing.assert_allclose(zinb_loss(**arguments), _expected(arguments), rtol=1e-10)


def _exact(count: float, log_mean: float, log_theta: float, logit: float | None) -> float:
    """Minus the log-probability of one count, in 50 digits."""
    with mpmath.workdps(50):
        mean, theta = mpmath.exp(log_mean), mpmath.exp(log_theta)
        log_p = (
            mpmath.loggamma(count + theta)
            - mpmath.loggamma(theta)
            - mpmath.loggamma(count + 1)
            + theta * mpmath.log(theta / (theta + mean))
            + count * mpmath.log(mean / (theta + mean))
        )
        if logit is not None:
            zero = 1 / (1 + mpmath.exp(-logit))
            log_p = mpmath.log(zero * (count == 0) + (1 - zero) * mpmath.exp(log_p))
        return float(-log_p)


@pytest.mark.parametrize("theta", [1e-3, 1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("count", [0, 1, 2, 17, 1000, 100_000])
@pytest.mark.parametrize("mean", [1e-9, 1e-3, 1.0, 17.0, 1000.0, 60000.0])
@pytest.mark.parametrize("logit", [None, -15.0, -1.5, 15.0])
def test_float32_holds_at_the_extremes(
    theta: float, count: int, mean: float, logit: float | None
) -> None:
    """Also where count, mean and θ are large: a few nats from terms near a million."""
    log_mean, log_theta = np.log(np.float32(mean)), np.log(np.float32(theta))
    arguments = [
        torch.tensor([[float(count)]]),
        torch.zeros(1, 1),
        torch.tensor([[log_mean]]),
        torch.tensor([log_theta]),
    ]
    dropout = [] if logit is None else [torch.tensor([[logit]])]
    found = (zinb_loss if dropout else nb_loss)(*arguments, *dropout)
    assert found.dtype == torch.float32
    expected = _exact(count, float(log_mean), float(log_theta), logit)
    # A zero of the ZINB is a difference of two softplus, exact to the rounding of the logit.
    absolute = 1e-9 if logit is None else 2e-7 * abs(logit)
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=absolute)


@pytest.mark.parametrize("logit", [-60.0, 0.0, 60.0])
def test_gradients_are_finite_at_the_extremes(logit: float) -> None:
    for log_theta, count, log_library in product((-30.0, 0.0, 30.0), (0.0, 1.0, 6e4), (0.0, 14.0)):
        leaves = [
            torch.tensor([[logit, 0.0]], requires_grad=True),
            torch.tensor([[log_library]], requires_grad=True),
            torch.tensor([log_theta, 0.0], requires_grad=True),
            torch.tensor([[logit, 0.0]], requires_grad=True),
        ]
        loss = zinb_loss(torch.tensor([[count, 3.0]]), *leaves)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves if leaf.grad is not None)
        assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("zero_inflated", [False, True])
@pytest.mark.parametrize("per_cell", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(
    zero_inflated: bool, per_cell: bool, masked: bool
) -> None:
    arguments = _minibatch(4, n_cells=3, n_genes=5)
    if not zero_inflated:
        arguments = _without_dropout(arguments)
    if per_cell:
        arguments["log_inverse_dispersion"] = arguments["log_inverse_dispersion"].repeat(3, 1)
    counts = arguments.pop("counts")
    assert (counts == 0).any()
    assert (counts > 0).any()
    present = torch.ones_like(counts, dtype=torch.bool)
    present[0, 1] = present[2, 3] = not masked

    def loss(*leaves: Tensor) -> Tensor:
        function = zinb_loss if zero_inflated else nb_loss
        return function(counts, *leaves, present=present if masked else None)

    leaves = [value.clone().requires_grad_() for value in arguments.values()]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("zero_inflated", [False, True])
def test_float32_gradients_are_those_of_float64(zero_inflated: bool) -> None:
    double = _minibatch(5, n_cells=20, n_genes=50)
    if not zero_inflated:
        double = _without_dropout(double)
    function = zinb_loss if zero_inflated else nb_loss
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaves = {name: value.to(dtype).clone() for name, value in double.items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name != "counts")
        function(**leaves).sum().backward()
        gradients.append([leaf.grad for name, leaf in leaves.items() if name != "counts"])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_absent_genes_do_not_exist() -> None:
    """Loss and gradients are those of the genes present alone, whatever the others hold."""
    arguments = _minibatch(6)
    genes = torch.tensor([0, 2, 3, 5, 8])
    present = torch.zeros(arguments["counts"].shape, dtype=torch.bool)
    present[:, genes] = True
    arguments["counts"][:, 1] = 1e6
    whole = {name: value.clone().requires_grad_() for name, value in arguments.items()}
    part = {
        name: (value if name == "log_library" else value[..., genes]).clone().requires_grad_()
        for name, value in arguments.items()
    }
    loss, expected = zinb_loss(**whole, present=present), zinb_loss(**part)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    for name in ("scale_logits", "log_inverse_dispersion", "dropout_logits"):
        found, subset = whole[name].grad, part[name].grad
        assert found is not None
        assert subset is not None
        torch.testing.assert_close(found[..., genes], subset)
        absent = torch.ones(9, dtype=torch.bool)
        absent[genes] = False
        assert (found[..., absent] == 0).all()


def _loss_and_gradients(arguments: dict[str, Tensor], present: Tensor | None) -> list[Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in arguments.items()}
    loss = (zinb_loss if "dropout_logits" in leaves else nb_loss)(**leaves, present=present)
    loss.sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


@pytest.mark.parametrize("zero_inflated", [False, True])
@pytest.mark.parametrize("per_cell", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_computing_all_elements_gives_what_gathering_gives(
    monkeypatch: pytest.MonkeyPatch, zero_inflated: bool, per_cell: bool, masked: bool
) -> None:
    """GPUs take the first way, CPUs the second."""
    arguments = _minibatch(8)
    if not zero_inflated:
        arguments = _without_dropout(arguments)
    if per_cell:
        arguments["log_inverse_dispersion"] = arguments["log_inverse_dispersion"].repeat(6, 1)
    present = arguments["counts"] < 4 if masked else None
    gathered = _loss_and_gradients(arguments, present)
    monkeypatch.setattr(likelihood, "_gathers", lambda device: False)
    computed = _loss_and_gradients(arguments, present)
    assert len(gathered) == len(arguments)
    for found, expected in zip(computed, gathered, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    arguments = _minibatch(9)
    on_gpu = {name: value.cuda() for name, value in arguments.items()}
    for found, expected in zip(
        _loss_and_gradients(on_gpu, None), _loss_and_gradients(arguments, None), strict=True
    ):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-10, atol=1e-10)


def test_bfloat16_arguments_are_widened() -> None:
    arguments = {name: value.bfloat16() for name, value in _minibatch(7).items()}
    counts = arguments.pop("counts").float()
    wide = {name: value.float() for name, value in arguments.items()}
    found = zinb_loss(counts, **arguments)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, zinb_loss(counts, **wide), rtol=0, atol=0)
