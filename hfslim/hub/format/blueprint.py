"""Describe the differences between a pruned model and the stock model of its config."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Units
from hfslim.hub.format import modeling_hfslim
from hfslim.hub.format.depth import Depth, set_depth
from hfslim.hub.format.modeling_hfslim import stock_class
from hfslim.hub.format.width import new_widths, proposals, set_widths

logger = logging.getLogger(__name__)

MARKS = ("hfslim", "quantization_config", "auto_map")
"""Config fields: the blueprint, the call of hfslim's loader, the file beside the weights."""


def check_built(model: PreTrainedModel) -> None:
    """Check that a model's class builds all of its tensors; else no cut of it could be loaded.

    Raises:
        ValueError: The class does not build all of them.
    """
    # Names count the layers that an earlier cut left.
    stock = _cut_stock(model, model.config, _earlier_layers(model))
    unknown = sorted(set(_tensors(model)) - set(_tensors(stock)))
    if unknown:
        raise ValueError(
            f"{stock_class(model).__name__} builds no {unknown[0]!r}, so a cut model with it could "
            "not be loaded: fold it into the weights first, as "
            "torch.nn.utils.parametrize.remove_parametrizations does"
        )


def describe(
    model: PreTrainedModel,
    before: Units,
    structure: Structure,
    depth: Sequence[Depth] | None = None,
) -> bool:
    """Bring `model.config` up to date after surgery.

    The family's own fields describe depth and uniform widths where they can; only the rest goes
    into `config.hfslim`. If nothing is left, the config is a plain one, and the model loads without
    hfslim.

    Args:
        model: The model, already cut.
        before: The units that it had before the cut.
        structure: The structure it was cut to.
        depth: The result of `set_depth`, if it was called.

    Returns:
        Whether the model may compute something else now: because no stock model of the new depth
        can be built and the old depth is back in the config, or because modules got a new width.
    """
    earlier = _earlier_layers(model)
    depth = set_depth(model, before, structure) if depth is None else depth
    for field in MARKS:
        vars(model.config).pop(field, None)
    kept = _kept_layers(before, structure, earlier, {change.path for change in depth})
    put_back = bool(depth) and not _is_built(model, kept)
    if put_back:
        logger.info("%s builds no model of this depth: listing the layers", type(model).__name__)
        for change in depth:
            vars(change.config).update(change.old)
        kept = _kept_layers(before, structure, earlier, set())
    widths = new_widths(before, structure)
    for fields in proposals(model, before, structure):
        config = copy.deepcopy(model.config)
        if fields and not _takes(model, config, fields):
            continue
        left = difference(model, config, kept)
        changed = set_widths(model, left.get("attributes", {}), widths)
        if not left or not difference(model, config, kept):
            model.config.update(fields)
            logger.info("the pruned model is described by its plain config: %s", fields or "depth")
            return put_back or bool(widths)
        for settings, old in changed:
            settings.update(old)
    blueprint = difference(model, model.config, kept)
    if blueprint:
        mark(model, blueprint)
    return put_back


def mark(model: PreTrainedModel, blueprint: dict[str, Any]) -> None:
    """Put a blueprint into the config, with the fields for loading with hfslim and without."""
    name = f"Slim{stock_class(model).__name__}"
    model.config.hfslim = {"version": modeling_hfslim.VERSION, **blueprint}
    model.config.quantization_config = {"quant_method": "hfslim"}
    auto_classes = _auto_classes(stock_class(model).__name__)
    model.config.auto_map = dict.fromkeys(auto_classes, f"modeling_hfslim.{name}")


def difference(
    model: PreTrainedModel, config: PreTrainedConfig, layers: dict[str, list[int]]
) -> dict[str, Any]:
    """Return the blueprint of a model against a config; empty if the config describes it fully.

    Args:
        model: The pruned model.
        config: A config of its family.
        layers: Positions kept in the lists whose length the config cannot express.
    """
    stock = _cut_stock(model, config, layers)
    tensors = _tensors(stock)
    shapes = {
        name: list(tensor.shape)
        for name, tensor in _tensors(model).items()
        if tensor.shape != tensors[name].shape
    }
    replaced, attributes = {}, {}
    modules = dict(stock.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        settings = _replacement(module)
        if settings:
            replaced[path] = settings
        if path not in modules:
            # BigBird's full attention has another module than its sparse one.
            continue
        changed = dict(_changed(module, modules[path], set(settings)))
        if changed:
            attributes[path] = changed
    parts = {"layers": layers, "replaced": replaced, "attributes": attributes, "shapes": shapes}
    return {name: part for name, part in parts.items() if part}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and the buffers that are saved, by name."""
    return {
        name: tensor
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
        if name.rpartition(".")[2]
        not in model.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set
    }


def stock_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the stock model of a config, without weights."""
    config = copy.deepcopy(config)
    for field in MARKS:
        vars(config).pop(field, None)
    with torch.device("meta"):
        return stock_class(model)(config)


def _cut_stock(
    model: PreTrainedModel, config: PreTrainedConfig, layers: dict[str, list[int]]
) -> PreTrainedModel:
    """Build the stock model of a config with only some layers in some lists."""
    stock = stock_model(model, config)
    for path, kept in layers.items():
        modeling_hfslim.keep_layers(cast(nn.ModuleList, stock.get_submodule(path)), kept)
    return stock


def _earlier_layers(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return the layers that the blueprint of an earlier cut keeps."""
    return (getattr(model.config, "hfslim", None) or {}).get("layers", {})


def _is_built(model: PreTrainedModel, layers: dict[str, list[int]]) -> bool:
    """Return whether the config, written and read, builds a stock model to cut to this one."""
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        stock = _cut_stock(model, config, layers)
    except Exception as error:
        logger.debug("no stock model: %s", error)
        return False
    tensors, own = _tensors(stock), _tensors(model)
    modules = dict(stock.named_modules(remove_duplicate=False))
    # The class may ignore the depth that its config holds.
    if tensors.keys() != own.keys():
        return False
    return all(
        modeling_hfslim.no_larger(tuple(tensor.shape), tuple(tensors[name].shape))
        for name, tensor in own.items()
    ) and all(
        modeling_hfslim.no_larger(value, vars(modules[path])[name])
        for path, module in model.named_modules(remove_duplicate=False)
        if path in modules
        for name, value in _changed(module, modules[path], set(_replacement(module)))
    )


def _kept_layers(
    before: Units, structure: Structure, earlier: dict[str, list[int]], in_config: set[str]
) -> dict[str, list[int]]:
    """Return the layers kept in the lists whose length no config field holds."""
    kept = dict(earlier)
    for site in before:
        if site.kind == "layers" and site.path not in in_config:
            now = structure.kept("layers", site.path)
            if len(now) < site.size or site.path in earlier:
                had = earlier.get(site.path, range(site.size))
                kept |= {path: [had[i] for i in now] for path in (site.path, *site.layers.beside)}
    return kept


def _takes(model: PreTrainedModel, config: PreTrainedConfig, fields: dict[str, Any]) -> bool:
    """Write fields into a config; return whether it builds a stock model with the same parts."""
    try:
        config.update(fields)
        # Jamba builds no mixture of one expert.
        stock = stock_model(model, type(config).from_dict(config.to_dict()))
        return set(_tensors(model)) <= set(_tensors(stock))
    except Exception as error:
        logger.debug("no stock model with %s: %s", fields, error)
        return False


def _replacement(module: nn.Module) -> dict[str, Any]:
    by = type(module).__name__.partition("__")[0]
    if by not in modeling_hfslim.REPLACEMENTS:
        return {}
    own = vars(module)
    present = {name: own[name] for name in modeling_hfslim.SETTINGS if name in own}
    return {"by": by} | {k: list(v) if isinstance(v, tuple) else v for k, v in present.items()}


def _changed(module: nn.Module, stock: nn.Module, skip: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module that differ from those of the stock module."""
    if stock_class(module).__name__ != stock_class(stock).__name__:
        # Regularisation may depend on depth (drop path), attention on the length of the input.
        if dict(module.named_parameters()).keys() != dict(stock.named_parameters()).keys():
            raise TypeError(f"{type(module).__name__} stands where {type(stock).__name__} should")
        return
    for name, value in vars(module).items():
        if name.startswith("_") or name in skip or name == "training" or name not in vars(stock):
            continue
        if isinstance(value, int | float | tuple) and value != vars(stock)[name]:
            if type(value) is type(vars(stock)[name]) and name != "drop_prob":
                yield name, list(value) if isinstance(value, tuple) else value


def _auto_classes(name: str) -> list[str]:
    """Return the auto classes that build a model class."""
    found = []
    for task in ("SEQUENCE", "IMAGE", "AUDIO"):
        table = getattr(modeling_auto, f"MODEL_FOR_{task}_CLASSIFICATION_MAPPING_NAMES")
        if any(
            name in (known if isinstance(known, tuple) else (known,)) for known in table.values()
        ):
            found.append(f"AutoModelFor{task.capitalize()}Classification")
    return found
