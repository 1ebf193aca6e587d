"""When the KL weight rises, and when training stops: pure functions of steps and history."""

from __future__ import annotations

from dataclasses import dataclass

from atlas.training.history import History


@dataclass(frozen=True, slots=True)
class KlSchedule:
    """The KL weight of each step: 0 at the first, rising linearly, 1 once the warm-up is over.

    The warm-up is a share of all steps, not a number of epochs, so that few epochs over many cells
    end at weight 1 as well: the last step always has weight 1, even with ``warmup_share`` 1.
    (KL annealing: scVI, Lopez et al. 2018, Methods.)

    Attributes
    ----------
    total_steps
        Steps of the whole training, at least 1.
    warmup_share
        Share of them during which the weight is below 1, in [0, 1]; 0 gives weight 1 throughout.
    """

    total_steps: int
    warmup_share: float

    @property
    def warmup_steps(self) -> int:
        """Number of steps with a weight below 1."""
        return min(round(self.warmup_share * self.total_steps), self.total_steps - 1)

    def weight(self, step: int) -> float:
        """The KL weight of the step that follows ``step`` steps already done."""
        warmup = self.warmup_steps
        return 1.0 if step >= warmup else step / warmup


def epochs_without_improvement(history: History, warmup_steps: int) -> int:
    """Epochs since the best validation bound; epochs that end within the warm-up do not count.

    Parameters
    ----------
    history
        The epochs so far.
    warmup_steps
        Steps during which the KL weight is below 1.
    """
    best = history.best_epoch
    if best is None:
        return 0
    return sum(record.step > warmup_steps and record.epoch > best for record in history.records)
