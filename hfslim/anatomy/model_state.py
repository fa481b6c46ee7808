"""Checks that a model is in a state in which its weights can be read, scored and cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hfslim.anatomy.adapters import check_merged

CLASSIFIERS = tuple(
    f"MODEL_FOR_{task}_MAPPING_NAMES"
    for task in (
        *("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION"),
        *("VIDEO_CLASSIFICATION", "TIME_SERIES_CLASSIFICATION", "VISUAL_QUESTION_ANSWERING"),
    )
)
"""The tables of transformers' auto classes whose logits are `[batch, classes]`."""


def check_state(model: Any) -> None:
    """Check that a model's weights are plain parameters of its own.

    Weights that the model's class computes itself, such as the positional convolution of wav2vec
    2.0, are allowed.

    Raises:
        TypeError: The model is no module, or a wrapper around a transformers model.
        ValueError: It has adapters, compiled parts, quantized weights, or weights that hooks or
            parametrizations compute. The message gives the way out.
    """
    if isinstance(model, nn.Module):
        check_merged(model)
    check_unwrapped(model)
    name = type(model).__name__
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            what = f"its {path!r} is" if path else "it is"
            raise ValueError(
                f"{name}: {what} compiled, and a compiled model does not see changes: pass the "
                "model from before torch.compile, its `_orig_mod`, and compile the result"
            )
    quantized = next(_quantized(model), None)
    if quantized is not None:
        raise ValueError(
            f"{name} has quantized or packed weights, such as {quantized}: load the model in "
            "float32 or bfloat16 without quantization_config, or call model.dequantize(), and "
            "convert the result"
        )
    computed = dict(_computed(model))
    if computed:
        computed = {
            k: way for k, way in computed.items() if k not in dict(_computed(_stock(model)))
        }
    if computed:
        path, (what, way) = next(iter(computed.items()))
        raise ValueError(
            f"{name} computes {len(computed)} tensors from others at each call, such as {path!r} "
            f"by {what}: make them plain parameters first, by {way} for each"
        )


def check_unwrapped(model: Any) -> None:
    """Raise a TypeError unless a model is a module, and no wrapper around a transformers model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got {model!r}: load it with from_pretrained first")
    if isinstance(model, PreTrainedModel):
        return
    inner = next((name for name, m in model.named_modules() if isinstance(m, PreTrainedModel)), "")
    if inner:
        raise TypeError(
            f"{type(model).__name__} is a wrapper: pass the model inside, its {inner!r}; merge "
            "adapters first (`merge_and_unload()`)"
        )


def check_classifier(model: Any) -> None:
    """Raise a ValueError if a model's class is known to have other logits than a classifier's.

    Other classes are known by their logits only.
    """
    check_head(*(c.__name__ for c in type(model).__mro__))


def check_head(*names: str) -> None:
    """Raise a ValueError if the first known of some classes is not a classifier's."""
    heads: dict[str, str] = {}
    for table, classes in vars(modeling_auto).items():
        if table.startswith("MODEL_FOR_") and table.endswith("_MAPPING_NAMES"):
            for given in classes.values():
                for one in (given,) if isinstance(given, str) else given:
                    if heads.get(one) not in CLASSIFIERS:
                        heads[one] = table
    name = next((name for name in names if name in heads), "")
    if name and heads[name] not in CLASSIFIERS:
        task = heads[name].removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES")
        raise ValueError(
            f"{name} is a model for {task.lower().replace('_', ' ')}, not a "
            "classifier, whose logits are [batch, classes]: load it by "
            "AutoModelForSequenceClassification, AutoModelForImageClassification or "
            "AutoModelForAudioClassification, and train its head"
        )


def _computed(model: nn.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the path of each computed tensor, what computes it, and the way to a plain one."""
    old = {WeightNorm: "remove_weight_norm(module)", SpectralNorm: "remove_spectral_norm(module)"}
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
                way = f"torch.nn.utils.prune.remove(module, {name!r})"
                yield f"{path}.{name}", ("torch.nn.utils.prune", way)
            elif type(hook) in old:
                way = f"torch.nn.utils.{old[type(hook)]}"
                yield f"{path}.{hook.name}", (type(hook).__name__, way)
        if parametrize.is_parametrized(module):
            for name, steps in module.parametrizations.items():
                way = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
                what = " and ".join(type(step).__name__ for step in steps)
                yield f"{path}.{name}", (what, way)


def _stock(model: nn.Module) -> nn.Module:
    """Build the stock model of a model's config, without weights; an empty one if it has none."""
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if config is None:
        return nn.Module()
    for mark in ("hfslim", "quantization_config", "auto_map"):
        vars(config).pop(mark, None)
    own = (c for c in type(model).__mro__ if not c.__module__.endswith("modeling_hfslim"))
    with torch.device("meta"):
        return next(own)(config)


def _quantized(model: nn.Module) -> Iterator[str]:
    """Yield the quantized weights, with their type."""
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    name = getattr(method, "quant_method", None)
    if name is not None and getattr(name, "value", name) != "hfslim":
        yield f"those of {getattr(name, 'value', name)}"
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn"):
            yield f"{path!r} ({type(module).__name__})"
    for path, parameter in model.named_parameters():
        kinds = [kind for kind in (type(parameter), type(parameter.data)) if _foreign(kind)]
        if kinds or not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
            kind = kinds[-1].__name__ if kinds else parameter.dtype
            yield f"{path!r} ({kind})"


def _foreign(kind: type) -> bool:
    """Return whether a tensor's type is no plain one of torch, and not a part of one (FSDP)."""
    plain = (torch.Tensor, nn.Parameter)
    return kind not in plain and not kind.__module__.startswith(("torch.distributed", "torch.nn"))
