"""Image classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    ViTConfig,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from hfslim.tasks.base import Batch, Collator, Reader, Task, targets
from hfslim.tasks.data import DataConfig, find_column, open_paths

SIXTEEN_BITS = 65_535
"""Largest value of 16 bits."""


def read_image(source: dict[str, Any]) -> Image.Image:
    """Read an image, in 8 bits a channel.

    Args:
        source: `bytes` of an image file or its `path`, as of `datasets.Image(decode=False)`.

    Raises:
        ValueError: The file is not a readable image, or has values that no scale is known for.
    """
    name = source["path"] or "image"
    try:
        image = datasets.Image().decode_example(source)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: not an image that can be read ({error})") from error
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")):
        raise ValueError(
            f"{name}: its values go from {values.min():g} to {values.max():g}, and those of an "
            f"image from 0 to 255, or to {SIXTEEN_BITS} in 16 bits: save it as such"
        )
    return Image.fromarray((values / (SIXTEEN_BITS / 255)).round().astype(np.uint8))


class ImageClassification(Task):
    """Classify an image, which is processed when it is read: any data set fits in memory."""

    name = "image-classification"
    auto_model: ClassVar[Any] = AutoModelForImageClassification
    folder_builder = "imagefolder"
    lazy = True

    def load_processor(
        self, source: str | None, config: PreTrainedConfig, revision: str = "main"
    ) -> Any:
        """Load the image processor, or make the family's for the config's size and channels.

        Raises:
            ValueError: The model's family has no image processor.
        """
        if source is not None:
            return AutoImageProcessor.from_pretrained(source, revision=revision, backend="pil")
        if type(config) not in IMAGE_PROCESSOR_MAPPING:
            raise ValueError(
                f"no image processor is known for {config.model_type!r}: "
                "set `processor` to a Hub id or folder"
            )
        size = getattr(config, "image_size", None)
        if not isinstance(size, int):
            raise ValueError(
                f"the config of {config.model_type!r} does not state the size of an image "
                f"(image_size is {size!r}): set `processor` to a Hub id or folder"
            )
        channels = config.num_channels
        # Convolutional families resize and then crop; a model from scratch gets the whole image.
        known: Any = IMAGE_PROCESSOR_MAPPING
        whole = {"height", "width"} <= set(known[type(config)]["pil"].size)
        return known[type(config) if whole else ViTConfig]["pil"](
            size={"height": size, "width": size},
            image_mean=[0.5] * channels,
            image_std=[0.5] * channels,
        )

    def input_columns(self, dataset: datasets.Dataset, data: DataConfig) -> tuple[str, ...]:
        """Find the column of the image."""
        key = "image_column_name"
        return (find_column(dataset, data.image_column_name, ("image", "img"), key),)

    def opened(
        self, dataset: datasets.Dataset, columns: tuple[str, ...], file: str | None
    ) -> datasets.Dataset:
        """Leave the images undecoded; a data file may hold their paths."""
        return open_paths(dataset, columns[0], datasets.Image(decode=False), file)

    def reader(self, columns: tuple[str, ...], data: DataConfig, processor: Any) -> Reader:
        """Process each image when it is read, converted to the processor's channels."""

        def read(batch: Batch) -> dict[str, Any]:
            images = [read_image(one) for one in batch[columns[0]]]
            return {"pixel_values": list(_pixels(images, processor))}

        return read

    def stated_length(self, data: DataConfig, processor: Any) -> int | None:
        """Return the side of the processor's images; None if they are not square."""
        *_, height, width = _pixels([Image.new("L", (64, 64))], processor).shape
        return width if height == width else None

    def batcher(self, processor: Any) -> Collator:
        """Stack the images."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            images = torch.stack([row["pixel_values"] for row in rows])
            return {"pixel_values": images, **targets(rows)}

        return collate


def _pixels(images: Sequence[Image.Image], processor: Any) -> torch.Tensor:
    """Return a processor's pixels of images, `[images, channels, height, width]`."""
    mode = "L" if len(processor.image_mean or ()) == 1 else "RGB"
    converted = [image.convert(mode) for image in images]
    return processor(converted, return_tensors="pt", input_data_format=None)["pixel_values"]
