"""scANVI against the paper's terms in float64, and against scvi-tools on equal weights."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from atlas.config import ScanviConfig
from atlas.errors import ConfigError
from atlas.models import SCANVI, Conditions, Inputs, LabelTree, build_model
from atlas.models.layers import sample_normal

N_GENES, N_BATCH, N_CELLS = 25, 2, 9
SMALL = ScanviConfig(n_hidden=12, n_latent=3, n_layers=1, dropout_rate=0.0)
FLAT = LabelTree.make(["B", "NK", "T"])
DEEP = LabelTree.make(
    ["CD4", "CD8", "B"], {"CD4": "T", "CD8": "T", "T": "lymphoid", "B": "lymphoid", "M": "myeloid"}
)


def make(labels: LabelTree = FLAT, *, prior: Tensor | None = None, **changes: object) -> SCANVI:
    config = dataclasses.replace(SMALL, **changes)
    model = build_model(config, N_GENES, N_BATCH, seed=3, library_prior=prior, labels=labels)
    assert isinstance(model, SCANVI)
    return model


def cells(label: list[int], seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    counts = rng.negative_binomial(0.5, 0.2, (len(label), N_GENES)).astype(np.float32)
    batch = torch.from_numpy(rng.integers(0, N_BATCH, len(label)))
    return Inputs(torch.from_numpy(counts), batch, label=torch.tensor(label))


def reference(
    model: SCANVI, inputs: Inputs, z: Tensor | None = None, u: Tensor | None = None
) -> Tensor:
    """KL of each cell as Supplementary Note 6 writes it, by loops in float64: (n_cells, 2).

    That of z, c and u first, then that of the library. z, (n_cells, n_latent), and u, (n_cells,
    n_classes, n_latent), are as drawn, or at their means.
    """
    labels, scvi = model.labels, model.scvi
    double = lambda t: t.detach().double().numpy()  # noqa: E731
    z_mean, z_var = map(double, model.posterior(inputs))
    drawn = z_mean if z is None else double(z)
    with torch.no_grad():
        log_q_nodes = double(model.classifier(torch.from_numpy(drawn).float()))
    out = []
    for i, code in enumerate(inputs.label.tolist()):
        q = {}
        for k, leaf in enumerate(labels.leaves):
            above, node = [leaf], leaf
            while labels.parents[node] >= 0:
                node = labels.parents[node]
                above.append(node)
            if code < 0 or code in above:
                q[k] = math.exp(log_q_nodes[i, leaf])
        total = sum(q.values())
        kl = 0.0
        for k, share in q.items():
            share /= total
            row = torch.from_numpy(drawn[i : i + 1]).float()
            u_mean, u_var = map(double, model.u_posterior(row, torch.tensor([k])))
            at = torch.from_numpy(u_mean).float() if u is None else u[i, k : k + 1]
            with torch.no_grad():
                conditions = Conditions(torch.tensor([k]))
                p_mean, p_var = map(double, model.z_decoder(at, conditions))
            two = norm.logpdf(drawn[i], p_mean[0], np.sqrt(p_var[0])).sum()  # log p(z | u, c)
            two -= norm.logpdf(drawn[i], z_mean[i], np.sqrt(z_var[i])).sum()  # log q(z | x)
            three = math.log(1 / model.n_classes) - math.log(share)
            four = -0.5 * (u_mean[0] ** 2 + u_var[0] - 1 - np.log(u_var[0])).sum()
            kl -= share * (two + three + four)
        kl_library = 0.0
        if scvi.config.library == "latent":
            mean, variance = map(double, scvi.library_posterior(inputs))
            p_mean, p_variance = double(scvi.library_prior)[inputs.batch[i]]
            ratio = variance[i, 0] / p_variance
            distance = (mean[i, 0] - p_mean) ** 2 / p_variance
            kl_library = 0.5 * (ratio + distance - 1 - math.log(ratio))
        out.append((kl, kl_library))
    return torch.tensor(out, dtype=torch.float64)


def draws(model: SCANVI, inputs: Inputs, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """z, and u of each cell and class, as the loss draws them with such a generator."""
    with torch.no_grad():
        z = model.scvi(inputs, generator).z
        classes = torch.arange(model.n_classes).repeat(len(z))
        rows = z.repeat_interleave(model.n_classes, dim=0)
        mean, variance = model.u_posterior(rows, classes)
        u = sample_normal(mean, variance, generator)
    return z, u.view(len(z), model.n_classes, -1)


@pytest.mark.parametrize("labels", [FLAT, DEEP], ids=["flat", "deep"])
@pytest.mark.parametrize("library", ["observed", "latent"])
def test_the_terms_are_those_of_the_paper(labels: LabelTree, library: str) -> None:
    prior = torch.tensor([[3.0, 0.5], [4.0, 0.7]]) if library == "latent" else None
    model = make(labels, prior=prior, library=library).eval()
    inputs = cells([-1, *range(len(labels.names)), -1])
    losses = model.loss(inputs, 1.0)
    torch.testing.assert_close(
        losses.kl.double(), reference(model, inputs).sum(-1), rtol=2e-5, atol=1e-4
    )
    torch.testing.assert_close(losses.objective, losses.negative_bound.mean())
    alone = model.scvi.loss(Inputs(inputs.counts, inputs.batch), 1.0)
    torch.testing.assert_close(losses.reconstruction_loss, alone.reconstruction_loss)


@pytest.mark.parametrize("labels", [FLAT, DEEP], ids=["flat", "deep"])
@pytest.mark.parametrize("library", ["observed", "latent"])
@pytest.mark.parametrize("training", ["alternating", "joint"])
def test_the_objective_is_that_of_the_paper_at_the_draws(
    labels: LabelTree, library: str, training: str
) -> None:
    """With z and u drawn, a warm-up, and the cross-entropy of Algorithm 1 where it is joint."""
    prior = torch.tensor([[3.0, 0.5], [4.0, 0.7]]) if library == "latent" else None
    changes = {"library": library, "training": training, "classification_weight": 7.0}
    model = make(labels, prior=prior, **changes).eval()
    inputs = cells([-1, *range(len(labels.names)), -1])
    losses = model.loss(inputs, 0.4, torch.Generator().manual_seed(5))
    z, u = draws(model, inputs, torch.Generator().manual_seed(5))
    assert (z - model.embed(inputs)).abs().min() > 1e-4
    kl, kl_library = reference(model, inputs, z, u).unbind(-1)
    torch.testing.assert_close(losses.kl.double(), kl + kl_library, rtol=2e-5, atol=1e-4)
    alone = model.scvi.loss(
        Inputs(inputs.counts, inputs.batch), 1.0, torch.Generator().manual_seed(5)
    )
    torch.testing.assert_close(losses.reconstruction_loss, alone.reconstruction_loss)
    objective = (losses.reconstruction_loss.double() + 0.4 * kl + kl_library).mean()
    if training == "joint":
        with torch.no_grad():
            log_q = model.classifier(z).double()
        known = [(i, code) for i, code in enumerate(inputs.label.tolist()) if code >= 0]
        entropy = -sum(log_q[i, code] for i, code in known) / len(known)
        assert losses.penalty is not None
        torch.testing.assert_close(losses.penalty.double(), 7 * entropy, rtol=1e-5, atol=1e-5)
        objective += 7 * entropy
    torch.testing.assert_close(losses.objective.double(), objective, rtol=1e-5, atol=1e-4)


def test_importance_weights_agree_with_quadrature() -> None:
    """Their mean estimates p(x); grids over u and z, of one dimension each, give it too."""
    model = make(DEEP, n_hidden=8, n_latent=1).eval()
    inputs = cells([-1] * 4)
    generator = torch.Generator().manual_seed(0)
    weights = torch.stack([model.log_weight(inputs, generator) for _ in range(3000)]).double()
    found = weights.logsumexp(0) - math.log(len(weights))
    grid = torch.linspace(-7, 7, 351)
    step = float(grid[1] - grid[0])
    prior = np.zeros(len(grid))  # p(z), the mean over classes of the integral over u
    for k in range(model.n_classes):
        with torch.no_grad():
            conditions = Conditions(torch.full((len(grid),), k))
            mean, variance = (
                t.double().numpy() for t in model.z_decoder(grid[:, None], conditions)
            )
        given_u = norm.pdf(grid.numpy()[None], mean, np.sqrt(variance))
        prior += norm.pdf(grid.numpy()) @ given_u * step / model.n_classes
    densities = []
    for at, density in zip(grid.tolist(), prior, strict=True):
        with torch.no_grad():
            decoded = model.scvi._decode(torch.full((4, 1), at), inputs.conditions)
            library = inputs.counts.sum(-1, keepdim=True).log()
            loss = model.scvi.reconstruction_loss(inputs, decoded, library)
        densities.append(math.log(density) - loss.double())
    evidence = torch.stack(densities).logsumexp(0) + math.log(step)
    torch.testing.assert_close(found, evidence, rtol=0, atol=0.05)


def test_a_tree_multiplies_along_its_paths() -> None:
    model = make(DEEP)
    q = model.log_probabilities(cells([-1] * 6)).exp().double().numpy()
    at = {name: q[:, i] for i, name in enumerate(DEEP.names)}
    np.testing.assert_allclose(at["lymphoid"] + at["myeloid"], 1, rtol=1e-6)
    np.testing.assert_allclose(at["T"] + at["B"], at["lymphoid"], rtol=1e-5)
    np.testing.assert_allclose(at["CD4"] + at["CD8"], at["T"], rtol=1e-5)
    np.testing.assert_allclose(at["M"], at["myeloid"], rtol=1e-6)
    # Each level is the softmax of a network of its own over siblings.
    with torch.no_grad():
        z = model.embed(cells([-1] * 6))
        none = Conditions(torch.empty(0, dtype=torch.int64))
        hidden = model.classifier.eval().hidden[2](z, none)
        theirs = model.classifier.logits[2](hidden).softmax(-1).double().numpy()
    np.testing.assert_allclose(at["CD4"] / at["T"], theirs[:, 0], rtol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    model = make(DEEP)
    with torch.no_grad():
        for linear in model.classifier.logits:
            linear.bias.copy_(torch.arange(len(linear.bias)) * 500.0)
    losses = model.loss(cells(list(range(len(DEEP.names)))), 1.0)
    losses.objective.backward()
    assert torch.isfinite(losses.negative_bound).all()
    assert torch.isfinite(model.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 2])))
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_a_label_moves_the_classifier_only_where_training_is_joint() -> None:
    inputs = cells([0, 1, 2, -1])
    for training, moves in (("alternating", False), ("joint", True), ("scvi-tools", True)):
        model = make(training=training)
        losses = model.loss(inputs, 1.0, torch.Generator().manual_seed(0))
        losses.objective.backward()
        grads = [p.grad for p in model.classifier.parameters()]
        assert all((grad is not None) == moves for grad in grads)
        assert (losses.penalty is not None) == moves
        assert model.scvi.encoder.mean.weight.grad.abs().sum() > 0


def test_bounds_lie_below_the_importance_weighted_likelihood() -> None:
    model = make(DEEP).eval()
    inputs = cells([-1, -1])
    generator = torch.Generator().manual_seed(0)
    bounds, weights = [], []
    for _ in range(3000):
        with torch.no_grad():
            bounds.append(-model.loss(inputs, 1.0, generator).negative_bound)
        weights.append(model.log_weight(inputs, generator))
    bound, log_w = torch.stack(bounds).double(), torch.stack(weights).double()
    likelihood = log_w.logsumexp(0) - math.log(len(log_w))
    assert (bound.mean(0) < log_w.mean(0) + 0.1).all()  # the classes are summed in the weight
    assert (log_w.mean(0) < likelihood).all()
    assert (likelihood < bound.mean(0) + 60).all()


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_nothing_is_nan_on_extreme_cells(likelihood: str) -> None:
    model = make(gene_likelihood=likelihood)
    inputs = cells([0, -1, 2])
    inputs.counts[0] = 0
    inputs.counts[1, :3] = 1e6
    for rows in (slice(0, 3), slice(0, 1), slice(1, 2)):
        some = Inputs(inputs.counts[rows], inputs.batch[rows], label=inputs.label[rows])
        model.zero_grad()
        losses = model.loss(some, 1.0, torch.Generator().manual_seed(1))
        losses.objective.backward()
        assert torch.isfinite(losses.negative_bound).all()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(grad).all() for grad in grads)


def test_one_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="two classes"):
        make(LabelTree.make(["T"]))
    assert make(LabelTree.make(["T"], unobserved=1)).n_classes == 2


def test_a_cycle_and_an_orphan_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cycle[\s\S]*A → B → A"):
        LabelTree.make(["A"], {"A": "B", "B": "A"})
    with pytest.raises(ConfigError, match=r"does not have all labels[\s\S]*found: C"):
        LabelTree.make(["A", "C"], {"A": "B"})


def test_trees_go_to_json_and_back() -> None:
    assert LabelTree.from_json(DEEP.to_json()) == DEEP
    assert DEEP.n_levels == 3
    assert DEEP.classes == ("B", "M", "CD4", "CD8")
    assert [DEEP.names[i] for i in DEEP.at_level(1)] == ["B", "M", "T", "T"]
    assert DEEP.codes(["CD8", None, "T", "?"]).tolist() == [6, -1, 4, -1]


def test_a_path_is_consistent_where_the_best_of_each_level_are_not() -> None:
    tree = LabelTree.make([], {"A1": "A", "A2": "A", "A3": "A", "B1": "B"})
    p = dict(zip(["A", "A1", "A2", "A3", "B", "B1"], [0.6, 0.18, 0.22, 0.2, 0.4, 0.4], strict=True))
    log_p = np.log([[p[name] for name in tree.names]])
    leaves = {name: p[name] for name in tree.classes}
    assert max(leaves, key=leaves.get) == "B1"  # under another group than the most probable one
    assert [tree.names[node] for node in tree.paths(log_p)[0]] == ["A", "A2"]


@pytest.mark.parametrize("seed", range(5))
def test_paths_go_from_parent_to_the_most_probable_child(seed: int) -> None:
    """Against a walk down each cell's own tree; in all trees some cells' levels would disagree."""
    rng = np.random.default_rng(seed)
    parents = [-1, -1, *(int(rng.integers(-1, i)) for i in range(2, 12))]
    tree = LabelTree(tuple(f"n{i}" for i in range(12)), tuple(parents))
    q = rng.dirichlet(np.full(len(tree.leaves), 0.7), 300)
    p = q @ tree.below.T
    paths = tree.paths(np.log(p + 1e-300))
    for cell, path in zip(p, paths.tolist(), strict=True):
        node, walked = -1, []
        while below := [i for i, parent in enumerate(parents) if parent == node]:
            node = max(below, key=lambda i: cell[i])
            walked.append(node)
        assert path == walked + [node] * (tree.n_levels - len(walked))
    assert (paths[:, -1] != np.array(tree.leaves)[q.argmax(axis=1)]).any()


def test_the_joint_form_is_that_of_scvi_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    scvi_module = pytest.importorskip("scvi.module")
    import test_models_parity as parity

    model = make(training="scvi-tools", norm="batch", classifier_hidden=12).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer = scvi_module.SCANVAE(
            N_GENES,
            n_batch=N_BATCH,
            n_labels=3,
            n_hidden=12,
            n_latent=3,
            n_layers=1,
            encode_covariates=True,
        )
        for part in peer.modules():
            if isinstance(part, torch.nn.BatchNorm1d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
    peer.eval()
    with torch.no_grad():
        parity._copy(model.scvi, peer)
        parity._copy_encoder(model.u_encoder, peer.encoder_z2_z1)
        parity._copy_stack(model.z_decoder.hidden, peer.decoder_z1_z2.decoder)
        model.z_decoder.mean.load_state_dict(peer.decoder_z1_z2.mean_decoder.state_dict())
        model.z_decoder.log_variance.load_state_dict(peer.decoder_z1_z2.var_decoder.state_dict())
        first, second = peer.classifier.classifier[0], peer.classifier.classifier[1]
        parity._copy_stack(model.classifier.hidden[0], first)
        model.classifier.logits[0].load_state_dict(second.state_dict())
    inputs = cells([0, 1, 2, -1, -1, 0])
    # Without a generator ours takes means where the peer would sample.
    monkeypatch.setattr(
        torch.distributions.Normal, "rsample", lambda self, *_: self.loc.expand(self.batch_shape)
    )
    tensors = {
        "X": inputs.counts,
        "batch": inputs.batch[:, None],
        "labels": inputs.label.clamp(min=0)[:, None],
    }
    known = inputs.label >= 0
    labelled = {name: value[known] for name, value in tensors.items()}
    with torch.no_grad():
        *_, theirs = peer(
            tensors,
            loss_kwargs={
                "kl_weight": 0.4,
                "labelled_tensors": labelled,
                "classification_ratio": model.config.classification_weight,
            },
        )
        ours = model.loss(inputs, 0.4)
    # The variance of p(z | u, c) has a floor of 1e-4 here, and none there.
    torch.testing.assert_close(ours.objective, theirs.loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        ours.penalty / model.config.classification_weight,
        theirs.classification_loss,
        rtol=1e-4,
        atol=0,
    )
