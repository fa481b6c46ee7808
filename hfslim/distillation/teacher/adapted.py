"""Load a teacher that is a PEFT adapter, on its own base or on the student's frozen base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from hfslim.anatomy.adapters import base_of

__all__ = ["base_source", "find_adapter", "load_adapted", "saved_config"]

logger = logging.get_logger(__name__)


def find_adapter(source: str, revision: str = "main") -> Any | None:
    """Return the PEFT config of a folder or Hub id, or None if it holds no adapter."""
    try:
        path = find_adapter_config_file(source, revision=revision)
    except OSError:
        return None
    return None if path is None else PeftConfig.from_pretrained(str(Path(path).parent))


def base_source(source: str, revision: str = "main") -> tuple[str, str]:
    """Return the source and revision of an adapter's base, or those of a whole model."""
    adapter = find_adapter(source, revision)
    if adapter is None:
        return source, revision
    return adapter.base_model_name_or_path, adapter.revision or "main"


def saved_config(
    source: str, revision: str = "main", labels: PreTrainedConfig | None = None
) -> PreTrainedConfig:
    """Read the config of a model or of an adapter's model.

    An adapter without a config of its own gets the label names of its base, or of the config
    `labels` (the student's) if the base has none.

    Raises:
        OSError: There is no model.
    """
    try:
        return AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError):
        if find_adapter(source, revision) is None:
            raise
        base, base_revision = base_source(source, revision)
        config = AutoConfig.from_pretrained(base, revision=base_revision)
    generic = list(config.id2label.values()) == [f"LABEL_{i}" for i in range(config.num_labels)]
    if generic and labels is not None:
        logger.warning(
            f"The adapter {source} has no label names; they are assumed to be the student's, in "
            f"this order: {list((labels.id2label or {}).values())}. Save a config "
            "beside the adapter to be sure."
        )
        config.id2label, config.label2id = labels.id2label, labels.label2id
    return config


def load_adapted(
    source: str, revision: str, adapter: Any, student: nn.Module, auto: Any, dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """Load an adapter on the student's frozen base if it is the same, else on its own base.

    On the student's base the teacher's parameters share the student's memory. Into its own base the
    adapter is merged.

    Args:
        source: Hub id or folder of the adapter.
        revision: Revision of a Hub id.
        adapter: The result of `find_adapter`.
        student: The student on its device.
        auto: Auto class of the task.
        dtype: Dtype of the teacher's weights.

    Returns:
        The model, and the names of the weights that neither base nor adapter has.

    Raises:
        ValueError: The adapter does not fit its base.
    """
    base, base_revision = adapter.base_model_name_or_path, adapter.revision or "main"
    labels: Any = base_of(student)
    config = saved_config(source, revision, labels.config)
    frozen, why = _frozen_base(student, base, base_revision, dtype)
    if frozen is not None:
        plain, missing, why = _on_shared(frozen, config, auto)
        if not why:
            model, missing = _adapt(plain, missing, source, revision, config)
            if not missing:
                logger.info(f"the adapter {source} shares the student's frozen weights of {base}")
                return model, []
            why = f"the student's base has no {missing[0]}"
    logger.info(f"the adapter {source} gets its own copy of {base}: {why}")
    plain, info = auto.from_pretrained(
        base,
        config=config,
        revision=base_revision,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    model, missing = _adapt(plain, missing, source, revision, config)
    return model.merge_and_unload(), missing


def _adapt(
    plain: Any, missing: list[str], source: str, revision: str, config: PreTrainedConfig
) -> tuple[Any, list[str]]:
    """Put the adapter on a model, and return the missing weights that it does not have either."""
    try:
        model: Any = PeftModel.from_pretrained(plain, source, revision=revision)
    except RuntimeError as error:
        raise ValueError(
            f"The adapter {source} does not fit a base with the {config.num_labels} labels "
            f"{list((config.id2label or {}).values())}: {' '.join(str(error).split())}"
        ) from error
    brought = tuple(
        name.removeprefix("base_model.model.").removesuffix("modules_to_save")
        for name, _ in model.named_modules()
        if name.endswith(".modules_to_save")
    )
    return model, sorted(key for key in missing if not key.startswith(brought))


def _frozen_base(
    student: Any, base: str, revision: str, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor] | None, str]:
    """Return the tensors of the student's frozen base by name, or why they cannot be shared."""
    configs = getattr(student, "peft_config", None)
    if not isinstance(student, PeftModel) or not configs:
        return None, "the student has no adapter on a frozen base"
    own = configs[student.active_adapter]
    name, own_revision = own.base_model_name_or_path, own.revision or "main"
    if _place(name) != _place(base) or own_revision != revision:
        return None, f"the student's base is {name} ({own_revision})"
    plain = base_of(student)
    if getattr(plain.config, "hfslim", None):
        return None, "the student's base is pruned"
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
        if {"modules_to_save", "original_module"} & set(name.split(".")) or "lora_" in name:
            continue
        if tensor.is_floating_point() and (tensor.requires_grad or tensor.dtype != dtype):
            return None, f"{name} is trained in the student, or is {tensor.dtype}"
        tensors[name.replace(".base_layer.", ".")] = tensor.detach()
    return tensors, ""


def _on_shared(
    tensors: dict[str, torch.Tensor], config: PreTrainedConfig, auto: Any
) -> tuple[Any, list[str], str]:
    """Build a model on given tensors; return it, the names of new tensors, and why it failed."""
    with torch.device("meta"):
        model = auto.from_config(config)
    new = []
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            whole = f"{path}.{name}" if path else name
            shared = tensors.get(whole)
            if shared is None or shared.shape != tensor.shape:
                new.append(whole)
                shared = torch.zeros(tensor.shape, dtype=tensor.dtype)
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(shared, requires_grad=False)
            else:
                module._buffers[name] = shared
        if any(torch.is_tensor(v) and v.is_meta for v in vars(module).values()):
            return None, [], f"{type(module).__name__} has tensors outside of its state"
    return model, new, ""


def _place(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).is_dir() else source
