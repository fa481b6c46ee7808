"""The padding token of a model that classifies texts from their last token."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from hfslim.anatomy.inputs import needs_padding

__all__ = ["check_padding", "set_padding"]


def set_padding(config: PreTrainedConfig, processor: Any) -> None:
    """Take the padding token of a processor into the config of a model that has none.

    Raises:
        ValueError: The padding token is outside of the model's vocabulary.
    """
    padding, text = getattr(processor, "pad_token_id", None), config.get_text_config()
    if not isinstance(padding, int) or getattr(text, "pad_token_id", None) is not None:
        return
    size = getattr(text, "vocab_size", None)
    if size is not None and padding >= size:
        raise ValueError(
            f"the tokenizer pads with id {padding}, the model has a vocabulary of {size}: set "
            "tokenizer.pad_token = tokenizer.eos_token, or add the token to the model by "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    for one in (text, config):
        one.pad_token_id = padding


def check_padding(model: Any, processor: Any, batch_size: int, whose: str) -> None:
    """Set a model's padding token; refuse a batch of several texts where there is none.

    Args:
        model: The model.
        processor: What makes its inputs, if it is known.
        batch_size: Examples in a batch.
        whose: What the message calls the model.

    Raises:
        ValueError: Neither the model nor its processor has a padding token that fits, and the model
            cannot find the end of a text without one.
    """
    if isinstance(getattr(model, "config", None), PreTrainedConfig):
        set_padding(model.config, processor)
    if batch_size > 1 and needs_padding(model):
        raise ValueError(
            f"{whose} {type(model).__name__} has no padding token, so it takes one text at a time, "
            f"not {batch_size}: pass a tokenizer that has one, or set "
            "model.config.pad_token_id = tokenizer.eos_token_id"
        )
