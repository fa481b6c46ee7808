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

from hfslim.tasks.base import Batch, Collator, Reader, Task, targets
from hfslim.tasks.data import DataConfig, find_column


def read_audio(source: dict[str, Any], rate: int, max_seconds: float) -> np.ndarray:
    """Read the start of a recording as one channel at a given rate.

    Args:
        source: `bytes` of a sound file or its `path`, as `datasets.Audio(decode=False)` gives.
        rate: Samples per second wanted.
        max_seconds: Seconds after which the recording is cut.

    Returns:
        Float32 samples, `[samples]`.

    Raises:
        ValueError: The file is no sound that can be read, or is empty.
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
    if own_rate == rate:
        return mono
    shared = gcd(rate, own_rate)
    return resample_poly(mono, rate // shared, own_rate // shared).astype(np.float32)


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
        """Find the column of the recording.

        Raises:
            ValueError: The column does not hold recordings.
        """
        column = find_column(dataset, data.audio_column_name, ("audio",), "audio_column_name")
        if not isinstance(dataset.features[column], datasets.Audio):
            raise ValueError(
                f"column {column!r} holds {dataset.features[column]}, not recordings: "
                "set audio_column_name"
            )
        return (column,)

    def raw(self, dataset: datasets.Dataset, columns: tuple[str, ...]) -> datasets.Dataset:
        """Leave the recordings undecoded."""
        return dataset.cast_column(columns[0], datasets.Audio(decode=False))

    def reader(self, columns: tuple[str, ...], data: DataConfig, processor: Any) -> Reader:
        """Read and resample each recording when it is asked for."""
        (audio,) = columns

        def read(batch: Batch) -> dict[str, Any]:
            waves = [
                read_audio(one, processor.sampling_rate, data.max_length_seconds)
                for one in batch[audio]
            ]
            return {"wave": waves}

        return read

    def stated_length(self, data: DataConfig, processor: Any) -> int | None:
        """Return the samples of a recording of `max_length_seconds`."""
        return round(data.max_length_seconds * processor.sampling_rate)

    def batcher(self, processor: Any) -> Collator:
        """Extract the features of a batch, padded as the extractor does by default.

        Extractors of a fixed length (Whisper, AST) pad to it; the others pad to the longest
        recording of the batch.
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
