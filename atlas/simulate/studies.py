"""Studies of simulated cells as h5ad files, with their truth beside them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
from anndata.io import write_elem
from dask.system import CPU_COUNT
from tqdm import tqdm

from atlas.errors import AtlasError, ConfigError
from atlas.hdf5 import Hdf5Writer, create_hdf5
from atlas.simulate.capture import Capture
from atlas.simulate.cells import Block, Draws, Process, Recipe

TRUTH_FILE = "truth.npz"
CAPTURE_FILE = "capture.npz"
TREE_FILE = "tree.npz"

_BLOCKS_AHEAD = 32  # of the writer: some 8 MB each, as a rule
_CHUNK = 2**16


def simulate(
    out_dir: str | os.PathLike[str],
    cells: int = 30_000,
    studies: int = 3,
    seed: int = 0,
    *,
    genes: int = 2000,
    types: int = 8,
    batches: int = 2,
    library: float = 2000.0,
    missing_genes: float = 0.0,
    varying_genes: float | None = None,
    process: Process = "zinb",
    capture: Capture | None = None,
    tree: bool = False,
    new_type: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> list[Path]:
    """Write ``study_1.h5ad`` … and the :class:`atlas.simulate.Truth` into ``out_dir``.

    ``X`` holds raw counts in CSR form; ``obs`` has ``batch``, ``cell_type`` (a tenth of the cells
    ``Unknown``), ``true_type``, ``state`` and ``log_library`` (natural logarithm of the expected
    total over all genes, without dropout); ``var`` is indexed by gene name and has ``gene_id``;
    ``obsm["X_true_latent"]`` is the state's latent. ``truth.npz`` is the truth.

    Another process than ZINB adds the obs columns ``transcripts`` (expected number in the cell),
    ``efficiency`` and ``depth`` (expected reads), and ``capture.npz``
    (:class:`atlas.simulate.CaptureGenes`); ``log_library`` is then that of the transcripts that are
    captured, or of the reads where these are counted.

    A tree adds ``branch`` in place of ``true_type``, ``depth_in_tree`` (distance from the root),
    ``distance_root``, ``distance_tip_1`` … (from the end points, along the tree) and ``tree.npz``
    (:class:`atlas.simulate.Tree`). ``cell_type`` is the end point that a cell lies beside, at most
    0.1 away, and ``Unknown`` for all others.

    Parameters
    ----------
    out_dir
        New or empty folder.
    cells
        Cells of all studies together; the first study is the largest.
    studies, batches
        Studies, and batches in each.
    seed
        Of everything.
    genes, types
        Genes and cell types of all studies together.
    library
        Median expected total of a cell's counts. At the default some 1,100 of 20,000 genes, or some
        400 of 2,000, are not zero.
    missing_genes
        Share of the genes that the last study has not measured.
    varying_genes
        Share of the genes that differ between the states, .2 by default. On a tree .98, as in
        SymSim: with .2 and a few hundred genes neither PCA nor scVI finds the tree
        (``benchmarks/LOG.md``).
    process
        ``"zinb"``; or bursts of transcription, capture, PCR and sequencing, counted as ``"umi"`` or
        as ``"reads"`` (:mod:`atlas.simulate.capture`). A cell then takes some 2 ms of a core at
        2,000 genes and 8 at 20,000, and memory goes with ``library``.
    capture
        Settings of the latter; also in ``uns["simulation"]``.
    tree
        Spread the cells along the branches of a binary tree with ``types`` tips
        (:mod:`atlas.simulate.tree`) in place of separate types.
    new_type
        The last study has a type that the others lack; nothing else changes in what is drawn but
        who the cells are.
    threads
        Threads that draw counts; by default one per core. Does not change the files.
    progress
        Show cells, cells/s and the time left on standard error.

    Returns
    -------
    Paths of the studies.

    Raises
    ------
    ConfigError
        If a number is out of range or the folder is not empty.
    AtlasError
        If a file cannot be written; nothing is left behind.
    """
    most = 1e6 if process == "zinb" else 1e5  # molecules are drawn one by one
    for name, value, good, expected in (
        ("studies", studies, studies >= 1, "at least 1"),
        ("cells", cells, cells >= studies, "at least 1 per study"),
        ("seed", seed, 0 <= seed < 2**63, "in [0, 2^63)"),
        ("genes", genes, genes >= 1, "at least 1"),
        ("types", types, types >= 1 + tree, "at least 2 for a tree" if tree else "at least 1"),
        ("batches", batches, batches >= 1, "at least 1"),
        ("library", library, 1 <= library <= most, f"in [1, {most:g}]"),
        ("missing_genes", missing_genes, 0 <= missing_genes < 1, "in [0, 1)"),
        ("varying_genes", varying_genes, 0 <= (varying_genes or 0) <= 1, "in [0, 1]"),
        ("process", process, process in get_args(Process), "zinb, umi or reads"),
        ("threads", threads, threads is None or threads >= 1, "at least 1"),
    ):
        if not good:
            raise ConfigError(f"{name} is out of range", found=value, expected=expected)
    if new_type and (tree or studies < 2 or types < 4):
        raise ConfigError(
            "The last study can have no type of its own",
            found="a tree" if tree else f"{studies} studies of {types} types",
            expected="separate types, 4 at least, and 2 studies at least",
        )
    if capture is not None and process == "zinb":
        raise ConfigError(
            "Only a process with capture has settings of it",
            found="process='zinb'",
            expected="process='umi' or 'reads'",
        )
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            "the output folder is not empty" if out.is_dir() else "the output is not a folder",
            expected="a new or empty folder",
            do="choose another one, or remove what is there",
            path=out,
        )
    recipe = Recipe.draw(
        studies, seed, genes=genes, types=types, batches=batches, library=library,
        missing_genes=missing_genes, varying_genes=varying_genes, process=process,
        capture=capture, tree=tree, new_type=new_type,
    )  # fmt: skip
    weights = 2 * studies - np.arange(studies)
    bounds = np.cumsum(weights) * (cells - studies) // weights.sum()
    sizes = 1 + np.diff(bounds, prepend=0)
    existed = out.exists()
    written: list[Path] = []
    partial = out / ".partial"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (
            ThreadPoolExecutor(threads or CPU_COUNT) as pool,
            tqdm(total=cells, unit="cell", unit_scale=True, disable=not progress) as bar,
        ):
            for study, n_obs in enumerate(sizes):
                with create_hdf5(partial) as writer:
                    _write_study(writer, recipe.study(study, int(n_obs)), pool, bar)
                written.append(partial.rename(out / f"study_{study + 1}.h5ad"))
        # Last, so that a folder with a truth is a whole one.
        for name, part in (
            (TREE_FILE, recipe.tree),
            (CAPTURE_FILE, recipe.capture_genes),
            (TRUTH_FILE, recipe.truth),
        ):
            if part is not None:
                part.save(partial)
                written.append(partial.rename(out / name))
    except BaseException as error:
        for path in (partial, *written):
            path.unlink(missing_ok=True)
        if not existed and out.is_dir():
            out.rmdir()
        if isinstance(error, OSError):
            raise AtlasError(
                "the simulated studies could not be written", found=error, path=out
            ) from error
        raise
    return written[: len(sizes)]


def _write_study(
    writer: Hdf5Writer, draws: Draws, pool: ThreadPoolExecutor, bar: tqdm[Any]
) -> None:
    """One study in anndata's format, its counts block by block."""
    file, n_obs = writer.file, len(draws.obs)
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    write_elem(file, "obs", draws.obs)
    write_elem(file, "var", draws.var)
    write_elem(file, "obsm", {"X_true_latent": draws.latent})
    write_elem(file, "uns", {"simulation": {**draws.settings, "truth": TRUTH_FILE}})
    for empty in ("layers", "obsp", "varm", "varp"):
        write_elem(file, empty, {})

    counts = file.create_group("X")
    counts.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    counts.attrs["shape"] = np.array([n_obs, len(draws.var)])
    # Shuffle and the lightest gzip: a fifth of the size, faster than the draws, read everywhere.
    options = {
        "maxshape": (None,), "chunks": (_CHUNK,), "compression": "gzip", "compression_opts": 1,
        "shuffle": True,
    }  # fmt: skip
    indices = counts.create_dataset("indices", shape=(0,), dtype=np.int32, **options)
    data = counts.create_dataset("data", shape=(0,), dtype=np.float32, **options)
    indptr = np.zeros(n_obs + 1, dtype=np.int64)

    start, n_values = 0, 0
    for lengths, block_indices, block_data in _in_order(pool, draws):
        stop, end = start + len(lengths), n_values + len(block_data)
        indptr[start + 1 : stop + 1] = n_values + np.cumsum(lengths)
        for part, values in ((indices, block_indices), (data, block_data)):
            part.resize((end,))
            part[n_values:end] = values
        writer.check()
        start, n_values = stop, end
        bar.update(len(lengths))
    counts.create_dataset("indptr", data=indptr)


def _in_order(pool: ThreadPoolExecutor, draws: Draws) -> Iterator[Block]:
    """Results in order, drawn a bounded number of blocks ahead."""
    ahead: deque[Future[Block]] = deque()
    try:
        for start in range(0, len(draws.obs), draws.block_rows):
            ahead.append(pool.submit(draws.block, start))
            if len(ahead) == _BLOCKS_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
