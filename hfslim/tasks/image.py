"""Image classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    ViTConfig,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from hfslim.tasks.base import Collator, Reader, Task, targets
from hfslim.tasks.data import DataConfig, find_column


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
        names, key, holds = ("image", "img"), "image_column_name", (datasets.Image, "images")
        return (find_column(dataset, data.image_column_name, names, key, holds),)

    def reader(self, columns: tuple[str, ...], data: DataConfig, processor: Any) -> Reader:
        """Process each image when it is read, converted to the processor's channels."""
        return lambda batch: {"pixel_values": list(_pixels(batch[columns[0]], processor))}

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
