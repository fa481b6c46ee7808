"""Dynamic quantization of an ONNX file to int8."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def dynamic_quantizer(exporters: Any, model: PreTrainedModel) -> Any:
    """Return ONNX Runtime's dynamic quantizer, with a scale for each channel if possible.

    Scales for each channel give logits far nearer to the model's, but ONNX Runtime fails on a
    weight that has no channel.
    """
    empty = [name for name, weight in model.named_parameters() if not weight.numel()]
    if empty:
        logger.warning(
            "int8 with one scale for each weight, not for each channel, which is less exact: "
            "%d weights are empty, such as %s",
            len(empty),
            empty[0],
        )
    config = exporters.OnnxRuntimeDynamicConfig(per_channel=not empty)
    return exporters.OnnxRuntimeQuantizer(config)
