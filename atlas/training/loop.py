"""A training in its run folder, from where it stands to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from atlas.config import TrainConfig
from atlas.errors import ConfigError
from atlas.models import SCANVI
from atlas.models.base import Model
from atlas.training.alternation import Alternation
from atlas.training.checkpoint import load_checkpoint
from atlas.training.environment import (
    check_environment,
    check_precision,
    resolve_device,
    torch_threads,
)
from atlas.training.history import History, write_log
from atlas.training.inputs import CellColumns, InputsBuilder
from atlas.training.loading import Ranges, n_rows, training_loader
from atlas.training.progress import ProgressLine
from atlas.training.ranks import Ranks
from atlas.training.run import check_same_run, identity, open_run
from atlas.training.state import TrainingState
from atlas.training.trainer import Penalty, Trainer
from loaders import SequentialLoader
from loaders.source import RowSource


def fit(
    model: Model,
    source: RowSource,
    *,
    train_rows: Ranges,
    validation_rows: Ranges,
    presence: npt.NDArray[np.bool_] | None,
    config: TrainConfig,
    out: Path,
    resume: bool,
    describe: Mapping[str, Any],
    progress: bool = True,
    reading: Callable[[RowSource], RowSource] | None = None,
    columns: CellColumns | None = None,
    penalty: Penalty | None = None,
    ranks: Ranks | None = None,
) -> History:
    """Train a model, with a log and checkpoints in a run folder.

    The model is trained in place. It ends with the average of its weights over the last steps, of
    the best epoch with early stopping.
    A run that was stopped in any way, ``kill -9`` included, and is resumed gives the same weights
    as one that was not, bit for bit on the same processor, versions and number of threads.

    Parameters
    ----------
    model
        With its initial weights; moved to the device of ``config``.
    source
        Rows, whose columns are the model's genes; ``obs_codes`` has "batch" and, where a study
        lacks a gene, "study".
    train_rows, validation_rows
        Sorted, disjoint ranges (start, stop) of source rows. No validation where the latter has
        no rows.
    presence
        Which study measured which gene: bool, (n_studies, n_genes); None where all did.
    config
        How to train.
    out
        The run folder: ``log.jsonl`` and ``checkpoints/``.
    resume
        Go on with the run in ``out``; without one there, start it.
    describe
        What identifies the run besides ``config``, as plain JSON: the model's configuration,
        genes, batches. Kept in each checkpoint; a resume with another is refused.
    progress
        Show a line of progress on stderr.
    reading
        Gives what to read in place of ``source``: the same rows under the same fingerprint. Called
        when the run folder is held, and only if there is something left to train.
    columns
        What the model is told of each row besides counts and batch.
    penalty
        What to add to the objective of each training step; ``describe`` is to identify it.
    ranks
        The processes that train together, each of which calls this with the same arguments; this
        one alone when None. The first writes.

    Returns
    -------
    History
        One record an epoch, those before a resume included.

    Raises
    ------
    CheckpointError
        ``out`` holds another run, or one and ``resume`` is False; or it cannot be read or written.
    ConfigError
        Early stopping without validation rows, no training rows, or a device that is not there.
    TrainingError
        A loss or weight is not finite, or another rank is gone; the checkpoint before it stays.
    KeyboardInterrupt
        On Ctrl-C, after the step in progress and a checkpoint.
    """
    validates = n_rows(validation_rows) > 0
    if config.early_stopping and not validates:
        raise ConfigError(
            "Early stopping needs cells that are held out",
            found=f"validation_share {config.validation_share}",
            do="raise --validation-share, or train without --early-stopping",
        )
    device = resolve_device(config.device)
    check_precision(config.precision, device)
    columns = CellColumns() if columns is None else columns
    ranks = Ranks() if ranks is None else ranks
    loader = training_loader(model, source, train_rows, config, device, columns, ranks)
    described = {**describe, "columns": columns.digests()}
    run = identity(config, source, train_rows, validation_rows, presence, described)
    held = open_run(out, resume=resume) if ranks.first else nullcontext()
    with ranks.sharing(model), held:
        ranks.wait()
        found = load_checkpoint(out)
        recorded_threads = None
        if found is not None:
            check_same_run(found.run, run, out)
            check_environment(found.environment, device, out, ranks.world_size)
            if found.environment.ranks == ranks.world_size:
                recorded_threads = found.environment.threads
        if reading is not None and (found is None or not found.progress.finished):
            source = reading(source)
            loader = training_loader(model, source, train_rows, config, device, columns, ranks)
        n_values = -(-config.minibatch_size // ranks.world_size) * model.n_genes
        with torch_threads(config.threads, recorded_threads, out, n_values):
            state = TrainingState.start(model, loader, config, device, shared=not ranks.alone)
            if found is not None:
                state.restore(found, out)
                if ranks.first:
                    write_log(out, state.history)
            validation = None
            if validates:
                validation = SequentialLoader(
                    source,
                    config.minibatch_size,
                    rows=validation_rows,
                    narrow=device.type == "cuda",
                )
            sparse = model.takes_sparse and device.type == "cpu"
            to_inputs = InputsBuilder(device, presence, columns, sparse)
            alternation = None
            if isinstance(model, SCANVI) and model.config.training == "alternating":
                alternation = Alternation(model, source, train_rows, to_inputs, columns, config)
            trainer = Trainer(
                state, validation, to_inputs, config, alternation, penalty, ranks, run, out
            )
            epoch_cells = n_rows(train_rows)
            done = epoch_cells * len(state.history.records) + state.epoch_cells
            show = progress and ranks.first
            with ProgressLine(config.max_epochs, epoch_cells, done, show=show) as line:
                trainer.run(line)
            if config.profile and ranks.first:
                trainer.clock.times.write(out, show=progress)
            model.load_state_dict(state.final_weights() if state.best is None else state.best)
            if alternation is not None:
                # The classifier was trained on the last encoder, not on the average that is kept.
                alternation.run(0)
    return state.history
