"""Visium folders of Space Ranger: spots with their places, and the scale of the images.

Form: 10x Genomics, "Space Ranger, Understanding Outputs, Spatial Outputs". Names are those of
scanpy and squidpy: ``obsm["spatial"]`` in pixels of the full image (x, y), ``in_tissue``,
``array_row`` and ``array_col`` in obs, ``uns["spatial"][SAMPLE]["scalefactors"]``. Images stay
where they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from atlas.errors import InputError
from atlas.ingest.content import Content, LazyArrays

_COLUMNS = ["in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_POSITIONS = ("tissue_positions.csv", "tissue_positions_list.csv")
_MATRICES = (
    "filtered_feature_bc_matrix.h5",
    "filtered_feature_bc_matrix",
    "raw_feature_bc_matrix.h5",
    "raw_feature_bc_matrix",
)


def spatial_folder(folder: Path) -> Path | None:
    """The folder with ``spatial`` in it: this one, or its ``outs``."""
    return next((p for p in (folder, folder / "outs") if (p / "spatial").is_dir()), None)


def read_visium(folder: Path, outs: Path, read: Callable[[Path], Content]) -> Content:
    """Counts and places of a sample.

    Parameters
    ----------
    folder, outs
        What was given, and the folder with ``spatial`` in it.
    read
        Reads the matrix, an .h5 file or a folder.

    Raises
    ------
    InputError
        Counts or positions are missing, or a barcode has no position.
    """
    matrix = next((outs / name for name in _MATRICES if (outs / name).exists()), None)
    found = sorted(outs.glob("*filtered_feature_bc_matrix.h5"))  # SAMPLE_filtered_…, as downloaded
    matrix = matrix or (found[0] if len(found) == 1 else None)
    if matrix is None:
        raise InputError(
            f"{folder} has no counts",
            found=", ".join(sorted(p.name for p in outs.iterdir())[:8]),
            expected=f"{_MATRICES[0]}, or the folder {_MATRICES[1]}",
            do="give the outs folder of Space Ranger",
            path=folder,
        )
    content = read(matrix)
    try:
        places = _positions(outs / "spatial", folder)
        missing = content.obs.index.difference(places.index)
        if len(missing):
            raise InputError(
                f"{folder} has barcodes without a position",
                found=f"{len(missing):,} of {len(content.obs):,}, e.g. {', '.join(missing[:3])}",
                expected="counts and positions of the same sample",
                do="copy counts and spatial from the same run of Space Ranger",
                path=folder,
            )
        places = places.loc[content.obs.index]
        pixels = places[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64)
        sample = folder.parent.name if folder.name == "outs" else folder.name
        scales = _scales(outs / "spatial" / "scalefactors_json.json")
    except BaseException:
        content.close()
        raise
    return replace(
        content,
        name=str(folder),
        path=folder,
        obs=content.obs.join(places[_COLUMNS[:3]]),
        obsm=LazyArrays({"spatial": lambda: pixels}),
        uns={"spatial": {sample: {"scalefactors": scales}}} if scales else {},
        notes=(*content.notes, f"{folder}: images are not kept, only their scale factors"),
    )


def _positions(spatial: Path, folder: Path) -> pd.DataFrame:
    """The table of positions, with a header (Space Ranger 2) or without."""
    path = next((spatial / name for name in _POSITIONS if (spatial / name).is_file()), None)
    if path is None:
        raise InputError(
            f"{folder} has no positions",
            found=", ".join(sorted(p.name for p in spatial.iterdir())[:8]) or "an empty folder",
            expected=" or ".join(_POSITIONS),
            do="copy the folder spatial of Space Ranger whole",
            path=spatial,
        )
    try:
        with path.open() as file:
            header = 0 if file.readline().startswith("barcode") else None
        table = pd.read_csv(path, header=header, index_col=0)
        table.columns = pd.Index(_COLUMNS)
        return table.astype(np.int64) if header is None else table
    except ValueError as error:
        raise InputError(
            f"{path} is not a table of positions",
            found=str(error).splitlines()[0],
            expected="barcode, " + ", ".join(_COLUMNS),
            do="copy the folder spatial of Space Ranger whole",
            path=path,
        ) from error


def _scales(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return {name: float(value) for name, value in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} does not hold scale factors",
            found=error,
            expected="a JSON object of numbers",
            do="copy the folder spatial of Space Ranger whole",
            path=path,
        ) from error
