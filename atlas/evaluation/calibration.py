"""When to answer Unknown, and which labels to allow: from studies left out of the reference.

Each study of a reference is labelled by the others, as a query is by all of them. What comes out
for its cells, whose labels are known, says where to draw the lines:

- *Unknown*: lines such that at most a share α of the left-out cells of known types, those whose
  label other studies have, lie beyond.
- *Label sets* (split conformal prediction; Vovk et al. 2005; with the score 1 - P(label), Sadinle
  et al. 2019, "Least ambiguous set-valued classifiers"): all labels with 1 - P ≤ q, q the
  ⌈(n + 1)(1 - α)⌉-th smallest of the n left-out cells' scores of their own label; and the label
  given, so that no set is empty. With a q of each label (Mondrian) the share holds for each label,
  where there are cells enough.

What is guaranteed: for a cell that is exchangeable with the left-out cells of known types, its set
holds its label with probability 1 - α at least, and it is called Unknown with probability α at
most; over both draws, that of the left-out cells included, and for Unknown, whose two lines are
drawn at one common rank, up to terms of 1/n. Nothing is drawn at random, so where scores are equal,
as for many cells at 0 and 1, sets hold the label more often than that.

What is not: a query is another study, and its cells are exchangeable with the left-out ones only as
far as its distance from the reference is like that of the reference's studies from each other.
Under a larger shift (a treatment, another tissue, surgery on few cells) fewer sets hold the label
and more cells are called Unknown. Cells of a study move together, so with S studies there are S
looks at a shift, not n. Therefore each left-out study is also judged by lines drawn from the other
studies alone (:class:`Fold`): how the folds differ tells what to expect of the next study. And the
left-out cells are labelled by fewer studies than the query's. For cells of unseen types there is no
promise: their label is in no set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atlas.config import VoteKernel
from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories, sample_rows
from atlas.evaluation.knn_labels import Answer, Codes, Floats, KnnLabels, Tree
from atlas.evaluation.neighbours import Backend, Embedding
from atlas.evaluation.novelty import OwnDistances
from atlas.evaluation.vectors import rows_of

Mask = npt.NDArray[np.bool_]

MOST_CELLS = 10_000
LEAST_CELLS = 2_000
"""Left-out cells of all studies together, at most and at least; a sample where there are more."""
_MOST_PAIRS = 2 * 10**9
"""Cells times cells among which they are searched: from 200,000 cells of the reference to a million
fewer are left out the larger it is, so that the search takes the same time."""

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class UnknownRule:
    """When a cell is called Unknown.

    Attributes
    ----------
    uncertainty_above, distance_above
        The lines for u and for the distance score; a cell beyond either is Unknown.
    """

    uncertainty_above: float
    distance_above: float = math.inf

    def applies(self, uncertainty: Floats, distance: Floats) -> Mask:
        """Which cells are Unknown."""
        beyond = (uncertainty > self.uncertainty_above) | (distance > self.distance_above)
        return np.asarray(beyond, bool)


PUBLISHED = UnknownRule(0.5)
"""scArches' rule (Lotfollahi et al. 2022, Methods): u above .5."""


@dataclass(frozen=True, slots=True, eq=False)
class SetRule:
    """Which labels are in a cell's set.

    Attributes
    ----------
    most
        q of each leaf: float64 (n_leaves,); infinite where there are too few cells to say, so that
        the label is in all sets.
    """

    most: Floats

    def sets(self, answer: Answer, tree: Tree) -> Mask:
        """Labels that are in the sets: bool (n_cells, n_leaves)."""
        inside = 1 - answer.leaves <= self.most + _ROUNDING
        return np.asarray(inside | (answer.label[:, None] == np.array(tree.leaves)), bool)


@dataclass(frozen=True, slots=True)
class Fold:
    """One left-out study, judged by lines that were drawn from the other studies' cells.

    Attributes
    ----------
    name
        Of the study (or batch).
    n_known, n_unseen
        Its cells whose label other studies have, and those whose label none has.
    accuracy
        Share of the known cells whose label is right, Unknown or not.
    answered, answered_accuracy
        Share of the known cells that are not Unknown, and of these the share that is right.
    unseen_unknown
        Share of the unseen cells called Unknown.
    covered, mean_set_size
        Share of the known cells whose set holds their label, and labels in a set.

    Where there are no such cells, or no sets, None.
    """

    name: str
    n_known: int
    n_unseen: int
    accuracy: float | None
    answered: float | None
    answered_accuracy: float | None
    unseen_unknown: float | None
    covered: float | None
    mean_set_size: float | None


@dataclass(frozen=True, slots=True, eq=False)
class LeftOut:
    """Cells of a reference as the other studies label them.

    Attributes
    ----------
    groups
        Study (or batch) of each cell.
    truth
        Its own label, a node: int64 (n_cells,).
    known
        Whether another study has its label, or one below it: bool (n_cells,).
    answer
        What the others say.
    tree
        The labels.
    """

    groups: Categories
    truth: Codes
    known: Mask
    answer: Answer
    tree: Tree

    def unknown_rule(self, false_unknown: float, rows: Mask | None = None) -> UnknownRule:
        """Lines for u and for the distance at a common rank, beyond which that share lies at most.

        Parameters
        ----------
        false_unknown
            α.
        rows
            The cells to draw from: bool (n_cells,); all known ones if None.
        """
        rows = self.known if rows is None else rows & self.known
        uncertainty, distance = self.answer.uncertainty[rows], self.answer.distance[rows]
        ranks = np.maximum(_ranks(uncertainty), _ranks(distance))
        last = conformal_quantile(ranks, 1 - false_unknown)
        if math.isinf(last):
            return UnknownRule(math.inf)
        at = int(last) - 1
        return UnknownRule(float(np.sort(uncertainty)[at]), float(np.sort(distance)[at]))

    def set_rule(self, level: float, per_label: bool, rows: Mask | None = None) -> SetRule:
        """The line for label sets that hold the label with probability ``level``.

        Parameters
        ----------
        level
            1 - α.
        per_label
            A line of each label's own, from its own cells.
        rows
            As for :meth:`unknown_rule`.
        """
        rows = self.known if rows is None else rows & self.known
        leaves = np.array(self.tree.leaves)
        column = np.full(len(self.tree.parents), -1, np.int64)
        column[leaves] = np.arange(len(leaves))
        own = column[self.truth]
        rows = rows & (own >= 0)
        scores = 1 - self.answer.leaves[rows, own[rows]]
        if not per_label:
            return SetRule(np.full(len(leaves), conformal_quantile(scores, level)))
        most = [conformal_quantile(scores[own[rows] == i], level) for i in range(len(leaves))]
        return SetRule(np.array(most))

    def folds(
        self, false_unknown: float | None, level: float | None, per_label: bool
    ) -> tuple[Fold, ...]:
        """Each study, judged by lines drawn from the others.

        Parameters
        ----------
        false_unknown
            α of the lines for Unknown; None for scArches' rule.
        level
            1 - α of the sets; None for none.
        per_label
            As for :meth:`set_rule`.
        """
        out = []
        right = is_or_lies_below(self.answer.label, self.truth, self.tree)
        for code in self.groups.present():
            own = self.groups.codes == code
            rule = PUBLISHED if false_unknown is None else self.unknown_rule(false_unknown, ~own)
            unknown = rule.applies(self.answer.uncertainty, self.answer.distance)
            known, unseen = own & self.known, own & ~self.known
            covered = size = None
            if level is not None:
                sets = self.set_rule(level, per_label, ~own).sets(self.answer, self.tree)
                leaf = known & np.isin(self.truth, self.tree.leaves)
                column = np.searchsorted(self.tree.leaves, self.truth[leaf])
                covered, size = _mean(sets[leaf, column]), _mean(sets[leaf].sum(axis=1))
            out.append(
                Fold(
                    name=self.groups.names[code],
                    n_known=int(known.sum()),
                    n_unseen=int(unseen.sum()),
                    accuracy=_mean(right[known]),
                    answered=_mean(~unknown[known]),
                    answered_accuracy=_mean(right[known & ~unknown]),
                    unseen_unknown=_mean(unknown[unseen]),
                    covered=covered,
                    mean_set_size=size,
                )
            )
        return tuple(out)


def leave_out(
    z: Embedding,
    nodes: Codes,
    groups: Categories,
    tree: Tree,
    *,
    k: int,
    kernel: VoteKernel = "gaussian",
    seed: int = 0,
    backend: Backend = "auto",
) -> LeftOut:
    """Label each study (or batch) of a reference by the others.

    Parameters
    ----------
    z, nodes, tree, k, kernel, seed, backend
        As for :class:`atlas.evaluation.knn_labels.KnnLabels`.
    groups
        The study of each cell of the reference.

    Raises
    ------
    ConfigError
        There is one study only, or without one of them there are not more than k cells.
    """
    present = groups.present()
    if len(present) < 2:
        raise ConfigError(
            "The reference has one study only, so none can be left out to calibrate by",
            found=", ".join(groups.names[code] for code in present),
            expected="labelled cells of two studies at least",
            do="leave out its batches (--calibrate-by batch), or do without calibration: "
            "Unknown above an uncertainty of .5, and no label sets",
        )
    most = min(MOST_CELLS, max(LEAST_CELLS, _MOST_PAIRS // len(z)))
    rows = sample_rows(np.arange(len(z)), most, seed)
    within = OwnDistances(z, nodes, groups, k, seed, backend)
    answers, asked, known = [], [], []
    for code in present:
        rest = groups.codes != code
        if rest.sum() <= k:
            raise ConfigError(
                f"The reference without {groups.names[code]!r} is too small to calibrate by",
                found=f"{int(rest.sum()):,} labelled cells, and k = {k}",
                expected="more than k",
                do="ask for fewer neighbours, or calibrate by another column",
            )
        own = rows[groups.codes[rows] == code]
        others = KnnLabels(
            rows_of(z, rest),
            nodes[rest],
            tree,
            k=k,
            kernel=kernel,
            backend=backend,
            scale=within.without(int(code), np.array(tree.parents, np.int64)),
        )
        answers.append(others.ask(z[own]))
        asked.append(own)
        known.append(np.isin(nodes[own], _with_ancestors(nodes[rest], tree)))
    every = np.concatenate(asked)
    answer = Answer(
        *(
            np.concatenate([getattr(one, field) for one in answers])
            for field in ("path", "probability", "leaves", "distance")
        )
    )
    if not any(part.any() for part in known):
        raise ConfigError(
            "No label of the reference is in two of its studies, so none can be left out",
            found=", ".join(groups.names[code] for code in present),
            expected="labels that studies share",
            do="calibrate by another column (--calibrate-by), or do without calibration",
        )
    return LeftOut(groups[every], nodes[every], np.concatenate(known), answer, tree)


def conformal_quantile(scores: npt.NDArray[np.float64 | np.int64], level: float) -> float:
    """The ⌈(n + 1) · level⌉-th smallest of n scores; infinite where there are too few.

    One more score, exchangeable with these, is at most this with probability ``level`` at least.
    """
    rank = math.ceil((len(scores) + 1) * level - _ROUNDING)
    return math.inf if rank > len(scores) else float(np.sort(scores)[max(rank, 1) - 1])


def is_or_lies_below(nodes: Codes, above: Codes, tree: Tree) -> Mask:
    """Whether each node is the other one, or lies below it: bool, (n,)."""
    parents = np.array(tree.parents, np.int64)
    found: Mask = nodes == above
    at = nodes.copy()
    for _ in range(tree.n_levels - 1):
        at = np.where(at >= 0, parents[at], -1)
        found |= at == above
    return found


def _with_ancestors(nodes: Codes, tree: Tree) -> Codes:
    """These nodes, and all above them."""
    out = set(np.unique(nodes).tolist())
    for node in list(out):
        while (node := tree.parents[node]) >= 0:
            out.add(node)
    return np.array(sorted(out), np.int64)


def _ranks(values: Floats) -> Codes:
    """How many values are at most each: int64 (n,), 1 to n."""
    return np.searchsorted(np.sort(values), values, side="right")


def _mean(values: npt.NDArray[np.bool_] | Codes) -> float | None:
    return float(values.mean()) if len(values) else None
