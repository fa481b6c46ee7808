"""Blocks of convolutional nets that add to their input, and can therefore be removed whole."""

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
    # timm
    **dict.fromkeys(("BasicBlock", "Bottleneck"), ""),
    **dict.fromkeys(("DepthwiseSeparableConv", "InvertedResidual"), "has_skip"),
}
"""Convolutional blocks that can go where they add to their input, by class name. The value is the
path of an attribute that is set and true in blocks that add; empty if all blocks do."""

SHORTCUTS = ("shortcut", "downsample")
"""Attributes of modules that change the input before the addition, if they have weights."""


def are_residual(layers: Iterable[nn.Module]) -> bool:
    """Return whether all modules are blocks of `RESIDUAL_BLOCKS`."""
    return all(type(layer).__name__ in RESIDUAL_BLOCKS for layer in layers)


def adds_to_input(block: nn.Module) -> bool:
    """Return whether a block of `RESIDUAL_BLOCKS` adds to its unchanged input, and so can go."""
    adds: Any = block
    for name in filter(None, RESIDUAL_BLOCKS[type(block).__name__].split(".")):
        adds = getattr(adds, name)
    shortcuts = (getattr(block, name, None) for name in SHORTCUTS)
    changes = any(s is not None and next(s.parameters(), None) is not None for s in shortcuts)
    return adds is not None and adds is not False and not changes
