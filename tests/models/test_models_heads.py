"""The last layer and the likelihood in one node, against both by themselves in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atlas.models import likelihood, zinb_loss
from atlas.models.fused import can_fuse
from atlas.models.likelihood import heads_loss, nb_loss
from atlas.models.sparse import csr, from_dense
from atlas.models.threads import at_once, cut, heavy_threads, threads

N_CELLS, N_HIDDEN, N_GENES = 70, 16, 201
Found = dict[str, Tensor]


def _cells(per_cell: bool = False) -> Found:
    rng = np.random.default_rng(0)
    counts = rng.geometric(0.4, (N_CELLS, N_GENES)) * (rng.random((N_CELLS, N_GENES)) < 0.1)
    counts[0] = 0
    given = {
        "counts": counts,
        "h": np.maximum(rng.normal(0, 1, (N_CELLS, N_HIDDEN)), 0),
        "log_library": np.log(np.maximum(counts.sum(1, keepdims=True), 1)),
        "log_inverse_dispersion": rng.normal(0, 1.5, (N_CELLS, N_GENES) if per_cell else N_GENES),
    }
    return {name: torch.from_numpy(np.asarray(value)).float() for name, value in given.items()}


def _layers(zero_inflated: bool, by_columns: bool = True) -> list[nn.Linear]:
    torch.manual_seed(0)
    layers = [nn.Linear(N_HIDDEN, N_GENES) for _ in range(1 + zero_inflated)]
    if by_columns:
        for layer in layers:
            layer.weight.data = layer.weight.data.t().contiguous().t()
    return layers


def _differentiated(
    given: Found, layers: list[nn.Linear], weight: Tensor | None, **options: object
) -> Found:
    """Losses, and gradients of their mean or of their sum times ``weight``."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if k != "counts"}
    second = layers[1] if len(layers) > 1 else None
    loss = heads_loss(given["counts"], scale=layers[0], zero_inflation=second, **leaves, **options)
    return _with_gradients(loss, leaves, layers, weight)


def _by_themselves(
    given: Found, layers: list[nn.Linear], weight: Tensor | None, **options: object
) -> Found:
    """The same in float64, layer by layer."""
    doubled = [nn.Linear(N_HIDDEN, N_GENES, dtype=torch.float64) for _ in layers]
    for own, layer in zip(doubled, layers, strict=True):
        own.load_state_dict(layer.state_dict())
    leaves = {k: v.double().requires_grad_() for k, v in given.items() if k != "counts"}
    others = leaves["log_library"], leaves["log_inverse_dispersion"]
    counts, logits = given["counts"].double(), [layer(leaves["h"]) for layer in doubled]
    if len(layers) > 1:
        loss = zinb_loss(counts, logits[0], *others, logits[1], **options)
    else:
        loss = nb_loss(counts, logits[0], *others, **options)
    return _with_gradients(loss, leaves, doubled, weight)


def _with_gradients(
    loss: Tensor, leaves: Found, layers: list[nn.Linear], weight: Tensor | None
) -> Found:
    all_leaves = leaves | {
        f"{i}.{name}": value
        for i, layer in enumerate(layers)
        for name, value in layer.named_parameters()
    }
    total = loss.mean() if weight is None else (loss * weight.to(loss.dtype)).sum()
    gradients = torch.autograd.grad(total, list(all_leaves.values()))
    return {"loss": loss.detach(), **dict(zip(all_leaves, gradients, strict=True))}


@pytest.mark.parametrize("zero_inflated", [False, True])
@pytest.mark.parametrize("per_cell", [False, True])
@pytest.mark.parametrize("some_present", [False, True])
@pytest.mark.parametrize("weighted", ["mean", "sum", "each"])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("by_onednn", [False, True])
def test_it_is_both_by_themselves(
    zero_inflated: bool,
    per_cell: bool,
    some_present: bool,
    weighted: str,
    n_threads: int,
    by_onednn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if by_onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("oneDNN is not in this build of torch")
    monkeypatch.setattr("atlas.models.products._THERE", by_onednn)
    monkeypatch.setattr("atlas.models.heads._LEAST_CELLS", 10)
    monkeypatch.setattr("atlas.models.heads._LEAST_GENES", 50)
    given, layers = _cells(per_cell), _layers(zero_inflated)
    generator = torch.Generator().manual_seed(2)
    weights = {"mean": None, "sum": torch.ones(N_CELLS)}
    weights["each"] = torch.rand(N_CELLS, generator=generator)
    weight = weights[weighted]
    present = None
    if some_present:
        present = torch.rand(N_CELLS, N_GENES, generator=generator) < 0.8
    assert can_fuse(given["counts"], given["h"], layers[0].weight)
    expected = _by_themselves(given, layers, weight, present=present)
    with threads(1, heavy=n_threads):
        found = _differentiated(given, layers, weight, present=present)
        with torch.no_grad():
            again = heads_loss(
                given["counts"], given["h"], layers[0], layers[1] if zero_inflated else None,
                given["log_library"], given["log_inverse_dispersion"], present,
            )  # fmt: skip
    assert torch.equal(found["loss"], again)
    torch.testing.assert_close(found["loss"].double(), expected["loss"], rtol=1e-5, atol=0)
    for name in found.keys() - {"loss"}:
        assert found[name].dtype == torch.float32
        scale = expected[name].abs().max()
        assert (found[name].double() - expected[name]).abs().max() < 1e-5 * scale, name


def test_layouts_change_nothing() -> None:
    """Sparse counts, weights by rows."""
    given = _cells()
    expected = _differentiated(given, _layers(True), None)
    dense = given["counts"]
    given["counts"] = csr(*map(torch.from_numpy, from_dense(dense.numpy())), dense.shape)
    found = _differentiated(given, _layers(True, by_columns=False), None)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_gradients_come_only_where_they_are_asked_for() -> None:
    """As in surgery, where the layers are frozen."""
    given, layers = _cells(), _layers(True)
    expected = _differentiated(given, layers, None)["h"]
    for layer in layers:
        layer.requires_grad_(False)
    h = given["h"].requires_grad_()
    loss = heads_loss(
        given["counts"], h, *layers, given["log_library"], given["log_inverse_dispersion"]
    )
    loss.mean().backward()
    assert torch.equal(h.grad, expected)
    assert layers[0].weight.grad is None
    assert given["log_inverse_dispersion"].grad is None


def test_bfloat16_products_are_near() -> None:
    given, layers = _cells(), _layers(True)
    expected = _differentiated(given, layers, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = _differentiated(given, layers, None)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        scale = value.abs().max()
        assert (found[name] - value).abs().max() < 0.02 * scale, name
    assert not torch.equal(found["loss"], expected["loss"])


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    given, layers = _cells(), _layers(True)
    fused = _differentiated(given, layers, None)
    monkeypatch.setattr(likelihood, "can_fuse", lambda *tensors: False)
    plain = _differentiated(given, layers, None)
    assert any(not torch.equal(fused[name], plain[name]) for name in fused)
    torch.testing.assert_close(fused["loss"], plain["loss"], rtol=1e-5, atol=0)


# threads


def test_parts_are_of_equal_size_and_make_up_the_range() -> None:
    assert cut(10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert cut(10, 3, step=4) == [(0, 4), (4, 8), (8, 10)]
    assert cut(2, 5) == [(0, 1), (1, 2)]
    assert cut(0, 4) == [(0, 0)]


def test_torch_has_one_thread_in_each_task() -> None:
    found: list[int] = []
    with threads(2, heavy=5):
        assert heavy_threads() == 5
        at_once([lambda: found.append(torch.get_num_threads()) for _ in range(3)])
        assert torch.get_num_threads() == 2
    assert found == [1, 1, 1]


def test_an_error_in_a_task_is_raised() -> None:
    def fail() -> None:
        raise ValueError("here")

    for tasks in ([fail], [fail, list], [list, fail]):
        with pytest.raises(ValueError, match="here"):
            at_once(tasks)
