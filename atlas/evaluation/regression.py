"""Share of an embedding's variance that batches explain: principal component regression.

scib-metrics 0.5.10, ``principal_component_regression`` with all components: R² of each component on
the batches, weighted by its variance. Over all components that is the variance between batches over
the whole, whatever the axes, so one pass over the cells gives it and no component is computed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories
from atlas.evaluation.estimates import Estimate, Sample
from atlas.evaluation.vectors import Embedding, tiles

_ROUNDING = 1e-24
"""Share of the summed squares below which the variance is that of a mean that was rounded."""


def explained_variance(
    embedding: Embedding, batches: Categories, sample: Sample, *, when: str = ""
) -> Estimate:
    """Share of the variance that lies between batches, from all cells.

    Parameters
    ----------
    embedding
        float32, (N, d).
    batches
        Batch of every cell.
    sample
        Cells from which its standard error is reckoned.
    when
        What the error message says of the embedding.

    Raises
    ------
    ConfigError
        All cells lie at one place.
    """
    n, d = embedding.shape
    n_batches = len(batches.names)
    means = np.zeros((n_batches, d))
    for part in tiles(n):
        for column in range(d):
            means[:, column] += np.bincount(
                batches.codes[part], embedding[part, column], minlength=n_batches
            )
    centre = means.sum(axis=0) / n
    means /= np.maximum(batches.counts(), 1)[:, None]
    whole = within = squares = 0.0
    for part in tiles(n):
        exact = embedding[part].astype(np.float64)
        squares += float((exact**2).sum())
        whole += float(((exact - centre) ** 2).sum())
        within += float(((exact - means[batches.codes[part]]) ** 2).sum())
    if whole <= _ROUNDING * squares:
        raise ConfigError(f"all cells lie at one place{when}", expected="an embedding that varies")
    share = 1 - within / whole
    exact = embedding[sample.rows].astype(np.float64)
    own = ((exact - means[batches.codes[sample.rows]]) ** 2).sum(axis=1)
    all_ = ((exact - centre) ** 2).sum(axis=1)
    influence = -(own - (1 - share) * all_) / (whole / n)
    return Estimate(share, influence, sample.of_all(), n)


def pcr_comparison(before: Estimate, after: Estimate) -> Estimate:
    """How much less the batches explain after integration: (before - after) / before, at least 0.

    Where they explain more after it, the value is cut to 0, and the interval's ends as well.

    Raises
    ------
    ConfigError
        Batches explain nothing before.
    """
    if before.value <= 0:
        raise ConfigError("batches explain nothing of the embedding before integration")
    value = 1 - after.value / before.value
    influence = -after.influence / before.value
    influence = influence + after.value / before.value**2 * before.influence
    return replace(after, value=value, influence=influence).at_least(0.0)
