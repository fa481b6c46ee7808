"""Blocks of convolutional nets that add to their input, and so may go whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

RESIDUAL_BLOCKS = {
    **dict.fromkeys(("BitBottleneckLayer", "BitPreActivationBottleneckLayer"), ""),
    "ConvNextV2Layer": "",
    "EfficientNetBlock": "projection.apply_dropout",
    "HGNetV2BasicLayer": "residual",
    "MobileNetV2InvertedResidual": "use_residual",
    **dict.fromkeys(("MobileViTInvertedResidual", "MobileViTV2InvertedResidual"), "use_residual"),
    "MobileViTV2TransformerLayer": "",
    "PoolFormerLayer": "",
    **dict.fromkeys(("RegNetXLayer", "RegNetYLayer"), ""),
    **dict.fromkeys(("ResNetBasicLayer", "ResNetBottleNeckLayer"), ""),
    **dict.fromkeys(("SwiftFormerConvEncoder", "SwiftFormerEncoderBlock"), ""),
    "TextNetRepConvLayer": "rbr_identity",
    # Of timm.
    **dict.fromkeys(("BasicBlock", "Bottleneck"), ""),
    **dict.fromkeys(("DepthwiseSeparableConv", "InvertedResidual"), "has_skip"),
}
"""Convolutional blocks that may go where they add to their input, by class name: the path of the
attribute that is there, and true, in those that do; of all of them if empty."""

SHORTCUTS = ("shortcut", "downsample")
"""Attributes of blocks that change the input before the addition, where they have weights."""


def are_residual(layers: Iterable[nn.Module]) -> bool:
    """Tell whether all of some modules are blocks of `RESIDUAL_BLOCKS`."""
    return all(type(layer).__name__ in RESIDUAL_BLOCKS for layer in layers)


def adds_to_input(block: nn.Module) -> bool:
    """Tell whether a block of `RESIDUAL_BLOCKS` adds to its input as it is, and so may go."""
    told: Any = block
    for name in filter(None, RESIDUAL_BLOCKS[type(block).__name__].split(".")):
        told = getattr(told, name)
    shortcuts = (getattr(block, name, None) for name in SHORTCUTS)
    changes = any(s is not None and next(s.parameters(), None) is not None for s in shortcuts)
    return told is not None and told is not False and not changes
