"""Graph connectivity of neighbours that are all at hand."""

from __future__ import annotations

import numpy as np

from atlas.evaluation.codes import Categories
from atlas.evaluation.connectivity import LabelGraphs
from atlas.evaluation.neighbours import Neighbours


def in_largest_part(found: Neighbours, labels: Categories) -> np.ndarray:
    """By neighbours of the first cells."""
    graphs = LabelGraphs(labels, found.k)
    graphs.add(np.arange(len(found.indices)), found)
    return graphs.in_largest_part()
