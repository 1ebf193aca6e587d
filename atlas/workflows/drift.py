"""How far a study that was added lies from its reference, and when to train anew."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from atlas.evaluation.codes import sample_rows
from atlas.evaluation.mixing import batch_entropies, permutation_ceiling
from atlas.evaluation.neighbours import nearest
from atlas.models import TrainedModel
from atlas.models.base import evaluating
from atlas.store import CountStore
from atlas.workflows.streaming import CellStream
from atlas.workflows.unseen import UnseenGroup

K = 50
"""Neighbours among which new cells and the reference mix (scVI, Lopez et al. 2018, Methods)."""

MANY_UNKNOWN, LITTLE_MIXING, MANY_ADDED = 0.2, 0.25, 0.5
"""Shares beyond which the advice is to look closer, or to train anew: rules of thumb."""

_SAMPLE = 2000
_CELLS_OF_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Drift:
    """How an update went, in figures that are kept with the model.

    Attributes
    ----------
    unknown_share
        Share of the new cells that are Unknown; None where nothing was transferred.
    entropy, entropy_ceiling
        Mean entropy of new cells against all others among the 50 nearest neighbours of new cells,
        and what it would be if both were permuted, nats.
    bound_before, bound_after
        Mean evidence lower bound of new cells at the posterior mean of z, as cells of the
        reference batch under which those of their batch are most likely, and as cells of their
        own; nats. Of at most a thousand cells a batch.
    nearest
        That reference batch, for each new one.
    added_share
        Share of the atlas' cells that came by surgery, this study included.
    advice
        What to do, in sentences; empty where all is well.
    unseen
        Groups of the Unknown cells, the largest first.
    """

    unknown_share: float | None
    entropy: float
    entropy_ceiling: float
    bound_before: float
    bound_after: float
    nearest: dict[str, str]
    added_share: float
    advice: tuple[str, ...] = ()
    unseen: tuple[UnseenGroup, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        unseen = [{**one, "markers": list(one["markers"])} for one in values["unseen"]]
        return {**values, "advice": list(self.advice), "unseen": unseen}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Drift:
        """The inverse of :meth:`to_json`."""
        unseen = tuple(UnseenGroup.from_json(one) for one in values.get("unseen", ()))
        return cls(**{**values, "advice": tuple(values["advice"]), "unseen": unseen})


def measure_drift(
    model: TrainedModel,
    store: CountStore,
    study: str,
    *,
    embedding: str,
    unknown_share: float | None,
    unseen: tuple[UnseenGroup, ...] = (),
    device: str = "auto",
) -> Drift:
    """Measure how a study lies to the rest of a store.

    Parameters
    ----------
    model
        After surgery with the study.
    store, study
        A store that has it.
    embedding
        Of all cells by the model.
    unknown_share, unseen
        As found before.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, …
    """
    new = store.obs_codes["study"] == store.studies.index(study)
    entropy, ceiling = _mixing(store.embedding(embedding), new)
    before, after, nearest_of = _bounds(model, store, new, device)
    added = {name for one in model.surgery for name in one.studies}
    sizes = dict(zip(store.studies, np.diff(store.segments), strict=True))
    drift = Drift(
        unknown_share=unknown_share,
        entropy=entropy,
        entropy_ceiling=ceiling,
        bound_before=before,
        bound_after=after,
        nearest=nearest_of,
        added_share=float(sum(int(sizes[name]) for name in added if name in sizes) / store.n_obs),
        unseen=unseen,
    )
    return dataclasses.replace(drift, advice=tuple(_advice(drift)))


def _advice(drift: Drift) -> list[str]:
    said = []
    if drift.unknown_share is not None and drift.unknown_share > MANY_UNKNOWN:
        said.append(
            f"{drift.unknown_share:.0%} of the cells are Unknown: look for types that the "
            "reference lacks; to have them in the model, train it anew on all studies"
        )
    said += [
        f"{one.n_obs:,} Unknown cells lie together ({one.name}, high in "
        f"{', '.join(one.markers[:3]) or 'no gene'}): perhaps a type that the reference lacks"
        for one in drift.unseen[:3]
    ]
    if drift.entropy < LITTLE_MIXING * drift.entropy_ceiling:
        said.append(
            f"the cells hardly mix with the others ({drift.entropy:.2f} of "
            f"{drift.entropy_ceiling:.2f} nats): another tissue or state, or too few epochs; if "
            "they ought to mix, train anew on all studies"
        )
    if drift.bound_after < drift.bound_before:
        said.append(
            "the cells are less likely after surgery than before: try more epochs or a smaller "
            "learning rate"
        )
    if drift.added_share > MANY_ADDED:
        said.append(
            f"{drift.added_share:.0%} of the cells came after training: train anew on all studies"
        )
    return said


def _mixing(z: npt.NDArray[np.float32], new: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Entropy among the neighbours of a sample of the new cells, and its ceiling."""
    asked = sample_rows(np.flatnonzero(new), _SAMPLE, seed=0)
    k = min(K, len(z) - 1)
    found = nearest(z, z[asked], k, asked)
    entropies = batch_entropies(found.indices, new.astype(np.int64), 2)
    sizes = np.array([(~new).sum(), new.sum()], np.int64)
    return float(entropies.mean()), permutation_ceiling(sizes, k)


def _bounds(
    model: TrainedModel, store: CountStore, new: npt.NDArray[np.bool_], device: str
) -> tuple[float, float, dict[str, str]]:
    """Mean bound before and after, and the nearest reference batch of each new one.

    What a reference batch gives is the same before and after surgery, so the new model has both.
    """
    n_original = len(model.batches) - sum(len(one.batches) for one in model.surgery)
    codes = store.obs_codes["batch"]
    sums, n_cells, nearest_of = np.zeros(2), 0, {}
    for code in np.unique(codes[new]):
        rows = np.flatnonzero(new & (codes == code))
        mask = np.zeros(store.n_obs, bool)
        mask[rows[:: max(1, len(rows) // _CELLS_OF_BATCH)]] = True
        totals = np.zeros(n_original + 1)  # the last one is that of the own batch
        for cells in CellStream(model, store, rows=mask, device=device, own_batch=True):
            for candidate in range(n_original + 1):
                inputs = dataclasses.replace(cells.inputs, label=None)
                if candidate < n_original:
                    batch = torch.full_like(inputs.batch, candidate)
                    inputs = dataclasses.replace(inputs, batch=batch)
                with evaluating(model.module):
                    losses = model.module.loss(inputs)
                totals[candidate] -= float(losses.negative_bound[: cells.n_cells].double().sum())
        best = int(totals[:-1].argmax())
        nearest_of[store.batches[code]] = model.batches[best]
        sums += totals[best], totals[-1]
        n_cells += int(mask.sum())
    return float(sums[0] / n_cells), float(sums[1] / n_cells), nearest_of
