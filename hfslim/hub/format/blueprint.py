"""Describe the differences between a pruned model and the stock model of its config."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
import transformers
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


Live = Mapping[nn.Module, Mapping[str, Any]]
"""The attributes of a live model that are not those of its config, such as a dropout set to 0."""
NO_STATE: Live = MappingProxyType({})


def check_built(model: PreTrainedModel) -> Live:
    """Check that a model's class and config build its tensors; else no cut could be loaded.

    Returns:
        The attributes that differ before the cut, which are none of the cut's.

    Raises:
        ValueError: The class, with the config, builds other tensors.
    """
    stock, name = stock_model(model, model.config), stock_class(model).__name__
    try:
        if earlier := getattr(model.config, "hfslim", None):
            modeling_hfslim.apply_blueprint(stock, earlier)
    except modeling_hfslim.BlueprintError as error:
        raise ValueError(
            f"the config of this {name} does not fit it ({error}): give it the config that it was "
            "built or saved with"
        ) from error
    own, built = _shapes(model), _shapes(stock)
    unknown, missing = sorted(set(own) - set(built)), sorted(set(built) - set(own))
    if unknown:
        raise ValueError(
            f"{name} builds no {unknown[0]!r}, so a cut model with it could "
            "not be loaded: fold it into the weights first, as "
            "torch.nn.utils.parametrize.remove_parametrizations does"
        )
    if missing:
        raise ValueError(
            f"{name} builds {missing[0]!r} from this config, which the model lacks, so that a cut "
            "model could not be loaded: change the config as the model was changed, for layers "
            "that were taken out their number"
        )
    wrong = next((path for path in own if own[path] != built[path]), None)
    if wrong:
        field = next(
            (
                f"config.{known} is {value}: set it to {own[wrong][0]}"
                for known in ("num_labels", "vocab_size", "max_position_embeddings")
                if (value := getattr(model.config, known, None)) == built[wrong][0]
            ),
            "change the config as the model was changed",
        )
        raise ValueError(
            f"{wrong!r} has the shape {own[wrong]} where {name} builds {built[wrong]} from its "
            f"config, so that a cut model could not be loaded; {field}"
        )
    modules = dict(stock.named_modules(remove_duplicate=False))
    return {
        module: dict(_changed(module, modules[path], {}, set()))
        for path, module in model.named_modules(remove_duplicate=False)
        if path in modules
    }


def check_described(model: PreTrainedModel, live: Live) -> None:
    """Check that the config, written and read, builds the cut model.

    Raises:
        RuntimeError: It does not.
    """
    config = type(model.config).from_dict(json.loads(model.config.to_json_string()))
    marks = getattr(config, "hfslim", None)
    try:
        stock = stock_model(model, config)
        if marks:
            modeling_hfslim.apply_blueprint(stock, marks)
        own, built = _shapes(model), _shapes(stock)
        wrong = next((p for p in {**own, **built} if own.get(p) != built.get(p)), None)
        reason = f"{wrong!r} {own.get(wrong)} would become {built.get(wrong)}" if wrong else ""
        left = {} if wrong else difference(model, config, {}, live, stock)
        reason = f"{left}" if left else reason
    except Exception as error:
        raise RuntimeError(f"{_UNSAVED} ({error}); {_UNCHANGED}") from error
    if reason:
        raise RuntimeError(f"{_UNSAVED} ({reason}); {_UNCHANGED}")


_UNSAVED = "the config would not build the cut model, so that it could not be loaded"
_UNCHANGED = "nothing was changed. Leave the kind of unit that causes it out of `units`"


def describe(
    model: PreTrainedModel,
    before: Units,
    structure: Structure,
    depth: Sequence[Depth] | None = None,
    live: Live = NO_STATE,
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
        live: The result of `check_built`: what differed before the cut, and is not recorded.

    Returns:
        Whether the model may compute something else now: because no stock model of the new depth
        can be built and the old depth is back in the config, or because modules got a new width.
    """
    earlier = _earlier_layers(model)
    depth = set_depth(model, before, structure) if depth is None else depth
    for field in MARKS:
        vars(model.config).pop(field, None)
    kept = _kept_layers(before, structure, earlier, {change.path for change in depth})
    put_back = bool(depth) and not _is_built(model, kept, live)
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
        left = difference(model, config, kept, live)
        changed = set_widths(model, left.get("attributes", {}), widths)
        if not left or not difference(model, config, kept, live):
            model.config.update(fields)
            logger.info("the pruned model is described by its plain config: %s", fields or "depth")
            return put_back or bool(widths)
        for settings, old in changed:
            settings.update(old)
    blueprint = difference(model, model.config, kept, live)
    if blueprint:
        mark(model, blueprint)
    return put_back


def mark(
    model: PreTrainedModel, blueprint: dict[str, Any], config: PreTrainedConfig | None = None
) -> None:
    """Put a blueprint into the config, with the fields for loading with hfslim and without."""
    config = model.config if config is None else config
    whole = {"version": modeling_hfslim.VERSION, **blueprint}
    config.hfslim = whole | {"digest": modeling_hfslim.digest(whole)}
    config.quantization_config = {"quant_method": "hfslim"}
    config.auto_map = {
        auto: f"modeling_hfslim.Slim{name}"
        for auto, name in _auto_classes(config, stock_class(model).__name__)
    }


def own_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config to save with a model, whose config may belong to the model around it.

    A whole model, built by its class from the config of a pruned one, gets a config without marks.
    """
    blueprint = modeling_hfslim.relative_to(model, model.config.hfslim)
    parts = {part: blueprint[part] for part in modeling_hfslim.PARTS if blueprint.get(part)}
    whole = _is_whole(model, parts)
    if blueprint == model.config.hfslim and not whole:
        return model.config
    config = copy.deepcopy(model.config)
    for field in MARKS:
        vars(config).pop(field, None)
    if parts and not whole:
        mark(model, parts, config)
    return config


def _is_whole(model: PreTrainedModel, blueprint: dict[str, Any]) -> bool:
    """Return whether everything that a blueprint makes smaller is larger in a model."""
    tensors, modules = _tensors(model), dict(model.named_modules(remove_duplicate=False))
    shapes, layers = blueprint.get("shapes", {}), blueprint.get("layers", {})
    if not shapes and not layers:
        return False
    return all(
        path in tensors
        and len(shape) == tensors[path].ndim
        and list(tensors[path].shape) != shape
        and modeling_hfslim.no_larger(tuple(shape), tuple(tensors[path].shape))
        for path, shape in shapes.items()
    ) and all(
        path in modules and len(list(modules[path].children())) > len(kept)
        for path, kept in layers.items()
    )


def difference(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    layers: dict[str, list[int]],
    live: Live = NO_STATE,
    stock: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Return the blueprint of a model against a config; empty if the config describes it fully.

    Args:
        model: The pruned model.
        config: A config of its family.
        layers: Positions kept in the lists whose length the config cannot express.
        live: Attributes that differed before the cut, which are left out.
        stock: The model to compare with, in place of the stock model of the config.
    """
    replaced_too = stock is None
    stock = _cut_stock(model, config, layers) if stock is None else stock
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
        if path not in modules:
            # BigBird's full attention has another module than its sparse one.
            continue
        if settings and (replaced_too or settings != _replacement(modules[path])):
            replaced[path] = settings
        changed = dict(_changed(module, modules[path], live.get(module, {}), set(settings)))
        if changed:
            attributes[path] = changed
    parts = {"layers": layers, "replaced": replaced, "attributes": attributes, "shapes": shapes}
    return {name: part for name, part in parts.items() if part}


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in _tensors(model).items()}


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


def _is_built(model: PreTrainedModel, layers: dict[str, list[int]], live: Live) -> bool:
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
        name in modeling_hfslim.CHANGED_BY_CUTS
        and modeling_hfslim.no_larger(value, vars(modules[path])[name])
        for path, module in model.named_modules(remove_duplicate=False)
        if path in modules
        for name, value in _changed(
            module, modules[path], live.get(module, {}), set(_replacement(module))
        )
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


def _changed(
    module: nn.Module, stock: nn.Module, live: Mapping[str, Any], skip: set[str]
) -> Iterator[tuple[str, Any]]:
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
            value = list(value) if isinstance(value, tuple) else value
            known = name in live and live[name] == value
            if type(vars(module)[name]) is type(vars(stock)[name]) and not known:
                if name != "drop_prob":
                    yield name, value


def _auto_classes(config: PreTrainedConfig, name: str) -> Iterator[tuple[str, str]]:
    """Yield the auto classes that build models of a config, and the class that each builds."""
    for task in ("", "SEQUENCE", "IMAGE", "AUDIO"):
        words = f"_FOR_{task}_CLASSIFICATION" if task else ""
        table = getattr(modeling_auto, f"MODEL{words}_MAPPING_NAMES")
        known = table.get(config.model_type, ())
        names = known if isinstance(known, tuple | list) else (known,)
        built = name if name in names else next(iter(names), None)
        if built and hasattr(transformers, built):
            yield f"AutoModelFor{task.capitalize()}Classification" if task else "AutoModel", built
