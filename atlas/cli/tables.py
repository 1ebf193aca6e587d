"""Measures and differences as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import ascii_lowercase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atlas.evaluation.metrics import Comparison, Difference, Measure, Metrics
    from atlas.evaluation.scib_table import ScibTable


def of_metrics(metrics: Metrics) -> Iterator[str]:
    """Each figure with its error, interval and cells; below, what computed it and what is not."""
    from atlas.evaluation.told import title

    by = _Letters()
    rows = [("", "value ± standard error", "", "95 % interval", "cells", "by")]
    for measure in metrics.measures:
        if measure.value is not None:
            interval = "" if measure.low is None else f"{measure.low:.4f} to {measure.high:.4f}"
            value, unit, cells = _value(measure), measure.unit, _cells(measure)
            rows.append((title(measure), value, unit, interval, cells, by.of([measure])))
    yield from _aligned("<><>><", rows)
    yield from by.lines()
    yield from _notes(metrics.measures)
    yield from _skipped(metrics.measures)


def of_comparison(found: Comparison) -> Iterator[str]:
    """The figures of all embeddings side by side, then the differences of each pair."""
    from atlas.evaluation.told import title

    by = _Letters()
    rows: list[Sequence[str]] = [("value ± standard error", *found.metrics, "cells", "by")]
    first = next(iter(found.metrics.values()))
    for measure in first.measures:
        own = [metrics[measure.name] for metrics in found.metrics.values()]
        there = [each for each in own if each.value is not None]
        if there:
            values = ["–" if each.value is None else _value(each) for each in own]
            name = f"{title(measure)}, {measure.unit}"
            rows.append((name, *values, _cells(there[0]), by.of(there)))
    yield from _aligned("<" + ">" * (len(rows[0]) - 2) + "<", rows)
    yield from by.lines()
    in_all = [
        measure
        for measure in first.measures
        if all(each[measure.name].skipped == measure.skipped for each in found.metrics.values())
    ]
    for name, metrics in found.metrics.items():
        yield from _notes(metrics.measures, name)
    yield from _skipped(in_all)
    names = {measure.name for measure in in_all}
    for name, metrics in found.metrics.items():
        yield from _skipped([m for m in metrics.measures if m.name not in names], name)
    for (one, other), differences in _by_pair(found.differences).items():
        yield f"{one} less {other}"
        lines = [("", "difference", "", "95 % interval", "")]
        for row in differences:
            interval = f"{row.low:+.4f} to {row.high:+.4f}"
            better = f"{row.favours} is better" if row.favours else ""
            lines.append((title(row), f"{row.value:+.4f}", row.unit, interval, better))
        yield from (f"  {line}" for line in _aligned("<><><", lines))


def of_scores(table: ScibTable) -> Iterator[str]:
    """scib-metrics' aggregate scores; nothing where none has a value."""
    aggregates = [score for score in table.scores if score.part == "Aggregate score"]
    if any(score.value is not None for score in aggregates):
        yield "scores as scib-metrics adds them up"
        for score in aggregates:
            error = f" ± {score.standard_error:.4f}" if score.standard_error is not None else ""
            value = "–" if score.value is None else f"{score.value:.4f}{error}"
            told = f"  ({score.skipped})" if score.skipped else ""
            yield f"  {score.embedding + ', ' + score.title.lower():<52} {value}{told}"


class _Letters:
    """A letter for each way in which figures were computed."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def of(self, measures: Iterable[Measure]) -> str:
        from atlas.evaluation.told import by

        ways = dict.fromkeys(filter(None, map(by, measures)))
        return "/".join(self._letters.setdefault(way, self._next()) for way in ways)

    def _next(self) -> str:
        place = len(self._letters)
        return ascii_lowercase[place] if place < 26 else str(place)

    def lines(self) -> Iterator[str]:
        yield from (f"  {letter}: {way}" for way, letter in self._letters.items())


def _aligned(sides: str, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they must be, each to the left (<) or to the right (>)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        fields = zip(row, sides, widths, strict=True)
        yield "  ".join(f"{text:{side}{width}}" for text, side, width in fields).rstrip()


def _value(measure: Measure) -> str:
    error = "" if measure.standard_error is None else f" ± {measure.standard_error:.4f}"
    return f"{measure.value:.4f}{error}"


def _cells(measure: Measure) -> str:
    return "" if measure.n is None else f"{measure.n:,}"


def _notes(measures: Iterable[Measure], embedding: str = "") -> Iterator[str]:
    from atlas.evaluation.told import notes

    for note, titles in notes(measures).items():
        of = f" of {embedding}" if embedding else ""
        yield f"note{of}: {note} ({'; '.join(titles)})"


def _skipped(measures: Iterable[Measure], embedding: str = "") -> Iterator[str]:
    from atlas.evaluation.told import skipped

    for reason, titles in skipped(measures).items():
        of = f" of {embedding}" if embedding else ""
        yield f"not measured{of}: {'; '.join(titles)} ({reason})"


def _by_pair(differences: Iterable[Difference]) -> Mapping[tuple[str, str], list[Difference]]:
    pairs: dict[tuple[str, str], list[Difference]] = {}
    for difference in differences:
        pairs.setdefault((difference.first, difference.second), []).append(difference)
    return pairs
