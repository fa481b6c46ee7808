"""Audio classification."""

from __future__ import annotations

import inspect
import io
from math import gcd
from typing import Any, ClassVar

import datasets
import numpy as np
import soundfile
from scipy.signal import resample_poly
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, PreTrainedConfig
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.utils import logging

from hfslim.tasks.base import Collator, Reader, Task, targets
from hfslim.tasks.data import DataConfig, find_column, open_paths

logger = logging.get_logger(__name__)

MIN_SECONDS = 0.05
"""Least length of a recording; the first layers of speech models see up to 45 ms at once."""


def read_audio(source: dict[str, Any], rate: int, max_seconds: float) -> np.ndarray:
    """Read the start of a recording as one channel at a given rate.

    Args:
        source: `bytes` of a sound file or its `path`, as of `datasets.Audio(decode=False)`.
        rate: Samples per second of the result, float32 `[samples]`; silence is added to a recording
            below `MIN_SECONDS`.
        max_seconds: Seconds after which the recording is cut.

    Raises:
        ValueError: The file is not a readable sound file, or is empty.
    """
    name = source["path"] or "recording"
    try:
        with soundfile.SoundFile(io.BytesIO(source["bytes"]) if source["bytes"] else name) as file:
            own_rate = file.samplerate
            wave = file.read(round(max_seconds * own_rate), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name}: not a sound file that can be read ({error})") from error
    if len(wave) == 0:
        raise ValueError(f"{name}: the recording is empty")
    mono = wave.mean(axis=1)
    if own_rate != rate:
        shared = gcd(rate, own_rate)
        mono = resample_poly(mono, rate // shared, own_rate // shared).astype(np.float32)
    short = round(MIN_SECONDS * rate) - len(mono)
    if short <= 0:
        return mono
    logger.warning_once(
        f"{name}: {len(mono) / rate * 1000:.0f} ms are less than the window of a model; recordings "
        f"below {MIN_SECONDS * 1000:.0f} ms get silence at their end"
    )
    return np.pad(mono, (0, short))


class AudioClassification(Task):
    """Classify a recording, read by soundfile and resampled to the model's rate."""

    name = "audio-classification"
    auto_model: ClassVar[Any] = AutoModelForAudioClassification
    folder_builder = "audiofolder"
    lazy = True

    def load_processor(
        self, source: str | None, config: PreTrainedConfig, revision: str = "main"
    ) -> Any:
        """Load the feature extractor, or make the family's own with its defaults.

        Raises:
            ValueError: The model's family has no feature extractor.
        """
        if source is not None:
            return AutoFeatureExtractor.from_pretrained(source, revision=revision)
        if type(config) not in FEATURE_EXTRACTOR_MAPPING:
            raise ValueError(
                f"no feature extractor is known for {config.model_type!r}: "
                "set `processor` to a Hub id or folder"
            )
        extractor: Any = FEATURE_EXTRACTOR_MAPPING[type(config)]
        return extractor()

    def input_columns(self, dataset: datasets.Dataset, data: DataConfig) -> tuple[str, ...]:
        """Find the column of the recording."""
        return (find_column(dataset, data.audio_column_name, ("audio",), "audio_column_name"),)

    def opened(
        self, dataset: datasets.Dataset, columns: tuple[str, ...], file: str | None
    ) -> datasets.Dataset:
        """Leave the recordings undecoded; a data file may hold their paths."""
        return open_paths(dataset, columns[0], datasets.Audio(decode=False), file)

    def reader(self, columns: tuple[str, ...], data: DataConfig, processor: Any) -> Reader:
        """Read and resample each recording when its example is read."""
        rate, seconds = processor.sampling_rate, data.max_length_seconds
        return lambda batch: {"wave": [read_audio(one, rate, seconds) for one in batch[columns[0]]]}

    def stated_length(self, data: DataConfig, processor: Any) -> int | None:
        """Return the number of samples in `max_length_seconds`."""
        return round(data.max_length_seconds * processor.sampling_rate)

    def batcher(self, processor: Any) -> Collator:
        """Extract the features of a batch.

        Extractors of a fixed length (Whisper, AST) pad to it, others to the longest recording.
        """
        default = inspect.signature(processor.__call__).parameters["padding"].default
        padding = default if default == "max_length" else True

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            inputs = processor(
                [row["wave"] for row in rows],
                sampling_rate=processor.sampling_rate,
                padding=padding,
                return_tensors="pt",
            )
            return {**inputs, **targets(rows)}

        return collate
