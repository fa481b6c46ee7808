"""Text classification: one text, or a pair."""

from __future__ import annotations

from typing import Any, ClassVar

import datasets
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedConfig,
)
from transformers.utils import logging

from hfslim.anatomy.inputs import text_positions
from hfslim.tasks.base import Batch, Collator, Reader, Task
from hfslim.tasks.data import DataConfig, check_texts, find_column
from hfslim.tasks.pairing import has_words

logger = logging.get_logger(__name__)


class TextClassification(Task):
    """Classify a text, or a pair of texts, tokenised once and padded batch by batch."""

    name = "text-classification"
    auto_model: ClassVar[Any] = AutoModelForSequenceClassification

    def load_processor(
        self, source: str | None, config: PreTrainedConfig, revision: str = "main"
    ) -> Any:
        """Load the tokenizer; one without a padding token pads with its end-of-text token.

        Raises:
            OSError: There is no tokenizer.
            ValueError: No source is given: a tokenizer cannot be made from a config. Or there is
                no token to pad with.
        """
        if source is None:
            raise ValueError(
                "a text model made from model_config needs `processor`: "
                "the Hub id or folder of a tokenizer"
            )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        if not has_words(tokenizer):
            raise OSError(f"{source} has no tokenizer: set `processor` to a Hub id or folder")
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError(
                    f"the tokenizer of {source} has neither a padding nor an end-of-text token, so "
                    "texts cannot be batched: save it with a pad_token, or set `processor`"
                )
            logger.warning("%s has no padding token: padding with its end of text", source)
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def input_columns(self, dataset: datasets.Dataset, data: DataConfig) -> tuple[str, ...]:
        """Find the column of the text and, where one is named, of its pair."""
        text = find_column(dataset, data.text_column_name, ("text", "sentence"), "text_column_name")
        if data.text_pair_column_name is None:
            return (text,)
        key = "text_pair_column_name"
        return (text, find_column(dataset, data.text_pair_column_name, (), key))

    def check_inputs(self, dataset: datasets.Dataset, columns: tuple[str, ...]) -> None:
        """Raise ValueError for missing texts; warn of blank ones."""
        for column in columns:
            check_texts(dataset, column)

    def reader(self, columns: tuple[str, ...], data: DataConfig, processor: Any) -> Reader:
        """Tokenise every text, cut to `max_seq_length` tokens."""
        if data.max_seq_length > processor.model_max_length:
            raise ValueError(
                f"max_seq_length {data.max_seq_length} is more than the tokenizer's "
                f"{processor.model_max_length}: set data.max_seq_length to that or less"
            )

        def tokenize(batch: Batch) -> dict[str, Any]:
            texts = (batch[column] for column in columns)
            return dict(processor(*texts, truncation=True, max_length=data.max_seq_length))

        return tokenize

    def check_model(self, config: PreTrainedConfig, data: DataConfig) -> None:
        """Raise ValueError for texts that may be longer than the model's table of positions."""
        text = config.get_text_config()
        skipped = (getattr(text, "pad_token_id", None) or 0) + 1
        if (getattr(text, "max_position_embeddings", 0) or 0) - skipped >= data.max_seq_length:
            return
        with torch.device("meta"):
            most = text_positions(self.auto_model.from_config(config))
        if most is not None and data.max_seq_length > most:
            raise ValueError(
                f"max_seq_length {data.max_seq_length} is more than the {most} positions of this "
                f"{config.model_type}: set data.max_seq_length to {most} or less"
            )

    def stated_length(self, data: DataConfig, processor: Any) -> int | None:
        """Return `max_seq_length` tokens."""
        return data.max_seq_length

    def batcher(self, processor: Any) -> Collator:
        """Pad each batch to its longest text."""
        return DataCollatorWithPadding(processor)
