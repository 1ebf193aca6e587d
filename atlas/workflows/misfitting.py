"""The misfit of query cells: reads the counts that :mod:`atlas.evaluation.misfit` compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, vstack

from atlas.errors import StoreError
from atlas.evaluation.codes import sample_rows
from atlas.evaluation.misfit import misfit, pooled, variance_within
from atlas.evaluation.neighbours import Backend, Embedding, Search, nearest
from atlas.store import CountStore, CountView
from loaders import SequentialLoader

Codes = npt.NDArray[np.int64]

POOLED: Final = 60
"""Cells of the query whose counts are summed; of one alone too few are known."""
AMONG: Final = 50
"""Reference cells that each of these is compared with."""
OF_REFERENCE: Final = 31
"""Cells of the reference whose counts are summed to know how much genes vary over it."""
SAMPLED: Final = 2000
"""Cells of each batch of the reference by which that is known."""

_MINIBATCH = 2048


@dataclass(frozen=True, slots=True)
class Asked:
    """Query cells and the reference that they were asked of.

    Attributes
    ----------
    rows, labels
        Rows of the query in the store, and the label that each got: int64 (n_query,).
    reference
        Rows of the reference: int64 (n_reference,).
    search
        What finds neighbours among these; None for exact search.
    """

    rows: Codes
    labels: Codes
    reference: Codes
    search: Search | None


def misfit_of(
    store: CountStore, embedding: str, asked: Asked, *, seed: int = 0, backend: Backend = "auto"
) -> npt.NDArray[np.float64]:
    """The misfit of query cells (:func:`atlas.evaluation.misfit.misfit`): float64 (n_query,).

    Counts of the query, and of the reference's cells that lie next to it, are held in memory, over
    the genes of the model that made the embedding.

    Raises
    ------
    StoreError
        The embedding does not say which genes it was made of.
    """
    z = store.embedding(embedding)
    genes = store.embedding_details(embedding).get("genes")
    if not genes:
        raise StoreError(
            f"Of the embedding {embedding!r} it is not known which genes it was made of",
            expected="an embedding by `atlas embed` or `atlas baseline`",
            do="leave the misfit out",
            path=store.path,
        )
    view = store.select(genes)
    batch = store.obs_codes["batch"].astype(np.int64)
    near = _within_batches(z, asked.rows, asked.rows, batch, POOLED, backend)
    own = z[asked.reference]
    k = min(AMONG, len(own))
    search = asked.search(z[asked.rows], k, None) if asked.search else None
    found = search or nearest(own, z[asked.rows], k, backend=backend)
    drawn = _drawn(asked.reference, batch, seed)
    around = _within_batches(z, asked.reference, drawn, batch, OF_REFERENCE, backend)
    among = pooled(found.indices, len(own))
    used = np.union1d(among.indices, around.indices)  # of the reference
    reference = _counts(view, asked.reference[used])
    _, drawn_batch = np.unique(batch[drawn], return_inverse=True)
    _, asked_batch = np.unique(batch[asked.rows], return_inverse=True)
    return misfit(
        _counts(view, asked.rows),
        reference,
        near,
        among[:, used],
        asked_batch,
        asked.labels,
        variance_within(reference, around[:, used], drawn_batch),
    )


def _drawn(rows: Codes, batch: Codes, seed: int) -> Codes:
    """Some cells of each batch: int64, rising within each."""
    return np.concatenate(
        [sample_rows(rows[batch[rows] == one], SAMPLED, seed) for one in np.unique(batch[rows])]
    )


def _within_batches(
    z: Embedding, rows: Codes, asked: Codes, batch: Codes, k: int, backend: Backend
) -> csr_matrix:
    """What sums the k cells of ``rows`` nearest to each of ``asked`` in its batch, itself too."""
    parts, order = [], []
    for one in np.unique(batch[asked]):
        own, mine = (np.flatnonzero(batch[which] == one) for which in (rows, asked))
        found = nearest(z[rows[own]], z[asked[mine]], min(k, len(own)), backend=backend)
        parts.append(pooled(own[found.indices], len(rows)))
        order.append(mine)
    return vstack(parts, format="csr")[np.argsort(np.concatenate(order))]


def _counts(view: CountView, rows: Codes) -> csr_matrix:
    """Counts of some rows of the store, which rise or not: float32 (len(rows), n_genes)."""
    rising = np.unique(rows)
    read = vstack([m.to_scipy() for m in SequentialLoader(view, _MINIBATCH, rising)], format="csr")
    return read[np.searchsorted(rising, rows)]
