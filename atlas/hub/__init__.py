"""Models that come from elsewhere, and go there."""

from atlas.hub.scvi_export import export_scvi
from atlas.hub.scvi_import import import_scvi

__all__ = ["export_scvi", "import_scvi"]
