"""Models with PEFT adapters: the model inside, and an equal plain model."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.utils import logging

__all__ = ["base_of", "check_merged", "merge_adapters", "plain_twin"]

logger = logging.get_logger(__name__)


def base_of(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merge_adapters(model: Any) -> Any:
    """Fold a model's adapters into its weights, so that it can be pruned and exported.

    Args:
        model: A `peft.PeftModel`, which changes; a model without adapters is returned unchanged.

    Returns:
        The transformers model inside, without adapters, with all parameters trainable. In float32
        its logits equal those of the adapted model up to rounding.

    Raises:
        ValueError: The adapters cannot be folded in: prompts and prefixes, adapters on quantized
            weights, or adapters that transformers itself has added.
    """
    layers = _adapted_layers(model)
    kinds = getattr(model, "peft_config", {}) if hasattr(model, "get_base_model") else {}
    if not layers and not kinds:
        return model
    prompts = [c for c in kinds.values() if getattr(c, "is_prompt_learning", False)]
    if not kinds or prompts:
        what = f"{prompts[0].peft_type.value} adapters" if prompts else "these adapters"
        raise ValueError(
            f"{what} of {type(base_of(model)).__name__} cannot be folded into weights: train with "
            "peft.get_peft_model and LoRA or its kin."
        )
    weights = [layer.get_base_layer().weight for layer in layers]
    if not all(weight.is_floating_point() for weight in weights):
        raise ValueError(
            "the adapters lie on quantized weights, which cannot take them up exactly: load the "
            "base in float32 or bfloat16, the adapter onto it, and merge that."
        )
    plain = model.merge_and_unload(safe_merge=True).requires_grad_(True)
    rounded = {str(w.dtype) for w in weights if w.dtype != torch.float32}
    logger.info(
        f"{len(layers)} adapted layers of {type(plain).__name__} are folded into their weights"
        + (f", rounded to {', '.join(sorted(rounded))}" if rounded else "")
    )
    return plain


def check_merged(model: nn.Module) -> None:
    """Raise ValueError if a model has adapters, which a cut would separate from its weights."""
    layers = _adapted_layers(model)
    if layers:
        raise ValueError(
            f"{type(base_of(model)).__name__} has adapters on {len(layers)} layers: fold them into "
            "the weights first, by model = hfslim.merge_adapters(model)."
        )


def plain_twin(model: Any) -> Any:
    """Return a copy of a model without adapters and without values, for inspection.

    The copy has the shapes of the model, pruned or not. Linear maps with computed weights, such as
    8-bit ones, get weights of their own. A model without either is returned itself.
    """
    computed = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight")
    ]
    adapted = _adapted_layers(model)
    if not adapted and not computed:
        return model
    empty: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()
    } | {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    twin = copy.deepcopy(model, empty)
    for path in computed:
        old: Any = twin.get_submodule(path)
        bias = old.bias is not None
        twin.set_submodule(path, nn.Linear(old.in_features, old.out_features, bias, device="meta"))
    if not adapted:
        return twin
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    for path, module in list(twin.named_modules()):
        if isinstance(module, BaseTunerLayer):
            twin.set_submodule(path, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            twin.set_submodule(path, module.original_module)
    return twin


def _adapted_layers(model: nn.Module) -> list[Any]:
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
