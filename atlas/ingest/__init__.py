"""Readers of foreign files: raw counts in blocks, tables, and the alignment of genes."""

from atlas.ingest.base import CountsSource
from atlas.ingest.content import CountsBlock, LayerBlock
from atlas.ingest.files import open_counts
from atlas.ingest.genes import AlignmentReport, GeneIdentity, GeneTable, align

__all__ = [
    "AlignmentReport",
    "CountsBlock",
    "CountsSource",
    "GeneIdentity",
    "GeneTable",
    "LayerBlock",
    "align",
    "open_counts",
]
