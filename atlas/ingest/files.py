"""Which reader a file goes to."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import h5py
from anndata import AnnData

from atlas.errors import ConfigError, InputError
from atlas.ingest.base import DEFAULT_MEMORY, CountsSource
from atlas.ingest.content import Content
from atlas.ingest.h5ad import is_h5ad, read_h5ad
from atlas.ingest.memory import read_anndata
from atlas.ingest.tenx import GENES, is_tenx, read_tenx

_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def open_counts(
    source: str | PathLike[str] | AnnData,
    *,
    layer: str | None = None,
    use_raw: bool = False,
    round_counts: bool = False,
    feature_type: str = GENES,
    memory: int = DEFAULT_MEMORY,
    folder: str | PathLike[str] | None = None,
) -> CountsSource:
    """Open raw counts for reading in blocks.

    Parameters
    ----------
    source
        An AnnData, in memory or backed; or the path of an ``.h5ad`` or a 10x ``.h5`` file, told
        apart by what is in them.
    layer
        Read this layer of an AnnData in place of X.
    use_raw
        Read ``raw.X`` with its genes in place of X.
    round_counts
        Round fractions, half to even, in place of refusing them.
    feature_type
        Which features of a 10x file to read; the source's ``notes`` name the others.
    memory
        Bytes that reading may take at a time.
    folder
        Where temporary files go, if the counts are stored by columns and do not fit in
        ``memory``: as large as the counts; the system's folder for such files by default.

    Returns
    -------
    CountsSource
        A context manager that closes the file.

    Raises
    ------
    InputError
        Where the input cannot be read as counts.
    MissingColumnError
        Where there is no such layer.
    ConfigError
        Where options contradict each other.
    """
    if layer is not None and use_raw:
        raise ConfigError(
            "a layer and raw.X were both asked for",
            found=f"layer={layer!r}, use_raw=True",
            expected="one of them",
            do="leave out --layer or --use-raw",
        )
    if isinstance(source, AnnData):
        content = read_anndata(source, layer=layer, use_raw=use_raw)
    else:
        content = _read_file(Path(source), layer, use_raw, feature_type)
    try:
        return CountsSource(
            content,
            round_counts=round_counts,
            memory=memory,
            folder=None if folder is None else Path(folder),
        )
    except BaseException:
        content.close()
        raise


def _read_file(path: Path, layer: str | None, use_raw: bool, feature_type: str) -> Content:
    file = _open_hdf5(path)
    try:
        if is_tenx(file):
            if layer is not None or use_raw:
                raise InputError(
                    f"{path} is a 10x matrix, which has neither layers nor raw",
                    found="raw.X was asked for" if use_raw else f"layer {layer!r} was asked for",
                    expected="no such option with a 10x file",
                    do="leave out --layer and --use-raw",
                    path=path,
                )
            return read_tenx(file, path, feature_type=feature_type)
        if is_h5ad(file):
            return read_h5ad(file, path, layer=layer, use_raw=use_raw)
        raise InputError(
            f"{path} is neither an AnnData nor a 10x file",
            found="an HDF5 file with " + (", ".join(sorted(file)[:8]) or "nothing in it"),
            expected="obs and var (.h5ad), or a 10x matrix (.h5)",
            do="give an .h5ad file or the .h5 file of Cell Ranger",
            path=path,
        )
    except BaseException:
        file.close()
        raise


def _open_hdf5(path: Path) -> h5py.File:
    if not path.exists():
        raise InputError(
            f"{path} does not exist",
            found="no such file",
            expected="an .h5ad file or a 10x .h5 file",
            do="check the name and the folder",
            path=path,
        )
    if path.is_dir():
        raise InputError(
            f"{path} is a folder",
            found="a folder",
            expected="an .h5ad file or a 10x .h5 file",
            do="give the file in it",
            path=path,
        )
    with path.open("rb") as file:
        start = file.read(len(_SIGNATURE))
    if not start:
        raise InputError(
            f"{path} is empty",
            found="0 bytes",
            expected="an .h5ad file or a 10x .h5 file",
            do="copy or download it again",
            path=path,
        )
    try:
        return h5py.File(path, "r")
    except OSError as error:
        whole = start == _SIGNATURE
        raise InputError(
            f"{path} is damaged" if whole else f"{path} is not an HDF5 file",
            found=str(error) if whole else f"a file that starts with {start!r}",
            expected="an .h5ad file or a 10x .h5 file",
            do="copy or download it again" if whole else "give an .h5ad file or a 10x .h5 file",
            path=path,
        ) from error
