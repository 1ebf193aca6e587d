"""Figures of the report, as strings to be set into HTML: data URIs and inline SVG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.palette import UNLABELED_COLOUR, palette

_LONGEST_TAG = 18
_MOST_NAMED_TAGS = 15
_TAG_HEIGHT = 4.0  # per cent of the map


@dataclass(frozen=True, slots=True)
class LossRecord:
    """Losses after an epoch: mean negative bound per cell, nats; None where not computed."""

    epoch: float
    training: float | None
    validation: float | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a legend: its number on the map, name, colour and cells."""

    number: int | None
    name: str
    colour: str
    cells: int


@dataclass(frozen=True, slots=True)
class Tag:
    """A text laid over a map, at per cent of its width and height from the upper left."""

    text: str
    left: float
    top: float


@dataclass(frozen=True, slots=True)
class Map:
    """A scatter of cells coloured by category: picture, texts over it, legend."""

    title: str
    image: str
    tags: tuple[Tag, ...]
    legend: tuple[Entry, ...]


def draw_map(
    title: str,
    xy: npt.NDArray[np.float32],
    categories: Categories,
    *,
    counts: npt.NDArray[np.int64],
    uncategorised: int,
    tags: bool,
    seed: int,
) -> Map:
    """Scatter cells by category; cells without one lie below the others, in light grey.

    Parameters
    ----------
    title
        Heading of the map.
    xy
        Positions, (n, 2).
    categories
        Of the cells drawn.
    counts, uncategorised
        Cells of each category and of none, among all cells, for the legend.
    tags
        Whether to write each category's name (or number, where names are many) on the map.
    seed
        Of the order in which cells are drawn, so that no category covers the others.
    """
    colours = np.array([*palette(len(categories.names)), UNLABELED_COLOUR])
    order = np.random.default_rng(seed).permutation(len(xy))
    order = np.concatenate(
        [
            order[categories.codes[order] == UNLABELED],
            order[categories.codes[order] != UNLABELED],
        ]
    )
    figure = Figure(figsize=(6, 6), dpi=160)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    size = float(np.clip(30_000 / max(len(xy), 1), 0.4, 16))
    # The last colour stands for code -1.
    axes.scatter(
        xy[order, 0], xy[order, 1], s=size, c=colours[categories.codes[order]], linewidths=0
    )
    low, span = _frame(xy)
    axes.set_xlim(low[0], low[0] + span)
    axes.set_ylim(low[1], low[1] + span)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    shown = [code for code in range(len(categories.names)) if counts[code]]
    numbered = tags and (
        len(shown) > _MOST_NAMED_TAGS
        or any(len(categories.names[code]) > _LONGEST_TAG for code in shown)
    )
    legend = [
        Entry(place if numbered else None, categories.names[code], str(colours[code]), counts[code])
        for place, code in enumerate(shown, start=1)
    ]
    if uncategorised:
        legend.append(Entry(None, "unlabeled", UNLABELED_COLOUR, uncategorised))
    texts = {
        code: str(place) if numbered else categories.names[code]
        for place, code in enumerate(shown, start=1)
    }
    return Map(
        title,
        "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"),
        _place_tags(xy, categories, texts, low, span) if tags else (),
        tuple(legend),
    )


def _frame(xy: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], float]:
    """Lower left corner and side of the square that the map shows."""
    if not len(xy):
        return np.zeros(2), 1.0
    low, high = xy.min(axis=0).astype(np.float64), xy.max(axis=0).astype(np.float64)
    span = float((high - low).max()) * 1.08 or 1.0
    return (low + high) / 2 - span / 2, span


def _place_tags(
    xy: npt.NDArray[np.float32],
    categories: Categories,
    texts: dict[int, str],
    low: npt.NDArray[np.float64],
    span: float,
) -> tuple[Tag, ...]:
    """Each text at the cell nearest to its category's median, one line lower where taken."""
    spots = []
    for code, text in texts.items():
        own = xy[categories.codes == code]
        if len(own):  # a rare category may have no cell in the sample
            middle = own[np.square(own - np.median(own, axis=0)).sum(axis=1).argmin()]
            left, bottom = (middle - low) / span * 100
            spots.append((100 - float(bottom), float(left), text))
    placed: list[Tag] = []
    for top, left, text in sorted(spots):
        lowest = max(
            (
                other.top + _TAG_HEIGHT
                for other in placed
                if abs(left - other.left) < 0.8 * (len(text) + len(other.text))
                and abs(top - other.top) < _TAG_HEIGHT
            ),
            default=top,
        )
        # Moved further, a text would seem to name other cells: rather let two overlap.
        placed.append(Tag(text, left, min(lowest, top + _TAG_HEIGHT)))
    return tuple(placed)


def draw_losses(history: Sequence[LossRecord]) -> str:
    """Training and validation loss by epoch, as an SVG element without outside references."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "atlas", "font.size": 11}):
        figure = Figure(figsize=(8, 3.4))
        axes = figure.add_subplot()
        for name, colour, style in (
            ("training", "#0072b2", "-"),
            ("validation", "#d55e00", "--"),
        ):
            points = [(r.epoch, getattr(r, name)) for r in history if getattr(r, name) is not None]
            if points:
                marker = "o" if len(points) < 3 else None
                epochs, losses = zip(*points, strict=True)
                axes.plot(epochs, losses, style, color=colour, label=name, lw=1.8, marker=marker)
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss per cell (nats)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", lw=0.8)
        axes.legend(frameon=False)
        figure.tight_layout()
        return inline_svg(figure)


def inline_svg(figure: Figure) -> str:
    """A figure as an SVG element for HTML, as wide as what it is set into."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue()
    # Inside HTML an svg element needs no namespaces, XML header or size in points.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r' height="[^"]*pt"', "", svg, count=1)
    )
