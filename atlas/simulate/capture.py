"""Counts outside the ZINB family: transcription in bursts, capture, PCR, sequencing.

The steps of SymSim (Zhang et al. 2019, Methods), each drawn:

1. A gene switches on and off; the share of the time that it is on is Beta(k_on, k_off). Given the
   share p, the transcripts of the gene are Poisson with mean ``s × p``, ``s`` such that the mean is
   ``transcripts × rho``: variance ``μ + μ² k_off / (k_on (k_on + k_off + 1))``, often with two
   modes.
2. Each transcript is captured with the cell's efficiency.
3. In each round of PCR each copy is doubled with the gene's rate. A new copy is faulty with a small
   probability: its UMI has become another one, and so are its descendants'.
4. Sequencing draws reads from all copies; the cell's expected number is its depth. With UMIs a copy
   gives one kind of fragment, and the count is the number of different UMIs read. Without, a copy
   gives fragments in proportion to the gene's length, and the count is the number of reads.

Two UMIs are never the same by chance, and errors of sequencing are left out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]

_MANY = 256
"""Copies from which on the binomial number of new ones is drawn as a rounded normal."""


@dataclass(frozen=True, slots=True)
class Capture:
    """Settings of capture, PCR and sequencing.

    Attributes
    ----------
    efficiency
        Share of a cell's transcripts that are captured, in the middle; in (0, 1].
    efficiency_spread
        Standard deviation of its logarithm between the cells of a batch.
    rounds
        Of PCR, 0 to 24.
    rate
        Share of the copies that a round doubles, of a gene in the middle; in (0, 1].
    rate_spread
        Standard deviation between genes; rates stay in [0.2, 1], or at ``rate`` without spread.
    error
        Probability that a new copy is faulty; 0 to 0.01.
    depth
        Reads of a cell, in the middle, per transcript that a cell in the middle captures.
    """

    efficiency: float = 0.1
    efficiency_spread: float = 0.3
    rounds: int = 16
    rate: float = 0.7
    rate_spread: float = 0.05
    error: float = 1e-4
    depth: float = 5.0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("efficiency", 0 < self.efficiency <= 1, "in (0, 1]"),
            ("efficiency_spread", 0 <= self.efficiency_spread <= 2, "in [0, 2]"),
            ("rounds", 0 <= self.rounds <= 24, "in [0, 24]"),
            ("rate", 0 < self.rate <= 1, "in (0, 1]"),
            ("rate_spread", 0 <= self.rate_spread <= 1, "in [0, 1]"),
            ("error", 0 <= self.error <= 0.01, "in [0, 0.01]"),
            ("depth", 0 < self.depth < np.inf, "above 0"),
        ):
            if not good:
                raise ConfigError(
                    f"{name} of the capture is out of range",
                    found=getattr(self, name),
                    expected=expected,
                )


@dataclass(frozen=True, slots=True, eq=False)
class CaptureGenes:
    """Of each gene, float64 (n_genes,) each.

    Attributes
    ----------
    k_on, k_off
        Rates of switching on and off, in lifetimes of a transcript.
    rate
        Share of the copies that a round of PCR doubles.
    length
        Of the transcript, bases; used without UMIs only.
    """

    k_on: Floats
    k_off: Floats
    rate: Floats
    length: Floats

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed ``.npz`` without pickles."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The inverse of :meth:`save`."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def draw_capture_genes(n_genes: int, capture: Capture, seed: int) -> CaptureGenes:
    """Draw what differs from gene to gene."""
    rng = np.random.default_rng([seed, 3])
    rate = rng.normal(capture.rate, capture.rate_spread, n_genes)
    return CaptureGenes(
        # On for a half to a few lifetimes of a transcript: bursts, for many genes with two modes.
        k_on=np.clip(rng.lognormal(0.0, 0.7, n_genes), 0.1, 10.0),
        k_off=np.clip(rng.lognormal(0.5, 0.7, n_genes), 0.1, 10.0),
        rate=np.clip(rate, min(0.2, capture.rate), 1.0),
        length=np.clip(rng.lognormal(np.log(2000.0), 0.6, n_genes), 200.0, 20_000.0),
    )


def draw_transcripts(rng: np.random.Generator, mean: Floats, genes: CaptureGenes) -> Integers:
    """Transcripts of cells: int64, as ``mean``, (n_cells, n_genes)."""
    on = rng.beta(genes.k_on, genes.k_off, mean.shape)
    return rng.poisson(mean * on * (1 + genes.k_off / genes.k_on))


def amplify(
    rng: np.random.Generator, rate: Floats, rounds: int, error: float
) -> tuple[Integers, Integers]:
    """PCR of single molecules.

    Parameters
    ----------
    rng
        Draws.
    rate
        float64, (n_molecules,): share of the copies of each that a round doubles.
    rounds
        How many.
    error
        Probability that a new copy is faulty.

    Returns
    -------
    copies
        int64, (n_families,): copies with one UMI; the molecules first, then faulty ones.
    origin
        int64, (n_families,): the molecule that each family comes from.
    """
    copies = np.ones(len(rate), np.int64)
    origin = np.arange(len(rate))
    for _ in range(rounds):
        doubled = rate[origin]
        new = np.empty_like(copies)
        many = copies >= _MANY
        new[~many] = rng.binomial(copies[~many], doubled[~many])
        n, p = copies[many], doubled[many]
        normal = np.rint(rng.normal(n * p, np.sqrt(n * p * (1 - p)))).astype(np.int64)
        new[many] = np.clip(normal, 0, n)
        ends = np.cumsum(new)
        n_faulty = int(rng.binomial(ends[-1], error)) if len(ends) and error else 0
        # which of all new copies: a family has as many chances as it has new copies
        drawn = rng.choice(ends[-1], n_faulty, replace=False) if n_faulty else np.empty(0, np.int64)
        faulty = np.searchsorted(ends, drawn, side="right")
        copies = copies + new - np.bincount(faulty, minlength=len(copies))
        copies = np.concatenate([copies, np.ones(n_faulty, np.int64)])
        origin = np.concatenate([origin, origin[faulty]])
    return copies, origin


def draw_reads(
    rng: np.random.Generator,
    transcripts: Integers,
    efficiency: Floats,
    depth: Floats,
    genes: CaptureGenes,
    capture: Capture,
    umi: bool,
) -> tuple[Integers, npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Capture, amplify and sequence cells.

    Parameters
    ----------
    rng
        Draws.
    transcripts
        int64, (n_cells, n_genes).
    efficiency, depth
        float64, (n_cells,): share captured, and expected reads.
    genes, capture
        What the draws follow.
    umi
        Count UMIs, or reads.

    Returns
    -------
    lengths, indices, data
        Of the counts in CSR form: values of each cell, their genes in order, and counts.
    """
    n_cells, n_genes = transcripts.shape
    captured = rng.binomial(transcripts, efficiency[:, None]).ravel()
    place = np.repeat(np.arange(captured.size), captured)  # cell × gene of each molecule
    copies, origin = amplify(rng, genes.rate[place % n_genes], capture.rounds, capture.error)
    place = place[origin]
    weight = copies.astype(np.float64)
    if not umi:
        weight *= genes.length[place % n_genes]
    cell = place // n_genes
    total = np.bincount(cell, weight, n_cells)
    # Poisson and independent: a multinomial whose number of reads is Poisson
    reads = rng.poisson(depth[cell] * weight / total[cell])
    counted = np.minimum(reads, 1) if umi else reads
    counts = np.bincount(place, counted, captured.size).reshape(n_cells, n_genes)
    rows, columns = np.nonzero(counts)
    return (
        np.bincount(rows, minlength=n_cells),
        columns.astype(np.int32),
        counts[rows, columns].astype(np.float32),
    )
