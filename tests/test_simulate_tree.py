"""Cells along a tree: distances against a shortest-path search, labels at the ends, expression."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import stats
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree

from atlas.cli import main
from atlas.errors import ConfigError
from atlas.simulate import (
    END_RADIUS,
    STATES_PER_BRANCH,
    UNLABELED,
    Tree,
    Truth,
    draw_tree,
    draw_truth,
    simulate,
)

SMALL = {"cells": 3000, "studies": 1, "genes": 200, "types": 5, "library": 1500.0,
         "progress": False}  # fmt: skip


def _between_states(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Distances between states, and to the nodes, by Dijkstra over states and nodes."""
    n_states, n_nodes = len(tree.state_branch), len(tree.nodes)
    edges = []
    for node in range(1, n_nodes):
        states = np.flatnonzero(tree.state_branch == node - 1)
        step = tree.length[node] / STATES_PER_BRANCH
        chain = [n_states + tree.parent[node], *states, n_states + node]
        lengths = [step / 2, *[step] * (len(states) - 1), step / 2]
        edges += [(a, b, w) for a, b, w in zip(chain, chain[1:], lengths, strict=False)]
    a, b, w = map(np.array, zip(*edges, strict=True))
    size = n_states + n_nodes
    distance = dijkstra(coo_matrix((w, (a.astype(int), b.astype(int))), (size, size)), False)
    return distance[:n_states, :n_states], distance[:n_states, n_states:]


@pytest.mark.parametrize(("tips", "seed"), [(2, 0), (5, 0), (5, 1), (9, 2)])
def test_distances_are_those_along_the_tree(tips, seed):
    tree = draw_tree(tips, seed)
    assert len(tree.nodes) == 2 * tips - 1
    assert tree.ends.tolist() == ["root", *[f"tip_{i + 1}" for i in range(tips)]]
    assert (tree.parent[1:] < np.arange(1, len(tree.nodes))).all()
    assert np.bincount(tree.parent[1:]).max() == 2
    _, to_nodes = _between_states(tree)
    ends = [tree.nodes.tolist().index(end) for end in tree.ends]
    np.testing.assert_allclose(tree.state_distance, to_nodes[:, ends], atol=1e-12)
    np.testing.assert_allclose(tree.state_depth, to_nodes[:, 0], atol=1e-12)
    assert tree.branches[0].startswith("root:")


def test_the_latent_moves_as_brownian_motion():
    """Squared distance over that along the tree: 10 × 0.7² on average, over many trees."""
    ratios = []
    for seed in range(60):
        tree = draw_tree(4, seed)
        along, _ = _between_states(tree)
        far = np.unravel_index(along.argmax(), along.shape)
        moved = np.square(tree.state_latent[far[0]] - tree.state_latent[far[1]]).sum()
        ratios.append(moved / along[far])
    # chi-square with 10 degrees of freedom: variance 20 × 0.7⁴
    assert abs(np.mean(ratios) - 4.9) < 4 * np.sqrt(20 * 0.7**4 / 60)


def test_expression_differs_more_the_further_apart_along_the_tree():
    for seed in range(3):
        tree = draw_tree(5, seed)
        along, _ = _between_states(tree)
        log_rho = np.log(draw_truth(1, seed, genes=1000, tree=tree).rho)
        square = (log_rho**2).sum(axis=1)
        apart = np.sqrt(np.maximum(square[:, None] + square - 2 * log_rho @ log_rho.T, 0))
        pairs = np.triu_indices(len(along), 1)
        assert stats.spearmanr(along[pairs], apart[pairs]).statistic > 0.75


@pytest.mark.parametrize(("given", "share"), [(None, 0.98), (0.2, 0.2), (1.0, 1.0), (0.0, 0.0)])
def test_the_share_of_genes_that_vary_along_a_tree(given, share):
    rho = draw_truth(1, 0, genes=3000, varying_genes=given, tree=draw_tree(5, 0)).rho
    # Genes that do not vary all change by the same factor, that of the softmax.
    change = np.sort(np.log(rho[-1]) - np.log(rho[0]))
    alike = (np.searchsorted(change, change + 1e-5) - np.arange(3000)).max()
    spread = np.sqrt(share * (1 - share) / 3000)
    # some genes are at the cap in both states
    assert abs(1 - alike / 3000 - share) <= 4 * spread + 0.005


def test_pca_finds_the_tree_if_almost_all_genes_vary(tmp_path):
    """And does not at the settings of types, where one gene in five does."""
    nearest = []
    for given in (None, 0.2):
        (path,) = simulate(tmp_path / str(given), seed=0, tree=True, varying_genes=given, **SMALL)
        a = ad.read_h5ad(path)
        x = a.X.toarray()
        x = np.log1p(1e3 * x / np.maximum(x.sum(axis=1, keepdims=True), 1))
        u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
        z = u[:, :10] * s[:10]
        distance = a.obs.filter(like="distance_").to_numpy()
        near = cKDTree(z).query(z, 16)[1][:, 1:]
        # Along a tree two points are as far apart as their distances to some end point.
        found = np.abs(distance[:, None] - distance[near]).max(axis=2).mean()
        other = np.random.default_rng(0).permutation(len(z))
        nearest.append(found / np.abs(distance - distance[other]).max(axis=1).mean())
    assert nearest[0] < 0.35
    assert nearest[1] > 0.55


@pytest.fixture(scope="module", params=["zinb", "umi"])
def simulated(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("tree") / "new"
    (path,) = simulate(out, seed=3, tree=True, process=request.param, **SMALL)
    return ad.read_h5ad(path), Tree.load(out / "tree.npz"), Truth.load(out / "truth.npz")


def test_positions_and_labels_are_in_obs(simulated):
    a, tree, truth = simulated
    state = a.obs["state"].to_numpy()
    distance = a.obs[[f"distance_{end}" for end in tree.ends]].to_numpy()
    np.testing.assert_array_equal(distance, tree.state_distance[state])
    np.testing.assert_array_equal(a.obs["depth_in_tree"], tree.state_depth[state])
    branch = tree.branches[tree.state_branch[state]]
    assert (a.obs["branch"].astype(str).to_numpy() == branch).all()
    assert truth.types.tolist() == tree.branches.tolist()
    assert "true_type" not in a.obs
    label = a.obs["cell_type"].astype(str).to_numpy()
    labelled = label != UNLABELED
    assert (labelled == (distance.min(axis=1) <= END_RADIUS)).all()
    assert (label[labelled] == tree.ends[distance[labelled].argmin(axis=1)]).all()
    assert set(label) == {*tree.ends, UNLABELED}
    assert 0.02 < labelled.mean() < 0.25


def test_cells_lie_evenly_along_the_branches(simulated):
    a, tree, _ = simulated
    found = np.bincount(a.obs["state"], minlength=len(tree.state_branch))
    share = tree.length[1:][tree.state_branch]
    expected = a.n_obs * share / share.sum()
    assert stats.chisquare(found, expected).pvalue > 1e-4


def test_counts_change_along_the_way_to_a_tip(simulated):
    """Mean profiles of cells at growing distance from a tip, compared with that at the tip."""
    a, tree, _ = simulated
    x = a.X.toarray()
    x = np.log1p(1e3 * x / np.maximum(x.sum(axis=1, keepdims=True), 1))
    correlations = []
    for end in tree.ends[1:]:
        distance = a.obs[f"distance_{end}"].to_numpy()
        near = x[distance <= 0.25].mean(axis=0)
        bins = np.digitize(distance, np.quantile(distance, np.linspace(0, 1, 9)[1:-1]))
        apart = [np.linalg.norm(x[bins == i].mean(axis=0) - near) for i in range(8)]
        correlations.append(stats.spearmanr(np.arange(8), apart).statistic)
    assert np.mean(correlations) > 0.7


def test_a_tree_depends_on_the_seed_alone(tmp_path):
    few = {**SMALL, "cells": 60}
    paths = [simulate(tmp_path / str(i), seed=s, tree=True, threads=t, **few)[0]
             for i, (s, t) in enumerate([(1, 1), (1, 2), (2, 1)])]  # fmt: skip
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != paths[2].read_bytes()
    assert sorted(p.name for p in paths[0].parent.iterdir()) == [
        "study_1.h5ad", "tree.npz", "truth.npz",
    ]  # fmt: skip


def test_the_command(tmp_path, capsys):
    command = ["simulate", str(tmp_path / "x"), "--cells", "50", "--studies", "1", "--genes", "30"]
    assert main([*command, "--tree", "--process", "reads", "--library", "50"]) == 0
    (path,) = capsys.readouterr().out.split()
    assert {"branch", "distance_root", "efficiency"} <= set(ad.read_h5ad(path).obs)
    names = {"capture.npz", "study_1.h5ad", "tree.npz", "truth.npz"}
    assert {p.name for p in (tmp_path / "x").iterdir()} == names


def test_a_tree_of_one_tip_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"types is out of range(.|\n)*at least 2 for a tree"):
        simulate(tmp_path / "x", tree=True, **{**SMALL, "types": 1})
