"""Dynamic quantization of an ONNX file to int8."""

from __future__ import annotations

from typing import Any


def dynamic_quantizer(exporters: Any) -> Any:
    """Return ONNX Runtime's dynamic quantizer, with a scale for each channel.

    A weight without elements, of a layer that lost every unit, has no scale: its nodes stay as
    they are.
    """

    class Quantizer(exporters.OnnxRuntimeQuantizer):
        def quantize(self, model: Any, *others: Any) -> Any:
            empty = {name for name, one in model.graph.initializers.items() if 0 in one.shape}
            self.config.nodes_to_exclude = [
                node.name
                for node in model.graph
                if empty & {given.name for given in node.inputs if given is not None}
            ]
            return super().quantize(model, *others)

    return Quantizer(exporters.OnnxRuntimeDynamicConfig(per_channel=True))
