"""Write down how a pruned model differs from the stock model that its config describes."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hfslim.anatomy import families
from hfslim.anatomy.config_fields import (
    CHOSEN_EXPERTS_FIELD,
    EXPERT_COUNT_FIELDS,
    EXPERT_WIDTH_FIELDS,
    HEAD_SIZE_FIELDS,
    WIDTH_FIELDS,
)
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Site, Units
from hfslim.hub.format import modeling_hfslim
from hfslim.hub.format.depth import Depth, set_depth
from hfslim.hub.format.modeling_hfslim import stock_class
from hfslim.hub.format.width import new_widths, tell_widths, with_widths

logger = logging.getLogger(__name__)

MARKS = ("hfslim", "quantization_config", "auto_map")
"""Config fields: the blueprint, the call of hfslim's loader, the file beside the weights."""


def check_built(model: PreTrainedModel) -> None:
    """Check that a model's class builds all of its tensors, or no cut of it could be loaded.

    Raises:
        ValueError: It does not.
    """
    stock = stock_model(model, model.config)
    # Of layers that an earlier cut left, the places in the list count.
    for path, kept in (getattr(model.config, "hfslim", None) or {}).get("layers", {}).items():
        modeling_hfslim.keep_layers(cast(nn.ModuleList, stock.get_submodule(path)), kept)
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

    What the family's own config can say (depth, uniform widths) is said there; only the rest goes
    into `config.hfslim`. If nothing is left, the config is a plain one, and the model loads with
    nothing of hfslim's.

    Args:
        model: The model, already cut.
        before: The units that it had before the cut.
        structure: The structure it was cut to.
        depth: What `set_depth` did, if it was called.

    Returns:
        Whether the model may compute otherwise now than it was cut to: because the depth was put
        back, of which no stock model is built, or because modules were told another width.
    """
    earlier = (getattr(model.config, "hfslim", None) or {}).get("layers", {})
    depth = set_depth(model, before, structure) if depth is None else depth
    for field in MARKS:
        vars(model.config).pop(field, None)
    told = {change.path for change in depth}
    kept = _kept_layers(before, structure, earlier, told)
    put_back = bool(told) and not _is_built(model, kept)
    if put_back:
        logger.info("%s builds no model of this depth: telling it apart", type(model).__name__)
        for change in depth:
            vars(change.config).update(change.old)
        kept = _kept_layers(before, structure, earlier, set())
    widths = new_widths(before, structure)
    for fields in with_widths(_uniform_widths(model), model.config, before, structure):
        config = copy.deepcopy(model.config)
        if fields and not _takes(model, config, fields):
            continue
        left = difference(model, config, kept)
        told_widths = tell_widths(model, left.get("attributes", {}), widths)
        if not left or not difference(model, config, kept):
            model.config.update(fields)
            logger.info("the pruned model is described by its plain config: %s", fields or "depth")
            return put_back or bool(widths)
        for settings, old in told_widths:
            settings.update(old)
    blueprint = difference(model, model.config, kept)
    if blueprint:
        mark(model, blueprint)
    return put_back


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
            # BigBird's full attention, in the place of its sparse one, has a module of its own.
            continue
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


def _is_built(model: PreTrainedModel, layers: dict[str, list[int]]) -> bool:
    """Tell whether the config, written and read, builds a stock model that can be cut to this."""
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        stock = stock_model(model, config)
        for path, kept in layers.items():
            modeling_hfslim.keep_layers(cast(nn.ModuleList, stock.get_submodule(path)), kept)
    except Exception as error:
        logger.debug("no stock model: %s", error)
        return False
    tensors, own = _tensors(stock), _tensors(model)
    modules = dict(stock.named_modules(remove_duplicate=False))
    # A config may hold a depth that its model is not built by.
    if tensors.keys() != own.keys():
        return False
    return all(
        tensor.ndim == tensors[name].ndim
        and all(new <= old for new, old in zip(tensor.shape, tensors[name].shape, strict=True))
        for name, tensor in own.items()
    ) and all(
        modeling_hfslim.no_larger(value, vars(modules[path])[name])
        for path, module in model.named_modules(remove_duplicate=False)
        if path in modules
        for name, value in _changed(module, modules[path], set(_replacement(module)))
    )


def _kept_layers(
    before: Units, structure: Structure, earlier: dict[str, list[int]], told: set[str]
) -> dict[str, list[int]]:
    """Return the layers kept of lists whose length no config field tells."""
    kept = dict(earlier)
    for site in before:
        if site.kind == "layers" and site.path not in told:
            now = structure.kept("layers", site.path)
            if len(now) < site.size or site.path in earlier:
                had = earlier.get(site.path, range(site.size))
                kept |= {path: [had[i] for i in now] for path in (site.path, *site.layers.beside)}
    return kept


def _uniform_widths(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Propose config changes that may express every width, the smallest change first."""
    sites = find_units(model).sites
    parts = [
        _neurons(
            model, [s for s in sites if s.kind == "neurons" and not s.experts.inside], WIDTH_FIELDS
        ),
        _heads(model, [s for s in sites if s.kind == "heads"]),
        _neurons(
            model,
            [s for s in sites if s.kind == "neurons" and s.experts.inside],
            EXPERT_WIDTH_FIELDS,
        ),
        _experts(model, [s for s in sites if s.kind == "experts"]),
    ]
    config = model.config
    new = [p for p in parts if any(getattr(config, name, None) != p[name] for name in p)]
    for number in range(len(new) + 1):
        for some in itertools.combinations(new, number):
            yield {name: value for part in some for name, value in part.items()}


def _neurons(model: PreTrainedModel, sites: list[Site], fields: Sequence[str]) -> dict[str, Any]:
    """Return the config field that may tell how many neurons each of some sites has."""
    sizes = {site.size * site.width for site in sites}
    names = [name for name in fields if hasattr(model.config, name)]
    return {names[0]: sizes.pop()} if len(sizes) == 1 and names else {}


def _heads(model: PreTrainedModel, sites: list[Site]) -> dict[str, Any]:
    """Return the config fields that may tell how many heads each of some sites has."""
    # Many families read a head size that their config does not declare.
    field = next((n for n in HEAD_SIZE_FIELDS if hasattr(model.config, n)), "head_dim")
    heads = {(s.size, s.width, s.heads.shared) for s in sites}
    if len(heads) != 1:
        return {}
    size, features, shared = heads.pop()
    module = model.get_submodule(sites[0].path)
    declared = (vars(module).get(name) for name in families.HEAD_DIM)
    head_dim = next((value for value in declared if value), None)
    if not head_dim:
        return {}
    counts = {"num_attention_heads": size * features // head_dim, field: head_dim}
    if hasattr(model.config, "num_key_value_heads"):
        counts["num_key_value_heads"] = 1 if shared else size
    return counts


def _experts(model: PreTrainedModel, sites: list[Site]) -> dict[str, Any]:
    """Return the config fields that may tell how many experts each of some sites has."""
    numbers = {(site.size, site.experts.chosen) for site in sites}
    names = [name for name in EXPERT_COUNT_FIELDS if hasattr(model.config, name)]
    if len(numbers) != 1 or not names:
        return {}
    size, chosen = numbers.pop()
    return {names[0]: size, CHOSEN_EXPERTS_FIELD: chosen}


def _takes(model: PreTrainedModel, config: PreTrainedConfig, fields: dict[str, Any]) -> bool:
    """Write fields into a config, and tell whether a stock model with the same parts is built."""
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
    names = (
        *("output", "returns", "residual", "norm", "kept_heads", "bias_heads"),
        *("listed", "count_field", "head_count"),
    )
    present = {name: vars(module)[name] for name in names if name in vars(module)}
    return {"by": by} | {k: list(v) if isinstance(v, tuple) else v for k, v in present.items()}


def _changed(module: nn.Module, stock: nn.Module, skip: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a module that differ from those of the stock one."""
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
