"""The table of scores as a figure: a field a measure, bars for the aggregates."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import Literal

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from atlas.evaluation.figures import inline_svg
from atlas.evaluation.scib_table import ScibTable, Score

FigureFormat = Literal["svg", "png", "pdf"]
_DATED: dict[FigureFormat, str] = {"svg": "Date", "png": "Software", "pdf": "CreationDate"}
_NAMES, _CELL, _LINE, _HEAD = 2.2, 1.0, 0.62, 1.0  # inches
_DARK = 0.62  # of a colour map's range, above which text is white


def _figure(table: ScibTable) -> Figure:
    """Rows are embeddings, the best total first."""
    names = sorted(table.embeddings, key=lambda name: -(table[name, "Total"].value or 0.0))
    columns = table.of(names[0])
    width = _NAMES + _CELL * len(columns)
    height = _HEAD + _LINE * len(names) + 0.15
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    starts: dict[str, int] = {}
    for place, score in enumerate(columns):
        starts.setdefault(score.part, place)
        x = _NAMES + _CELL * (place + 0.5)
        axes.text(x, _HEAD - 0.12, score.title.replace(" ", "\n", 1), ha="center", va="bottom")
    for part, place in starts.items():
        x = _NAMES + _CELL * place + 0.08
        axes.text(x, 0.22, part, weight="bold", va="center")
        axes.plot([x - 0.04, x - 0.04], [0.1, height - 0.1], color="#c5ccd3", lw=0.8)
    axes.plot([0.1, width - 0.1], [_HEAD, _HEAD], color="#1c2733", lw=1)
    for line, name in enumerate(names):
        y = _HEAD + _LINE * (line + 0.5)
        shown = name if len(name) <= 22 else name[:21] + "…"
        axes.text(0.15, y, shown, weight="bold", va="center")
        for place, score in enumerate(table.of(name)):
            _draw(axes, score, _NAMES + _CELL * place, y)
    return figure


def _draw(axes: Axes, score: Score, left: float, y: float) -> None:
    x = left + _CELL / 2
    if score.value is None:
        axes.text(x, y, "–", ha="center", va="center", color="#5b6875")
        return
    share = min(1.0, max(0.0, score.value))
    if score.part == "Aggregate score":
        colour = colormaps["YlGnBu"](0.15 + 0.3 * share)
        full = _CELL - 0.2
        axes.add_patch(Rectangle((left + 0.1, y - 0.2), full * share, 0.4, color=colour, lw=0))
        axes.text(left + 0.16, y, f"{score.value:.2f}", va="center", color="#1c2733")
        return
    colour = colormaps["Greens" if score.part == "Bio conservation" else "Purples"](0.85 * share)
    axes.add_patch(Circle((x, y), 0.25, facecolor=colour, edgecolor="#c5ccd3", lw=0.6))
    ink = "#ffffff" if 0.85 * share > _DARK else "#1c2733"
    axes.text(x, y, f"{score.value:.2f}", ha="center", va="center", color=ink)


def _style() -> AbstractContextManager[None]:
    # text stays text, to be edited, and the same scores give the same file
    return matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "atlas scores", "font.size": 10}
    )


def inline_scores(table: ScibTable) -> str:
    """The figure as an SVG element for HTML, without outside references."""
    with _style():
        return inline_svg(_figure(table))


def draw_scores(table: ScibTable, format: FigureFormat) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    with _style():
        metadata = {_DATED[format]: None}
        _figure(table).savefig(buffer, format=format, metadata=metadata, dpi=160)
    return buffer.getvalue()
