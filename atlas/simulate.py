"""Counts of several studies with known truth, as h5ad files, for the demo, tests and benchmarks.

The truth, in the order in which it is drawn:

1. A cell type is a curve in a latent space of 10 dimensions, a centre and a direction; a *state* is
   one of 16 points spread evenly along it. A cell is in one state of its type, each as likely.
2. Gene g has log expression ``min(baseline_g + loadings_g · z, 5.5)``. One gene in five has
   loadings. The softmax over all genes is the state's ``rho``.
3. A batch multiplies rho by a log-normal factor per gene (the study's times the batch's own) and
   rho is normalised again. A cell's library is log-normal around its batch's location.
4. The count of gene g is zero with probability ``1 / (1 + exp(-dropout_logit_g))`` and otherwise
   negative binomial with mean ``library × rho_g`` and inverse dispersion ``theta_g``: variance
   ``μ + μ² / theta_g``.

Types have unequal shares, which vary a little from study to study, and where there are several
studies and types each study lacks one type. A gene that a study has not measured is absent from its
file; the other counts are what they would have been, the library still sums over all genes.

Each cell draws from a counter-based generator of its own, so that the files depend on the arguments
and not on the number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.io import write_elem
from dask.system import CPU_COUNT
from tqdm import tqdm

from atlas.errors import AtlasError, ConfigError
from atlas.hdf5 import Hdf5Writer, create_hdf5
from atlas.zinb_draws import draw_counts

Array: TypeAlias = npt.NDArray[Any]

TRUTH_FILE = "truth.npz"
N_LATENT = 10
STATES_PER_TYPE = 16
UNLABELED = "Unknown"

_UNLABELED_SHARE = 0.1
_BLOCK_ROWS = 512
_BLOCKS_AHEAD = 32  # of the writer: some 8 MB each, as a rule
_CHUNK = 2**16
_TYPE_SHARE_RATIO = 0.75  # of one type's share to that of the type before it


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What the counts were drawn from; ``states`` are ``types × 16``, ``batches`` of all studies.

    Attributes
    ----------
    genes, gene_ids
        str, (n_genes,).
    types
        str, (n_types,).
    batches
        str, (n_batches,): ``study/batch``.
    batch_study
        int64, (n_batches,): study of each batch.
    state_type
        int64, (n_states,): type of each state.
    state_latent
        float32, (n_states, 10).
    rho
        float32, (n_states, n_genes): expression as a share of all genes, before batch effects.
    type_rho
        float32, (n_types, n_genes): mean of rho over the type's states.
    batch_effect
        float32, (n_batches, n_genes): natural logarithm of the factor on rho.
    log_library_location
        float64, (n_batches,): mean of the cells' natural log library.
    inverse_dispersion, dropout_logit
        float64, (n_genes,).
    type_share
        float64, (n_studies, n_types): probability of each type; 0 where the study lacks it.
    measured
        bool, (n_studies, n_genes).
    """

    genes: npt.NDArray[np.str_]
    gene_ids: npt.NDArray[np.str_]
    types: npt.NDArray[np.str_]
    batches: npt.NDArray[np.str_]
    batch_study: npt.NDArray[np.int64]
    state_type: npt.NDArray[np.int64]
    state_latent: npt.NDArray[np.float32]
    rho: npt.NDArray[np.float32]
    type_rho: npt.NDArray[np.float32]
    batch_effect: npt.NDArray[np.float32]
    log_library_location: npt.NDArray[np.float64]
    inverse_dispersion: npt.NDArray[np.float64]
    dropout_logit: npt.NDArray[np.float64]
    type_share: npt.NDArray[np.float64]
    measured: npt.NDArray[np.bool_]

    def batch_rho(self, batch: int) -> npt.NDArray[np.float32]:
        """Rho with the effect of one batch, normalised: float32, (n_states, n_genes)."""
        shifted = self.rho * np.exp(self.batch_effect[batch])
        normalized: npt.NDArray[np.float32] = shifted / shifted.sum(axis=1, keepdims=True)
        return normalized

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed ``.npz`` without pickles."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The inverse of :meth:`save`."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


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
    threads: int | None = None,
    progress: bool = True,
) -> list[Path]:
    """Write ``study_1.h5ad`` … and the :class:`Truth` (``truth.npz``) into ``out_dir``.

    ``X`` holds raw counts in CSR form; ``obs`` has ``batch``, ``cell_type`` (a tenth of the cells
    ``Unknown``), ``true_type``, ``state`` and ``log_library`` (natural logarithm of the expected
    total over all genes, without dropout); ``var`` is indexed by gene name and has ``gene_id``;
    ``obsm["X_true_latent"]`` is the state's latent.

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
    for name, value, good, expected in (
        ("studies", studies, studies >= 1, "at least 1"),
        ("cells", cells, cells >= studies, "at least 1 per study"),
        ("seed", seed, 0 <= seed < 2**63, "in [0, 2^63)"),
        ("genes", genes, genes >= 1, "at least 1"),
        ("types", types, types >= 1, "at least 1"),
        ("batches", batches, batches >= 1, "at least 1"),
        ("library", library, 1 <= library <= 1e6, "in [1, 1e6]"),
        ("missing_genes", missing_genes, 0 <= missing_genes < 1, "in [0, 1)"),
        ("threads", threads, threads is None or threads >= 1, "at least 1"),
    ):
        if not good:
            raise ConfigError(f"{name} is out of range", found=value, expected=expected)
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            "the output folder is not empty" if out.is_dir() else "the output is not a folder",
            expected="a new or empty folder",
            do="choose another one, or remove what is there",
            path=out,
        )
    truth = draw_truth(
        studies, seed, genes=genes, types=types, batches=batches, library=library,
        missing_genes=missing_genes,
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
                    _write_study(writer, truth, study, int(n_obs), seed, pool, bar)
                written.append(partial.rename(out / f"study_{study + 1}.h5ad"))
        # Last, so that a folder with a truth is a whole one.
        truth.save(partial)
        partial.rename(out / TRUTH_FILE)
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
    return written


def draw_truth(
    studies: int = 3,
    seed: int = 0,
    *,
    genes: int = 2000,
    types: int = 8,
    batches: int = 2,
    library: float = 2000.0,
    missing_genes: float = 0.0,
) -> Truth:
    """Draw the truth alone; arguments as of :func:`simulate`."""
    rng = np.random.default_rng([seed, 0])
    baseline = rng.normal(0.0, 2.2, genes)
    loaded = rng.random(genes) < 0.2
    loadings = loaded[:, None] * rng.normal(0.0, 1.0 / np.sqrt(N_LATENT), (genes, N_LATENT))
    centres = rng.normal(0.0, 1.0, (types, 1, N_LATENT))
    directions = rng.normal(0.0, 0.4, (types, 1, N_LATENT))
    along = np.linspace(-1.0, 1.0, STATES_PER_TYPE)[:, None]
    latent = (centres + along * directions).reshape(-1, N_LATENT).astype(np.float32)
    # Capped, so that no gene takes a large part of a cell.
    logits = np.minimum(baseline + latent @ loadings.T, 5.5)
    rho = np.exp(logits - logits.max(axis=1, keepdims=True))
    rho /= rho.sum(axis=1, keepdims=True)

    n_batches = studies * batches
    study_effect = np.repeat(rng.normal(0.0, 0.3, (studies, genes)), batches, axis=0)
    batch_effect = study_effect + rng.normal(0.0, 0.15, (n_batches, genes))
    location = np.log(library) + rng.normal(0.0, 0.2, n_batches)
    share = _TYPE_SHARE_RATIO ** np.arange(types) * rng.lognormal(0.0, 0.3, (studies, types))
    if studies > 1 and types > 1:
        # From the rarest on; every type is left in all studies but one when types ≥ studies.
        share[np.arange(studies), types - 1 - np.arange(studies) % types] = 0
    # Bounded, so that the probability of zero stays far from underflow.
    inverse_dispersion = np.clip(rng.lognormal(np.log(2.0), 0.6, genes), 0.1, 50.0)
    dropout_logit = rng.normal(-3.0, 0.7, genes)
    measured = np.ones((studies, genes), dtype=np.bool_)
    measured[-1, rng.permutation(genes)[: round(missing_genes * genes)]] = False
    return Truth(
        genes=np.array([f"gene_{g + 1:05d}" for g in range(genes)]),
        gene_ids=np.array([f"ENSG9{g + 1:010d}" for g in range(genes)]),
        types=np.array([f"type_{t + 1}" for t in range(types)]),
        batches=np.array(
            [f"study_{s + 1}/batch_{b + 1}" for s in range(studies) for b in range(batches)]
        ),
        batch_study=np.repeat(np.arange(studies), batches),
        state_type=np.repeat(np.arange(types), STATES_PER_TYPE),
        state_latent=latent,
        rho=rho.astype(np.float32),
        type_rho=rho.reshape(types, STATES_PER_TYPE, genes).mean(axis=1).astype(np.float32),
        batch_effect=batch_effect.astype(np.float32),
        log_library_location=location,
        inverse_dispersion=inverse_dispersion,
        dropout_logit=dropout_logit,
        type_share=share / share.sum(axis=1, keepdims=True),
        measured=measured,
    )


def _write_study(
    writer: Hdf5Writer,
    truth: Truth,
    study: int,
    n_obs: int,
    seed: int,
    pool: ThreadPoolExecutor,
    bar: tqdm[Any],
) -> None:
    """One study in anndata's format, its counts block by block."""
    file = writer.file
    rng = np.random.default_rng([seed, 1, study])
    own_batches = np.flatnonzero(truth.batch_study == study)
    batch = rng.integers(0, len(own_batches), n_obs)
    cell_type = rng.choice(len(truth.types), n_obs, p=truth.type_share[study])
    state = cell_type * STATES_PER_TYPE + rng.integers(0, STATES_PER_TYPE, n_obs)
    log_library = rng.normal(truth.log_library_location[own_batches][batch], 0.4)
    label = np.where(rng.random(n_obs) < _UNLABELED_SHARE, len(truth.types), cell_type)
    names = np.array([f"study_{study + 1}-cell_{i + 1:07d}" for i in range(n_obs)], dtype=object)
    batch_names = [name.partition("/")[2] for name in truth.batches[own_batches]]
    measured = np.flatnonzero(truth.measured[study])

    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    obs = {
        "batch": _categorical(batch, batch_names),
        "cell_type": _categorical(label, [*truth.types.tolist(), UNLABELED]),
        "true_type": _categorical(cell_type, truth.types.tolist()),
        "state": state.astype(np.int32),
        "log_library": log_library,
    }
    write_elem(file, "obs", pd.DataFrame(obs, index=names))
    var = pd.DataFrame(
        {"gene_id": truth.gene_ids[measured].astype(object)},
        index=truth.genes[measured].astype(object),
    )
    write_elem(file, "var", var)
    write_elem(file, "obsm", {"X_true_latent": truth.state_latent[state]})
    write_elem(file, "uns", {"simulation": {"seed": seed, "study": study, "truth": TRUTH_FILE}})
    for empty in ("layers", "obsp", "varm", "varp"):
        write_elem(file, empty, {})

    counts = file.create_group("X")
    counts.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    counts.attrs["shape"] = np.array([n_obs, len(measured)])
    # Shuffle and the lightest gzip: a fifth of the size, faster than the draws, read everywhere.
    options = {
        "maxshape": (None,), "chunks": (_CHUNK,), "compression": "gzip", "compression_opts": 1,
        "shuffle": True,
    }  # fmt: skip
    indices = counts.create_dataset("indices", shape=(0,), dtype=np.int32, **options)
    data = counts.create_dataset("data", shape=(0,), dtype=np.float32, **options)
    indptr = np.zeros(n_obs + 1, dtype=np.int64)

    kept = 1 / (1 + np.exp(truth.dropout_logit[measured]))
    theta = truth.inverse_dispersion[measured]
    tables = np.stack([truth.batch_rho(int(b))[:, measured] for b in own_batches])
    key = np.random.SeedSequence([seed, 2, study]).generate_state(1, np.uint64)[0]

    def draw(start: int) -> tuple[Array, Array, Array]:
        rows = slice(start, start + _BLOCK_ROWS)
        library = np.exp(log_library[rows])
        block: tuple[Array, Array, Array] = draw_counts(
            key, start, library, batch[rows], state[rows], tables, kept, theta, measured
        )
        return block

    start, n_values = 0, 0
    for lengths, block_indices, block_data in _in_order(pool, draw, range(0, n_obs, _BLOCK_ROWS)):
        stop, end = start + len(lengths), n_values + len(block_data)
        indptr[start + 1 : stop + 1] = n_values + np.cumsum(lengths)
        for part, values in ((indices, block_indices), (data, block_data)):
            part.resize((end,))
            part[n_values:end] = values
        writer.check()
        start, n_values = stop, end
        bar.update(len(lengths))
    counts.create_dataset("indptr", data=indptr)


def _categorical(codes: npt.NDArray[np.int64], names: list[str]) -> pd.Categorical[str]:
    """Of the names that occur."""
    used, codes = np.unique(codes, return_inverse=True)
    return pd.Categorical.from_codes(codes, pd.Index([names[i] for i in used]))


def _in_order(
    pool: ThreadPoolExecutor, draw: Any, starts: range
) -> Iterator[tuple[Array, Array, Array]]:
    """Results in order, drawn a bounded number of blocks ahead."""
    ahead: deque[Future[tuple[Array, Array, Array]]] = deque()
    try:
        for start in starts:
            ahead.append(pool.submit(draw, start))
            if len(ahead) == _BLOCKS_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
