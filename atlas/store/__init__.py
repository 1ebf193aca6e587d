"""The on-disk format: studies in Zarr, numbered manifests, one gene table, one row order."""

from atlas.store.append import AppendReport
from atlas.store.base import CountStore
from atlas.store.convert import convert_store
from atlas.store.export import to_anndata
from atlas.store.files_source import FilesSource, open_files
from atlas.store.mirror import write_inventory
from atlas.store.opening import create_store, open_store
from atlas.store.projection import Projection, open_projection
from atlas.store.split import Split
from atlas.store.view import CountView

__all__ = [
    "AppendReport",
    "CountStore",
    "CountView",
    "FilesSource",
    "Projection",
    "Split",
    "convert_store",
    "create_store",
    "open_files",
    "open_projection",
    "open_store",
    "to_anndata",
    "write_inventory",
]
