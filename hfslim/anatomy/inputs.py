"""Example inputs for probing, counting and timing a model."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfslim.anatomy.adapters import base_of

TEXT_LENGTH = 128
IMAGE_SIZE = 224
AUDIO_SAMPLES = 16_000
CHARACTERS = 256
"""Number of code points for models that read characters."""
_POSITIONS = re.compile(
    r"(?!.*(?:vision|visual|image|audio|output_position))"
    r"(.*(?:position_embeddings?|position_ids|embed_positions|positions_embed|wpe))(\.weight)?"
)
"""Names of tables of a text's positions, without and with `.weight`."""
_FLOATING = ("pixel_values", "input_values", "input_features", "inputs_embeds")

Stated = Mapping[str, torch.Tensor | Sequence[int]]
"""An input: tensors, or their shapes."""


def stated_inputs(model: PreTrainedModel, inputs: Stated | None) -> dict[str, torch.Tensor]:
    """Return the arguments of a model's forward for counting its cost, on the model's device.

    Args:
        model: The classifier.
        inputs: Tensors, or shapes such as `{"input_ids": [1, 128]}`; one example of
            `example_inputs` if not given.
    """
    if inputs is None:
        return example_inputs(model)
    result = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            dtype = model.dtype if name in _FLOATING else torch.long
            value = torch.ones(tuple(value), dtype=dtype)
        result[name] = value.to(next(model.parameters()).device)
    return result


def example_inputs(
    model: PreTrainedModel, batch_size: int = 1, seed: int = 0, length: int | None = None
) -> dict[str, torch.Tensor]:
    """Build random inputs of the right kind and size for a classifier.

    Args:
        model: The classifier; its config gives sizes, its `main_input_name` the modality.
        batch_size: Number of examples.
        seed: Seed of the contents.
        length: Tokens, samples, frames or pixels each way, where the model takes any number. 128
            tokens, one second at 16 kHz, 128 frames or 224 pixels if not given.

    Returns:
        The arguments of the model's forward, on the model's device.

    Raises:
        ValueError: The model's main input is of an unknown kind, the model has fewer positions than
            `length`, or takes one example at a time for want of a padding token.
    """
    config, name = model.config, model.main_input_name
    generator = torch.Generator().manual_seed(seed)
    kind = _perceived(model) if name == "inputs" else name
    if kind == "input_ids":
        if batch_size > 1 and needs_padding(model):
            raise ValueError(
                f"{type(model).__name__} has no padding token, so it takes one text at a time, not "
                f"{batch_size}: set pad_token_id in its config, or save a tokenizer beside it"
            )
        text = config.get_text_config()
        ids = _text(model, text, batch_size, length, generator)
        if config.is_encoder_decoder:
            # BART and T5 classify from the position of the only end token.
            ids[:, -1] = text.eos_token_id
        inputs = {name: ids, "attention_mask": torch.ones_like(ids)}
    elif kind == "pixel_values":
        inputs = {name: torch.randn(batch_size, *_image_shape(config, length), generator=generator)}
        patches = getattr(getattr(config, "vision_config", None), "num_patches", None)
        if patches:
            inputs |= _patches(config.vision_config, batch_size, generator)
    elif kind in ("input_values", "input_features"):
        shape = (batch_size, *_speech_shape(config, length))
        inputs = {name: torch.randn(shape, generator=generator)}
    else:
        raise ValueError(
            f"{type(model).__name__} takes {name!r}; example inputs are known for input_ids, "
            "pixel_values, input_values and input_features: pass inputs of your own"
        )
    parameter = next(model.parameters())
    return {
        key: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for key, value in inputs.items()
    }


def needs_padding(model: nn.Module) -> bool:
    """Return whether a model finds the end of a text by its padding token and has none."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return False
    if getattr(config.get_text_config(), "pad_token_id", None) is not None:
        return False
    forwards = (vars(cls).get("forward") for cls in type(base_of(model)).__mro__)
    codes = (getattr(inspect.unwrap(one), "__code__", None) for one in forwards if one)
    return any("pad_token_id" in code.co_names for code in codes if code)


def text_positions(model: nn.Module) -> int | None:
    """Return the number of tokens that a model has a table of positions for; None for any."""
    tables, ids = [], []
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if (match := _POSITIONS.fullmatch(name)) is None:
            continue
        if name.endswith("position_ids"):
            ids.append(tensor.shape[-1])
            continue
        table: Any = model.get_submodule(match[1]) if match[2] else None
        # BART-like tables begin at an offset, RoBERTa-like ones behind the padding index.
        padding = getattr(table, "padding_idx", None)
        skipped = getattr(table, "offset", 0 if padding is None else padding + 1)
        tables.append(len(tensor) - skipped)
    return min(tables + ids) if tables else None


def _text(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    batch_size: int,
    length: int | None,
    generator: torch.Generator,
) -> torch.Tensor:
    if length is None:
        longest = getattr(config, "max_position_embeddings", None) or TEXT_LENGTH + 2
        # RoBERTa-like models count positions from the padding index on.
        length = min(TEXT_LENGTH, max(longest - 2, 1))
    elif (most := text_positions(model)) is not None and length > most:
        raise ValueError(
            f"length {length} is more than the {most} positions of {type(model).__name__}: set it "
            f"to {most} or less"
        )
    shape = (batch_size, length)
    size = getattr(config, "vocab_size", CHARACTERS)
    special = set()
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        special |= set(token) if isinstance(token, list) else {token}
    ids = torch.randint(size, shape, generator=generator)
    free = next(i for i in range(size - 1, -1, -1) if i not in special)
    for token in special:
        if isinstance(token, int):
            ids = ids.masked_fill(ids == token, free)
    return ids


def _image_shape(config: PreTrainedConfig, length: int | None) -> tuple[int, int, int]:
    config = getattr(config, "vision_config", config)
    timm = getattr(config, "pretrained_cfg", None) or {}
    if "input_size" in timm:
        channels, height, width = timm["input_size"]
        return channels, height, width
    size = getattr(config, "image_size", length or IMAGE_SIZE)
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def _patches(
    config: PreTrainedConfig, batch_size: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return an image for SigLIP 2: flat patches, and their number each way."""
    side = math.isqrt(config.num_patches)
    pixels = config.num_channels * config.patch_size**2
    return {
        "pixel_values": torch.randn(batch_size, side * side, pixels, generator=generator),
        "pixel_attention_mask": torch.ones(batch_size, side * side, dtype=torch.long),
        "spatial_shapes": torch.full((batch_size, 2), side),
    }


def _perceived(model: PreTrainedModel) -> str:
    """Return the kind of input that a Perceiver's preprocessor embeds."""
    embeds = getattr(model.get_submodule("perceiver.input_preprocessor"), "embeddings", None)
    return "pixel_values" if embeds is None else "input_ids"


def _speech_shape(config: object, length: int | None) -> tuple[int, ...]:
    mel = getattr(config, "num_mel_bins", None)
    positions = getattr(config, "max_source_positions", None)
    if mel and positions:
        return mel, 2 * positions
    if mel:
        return getattr(config, "max_length", None) or length or 1024, mel
    features = getattr(config, "feature_projection_input_dim", None)
    if features:
        return length or 128, features
    return (length or AUDIO_SAMPLES,)
