"""Signatures of cell types: genes that are high or low in them, and how well each cell fits."""

from atlas.signatures.genes import Aliases, Resolved, resolve
from atlas.signatures.reading import Signature, read_signatures
from atlas.signatures.scores import Scores, Seeds, choose_seeds, score_cells

__all__ = [
    "Aliases",
    "Resolved",
    "Scores",
    "Seeds",
    "Signature",
    "choose_seeds",
    "read_signatures",
    "resolve",
    "score_cells",
]
