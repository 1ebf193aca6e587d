"""Which reader a file goes to."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

import h5py
from anndata import AnnData

from atlas.errors import ConfigError, InputError
from atlas.ingest.anndata_zarr import is_zarr, read_zarr
from atlas.ingest.base import DEFAULT_MEMORY, CountsSource
from atlas.ingest.content import Content
from atlas.ingest.h5ad import is_h5ad, read_h5ad
from atlas.ingest.lengths import ByLength, read_lengths, relative_lengths
from atlas.ingest.loom import is_loom, read_loom
from atlas.ingest.memory import read_anndata
from atlas.ingest.mtx import is_mtx, read_mtx
from atlas.ingest.soma import is_soma, read_soma
from atlas.ingest.tenx import GENES, is_tenx, read_tenx
from atlas.ingest.text import is_text, read_text
from atlas.ingest.visium import read_visium, spatial_folder

_READABLE = (
    ".h5ad, 10x .h5, .loom, .csv, .tsv or .txt, AnnData in Zarr, a 10x or Visium folder, SOMA"
)
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
    transpose: bool = False,
    gene_lengths: str | PathLike[str] | None = None,
    measurement: str | None = None,
    obs_filter: str | None = None,
) -> CountsSource:
    """Open raw counts for reading in blocks.

    Parameters
    ----------
    source
        An AnnData, in memory or backed; or the path of an ``.h5ad``, a 10x ``.h5`` or a ``.loom``
        file, told apart by what is in them, of a table in text (``.csv``, ``.tsv``, ``.txt``, also
        gzipped), of the folder of an AnnData in Zarr, of a 10x folder (``matrix.mtx``), of a Visium
        folder (``spatial``) or of a SOMA experiment, which may be a URI (``s3://…``).
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
    transpose
        Of a table in text: there is a gene on each line, not a cell.
    gene_lengths
        A table of genes and lengths; counts are divided by the relative length of their gene, and
        the integer part is kept (:mod:`atlas.ingest.lengths`).
    measurement, obs_filter
        Of a SOMA experiment: the name of the measurement, and a condition on obs; see
        :func:`atlas.ingest.soma.read_soma`.

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
    soma = not isinstance(source, AnnData) and is_soma(Path(source))
    if not soma and (measurement is not None or obs_filter is not None):
        name = "an AnnData" if isinstance(source, AnnData) else source
        raise ConfigError(
            "Only a SOMA experiment has measurements and a filter of obs",
            found=f"measurement={measurement!r}, obs_filter={obs_filter!r} with {name}",
            do="leave them out; rows are chosen with rows= when training or exporting",
            path=None if isinstance(source, AnnData) else source,
        )
    if isinstance(source, AnnData):
        content = read_anndata(source, layer=layer, use_raw=use_raw)
    elif soma:
        if use_raw:
            raise InputError(
                f"{source} is a SOMA experiment, which has no raw",
                found="raw.X was asked for",
                expected="a layer, or a measurement of its own",
                do="leave out --use-raw; name them with --layer and --measurement",
                path=source,
            )
        content = read_soma(
            Path(source), measurement=measurement, layer=layer, obs_filter=obs_filter
        )
    else:
        content = _read(Path(source), layer, use_raw, feature_type, transpose)
    try:
        if transpose and (isinstance(source, AnnData) or not is_text(Path(source))):
            raise ConfigError(
                "Only a table in text can be transposed",
                found=content.name,
                expected="a .csv, .tsv or .txt file with a gene on each line",
                do="leave out --transpose",
            )
        if gene_lengths is not None:
            lengths = Path(gene_lengths)
            relative = relative_lengths(read_lengths(lengths), content.var, lengths, content.path)
            content = replace(content, counts=ByLength(content.counts, relative))
        return CountsSource(
            content,
            round_counts=round_counts,
            memory=memory,
            folder=None if folder is None else Path(folder),
        )
    except BaseException:
        content.close()
        raise


def _read(
    path: Path, layer: str | None, use_raw: bool, feature_type: str, transpose: bool
) -> Content:
    """Find the reader of a file or folder."""
    if path.is_dir():
        if is_zarr(path):
            return read_zarr(path, layer=layer, use_raw=use_raw)
        outs = spatial_folder(path)
        if outs is None and not is_mtx(path):
            there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing in it"
            raise InputError(
                f"{path} is a folder that cannot be read",
                found=f"a folder with {there}",
                expected=_READABLE,
                do="give the file or folder that holds the counts",
                path=path,
            )
        _refuse(layer, use_raw, path, "a 10x folder" if outs is None else "a Visium folder")
        if outs is None:
            return read_mtx(path, feature_type=feature_type)
        return read_visium(path, outs, lambda p: _read(p, None, False, feature_type, False))
    if is_text(path) and path.is_file() and path.stat().st_size:
        _refuse(layer, use_raw, path, "a table in text")
        return read_text(path, transpose=transpose)
    return _read_hdf5(path, layer, use_raw, feature_type)


def _refuse(layer: str | None, use_raw: bool, path: Path, what: str) -> None:
    if layer is not None or use_raw:
        raise InputError(
            f"{path} is {what}, which has neither layers nor raw",
            found="raw.X was asked for" if use_raw else f"layer {layer!r} was asked for",
            expected=f"no such option with {what}",
            do="leave out --layer and --use-raw",
            path=path,
        )


def _read_hdf5(path: Path, layer: str | None, use_raw: bool, feature_type: str) -> Content:
    file = _open_hdf5(path)
    try:
        if is_loom(file):
            if use_raw:
                _refuse(None, use_raw, path, "a loom file")
            return read_loom(file, path, layer=layer)
        if is_tenx(file):
            _refuse(layer, use_raw, path, "a 10x matrix")
            return read_tenx(file, path, feature_type=feature_type)
        if is_h5ad(file):
            return read_h5ad(file, path, layer=layer, use_raw=use_raw)
        raise InputError(
            f"{path} is neither an AnnData nor a 10x or loom file",
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
            expected=_READABLE,
            do="check the name and the folder",
            path=path,
        )
    with path.open("rb") as file:
        start = file.read(len(_SIGNATURE))
    if not start:
        raise InputError(
            f"{path} is empty",
            found="0 bytes",
            expected=_READABLE,
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
            expected=_READABLE,
            do="copy or download it again" if whole else "give a file of one of these forms",
            path=path,
        ) from error
