"""Export a classifier as an ONNX or torch.export file."""

from hfslim.hub.export.exporting import Export, export
from hfslim.hub.export.formats import ExportError, check_format, open_exported

__all__ = ["Export", "ExportError", "check_format", "export", "open_exported"]
