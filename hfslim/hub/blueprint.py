"""Write down how a pruned model differs from the stock model that its config describes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hfslim.anatomy import families
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.units import Units
from hfslim.hub import modeling_hfslim
from hfslim.hub.modeling_hfslim import stock_class
from hfslim.structure import Structure

logger = logging.getLogger(__name__)

MARKS = ("hfslim", "quantization_config", "auto_map")
"""Config fields: the blueprint, the call of hfslim's loader, the file beside the weights."""


def describe(model: PreTrainedModel, before: Units, structure: Structure) -> None:
    """Bring `model.config` up to date after surgery.

    What the family's own config can say (depth, uniform widths) is said there; only the rest goes
    into `config.hfslim`. If nothing is left, the config is a plain one, and the model loads with
    nothing of hfslim's.

    Args:
        model: The model, already cut.
        before: The units that it had before the cut.
        structure: The structure it was cut to.
    """
    earlier = getattr(model.config, "hfslim", None) or {}
    for field in MARKS:
        vars(model.config).pop(field, None)
    depth = _set_depth(model.config, before, structure)
    kept = _kept_layers(before, structure, earlier.get("layers", {}), depth)
    for fields in _uniform_widths(model):
        config = copy.deepcopy(model.config)
        config.update(fields)
        if not difference(model, config, kept):
            model.config.update(fields)
            logger.info("the pruned model is described by its plain config: %s", fields or depth)
            return
    blueprint = difference(model, model.config, kept)
    if blueprint:
        mark(model, blueprint)


def mark(model: PreTrainedModel, blueprint: dict[str, Any]) -> None:
    """Put a blueprint into the config, with what the two ways of loading it need."""
    name = f"Slim{stock_class(model).__name__}"
    model.config.hfslim = {"version": modeling_hfslim.VERSION, **blueprint}
    model.config.quantization_config = {"quant_method": "hfslim"}
    auto_classes = _auto_classes(stock_class(model).__name__)
    model.config.auto_map = dict.fromkeys(auto_classes, f"modeling_hfslim.{name}")


def difference(
    model: PreTrainedModel, config: PreTrainedConfig, layers: dict[str, list[int]]
) -> dict[str, Any]:
    """Compare a model with the stock model of a config; empty if that describes it fully.

    Args:
        model: The pruned model.
        config: A config of its family.
        layers: Positions kept in the lists whose length the config cannot express.

    Returns:
        The parts of a blueprint that are not empty.
    """
    stock = stock_model(model, config)
    for path, kept in layers.items():
        modeling_hfslim.keep_layers(cast(nn.ModuleList, stock.get_submodule(path)), kept)
    parameters = dict(stock.named_parameters(remove_duplicate=False))
    shapes = {
        name: list(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.shape != parameters[name].shape
    }
    replaced, attributes = {}, {}
    modules = dict(stock.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        settings = _replacement(module)
        if settings:
            replaced[path] = settings
        changed = dict(_changed(module, modules[path], set(settings)))
        if changed:
            attributes[path] = changed
    parts = {
        "layers": layers,
        "replaced": replaced,
        "attributes": attributes,
        "shapes": shapes,
    }
    return {name: part for name, part in parts.items() if part}


def stock_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the stock model of a config, without weights."""
    config = copy.deepcopy(config)
    for field in MARKS:
        vars(config).pop(field, None)
    with torch.device("meta"):
        return stock_class(model)(config)


def _set_depth(config: PreTrainedConfig, before: Units, structure: Structure) -> dict[str, Any]:
    """Write the new number of layers into the fields that held the old one."""
    lists = [site for site in before if site.kind == "layers"]
    cut = {s.path: structure.kept("layers", s.path) for s in lists if _is_cut(structure, s.path)}
    fields: dict[str, Any] = {}
    if not cut:
        return fields
    for name in families.DEPTH_FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and list(value) == [s.size for s in lists]:
            fields[name] = type(value)(len(structure.kept("layers", s.path)) for s in lists)
        elif len(lists) == 1 and value == lists[0].size:
            fields[name] = len(cut[lists[0].path])
    for name in families.PER_LAYER_FIELDS:
        value = getattr(config, name, None)
        if len(lists) == 1 and isinstance(value, list) and len(value) == lists[0].size:
            fields[name] = [value[i] for i in cut[lists[0].path]]
    for name, value in fields.items():
        setattr(config, name, value)
    stages = getattr(config, "stage_names", None)
    if len(lists) == 1 and stages and len(stages) == lists[0].size + 1:
        config.stage_names = stages[: len(cut[lists[0].path]) + 1]
        config.set_output_features_output_indices(None, None)
    return fields


def _is_cut(structure: Structure, path: str) -> bool:
    return any(e.path == path and e.kind == "layers" and len(e.kept) < e.total for e in structure)


def _kept_layers(
    before: Units, structure: Structure, earlier: dict[str, list[int]], depth: dict[str, Any]
) -> dict[str, list[int]]:
    """Return the layers kept of lists whose length no config field tells."""
    kept = dict(earlier)
    for site in before:
        if site.kind == "layers" and (site.path in earlier or not depth):
            now = structure.kept("layers", site.path)
            if len(now) < site.size or site.path in earlier:
                kept[site.path] = [earlier.get(site.path, range(site.size))[i] for i in now]
    return kept


def _uniform_widths(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Propose config changes that may express every width, the smallest change first."""
    yield {}
    sites = find_units(model).sites
    neurons = {site.size for site in sites if site.kind == "neurons"}
    heads = {(site.size, site.width) for site in sites if site.kind == "heads"}
    width: dict[str, Any] = {}
    if len(neurons) == 1:
        names = (name for name in families.WIDTH_FIELDS if hasattr(model.config, name))
        width = dict.fromkeys(list(names)[:1], neurons.pop())
        if width:
            yield width
    if len(heads) == 1 and model.config.model_type in families.FREE_HEAD_SIZE:
        size, features = heads.pop()
        module = model.get_submodule(next(s.path for s in sites if s.kind == "heads"))
        head_dim = next((vars(module).get(name) for name in families.HEAD_DIM), None)
        if head_dim:
            counts = {"num_attention_heads": size * features // head_dim, "head_dim": head_dim}
            if hasattr(model.config, "num_key_value_heads"):
                counts["num_key_value_heads"] = size
            yield counts
            if width:
                yield width | counts


def _replacement(module: nn.Module) -> dict[str, Any]:
    by = type(module).__name__.partition("__")[0]
    if by not in modeling_hfslim.REPLACEMENTS:
        return {}
    names = ("output", "returns", "kept_heads", "bias_heads")
    present = {name: vars(module)[name] for name in names if name in vars(module)}
    return {"by": by} | {k: list(v) if isinstance(v, tuple) else v for k, v in present.items()}


def _changed(module: nn.Module, stock: nn.Module, skip: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a module that differ from those of the stock one."""
    if stock_class(module).__name__ != stock_class(stock).__name__:
        # Only regularisation that depends on depth (drop path) may differ in class.
        if any(True for _ in module.parameters()):
            raise TypeError(f"{type(module).__name__} stands where {type(stock).__name__} should")
        return
    for name, value in vars(module).items():
        if name.startswith("_") or name in skip or name == "training" or name not in vars(stock):
            continue
        if isinstance(value, int | float | str | tuple) and value != vars(stock)[name]:
            if type(value) is type(vars(stock)[name]) and name != "drop_prob":
                yield name, list(value) if isinstance(value, tuple) else value


def _auto_classes(name: str) -> list[str]:
    tables = {
        "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    }
    return [
        auto
        for auto, table in tables.items()
        if any(
            name == known or (isinstance(known, tuple) and name in known)
            for known in getattr(modeling_auto, table).values()
        )
    ]
