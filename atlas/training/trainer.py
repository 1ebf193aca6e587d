"""Epochs and steps of a training."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from atlas.config import TrainConfig
from atlas.errors import TrainingError
from atlas.models.base import Inputs, Losses, Model, evaluating
from atlas.models.noise import SharedGenerator
from atlas.training.adam import Stepper
from atlas.training.alternation import Alternation
from atlas.training.checkpoint import save_checkpoint
from atlas.training.clock import Clock
from atlas.training.environment import current_environment
from atlas.training.history import EpochRecord, write_log
from atlas.training.inputs import InputsBuilder
from atlas.training.progress import ProgressLine, deferred_interrupt
from atlas.training.ranks import Ranks, told_of_peers
from atlas.training.schedule import KlSchedule, epochs_without_improvement
from atlas.training.state import TrainingState, seeded
from atlas.training.writing import io_errors
from loaders import Minibatch, SequentialLoader

Penalty = Callable[[Model, Inputs], Tensor | None]
"""A scalar to add to the objective of a minibatch; None for nothing."""

_READ_SECONDS = 1.0
"""How often losses are read from the device, to show them and to see that they are finite."""

_ROWS = "not_finite.json"
"""Rows of the step whose loss was not finite, in the run folder."""

_ASKED_STEPS = 16
"""Steps after which ranks look whether one of them was asked to stop."""


class Trainer:
    """The loop over epochs and steps; all that must outlive a crash is in ``state``."""

    def __init__(
        self,
        state: TrainingState,
        validation: SequentialLoader | None,
        to_inputs: InputsBuilder,
        config: TrainConfig,
        alternation: Alternation | None,
        penalty: Penalty | None,
        ranks: Ranks,
        run: Mapping[str, Any],
        out: Path,
    ) -> None:
        self.alternation = alternation
        self.ranks = ranks
        self.penalty = penalty
        self.state = state
        self.validation = validation
        self.to_inputs = to_inputs
        self.config = config
        self.identity = run
        self.out = out
        self.device = state.sums.device
        self.environment = current_environment(self.device, ranks.world_size)
        self.stepper = Stepper(state.optimizer, state.average, state.model)
        self.trained = [p for p in state.model.parameters() if p.requires_grad]
        total_steps = config.max_epochs * state.loader.steps_per_epoch
        self.schedule = KlSchedule(total_steps, config.warmup_share)
        # Objectives of the steps since the device was last read: no step waits for it.
        self.unread: list[Tensor] = []
        self.clock = Clock(self.device, on=config.profile)
        self.interrupted: Callable[[], bool] = bool
        self.asked = state.sums.new_zeros(())
        self.ticked_at = self.read_at = self.saved_at = time.monotonic()

    def run(self, line: ProgressLine) -> None:
        """Train until there is nothing left to do."""
        state = self.state
        with deferred_interrupt() as self.interrupted:
            while not state.finished:
                self.ticked_at = time.monotonic()
                for minibatch in state.loader:
                    before = state.epoch_cells
                    self.step(minibatch)
                    line.advance(state.epoch_cells - before)
                    if self.ticked_at - self.read_at >= _READ_SECONDS:
                        loss, *_ = self.read_losses()
                        line.describe(self.epoch, state.step, loss)
                    stopping = self.asked_to_stop()
                    if stopping or self.save_is_due():
                        self.save()
                    if stopping:
                        self.stop()
                    self.clock.lap("between")
                self.end_epoch()
                self.clock.lap("between")
                self.asked = torch.tensor(float(self.interrupted()), device=self.device)
                if self.ranks.add_up(self.asked).item() > 0:
                    self.stop()

    @property
    def epoch(self) -> int:
        """The epoch in progress, counted from 1."""
        return len(self.state.history.records) + 1

    def asked_to_stop(self) -> bool:
        """Whether this process, or at this step one of the ranks, was asked to stop."""
        if self.ranks.alone:
            return self.interrupted()
        # Reading it waits for the device, so it is done now and then, by all at the same step.
        return self.state.step % _ASKED_STEPS == 0 and self.asked.item() > 0

    def step(self, minibatch: Minibatch) -> None:
        """One step of the optimiser; nothing here waits for the device."""
        state, clock = self.state, self.clock
        clock.lap("waiting")
        cells = self.share(minibatch)
        inputs = self.to_inputs(minibatch)
        state.optimizer.zero_grad()
        clock.lap("copying")
        with told_of_peers():
            with self.autocast():
                losses = state.model.loss(
                    inputs,
                    self.schedule.weight(state.step),
                    state.generator,
                    state.step / self.schedule.total_steps,
                )
                losses = self.penalised(losses, inputs)
            clock.lap("forward")
            part = losses.objective
            if not self.ranks.alone:  # so that the sum over ranks is the mean over all cells
                part = part * (minibatch.n_rows / cells)
            part.backward()  # type: ignore[no-untyped-call]
        objective = losses.objective.detach()
        sums = torch.stack(
            (
                objective * minibatch.n_rows,
                losses.reconstruction_loss.detach().sum(),
                losses.kl.detach().sum(),
                torch.zeros_like(objective)
                if losses.penalty is None
                else losses.penalty.detach() * minibatch.n_rows,
            )
        )
        if not self.ranks.alone:
            told = torch.cat([sums, sums.new_full((1,), float(self.interrupted()))])
            told = self.ranks.add_up_step(self.trained, told)
            sums, objective, self.asked = told[:-1], told[0] / cells, told[-1]
        clock.lap("backward")
        self.stepper.step(state.step)
        clock.lap("optimiser")

        state.sums += sums
        self.unread.append(objective)
        state.step += 1
        state.epoch_cells += cells
        now = time.monotonic()
        state.epoch_seconds += now - self.ticked_at
        self.ticked_at = now

    def share(self, minibatch: Minibatch) -> int:
        """Cells of a minibatch over all ranks; the generator is told which of them are here."""
        generator = self.state.generator
        if not isinstance(generator, SharedGenerator):
            return minibatch.n_rows
        loader = self.state.loader
        at = loader.step - 1
        generator.own = torch.from_numpy(loader.plan.places(at)).to(self.device)
        generator.n_cells = loader.plan.rows_of_step(at)
        return generator.n_cells

    def penalised(self, losses: Losses, inputs: Inputs) -> Losses:
        """The losses with the penalty of the training added, if there is one."""
        added = None if self.penalty is None else self.penalty(self.state.model, inputs)
        if added is None:
            return losses
        penalty = added if losses.penalty is None else losses.penalty + added
        return dataclasses.replace(losses, objective=losses.objective + added, penalty=penalty)

    def end_epoch(self) -> None:
        """Validate, record, decide whether to go on, save."""
        state, config = self.state, self.config
        train_loss, reconstruction_loss, kl, penalty = self.read_losses()
        if self.alternation is not None:
            self.alternation.run(self.epoch)
            if state.average is not None:
                self.alternation.copy_into(state.average.weights)
        # Reading waited for the steps that the device had not done yet.
        state.epoch_seconds += time.monotonic() - self.ticked_at
        self.clock.end_epoch(state.loader.stalls, state.epoch_seconds, state.epoch_cells)
        record = EpochRecord(
            epoch=self.epoch,
            step=state.step,
            train_loss=train_loss,
            reconstruction_loss=reconstruction_loss,
            kl=kl,
            penalty=penalty,
            kl_weight=self.schedule.weight(state.step - 1),
            validation_bound=self.validate(),
            seconds=state.epoch_seconds,
            cells_per_second=state.epoch_cells / state.epoch_seconds,
        )
        state.history = state.history.append(record)
        state.forget_epoch()
        state.finished = record.epoch == config.max_epochs
        if config.early_stopping:
            if state.history.best_epoch == record.epoch:
                state.keep_weights()
            waited = epochs_without_improvement(state.history, self.schedule.warmup_steps)
            state.finished |= waited >= config.patience
        self.save()
        if self.ranks.first:
            write_log(self.out, state.history)

    def validate(self) -> float | None:
        """Mean negative bound over the held-out cells; its noise depends on seed and epoch only."""
        if self.validation is None:
            return None
        state, ranks = self.state, self.ranks
        generator = torch.Generator(self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        averaged = nullcontext() if state.average is None else state.average.applied(state.model)
        with averaged, evaluating(state.model), self.autocast():
            for number, minibatch in enumerate(self.validation):
                if number % ranks.world_size != ranks.rank:
                    continue
                seeded(generator, self.config.seed, self.epoch, 3, number)
                losses = state.model.loss(self.to_inputs(minibatch), 1.0, generator)
                total += losses.negative_bound.sum()
        bound = ranks.add_up(total).item() / self.validation.n_rows
        if not math.isfinite(bound):
            raise self.not_finite("The validation bound is not finite", bound, state.step)
        return bound

    def read_losses(self) -> tuple[float, ...]:
        """Objective, reconstruction loss, KL divergence, penalty: means over the epoch so far.

        Raises
        ------
        TrainingError
            The objective of a step since the last reading is not finite.
        """
        state = self.state
        if self.unread:
            objectives = torch.stack(self.unread).tolist()
            first_step = state.step - len(objectives) + 1
            self.unread.clear()
            for step, objective in enumerate(objectives, first_step):
                if not math.isfinite(objective):
                    listed = self.list_rows(step)
                    raise self.not_finite("The loss is not finite", objective, step, listed)
        self.read_at = time.monotonic()
        return tuple((state.sums / state.epoch_cells).tolist())

    def save_is_due(self) -> bool:
        """Whether steps or minutes ask for a checkpoint."""
        every, minutes = self.config.checkpoint_steps, self.config.checkpoint_minutes
        by_steps = every > 0 and self.state.step % every == 0
        return by_steps or self.ticked_at - self.saved_at >= 60 * minutes

    def save(self) -> None:
        """Write a checkpoint, unless what it would hold is spoilt; of the ranks the first does."""
        if not self.ranks.first:
            self.saved_at = time.monotonic()
            return
        if self.unread:
            self.read_losses()
        parameters = [parameter.detach() for parameter in self.state.model.parameters()]
        if not torch.stack([torch.isfinite(p).all() for p in parameters]).all():
            raise self.not_finite("A weight is not finite", "nan or inf", self.state.step)
        save_checkpoint(self.out, self.state.checkpoint(self.identity, self.environment))
        self.saved_at = self.ticked_at = time.monotonic()

    def stop(self) -> NoReturn:
        """Leave after Ctrl-C; the checkpoint is written."""
        raise KeyboardInterrupt(
            f"training stopped after step {self.state.step}; --resume goes on from there "
            f"({self.out})"
        )

    def list_rows(self, step: int) -> str:
        """Write the rows of a step, counted from 1 over the training; says which and where."""
        loader = self.state.loader
        epoch = self.epoch - 1
        rows = loader.rows_of(epoch, step - 1 - epoch * loader.steps_per_epoch).tolist()
        with io_errors("The rows of the step cannot be written", self.out):
            content = {"epoch": self.epoch, "step": step, "rows": rows}
            (self.out / _ROWS).write_text(json.dumps(content) + "\n")
        some = ", ".join(map(str, rows[:5]))
        return f"; its rows of the store are {some}, … ({len(rows)}, listed in {_ROWS})"

    def not_finite(self, what: str, found: object, step: int, listed: str = "") -> TrainingError:
        """The error for a value that cannot be trained on."""
        return TrainingError(
            what,
            found=f"{found} at step {step}, epoch {self.epoch}{listed}",
            expected="a finite number",
            do="train with a lower --lr or without --precision bfloat16, and look for extreme "
            "counts; the last checkpoint is as it was",
            path=self.out,
        )

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16 where the configuration says so."""
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)
