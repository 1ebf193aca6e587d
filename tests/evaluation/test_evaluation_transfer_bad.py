"""Label transfer from what is odd: one cell of a label or a study, none asked, labels amiss."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from atlas.errors import ConfigError, ModelError
from atlas.evaluation import calibration
from atlas.evaluation.calibration import leave_out
from atlas.evaluation.codes import Categories
from atlas.evaluation.knn_labels import KnnLabels
from atlas.evaluation.misfit import misfit, pooled
from atlas.evaluation.transfer_score import Transferred, score_query
from atlas.models import LabelTree

TREE = LabelTree.make(["B", "Mono", "NK", "T"])
RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 3, 300)
Z = (2 * RNG.normal(size=(4, 3))[CODES] + RNG.normal(size=(300, 3))).astype(np.float32)


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        (np.where(np.arange(300) == 7, -1, CODES), "300 labels, nodes -1 to 2"),
        (np.where(np.arange(300) == 7, 4, CODES), "300 labels, nodes 0 to 4"),
        (np.append(CODES, 0), "301 labels, nodes 0 to 2"),
    ],
)
def test_labels_that_are_none_of_the_cells_are_refused(nodes: np.ndarray, found: str) -> None:
    """As a cell without a label would vote for the last label of another query cell."""
    with pytest.raises(
        ConfigError, match=f"labels of the reference do not fit it\n  found: {found}"
    ):
        KnnLabels(Z, nodes, TREE, k=5)


@pytest.mark.parametrize("row", [0, 7])
def test_values_that_are_not_finite_are_told_as_such(row: int) -> None:
    z = Z.copy()
    z[row, 1] = np.nan
    with pytest.raises(ModelError, match=rf"not finite.*\n  found: 1 of 900 values.* row {row}\n"):
        KnnLabels(z, CODES, TREE, k=5)
    with pytest.raises(ModelError, match=rf"not finite.*\n  found: 1 of 900 values.* row {row}\n"):
        KnnLabels(Z, CODES, TREE, k=5).ask(z)


def test_no_cell_asked_no_answer() -> None:
    found = KnnLabels(Z, CODES, TREE, k=5).ask(Z[:0])
    assert found.leaves.shape == (0, 4)
    assert found.path.shape == found.probability.shape == (0, 1)
    assert found.distance.shape == (0,)


def test_one_cell_of_a_label_and_one_of_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = CODES.copy()
    codes[17] = 3
    study = np.arange(300) % 2
    study[5] = 2
    groups = Categories(study, ("a", "b", "c"))
    left = leave_out(Z, codes, groups, TREE, k=5)
    assert (~left.known).sum() == 1  # the label that its study alone has
    assert np.isfinite(left.answer.distance).all()
    lines = left.set_rule(0.9, per_label=True).most
    assert np.isfinite(lines[:3]).all()
    assert np.isinf(lines[3])
    fold = left.folds(0.1, 0.9, per_label=True)[2]
    assert (fold.n_known, fold.n_unseen, fold.unseen_unknown) == (1, 0, None)
    # a study of which no cell is drawn is not judged
    monkeypatch.setattr(calibration, "MOST_CELLS", 20)
    monkeypatch.setattr(calibration, "LEAST_CELLS", 20)
    few = leave_out(Z, codes, groups, TREE, k=5)
    assert [fold.name for fold in few.folds(0.1, 0.9, per_label=True)] == ["a", "b"]
    assert len(few.truth) == 20


def test_the_misfit_of_a_batch_that_is_summed_whole_is_not_known() -> None:
    """All of its cells have one sum, and it was taken for what the batch adds: a misfit of 0."""
    counts = csr_matrix(RNG.poisson(1.0, (40, 8)).astype(np.float32))
    batches = np.repeat([0, 1, 2], [29, 1, 10])
    near = np.zeros((40, 40), np.float32)
    for batch, k in ((0, 6), (1, 1), (2, 10)):
        for row in np.flatnonzero(batches == batch):
            near[row, RNG.choice(np.flatnonzero(batches == batch), k, replace=False)] = 1
    among = pooled(np.array([RNG.choice(40, 5, replace=False) for _ in range(40)]), 40)
    labels = np.arange(40) % 2
    found = misfit(counts, counts, csr_matrix(near), among, batches, labels, np.ones(8))
    assert np.isfinite(found[:29]).all()
    assert (found[:29] > 0).all()
    assert np.isnan(found[29:]).all()
    # and says nothing of how well it tells unseen cells apart
    known = np.arange(40) % 3 > 0
    options = {
        "truth": np.where(known, 0, 4),
        "known": known,
        "path": labels[:, None],
        "unknown": np.zeros((40, 1), bool),
        "uncertainty": np.zeros(40),
        "distance": np.zeros(40),
        "sets": None,
    }
    names = (*TREE.names, "lost")
    some = np.where(np.arange(40) < 29, known * -1.0, np.nan)
    assert score_query(Transferred(**options, misfit=some), TREE, names).misfit_auroc == 1
    none = np.full(40, np.nan)
    assert score_query(Transferred(**options, misfit=none), TREE, names).misfit_auroc is None
