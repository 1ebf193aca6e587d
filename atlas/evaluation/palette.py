"""Colours that stay apart for readers with and without red-green blindness."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

UNLABELED_COLOUR = "#d4d4d4"

# Okabe and Ito (2008), without black and without the yellow that vanishes on white.
_FIRST = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7")

# Machado, Oliveira and Fernandes (2009), table 1: full protanopia and deuteranopia, linear sRGB.
_VISIONS = (
    np.eye(3),
    np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
)

# OKLab (Ottosson 2020): linear sRGB → cone responses → lightness and two colour axes.
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)

Array = npt.NDArray[np.float64]


@lru_cache(maxsize=8)
def palette(n: int) -> tuple[str, ...]:
    """``n`` colours as ``#rrggbb``; a longer palette begins with the shorter one.

    The first six are Okabe and Ito's. Each further one is the colour whose smallest distance to
    those before it, in OKLab and over normal, protanope and deuteranope vision, is the largest.
    Colours that are grey, very light or very dark are left to unlabeled cells, paper and text.
    """
    levels = np.linspace(0, 255, 16).round()
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    seen = _oklab(grid)
    chroma = np.hypot(seen[:, 1], seen[:, 2])
    usable = (seen[:, 0] > 0.35) & (seen[:, 0] < 0.85) & (chroma > 0.06)
    grid = grid[usable]
    chosen = [np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)], float) for c in _FIRST[:n]]
    seen = np.stack([_oklab(grid, vision) for vision in _VISIONS])
    distance = np.full(len(grid), np.inf)
    for colour in chosen:
        distance = np.minimum(distance, _distance(seen, colour))
    while len(chosen) < n:
        colour = grid[distance.argmax()]
        distance = np.minimum(distance, _distance(seen, colour))
        chosen.append(colour)
    return tuple("#{:02x}{:02x}{:02x}".format(*map(int, colour)) for colour in chosen)


def _distance(seen: Array, colour: Array) -> Array:
    """Distance of every candidate to one colour, the smallest over the kinds of vision."""
    own = np.stack([_oklab(colour[None], vision) for vision in _VISIONS])
    nearest: Array = np.linalg.norm(seen - own, axis=2).min(axis=0)
    return nearest


def _oklab(rgb: Array, vision: Array = _VISIONS[0]) -> Array:
    """OKLab of sRGB values (0 to 255) as a kind of vision sees them: (n, 3)."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ vision.T, 0, 1)
    lab: Array = np.cbrt(seen @ _TO_CONES.T) @ _TO_OKLAB.T
    return lab
