"""Models of a task, from the Hub, a folder or a config, with the labels of the data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from hfslim.anatomy.model_state import check_head
from hfslim.anatomy.outputs import label_names
from hfslim.tasks.base import Task
from hfslim.tasks.data import did_you_mean
from hfslim.tasks.labels import Labels
from hfslim.tasks.padding import set_padding

logger = logging.get_logger(__name__)


def make_config(settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Make a config from `model_type` and its fields.

    Raises:
        ValueError: The model type or a field is unknown; the message has the nearest.
    """
    given = dict(settings)
    model_type = given.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), CONFIG_MAPPING)
        raise ValueError(f"model_config.model_type: unknown {model_type!r}{hint}")
    default = CONFIG_MAPPING[model_type]()
    known = {*default.to_dict(), *default.attribute_map}
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ValueError(f"model_config.{key}: {model_type} has no such field{hint}")
    return CONFIG_MAPPING[model_type](**given)


def build_model(
    task: Task, settings: Mapping[str, Any], labels: Labels, processor: Any = None
) -> PreTrainedModel:
    """Build an untrained model from `model_config`, with the padding token of a processor."""
    config = make_config({**settings, **labels.config})
    set_padding(config, processor)
    model_class = task.auto_model._model_mapping[type(config)]
    config.architectures = [model_class.__name__]
    return task.auto_model.from_config(config)


def padded_config(task: Task, source: str) -> PreTrainedConfig:
    """Load a model's config, with the padding token of the processor that is saved with it."""
    config, processor = AutoConfig.from_pretrained(source), None
    if getattr(config.get_text_config(), "pad_token_id", None) is None:
        with suppress(OSError, ValueError):
            processor = task.load_processor(source, config)
    set_padding(config, processor)
    return config


def load_model(
    task: Task, source: str, labels: Labels, new_head: bool, processor: Any = None
) -> PreTrainedModel:
    """Load a model for the labels of the data.

    A head that was trained on the same labels is kept. Where the number of labels differs, or
    there is no head, a new one is made if `new_head` allows it.

    Args:
        task: Kind of classification.
        source: Hub id or local folder.
        labels: Labels of the data, paired with the model's outputs unless it gets a new head.
        new_head: Whether a new head is allowed, because the model is trained next.
        processor: Its padding token is taken into a config that has none.

    Raises:
        ValueError: The labels or the head do not match and `new_head` is false, or the padding
            token is outside of the vocabulary.
    """
    config = AutoConfig.from_pretrained(source)
    names = label_names(config)
    if not new_head:
        try:
            labels = labels if labels.by else labels.paired(names)
            fits = len(names) == len(labels.names)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{source} has the labels {list(names)}, the data have {list(labels.names)}: "
                "begin with a `transfer` stage, which trains a new head"
            )
    if names != labels.names:
        logger.warning("%s: labels %s become %s", source, list(names), list(labels.names))
    config = AutoConfig.from_pretrained(source, **labels.config)
    set_padding(config, processor)
    model, info = task.auto_model.from_pretrained(
        source,
        config=config,
        ignore_mismatched_sizes=len(names) != len(labels.names),
        output_loading_info=True,
    )
    _check_loaded(source, info, len(names), len(labels.names), new_head)
    if not new_head:
        check_head(*(config.architectures or ()))
    return model


def _check_loaded(
    source: str, info: Mapping[str, Any], before: int, after: int, new_head: bool
) -> None:
    """Refuse missing and mismatched weights that a new head does not explain."""
    for key, stored, wanted in info["mismatched_keys"]:
        if stored[0] != before or wanted[0] != after or stored[1:] != wanted[1:]:
            raise ValueError(
                f"{source}: weight {key} is stored as {tuple(stored)}, the model needs "
                f"{tuple(wanted)}: the folder is damaged or holds another model"
            )
    if info["missing_keys"] and not new_head:
        raise ValueError(
            f"{source} lacks trained weights for {sorted(info['missing_keys'])}: "
            "begin with a `transfer` stage, which trains them"
        )
