"""Sparse, exact draws from the zero-inflated negative binomial, the same on any threads."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def draw_counts(  # type: ignore[no-untyped-def]
    key, start, library, batch, state, tables, kept, theta, genes
):
    """Counts of consecutive cells: lengths of the rows, indices, data.

    A uniform draw per cell and gene, inverted. P(x > 0) ≤ kept·μ, since (θ/(θ+μ))^θ ≥ exp(-μ) ≥
    1 - μ: most zeros are known by one comparison, and logarithms are taken for the others only.
    """
    n_rows, n_genes = len(library), len(genes)
    lengths = np.empty(n_rows, dtype=np.int64)
    indices = np.empty(n_rows * 256, dtype=np.int32)
    data = np.empty(n_rows * 256, dtype=np.float32)
    n_values = 0
    for row in range(n_rows):
        if n_values + n_genes > len(data):
            grown = max(2 * len(data), n_values + n_genes)
            more_indices = np.empty(grown, dtype=np.int32)
            more_data = np.empty(grown, dtype=np.float32)
            more_indices[:n_values] = indices[:n_values]
            more_data[:n_values] = data[:n_values]
            indices, data = more_indices, more_data
        before = n_values
        rho = tables[batch[row], state[row]]
        cell = _mix(key + np.uint64(start + row) * np.uint64(0xD1342543DE82EF95))
        for i in range(n_genes):
            # By position among all genes: what a study has not measured changes no other count.
            bits = _mix(cell + np.uint64(genes[i] + 1) * np.uint64(0x9E3779B97F4A7C15))
            upper = np.float64((bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # in (0, 1]
            mean = library[row] * rho[i]
            if upper > kept[i] * mean:
                continue
            count = _invert(upper / kept[i], mean, theta[i])
            if count > 0:
                indices[n_values] = i
                data[n_values] = count
                n_values += 1
        lengths[row] = n_values - before
    return lengths, indices[:n_values].copy(), data[:n_values].copy()


@numba.njit(nogil=True, cache=True)
def _invert(upper, mean, theta):  # type: ignore[no-untyped-def]
    """The smallest x with P(X > x) < upper, X negative binomial."""
    log_zero = -theta * np.log1p(mean / theta)
    beyond = -np.expm1(log_zero)
    probability = np.exp(log_zero)
    ratio = mean / (mean + theta)
    x = 0
    while upper <= beyond:
        probability *= (x + theta) / (x + 1) * ratio
        x += 1
        beyond -= probability
        if probability < 1e-18 and x > mean:  # what is left of `beyond` is rounding
            break
    return x


@numba.njit(nogil=True, cache=True, inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    """The output function of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
