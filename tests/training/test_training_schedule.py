"""The KL weight and the patience of early stopping, as properties."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from atlas.training.history import EpochRecord, History
from atlas.training.schedule import KlSchedule, epochs_without_improvement

totals = st.integers(1, 10_000)
shares = st.floats(0, 1)


def history(bounds: list[float | None], steps_per_epoch: int = 1) -> History:
    return History(
        tuple(
            EpochRecord(i, i * steps_per_epoch, 1.0, 1.0, 0.0, 0.0, 1.0, bound, 1.0, 1.0)
            for i, bound in enumerate(bounds, 1)
        )
    )


@given(totals, shares)
def test_weight_rises_linearly_from_zero_to_exactly_one(total: int, share: float) -> None:
    schedule = KlSchedule(total, share)
    weights = [schedule.weight(step) for step in range(total)]
    assert weights[-1] == 1.0
    assert all(a <= b for a, b in pairwise(weights))
    rising = [w for w in weights if w < 1]
    assert len(rising) == schedule.warmup_steps
    assert all(abs(w * len(rising) - i) < 1e-9 for i, w in enumerate(rising))


@given(totals)
def test_no_warmup_is_weight_one_throughout(total: int) -> None:
    schedule = KlSchedule(total, 0.0)
    assert {schedule.weight(step) for step in range(total)} == {1.0}


def test_half_of_the_steps_is_warmup_however_few_the_epochs() -> None:
    # A million cells for 8 epochs: counted in epochs (400) the weight would end at 0.02.
    schedule = KlSchedule(8 * 7031, 0.5)
    assert schedule.weight(0) == 0.0
    assert schedule.weight(2 * 7031) == 0.5
    assert schedule.weight(4 * 7031) == 1.0


def test_a_whole_share_still_ends_at_one() -> None:
    assert [KlSchedule(5, 1.0).weight(step) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_best_epoch_is_the_first_of_the_lowest() -> None:
    assert history([3.0, 1.0, 2.0, 1.0]).best_epoch == 2
    assert history([None, None]).best_epoch is None
    assert history([]).best_epoch is None


def test_epochs_within_the_warmup_do_not_count_against_patience() -> None:
    falling_then_flat = history([5.0, 1.0, 2.0, 2.0, 2.0], steps_per_epoch=10)
    assert epochs_without_improvement(falling_then_flat, warmup_steps=0) == 3
    assert epochs_without_improvement(falling_then_flat, warmup_steps=35) == 2
    assert epochs_without_improvement(falling_then_flat, warmup_steps=40) == 1
    assert epochs_without_improvement(falling_then_flat, warmup_steps=50) == 0


@given(st.lists(st.floats(0, 10), min_size=1))
def test_without_warmup_waiting_is_the_distance_to_the_best(bounds: list[float]) -> None:
    waited = epochs_without_improvement(history(list(bounds)), warmup_steps=0)
    assert waited == len(bounds) - 1 - bounds.index(min(bounds))
