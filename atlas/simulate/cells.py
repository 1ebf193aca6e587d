"""The cells of one study: what each is, and its counts block by block, by the process asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.simulate.capture import (
    Capture,
    CaptureGenes,
    draw_capture_genes,
    draw_reads,
    draw_transcripts,
)
from atlas.simulate.tree import Tree, draw_tree
from atlas.simulate.truth import N_LATENT, Truth, draw_truth
from atlas.simulate.zinb import draw_counts

Process: TypeAlias = Literal["zinb", "umi", "reads"]
Block: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""Values of each row, then columns and counts of all rows."""

UNLABELED = "Unknown"
_UNLABELED_SHARE = 0.1
_BLOCK_ROWS = 512
_CAPTURE_BLOCK_ROWS = 64
"""Of a process with capture, which holds a number for each cell and gene."""


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """One study: what is written of its cells, and how their counts are drawn.

    Attributes
    ----------
    obs, var
        The tables.
    latent
        float32, (n_obs, 10).
    settings
        Plain values, for ``uns``.
    block_rows
        Cells that are drawn in one go; the counts depend on it where the process has capture.
    block
        Draws the counts of the cells from a multiple of ``block_rows`` on, over ``var``; safe to
        call from several threads.
    """

    obs: pd.DataFrame
    var: pd.DataFrame
    latent: npt.NDArray[np.float32]
    settings: dict[str, Any]
    block_rows: int
    block: Callable[[int], Block]


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """Everything that is drawn once for all studies.

    Attributes
    ----------
    seed, library, process
        As asked for.
    truth, tree, capture_genes
        As drawn; None for what is not used.
    capture
        Settings of a process with capture.
    """

    seed: int
    library: float
    process: Process
    truth: Truth
    tree: Tree | None
    capture: Capture
    capture_genes: CaptureGenes | None

    @classmethod
    def draw(
        cls,
        studies: int,
        seed: int,
        *,
        genes: int,
        types: int,
        batches: int,
        library: float,
        missing_genes: float,
        varying_genes: float | None,
        process: Process,
        capture: Capture | None,
        tree: bool,
        new_type: bool = False,
    ) -> Self:
        """Arguments as of :func:`atlas.simulate.simulate`."""
        drawn = draw_tree(types, seed, N_LATENT) if tree else None
        truth = draw_truth(
            studies, seed, genes=genes, types=types, batches=batches, library=library,
            missing_genes=missing_genes, varying_genes=varying_genes, tree=drawn,
            zinb=process == "zinb", new_type=new_type,
        )  # fmt: skip
        settings = capture or Capture()
        capture_genes = None if process == "zinb" else draw_capture_genes(genes, settings, seed)
        return cls(seed, library, process, truth, drawn, settings, capture_genes)

    def study(self, study: int, n_obs: int) -> Draws:
        """Draw the cells of a study, and prepare the draws of their counts."""
        truth, tree = self.truth, self.tree
        rng = np.random.default_rng([self.seed, 1, study])
        own_batches = np.flatnonzero(truth.batch_study == study)
        batch = rng.integers(0, len(own_batches), n_obs)
        cell_type = rng.choice(len(truth.types), n_obs, p=truth.type_share[study])
        n_states = len(truth.state_type) // len(truth.types)
        state = cell_type * n_states + rng.integers(0, n_states, n_obs)
        log_library = rng.normal(truth.log_library_location[own_batches][batch], 0.4)
        measured = np.flatnonzero(truth.measured[study])
        batch_names = [name.partition("/")[2] for name in truth.batches[own_batches]]
        obs: dict[str, Any] = {"batch": _categorical(batch, batch_names)}
        if tree is None:
            names = [*truth.types.tolist(), UNLABELED]
            unlabeled = rng.random(n_obs) < _UNLABELED_SHARE
            obs["cell_type"] = _categorical(np.where(unlabeled, len(names) - 1, cell_type), names)
            obs["true_type"] = _categorical(cell_type, truth.types.tolist())
        else:
            names = [*tree.ends.tolist(), UNLABELED]
            end = tree.state_end[state]
            obs["cell_type"] = _categorical(np.where(end < 0, len(names) - 1, end), names)
            obs["branch"] = _categorical(cell_type, truth.types.tolist())
            obs["depth_in_tree"] = tree.state_depth[state]
            for column, name in enumerate(tree.ends.tolist()):
                obs[f"distance_{name}"] = tree.state_distance[state, column]
        obs["state"] = state.astype(np.int32)
        tables = np.stack([truth.batch_rho(int(b)) for b in own_batches])
        if self.capture_genes is None:
            obs["log_library"] = log_library
            block_rows = _BLOCK_ROWS
            block = self._zinb(study, log_library, batch, state, tables[:, :, measured], measured)
        else:
            block_rows = _CAPTURE_BLOCK_ROWS
            block = self._captured(
                study, obs, log_library, own_batches[batch], batch, state, tables, measured
            )
        settings: dict[str, Any] = {"seed": self.seed, "study": study, "process": self.process}
        if self.capture_genes is not None:
            settings["capture"] = asdict(self.capture)
        index = [f"study_{study + 1}-cell_{i + 1:07d}" for i in range(n_obs)]
        return Draws(
            obs=pd.DataFrame(obs, index=np.array(index, dtype=object)),
            var=pd.DataFrame(
                {"gene_id": truth.gene_ids[measured].astype(object)},
                index=truth.genes[measured].astype(object),
            ),
            latent=truth.state_latent[state],
            settings=settings,
            block_rows=block_rows,
            block=block,
        )

    def _zinb(
        self,
        study: int,
        log_library: npt.NDArray[np.float64],
        batch: npt.NDArray[np.int64],
        state: npt.NDArray[np.int64],
        tables: npt.NDArray[np.float32],
        measured: npt.NDArray[np.int64],
    ) -> Callable[[int], Block]:
        tables = np.ascontiguousarray(tables)
        kept = 1 / (1 + np.exp(self.truth.dropout_logit[measured]))
        theta = self.truth.inverse_dispersion[measured]
        key = np.random.SeedSequence([self.seed, 2, study]).generate_state(1, np.uint64)[0]

        def block(start: int) -> Block:
            rows = slice(start, start + _BLOCK_ROWS)
            library = np.exp(log_library[rows])
            drawn: Block = draw_counts(
                key, start, library, batch[rows], state[rows], tables, kept, theta, measured
            )
            return drawn

        return block

    def _captured(
        self,
        study: int,
        obs: dict[str, Any],
        log_library: npt.NDArray[np.float64],
        all_batch: npt.NDArray[np.int64],
        batch: npt.NDArray[np.int64],
        state: npt.NDArray[np.int64],
        tables: npt.NDArray[np.float32],
        measured: npt.NDArray[np.int64],
    ) -> Callable[[int], Block]:
        """Draw what cells have, into ``obs``, and prepare the draws of their counts.

        The library that ZINB would have is what a cell has in transcripts: its batch's part of it
        is the batch's efficiency.
        """
        settings, genes = self.capture, self.capture_genes
        assert genes is not None
        rng = np.random.default_rng([self.seed, 6, study])
        location = self.truth.log_library_location[all_batch]
        spread = settings.efficiency_spread
        in_batch = settings.efficiency * np.exp(location - np.log(self.library))
        efficiency = np.minimum(1.0, in_batch * np.exp(rng.normal(0.0, spread, len(state))))
        transcripts = np.exp(log_library - location) * self.library / settings.efficiency
        depth = settings.depth * self.library * np.exp(rng.normal(0.0, 0.2, len(state)))
        expected = depth if self.process == "reads" else transcripts * efficiency
        obs |= {
            "log_library": np.log(expected),
            "transcripts": transcripts,
            "efficiency": efficiency,
            "depth": depth,
        }
        column_of = np.full(tables.shape[-1], -1, np.int32)
        column_of[measured] = np.arange(len(measured), dtype=np.int32)

        def block(start: int) -> Block:
            rows = slice(start, start + _CAPTURE_BLOCK_ROWS)
            rng = np.random.default_rng([self.seed, 7, study, start])
            mean = transcripts[rows, None] * tables[batch[rows], state[rows]]
            lengths, indices, data = draw_reads(
                rng, draw_transcripts(rng, mean, genes), efficiency[rows], depth[rows], genes,
                settings, self.process == "umi",
            )  # fmt: skip
            # What is not measured was drawn all the same: the other counts do not depend on it.
            columns = column_of[indices]
            kept = columns >= 0
            row = np.repeat(np.arange(len(lengths)), lengths)[kept]
            return np.bincount(row, minlength=len(lengths)), columns[kept], data[kept]

        return block


def _categorical(codes: npt.NDArray[np.int64], names: list[str]) -> pd.Categorical[str]:
    """Of the names that occur."""
    used, codes = np.unique(codes, return_inverse=True)
    return pd.Categorical.from_codes(codes, pd.Index([names[i] for i in used]))
