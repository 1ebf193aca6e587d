"""Which cells are asked where batches and labels are many: rare ones are asked, or named."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from atlas.evaluation.cells import Cells
from atlas.evaluation.codes import Categories
from atlas.evaluation.measures import evaluate_embedding
from atlas.evaluation.metrics import Metrics

N, N_BATCHES, N_LABELS = 3000, 40, 14
RNG = np.random.default_rng(3)
CODES = np.r_[RNG.choice(11, N - 15), np.repeat([11, 12, 13], [5, 7, 3])]
BATCH = RNG.choice(N_BATCHES, N)
BATCH[CODES == 13] = 0  # the label in the fewest batches
Z = (1.5 * RNG.standard_normal((N_LABELS, 5))[CODES] + RNG.standard_normal((N, 5))).astype(
    np.float32
)
LABELS = Categories(CODES, [f"type {i}" for i in range(N_LABELS)])
BATCHES = Categories(BATCH, [f"batch {i}" for i in range(N_BATCHES)])


def measured(most: int, labels: Categories = LABELS) -> Metrics:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return evaluate_embedding(
            Z, BATCHES, labels, max_queries=most, leiden_cells=0, graph_cells=0, individual=Z
        )


def strata(most: int, labels: Categories | None = LABELS) -> np.ndarray:
    return Cells(Z, BATCHES, labels, 0, most, (15,), "auto", None, 0, 0).strata


def test_strata_are_the_finest_that_leave_two_cells_to_each() -> None:
    both = len(np.unique(BATCH * N_LABELS + CODES))
    assert len(np.unique(strata(4 * both))) == both
    for most in (4 * both - 1, 2 * N_LABELS):
        np.testing.assert_array_equal(strata(most), CODES + 1)
    many = Categories(np.arange(N) % 700, [str(i) for i in range(700)])
    np.testing.assert_array_equal(strata(1000, many), BATCH)
    np.testing.assert_array_equal(strata(2 * N_BATCHES, None), BATCH)
    assert len(np.unique(strata(2 * N_BATCHES - 1, None))) == 1
    assert len(np.unique(strata(20))) == 1


def test_rare_labels_are_asked_where_batches_and_labels_are_many() -> None:
    whole, part = measured(N), measured(600)
    asked = {g.of: g.n for g in part.groups if g.name == "label_accuracy_k50"}
    assert [asked[f"label type {code}"] for code in (11, 12, 13)] == [2, 2, 2]
    for name in ("label_accuracy_k50", "label_weighted_accuracy_k50", "silhouette_label"):
        ours, truth = part[name], whole[name]
        assert ours.note is None
        assert ours.value is not None
        assert truth.value is not None
        assert ours.standard_error is not None
        # Of labels with two cells asked, all or none right, the error knows nothing: 3 of 14.
        slack = 0.1 if "weighted" in name else 0
        assert abs(ours.value - truth.value) < 4 * ours.standard_error + slack, name
    assert part["isolated_labels"].value is not None


@pytest.mark.parametrize("seed", range(3))
def test_values_do_not_lean_to_what_the_strata_favour(seed: int) -> None:
    """Each label's two at the least are weighted down: the mean over cells is that of all."""
    cells = Cells(Z, BATCHES, LABELS, seed, 600, (15,), "auto", None, 0, 0)
    weights = np.bincount(CODES[cells.sample.rows], cells.sample.weights, minlength=N_LABELS)
    np.testing.assert_allclose(weights, np.bincount(CODES) / N, rtol=1e-12)


def test_labels_and_batches_that_were_not_asked_are_named() -> None:
    part = measured(24)
    asked = {g.of: g for g in part.groups if g.name == "label_accuracy_k50"}
    assert {of for of in asked if of.startswith("label")} == {f"label {n}" for n in LABELS.names}
    assert asked["label type 13"].skipped == "none of its cells was asked"
    for name in ("label_weighted_accuracy_k50", "label_weighted_accuracy_kernel_k50"):
        note = str(part[name].note)
        assert note.startswith("without labels type ")
        assert "type 13" in note
        assert note.endswith("none of their cells was asked")
    assert part["label_accuracy_k50"].note is None
    assert part["isolated_labels"].skipped == "no cell of an isolated label was asked"
    assert str(part["silhouette_batch"].note).startswith("without labels type ")
    assert str(part["purity_k15"].note).startswith("without batches batch ")
    missed = [g for g in part.groups if g.name == "purity_k15" and g.value is None]
    assert {g.skipped for g in missed} == {"none of its cells was asked"}


def test_more_batches_than_figures_are_given_of_are_told() -> None:
    batches = Categories(np.arange(N) % 300, [str(i) for i in range(300)])
    metrics = evaluate_embedding(Z, batches, LABELS, leiden_cells=0, graph_cells=0)
    (told,) = [g for g in metrics.groups if g.name == "mixing_entropy_k50" and "batch" in str(g.of)]
    assert (told.of, told.value) == ("batch *", None)
    assert told.skipped == "there are 300 batches, and figures of each are given up to 200"
