"""Models and references that come from elsewhere, and go there."""

from atlas.hub.fetching import fetch
from atlas.hub.package import Package, load_package
from atlas.hub.scvi_export import export_scvi
from atlas.hub.scvi_import import import_scvi

__all__ = ["Package", "export_scvi", "fetch", "import_scvi", "load_package"]
