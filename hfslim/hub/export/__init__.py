"""Write a classifier as an ONNX or torch.export file."""

from hfslim.hub.export.exporting import Export, ExportError, export, open_exported

__all__ = ["Export", "ExportError", "export", "open_exported"]
