"""The sides of ``bench_loader.py``, and what is compared with what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MEMORY = 900_000_000
_BUDGET = {"memory": MEMORY}
"""What 16,384 rows mixed in minibatches of 4,096 are proven not to exceed; by weight, 1 GB."""
_WIDE = {"memory": 1_400_000_000}
"""The same where values are not narrow."""
_PEERS_BUFFER = {"memory": 6_000_000_000, "block_size": 2048, "buffer_size": 65_536}
"""As many rows mixed as tiledbsoma-ml mixes, in less memory."""
BUFFER = 8192
"""Rows that are mixed at a time by the peers that take a number, and by ours beside them."""
BLOCK = 32


@dataclass(frozen=True)
class Side:
    """One way to stream.

    Attributes
    ----------
    name
        In tables.
    script
        The worker's, in this folder.
    settings
        What the worker is told beside minibatch size and paths.
    genes
        ``"all"`` or ``"chosen"``: which columns come.
    environment
        Folder of its environment; none for ours.
    needs
        The store that it reads, by its name in :mod:`stores`.
    most_cells
        Up to how many cells it is measured.
    limit
        Seconds after which it is stopped, where not those of all.
    weighted
        Rows come with replacement.
    """

    name: str
    script: str
    settings: dict[str, Any] = field(default_factory=dict)
    genes: str = "all"
    environment: str | None = None
    needs: str = "ours"
    most_cells: int | None = None
    limit: float | None = None
    weighted: bool = False

    @property
    def budget(self) -> int:
        """Bytes that a side of ours is given."""
        return int(self.settings.get("loader", _BUDGET)["memory"])

    def arguments(self, minibatch_size: int) -> dict[str, Any]:
        """What the worker gets to know of this side."""
        if self.environment is None:
            return {"source": "store", "loader": _BUDGET, "weighted": self.weighted} | self.settings
        return self.settings


def sides(minibatch_size: int) -> list[Side]:
    """All sides, in the order in which they take turns."""
    ours = "with_atlas.py"
    alike = _BUDGET | {"block_size": BLOCK, "buffer_size": max(BUFFER, minibatch_size)}
    return [
        Side("ours, block 32", ours, {"loader": alike}),
        Side("ours", ours),
        Side("ours, narrow", ours, {"loader": _BUDGET | {"narrow": True}}),
        Side("ours, weighted", ours, {"loader": {"memory": 10**9}}, weighted=True),
        Side("ours, chosen genes", ours, {"source": "chosen"}, genes="chosen"),
        Side("ours, projected", ours, {"source": "projected"}, genes="chosen", needs="projected"),
        Side(
            "ours, TileDB",
            ours,
            {"source": "tiledb"},
            needs="tiledb",
            most_cells=100_000,
        ),
        Side(
            "sparse TileDB",
            ours,
            {"source": "sparse"},
            needs="sparse",
            most_cells=100_000,
        ),
        Side(
            "ours, SOMA",
            ours,
            {"source": "soma", "loader": _WIDE},
            needs="tiledbsoma",
            most_cells=100_000,
        ),
        Side(
            "ours, SOMA, block 2048",
            ours,
            {"source": "soma", "loader": _PEERS_BUFFER},
            needs="tiledbsoma",
            most_cells=100_000,
        ),
        Side(
            "ours, h5ad",
            ours,
            {"source": "file", "loader": _WIDE},
            needs="file",
            most_cells=100_000,
        ),
        Side(
            "ours, AnnData in Zarr",
            ours,
            {"source": "zarr", "loader": _WIDE},
            needs="zarr",
            most_cells=100_000,
        ),
        Side(
            "annbatch",
            "with_annbatch.py",
            {"block_size": BLOCK, "blocks": BUFFER // BLOCK},
            environment="annbatch",
            needs="annbatch",
        ),
        Side(
            "scDataset",
            "with_scdataset.py",
            {"block_size": BLOCK, "fetch_factor": max(1, 4 * BUFFER // minibatch_size)},
            environment="scdataset",
            needs="file",
        ),
        Side(
            "tiledbsoma-ml",
            "with_tiledbsoma.py",
            environment="tiledbsoma",
            needs="tiledbsoma",
            most_cells=100_000,
            # It reads 65,536 rows before the first minibatch: only a whole epoch is fair to it.
            limit=180.0,
        ),
    ]


COMPARISONS = (
    ("ours, block 32", "annbatch", 1.5),
    ("ours", "annbatch", 2.5),
    ("ours, narrow", "annbatch", 3.5),
    ("ours", "scDataset", 10),
    ("ours", "tiledbsoma-ml", 30),
    ("ours, projected", "ours", 3),
    ("ours, projected", "ours, chosen genes", 3),
    ("ours, weighted", "ours", 0.5),
    ("ours, TileDB", "tiledbsoma-ml", 5),
    ("ours, TileDB", "sparse TileDB", 1),
    ("ours, SOMA", "tiledbsoma-ml", 1),
    ("ours, SOMA, block 2048", "tiledbsoma-ml", 2),
    ("ours, h5ad", "scDataset", 1),
    ("ours", "ours, h5ad", 1),
    ("ours", "ours, AnnData in Zarr", 1),
)
"""Side, side, and the least ratio of their speeds to reach."""

COLD = ("ours", "ours, narrow", "annbatch")
"""Sides that are measured with a cold page cache too."""
