"""TileDB-SOMA experiments, as CELLxGENE Census publishes them; needs the extra ``soma``.

An experiment is seen as it was when it was opened: what is written later does not show. Model:
github.com/single-cell-data/SOMA, abstract specification, "Experiment" and "Measurement".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import InputError
from atlas.ingest.content import Content, LazyArrays, missing_layer
from atlas.ingest.soma_matrix import Opened, SomaMatrix

_OBS_NAMES = ("obs_id", "obs_names")
_VAR_NAMES = ("var_id", "feature_name", "var_names")
_LAYERS = ("raw", "data")
"""Where counts are looked for: in Census, and where ``tiledbsoma.io`` puts them."""


def is_uri(path: Path) -> bool:
    """Whether what was given as a path is a URI: ``s3://…`` is kept as ``s3:/…``."""
    return bool(path.parts) and path.parts[0].endswith(":") and len(path.parts[0]) > 2


def is_soma(path: Path) -> bool:
    """Whether there is a TileDB group, or a URI, which no other reader takes."""
    return is_uri(path) or (path / "__tiledb_group.tdb").is_file() or (path / "__group").is_dir()


def read_soma(
    path: Path, *, measurement: str | None, layer: str | None, obs_filter: str | None
) -> Content:
    """Find tables and counts of a measurement; counts are not read yet.

    Parameters
    ----------
    path
        Of the experiment, or its URI.
    measurement
        Its name; may be left out where there is one.
    layer
        Of X; ``raw`` or ``data`` by default.
    obs_filter
        Which cells, in the syntax of TileDB: ``"tissue == 'lung' and is_primary_data == True"``.

    Raises
    ------
    InputError
        There is no experiment or measurement, the filter cannot be read or keeps no cell, or X is
        dense.
    MissingColumnError
        There is no such layer.
    ConfigError
        The package tiledbsoma is not installed.
    """
    opened = Opened(path, str(path).replace(":/", "://", 1) if is_uri(path) else str(path))
    try:
        return _content(opened, path, measurement, layer, obs_filter)
    except BaseException:
        opened.close()
        raise


def _content(
    opened: Opened,
    path: Path,
    measurement: str | None,
    layer: str | None,
    obs_filter: str | None,
) -> Content:
    experiment = opened.experiment
    names = sorted(experiment.ms.keys())
    if measurement is None and len(names) == 1:
        measurement = names[0]
    if measurement is None or measurement not in names:
        raise InputError(
            f"{path} has no such measurement" if measurement else "The measurement is not given",
            found=repr(measurement),
            expected="one of " + ", ".join(map(repr, names)),
            do=f"measurement={names[0]!r} in Python, --measurement {names[0]}" if names else None,
            path=path,
        )
    obs = _obs(experiment, obs_filter, path)
    ids = obs.pop("soma_joinid").to_numpy(np.int64)
    var = experiment.ms[measurement].var.read().concat().to_pandas().sort_values("soma_joinid")
    genes = var.pop("soma_joinid").to_numpy(np.int64)
    x = experiment.ms[measurement].X if "X" in experiment.ms[measurement] else {}
    said = obs["nnz"].to_numpy() if "nnz" in obs else None  # as in Census
    layers = {
        name: functools.partial(SomaMatrix, opened, measurement, name, ids, genes, said)
        for name in x
    }
    chosen = layer or next((name for name in _LAYERS if name in layers), None)
    if chosen is None and len(layers) == 1:
        chosen = next(iter(layers))
    if chosen not in layers:
        raise missing_layer(str(chosen or _LAYERS[0]), layers, str(path), path)
    counts = layers[chosen]()
    return Content(
        name=str(path),
        path=path,
        obs=_named(obs, _OBS_NAMES, ids),
        var=_named(var, _VAR_NAMES, genes),
        obsm=_obsm(opened, measurement, ids),
        uns={},
        counts=counts,
        layers=layers,
        elsewhere={
            f"X[{name!r}] holds counts: add --layer {name} (layer={name!r} in Python)": matrix
            for name, matrix in layers.items()
            if name != chosen
        },
        close=opened.close,
        stamp=lambda: "",  # it is seen as it was
        digest=counts.digest,
    )


def _obs(experiment: Any, obs_filter: str | None, path: Path) -> pd.DataFrame:
    try:
        table = experiment.obs.read(value_filter=obs_filter).concat()
    except Exception as error:  # tiledbsoma raises what TileDB raises
        raise InputError(
            "obs cannot be read" if obs_filter is None else "The filter of obs cannot be used",
            found=f"{obs_filter!r}: {error}".splitlines()[0],
            expected="a condition on columns of obs: "
            + ", ".join(experiment.obs.schema.names[:12]),
            do="write it as in \"tissue == 'lung' and is_primary_data == True\"",
            path=path,
        ) from error
    if not table.num_rows:
        raise InputError(
            "The filter of obs keeps no cell" if obs_filter else f"{path} has no cells",
            found=repr(obs_filter),
            expected="at least one cell",
            path=path,
        )
    obs: pd.DataFrame = table.to_pandas().sort_values("soma_joinid")
    for name in obs.select_dtypes("category"):
        obs[name] = obs[name].cat.remove_unused_categories()
    return obs


def _named(table: pd.DataFrame, names: Sequence[str], ids: npt.NDArray[np.int64]) -> pd.DataFrame:
    """With the first of the columns as index that has a name for each row, or the join ids."""
    for name in names:
        if name in table and table[name].notna().all() and table[name].is_unique:
            return table.set_index(table.pop(name).astype(str).to_numpy(object))
    return table.set_index(ids.astype(str).astype(object))


def _obsm(opened: Opened, measurement: str, ids: npt.NDArray[np.int64]) -> LazyArrays:
    found = opened.experiment.ms[measurement]
    names = [n for n, a in found.obsm.items() if a.ndim == 2] if "obsm" in found else []

    def array(name: str) -> npt.NDArray[Any]:
        stored = opened.experiment.ms[measurement].obsm[name]
        if not stored.is_sparse:
            dense: npt.NDArray[Any] = stored.read().to_numpy()[ids]
            return dense
        columns = int(stored.non_empty_domain()[1][1]) + 1
        out = np.zeros((len(ids), columns), np.float32)
        for table in stored.read((ids, slice(None))).tables():
            rows, column, values = (c.to_numpy() for c in table.columns)
            out[np.searchsorted(ids, rows), column] = values
        return out

    return LazyArrays({name: functools.partial(array, name) for name in names})
