"""What is said of a figure beside its value: its name with k, what computed it, what was left out.

For the console and the report, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from atlas.evaluation.metrics import Difference, Measure

_APPROXIMATE = ("IVF", "HNSW")  # in the names of what searches
_ADVICE = {
    "no cell has a label": "`atlas annotate STORE TABLE --label-key COLUMN` gives labels",
    "there is only one batch": "`atlas annotate STORE TABLE --batch-key COLUMN` gives batches",
}


def title(figure: Measure | Difference) -> str:
    """Its title, with the number of neighbours."""
    return figure.title if figure.k is None else f"{figure.title} (k {figure.k})"


def by(measure: Measure) -> str:
    """What searched or computed it, with its recall where neighbours were searched."""
    if measure.backend is None:
        return ""
    if measure.recall is None:
        untold = measure.k is not None and measure.backend.startswith(("faiss", "torch"))
        return f"{measure.backend}, recall not measured" if untold else measure.backend
    if is_exact(measure):
        return f"{measure.backend}, exact: recall 1"
    return f"{measure.backend}, recall {measure.recall:.4f}"


def is_exact(measure: Measure) -> bool:
    """Whether its neighbours were searched by a kind that leaves none out."""
    approximate = any(word in (measure.backend or "") for word in _APPROXIMATE)
    return measure.recall == 1 and not approximate


def exactness(measures: Iterable[Measure]) -> str:
    """Which neighbours were searched exactly, as a sentence or several; "" where none were."""
    searched = [m for m in measures if m.value is not None and m.recall is not None]
    if not searched:
        return ""
    rest = [m for m in searched if not is_exact(m)]
    if not rest:
        return "All neighbours whose recall is told were searched exactly."
    told = ", ".join(f"{title(m)} ({by(m)})" for m in rest)
    text = f"Searched approximately, with the recall that was measured: {told}."
    return text + (" All others exactly." if len(rest) < len(searched) else "")


def notes(measures: Iterable[Measure]) -> dict[str, list[str]]:
    """Titles of the figures of which something has to be known, by what that is."""
    found: dict[str, list[str]] = {}
    for measure in measures:
        if measure.note is not None and measure.value is not None:
            found.setdefault(measure.note, []).append(title(measure))
    return {note: list(dict.fromkeys(titles)) for note, titles in found.items()}


def skipped(measures: Iterable[Measure]) -> dict[str, list[str]]:
    """Titles of what has no value, by reason; the reason says what to do, where that is known."""
    reasons: dict[str, list[str]] = {}
    for measure in measures:
        if measure.skipped is not None:
            advice = _ADVICE.get(measure.skipped)
            reason = measure.skipped if advice is None else f"{measure.skipped}: {advice}"
            named = reasons.setdefault(reason, [])
            if title(measure) not in named:
                named.append(title(measure))
    return reasons
