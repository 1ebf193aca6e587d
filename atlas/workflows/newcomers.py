"""The steps of an update that label a study's cells; each is passed over where it is done."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from atlas.models import TrainedModel
from atlas.store import CountStore, obs_part
from atlas.workflows.labelling import label
from atlas.workflows.transferring import transfer_labels

K = 50
"""Neighbours that vote for a label."""


def labels_by_neighbours(
    forked: CountStore, name: str, study: str, false_unknown: float | None
) -> dict[str, int]:
    """Label the study's cells by the other cells that have a label; cells of each label."""
    column = f"{name}_label"
    new = forked.obs_codes["study"] == forked.studies.index(study)
    n_labelled = int((~new & (forked.obs_codes["label"] >= 0)).sum())
    if n_labelled < 2:
        return {}
    k = min(K, n_labelled - 1)
    by = None if false_unknown is None else _calibrate_by(forked, ~new, k)
    if not _written(forked, study, f"{column}_distance"):
        transfer_labels(
            forked,
            embedding=name,
            reference=~new,
            query=new,
            name=column,
            k=k,
            false_unknown=None if by is None else false_unknown,
            calibrate_by=by or "atlas_study",
        )
    return _counted(forked, study, column)


def _calibrate_by(forked: CountStore, reference: npt.NDArray[np.bool_], k: int) -> str | None:
    """What can be left out of the reference in turn; None where it cannot be divided.

    Without any of the groups there are more than k labelled cells, and two groups share a label.
    """
    labels = forked.obs_codes["label"]
    voting = reference & (labels >= 0)
    for column in ("study", "batch"):  # the store's own, not an obs column of the input
        codes = forked.obs_codes[column][voting]
        groups, sizes = np.unique(codes, return_counts=True)
        pairs = np.unique(np.stack([codes, labels[voting]]), axis=1)
        shared = len(np.unique(pairs[1])) < pairs.shape[1]
        if len(groups) > 1 and shared and len(codes) - sizes.max() > k:
            return f"atlas_{column}"
    return None


def labels_by_classifier(
    trained: TrainedModel, forked: CountStore, name: str, study: str, device: str
) -> dict[str, int]:
    """Label the study's cells by a scANVI's classifier too; cells of each class."""
    if trained.labels is None:
        return {}
    column = f"{name}_class"
    if not _written(forked, study, f"{column}_entropy"):
        new = forked.obs_codes["study"] == forked.studies.index(study)
        label(trained, forked, name=column, rows=new, device=device)
    return _counted(forked, study, column)


def _written(forked: CountStore, study: str, column: str) -> bool:
    """Whether an obs column was written since the study was ingested, in which it may have been."""
    part = forked.study(study).entry.parts.get("obs")
    return part is not None and column in obs_part.read(forked.path, part)


def _counted(forked: CountStore, study: str, column: str) -> dict[str, int]:
    given = forked.study(study).obs()[column].value_counts()
    return {str(label): int(n) for label, n in given.items() if n}
