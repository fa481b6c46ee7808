"""Write a classifier as an ONNX or torch.export file."""

from hfslim.hub.export.exporting import Export, ExportError, export

__all__ = ["Export", "ExportError", "export"]
