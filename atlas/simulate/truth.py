"""What simulated counts are drawn from, whatever the process."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from atlas.simulate.tree import Tree

N_LATENT = 10
STATES_PER_TYPE = 16
_VARYING_OF_TYPES = 0.2
# SymSim's tutorial has 12 factors that vary along the tree, each of which acts on a gene with
# probability .3 (n_de_evf, gene_effect_prob): on all genes but .7¹², 1.4 %.
_VARYING_OF_TREE = 0.98
_TYPE_SHARE_RATIO = 0.75  # of one type's share to that of the type before it


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What the counts were drawn from; ``batches`` are those of all studies.

    States are 16 of each type; on a tree a type is a branch, with 32 states along it.

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
        float64, (n_genes,): of the zero-inflated negative binomial, NaN for another process.
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


def draw_truth(
    studies: int = 3,
    seed: int = 0,
    *,
    genes: int = 2000,
    types: int = 8,
    batches: int = 2,
    library: float = 2000.0,
    missing_genes: float = 0.0,
    varying_genes: float | None = None,
    tree: Tree | None = None,
    zinb: bool = True,
    new_type: bool = False,
) -> Truth:
    """Draw the truth alone; arguments as of :func:`atlas.simulate.simulate`.

    With a tree its branches take the place of the types, and its states that of theirs; without
    ``zinb`` the parameters of that distribution are NaN.
    """
    rng = np.random.default_rng([seed, 0])
    baseline = rng.normal(0.0, 2.2, genes)
    if varying_genes is None:
        varying_genes = _VARYING_OF_TYPES if tree is None else _VARYING_OF_TREE
    loaded = rng.random(genes) < varying_genes
    loadings = loaded[:, None] * rng.normal(0.0, 1.0 / np.sqrt(N_LATENT), (genes, N_LATENT))
    if tree is None:
        names = [f"type_{t + 1}" for t in range(types)]
        latent = _latent_of_types(rng, types)
        state_type = np.repeat(np.arange(types), STATES_PER_TYPE)
    else:
        names, latent, state_type = tree.branches.tolist(), tree.state_latent, tree.state_branch
        types = len(names)
    # Capped, so that no gene takes a large part of a cell.
    logits = np.minimum(baseline + latent @ loadings.T, 5.5)
    rho = np.exp(logits - logits.max(axis=1, keepdims=True))
    rho /= rho.sum(axis=1, keepdims=True)

    n_batches = studies * batches
    study_effect = np.repeat(rng.normal(0.0, 0.3, (studies, genes)), batches, axis=0)
    batch_effect = study_effect + rng.normal(0.0, 0.15, (n_batches, genes))
    location = np.log(library) + rng.normal(0.0, 0.2, n_batches)
    if tree is None:
        share = _shares_of_types(rng, studies, types)
        if new_type:
            lacking = int(np.flatnonzero(share[-1] == 0)[0])
            middle = types // 2
            share[:-1, middle if middle != lacking else middle + 1] = 0
    else:
        share = np.tile(tree.length[1:], (studies, 1))
    # Bounded, so that the probability of zero stays far from underflow.
    inverse_dispersion = np.clip(rng.lognormal(np.log(2.0), 0.6, genes), 0.1, 50.0)
    dropout_logit = rng.normal(-3.0, 0.7, genes)
    measured = np.ones((studies, genes), dtype=np.bool_)
    measured[-1, rng.permutation(genes)[: round(missing_genes * genes)]] = False
    return Truth(
        genes=np.array([f"gene_{g + 1:05d}" for g in range(genes)]),
        gene_ids=np.array([f"ENSG9{g + 1:010d}" for g in range(genes)]),
        types=np.array(names),
        batches=np.array(
            [f"study_{s + 1}/batch_{b + 1}" for s in range(studies) for b in range(batches)]
        ),
        batch_study=np.repeat(np.arange(studies), batches),
        state_type=state_type,
        state_latent=latent,
        rho=rho.astype(np.float32),
        type_rho=rho.reshape(types, -1, genes).mean(axis=1).astype(np.float32),
        batch_effect=batch_effect.astype(np.float32),
        log_library_location=location,
        inverse_dispersion=inverse_dispersion if zinb else np.full(genes, np.nan),
        dropout_logit=dropout_logit if zinb else np.full(genes, np.nan),
        type_share=share / share.sum(axis=1, keepdims=True),
        measured=measured,
    )


def _latent_of_types(rng: np.random.Generator, types: int) -> npt.NDArray[np.float32]:
    """Points on a line for each type: float32, (types × 16, 10)."""
    centres = rng.normal(0.0, 1.0, (types, 1, N_LATENT))
    directions = rng.normal(0.0, 0.4, (types, 1, N_LATENT))
    along = np.linspace(-1.0, 1.0, STATES_PER_TYPE)[:, None]
    latent: npt.NDArray[np.float64] = centres + along * directions
    return latent.reshape(-1, N_LATENT).astype(np.float32)


def _shares_of_types(rng: np.random.Generator, studies: int, types: int) -> npt.NDArray[np.float64]:
    """Weight of each type in each study: float64, (studies, types)."""
    share = _TYPE_SHARE_RATIO ** np.arange(types) * rng.lognormal(0.0, 0.3, (studies, types))
    if studies > 1 and types > 1:
        # From the rarest on; every type is left in all studies but one when types ≥ studies.
        share[np.arange(studies), types - 1 - np.arange(studies) % types] = 0
    return share
