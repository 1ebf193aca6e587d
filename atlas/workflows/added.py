"""What a report tells of the studies that updates added to a store."""

from __future__ import annotations

import numpy as np

from atlas.evaluation.labels import Confusion
from atlas.evaluation.report import AddedLabel, AddedStudy
from atlas.store import CountStore
from atlas.workflows.drift import Drift


def added_studies(store: CountStore, model: str) -> tuple[AddedStudy, ...]:
    """The studies that :func:`atlas.update` added to a model kept with a store, if there are any.

    Studies that were dropped since are left out.
    """
    if model not in store.models:
        return ()
    out = []
    for version in store.model_versions(model):
        record = store.model_record(model, version)
        if "drift" in record and record["study"] in store.studies:
            out.append(_added(store, model, version, record["study"], record["drift"]))
    return tuple(out)


def _added(
    store: CountStore, model: str, version: int, study: str, drift: dict[str, object]
) -> AddedStudy:
    went = Drift.from_json(drift)
    labels, confusion = _labelled(store, f"{model}_label", study)
    return AddedStudy(
        name=study,
        version=version,
        cells=store.study(study).entry.n_obs,
        unknown_share=went.unknown_share,
        entropy=went.entropy,
        entropy_ceiling=went.entropy_ceiling,
        bound_before=went.bound_before,
        bound_after=went.bound_after,
        advice=went.advice,
        groups=tuple((one.name, one.n_obs, one.markers) for one in went.unseen),
        labels=labels,
        confusion=confusion,
    )


def _labelled(
    store: CountStore, column: str, study: str
) -> tuple[tuple[AddedLabel, ...], Confusion | None]:
    """The labels that cells of a study got, and these beside their own."""
    obs = store.study(study).obs()
    if not {column, f"{column}_uncertainty", f"{column}_distance"} <= set(obs.columns):
        return (), None
    given = obs[column].astype(str).to_numpy(str)
    names, which = np.unique(given, return_inverse=True)
    labels = tuple(
        AddedLabel(
            str(name),
            int((which == i).sum()),
            float(obs[f"{column}_uncertainty"].to_numpy(np.float64)[which == i].mean()),
            float(obs[f"{column}_distance"].to_numpy(np.float64)[which == i].mean()),
        )
        for i, name in enumerate(names)
    )
    own = store.obs_codes["label"][store.obs_codes["study"] == store.studies.index(study)]
    there = own >= 0
    if not there.any():
        return labels, None
    met, row = np.unique(own[there], return_inverse=True)
    counts = np.zeros((len(met), len(names)), np.int64)
    np.add.at(counts, (row, which[there]), 1)
    truth = tuple(store.labels[code] for code in met)
    return labels, Confusion(truth, tuple(map(str, names)), counts)
