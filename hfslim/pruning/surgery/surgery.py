"""The physical cut: smaller dense modules of the same class, proved equal to the gated model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hfslim.anatomy import layer_lists
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.model_state import check_state
from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Site, Units
from hfslim.hub.format import blueprint, modeling_hfslim
from hfslim.hub.format.depth import check_layer_types, configs, layer_types, set_depth
from hfslim.pruning.surgery.proof import (
    Returns,
    Settings,
    check_equal,
    probe_inputs,
    run_gated,
    warn_if_no_effect,
)
from hfslim.pruning.surgery.reversible_slices import ReversibleSlices

logger = logging.getLogger(__name__)


def shrink(
    model: PreTrainedModel, structure: Structure, inputs: Mapping[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """Remove the units that a structure does not keep, in place.

    The model keeps its class. Its config is updated, so that the stock `save_pretrained` and
    `from_pretrained` save and load it. The logits of the cut model are compared with those of the
    gated model; if they differ, the cut is undone. A warning is logged if the gates change the
    logits too little for this check. No tensor is held twice meanwhile.

    Args:
        model: The model itself, not a wrapper, and not one that an optimizer is training: its
            parameters are replaced.
        structure: The units to keep.
        inputs: The inputs of the check; small random inputs by default.

    Returns:
        The same model.

    Raises:
        KeyError: The structure names a site that the model does not have.
        ValueError: It counts other numbers of units, or removes one that cannot be removed; or the
            model has tensors that its class does not build.
        RuntimeError: The cut model does not equal the gated one, or its config would assign layers
            the attention types of others. The model is unchanged.
    """
    check_state(model)
    units = find_units(model, structure.has("dimensions"))
    structure = units.complete(structure)
    if structure.is_full:
        logger.info("nothing to remove")
        return model
    live = blueprint.check_built(model)
    if inputs is None:
        inputs = probe_inputs(model)
    expected, returns = run_gated(model, units, structure, inputs)
    warn_if_no_effect(expected, model, inputs)
    types = layer_types(model, units)
    surgery = _Surgery(model, sparing=True)
    try:
        surgery.own_config()
        surgery.cut(units, structure, returns)
        depth = set_depth(model, units, structure)
        check_layer_types(model, types, structure)
        surgery.record_attributes()
        check_equal(expected, model, inputs)
        changed = blueprint.describe(model, units, structure, depth, live)
        blueprint.check_described(model, live)
        check_layer_types(model, types, structure)
        if changed:
            check_equal(expected, model, inputs)
    except BaseException:
        surgery.undo()
        raise
    surgery.finish()
    logger.info("shrunk to %s (%s)", structure, structure.digest())
    return model


@contextmanager
def cut_for_now(
    model: PreTrainedModel, units: Units, structure: Structure, returns: Returns
) -> Iterator[None]:
    """Cut a model inside the block only, without the check and without changing its config.

    The whole tensors are kept beside the cut ones, at their places in memory, so that undoing takes
    no time and does not influence later timings. `returns` comes from `attention_returns`.
    """
    surgery = _Surgery(model, sparing=False)
    try:
        surgery.cut(units, structure, returns)
        yield
    finally:
        surgery.undo()


class _Surgery:
    """Changes to a model that can be undone; `sparing` as of `ReversibleSlices`."""

    def __init__(self, model: PreTrainedModel, sparing: bool) -> None:
        self.model = model
        self.slices = ReversibleSlices(model, sparing)
        self.before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.classes: list[tuple[nn.Module, type]] = []
        self.configs = [(config, dict(vars(config))) for config in configs(model)]

    def own_config(self) -> None:
        """Give the model configs of its own: another model may hold the same ones."""
        copies: dict[int, Any] = {}
        for module in self.model.modules():
            held = {n: v for n, v in vars(module).items() if isinstance(v, PreTrainedConfig)}
            if held:
                self._record(vars(module))
                vars(module).update({n: copy.deepcopy(v, copies) for n, v in held.items()})

    def cut(self, units: Units, structure: Structure, returns: Returns) -> None:
        lists = [site for site in units if site.kind == "layers"]
        dropped = {
            f"{site.path}.{index}"
            for site in lists
            for index in set(range(site.size)) - set(structure.kept("layers", site.path))
        }
        narrowed = {
            site: kept
            for site in units
            if site.kind != "layers" and site.layer not in dropped
            if len(kept := structure.kept(site.kind, site.path)) < site.size
        }
        self._slice(narrowed)
        for site, kept in narrowed.items():
            for one in site.modules:
                self._set_attributes(one, kept)
                if site.kind == "heads":
                    self._replace(one, kept, returns[site.path])
        # Last, because the paths of the sites use the old indices of the layers.
        for site in lists:
            kept = structure.kept("layers", site.path)
            for path in () if site.layers.runs else (site.path, *site.layers.beside):
                layers = cast(nn.ModuleList, self.model.get_submodule(path))
                for module in layers.modules():
                    self._record(vars(module), module._modules)
                modeling_hfslim.keep_layers(layers, kept)
            around = self.model.get_submodule(site.path.rpartition(".")[0])
            for name in layer_lists.LAYER_COUNTS:
                if name in vars(around):
                    self._record(vars(around))
                    setattr(around, name, len(kept))

    def record_attributes(self) -> None:
        """Record the attributes of all modules, to undo later changes."""
        self._record(*(vars(module) for module in self.model.modules()))

    def undo(self) -> None:
        for mapping, old in reversed(self.before):
            mapping.clear()
            mapping.update(old)
        for module, cls in reversed(self.classes):
            module.__class__ = cls
        for config, old in self.configs:
            vars(config).clear()
            vars(config).update(old)
        self.before.clear()
        self.slices.restore()

    def finish(self) -> None:
        """Discard the removed entries; `undo` is not possible any more."""
        self.before.clear()
        self.slices.discard()

    def _record(self, *mappings: dict[str, Any]) -> None:
        self.before.extend((mapping, dict(mapping)) for mapping in mappings)

    def _slice(self, narrowed: Mapping[Site, tuple[int, ...]]) -> None:
        """Slice each tensor once per dimension, by the units of all sites in it."""
        indices: dict[tuple[str, str, int], torch.Tensor] = {}
        in_blocks = {
            cut.module for site in narrowed for cut in site.cuts if site.feeds[0].blocks > 1
        }
        for site, kept in narrowed.items():
            for cut in site.cuts:
                where = cut.module, cut.tensor, cut.dim
                size = getattr(self.model.get_submodule(cut.module), cut.tensor).shape[cut.dim]
                index = cut.indices(kept, site.size, size)
                others = indices.get(where, index)
                indices[where] = index[torch.isin(index, others)]
        made: dict[tuple[int, int, tuple[int, ...]], torch.Tensor] = {}
        for (path, name, dim), index in indices.items():
            module = self.model.get_submodule(path)
            self._record(vars(module), module._parameters, module._buffers)
            old = getattr(module, name)
            if name == "original1" and hasattr(module, "original0"):
                self._keep_weight(module, index.to(old.device), dim)
            same = id(old), dim, tuple(index.tolist())
            if same not in made:
                made[same] = self.slices.select(old, dim, index)
            # Modules that share a weight share its slice.
            owner: Any = module._buffers if name in module._buffers else module._parameters
            owner[name] = made[same]
        self.slices.restore_used(self.model)
        for path in dict.fromkeys(path for path, *_ in indices):
            module = self.model.get_submodule(path)
            modeling_hfslim.update_sizes(module, groups_stay=path in in_blocks)
            if modeling_hfslim.has_no_inputs(module):
                self._replace_class(module, "Inputless")

    def _keep_weight(self, module: nn.Module, index: torch.Tensor, dim: int) -> None:
        """Correct the length of a weight norm for the removed entries of its direction."""
        both = [module.get_parameter(name) for name in ("original0", "original1")]
        length, direction = (self.slices.whole(one) for one in both)
        over = tuple(d for d in range(length.ndim) if length.shape[d] == 1)
        if dim in over:
            left = direction.index_select(dim, index).norm(dim=over, keepdim=True)
            shorter = length * left / direction.norm(dim=over, keepdim=True)
            module._parameters["original0"] = nn.Parameter(shorter, both[0].requires_grad)

    def _set_attributes(self, site: Site, kept: tuple[int, ...]) -> None:
        """Update the attributes of modules that depend on the number of units."""
        module = self.model.get_submodule(site.path)
        self._record(vars(module))
        for name, value in vars(module).items():
            if isinstance(value, dict) and name.endswith("_cache"):
                # LeViT caches its position bias in eval mode.
                vars(module)[name] = {}
        values = {name: by * len(kept) for name, by in site.attributes}
        values |= dict.fromkeys(site.experts.clipped, min(site.experts.chosen, len(kept)))
        around = self.model.get_submodule(site.path.rpartition(".")[0])
        for path, value in values.items():
            owner, _, name = path.rpartition(".")
            holder = around if name[0] == "^" else module.get_submodule(owner)
            self._record(vars(holder))
            setattr(holder, name.removeprefix("^"), value)

    def _replace(self, site: Site, kept: tuple[int, ...], returns: Settings) -> None:
        for path in site.heads.norms if kept else ():
            norm = self.model.get_submodule(path)
            count = getattr(norm, "head_count", site.size)
            heads = _original_heads(norm, site, kept)
            self._replace_class(norm, "AcrossHeads", kept_heads=heads, head_count=count)
        module = self.model.get_submodule(site.path)
        by = site.heads.replacement or ("" if kept else "Headless")
        if not by:
            return
        settings: dict[str, Any] = {}
        if not kept:
            inside = site.gate.removeprefix(f"{site.path}.")
            settings = {"output": inside if inside != site.gate else ""}
            settings |= returns | dict(site.heads.headless)
        if by == "CountedHeads":
            part = site.heads
            settings |= {"count_field": part.count_field, "head_count": part.queries * len(kept)}
        elif site.heads.replacement:
            settings["kept_heads"] = _original_heads(module, site, kept)
        if issubclass(modeling_hfslim.REPLACEMENTS[by], modeling_hfslim.BiasedHeads):
            settings["bias_heads"] = getattr(module, "bias_heads", 0) or site.size
        self._replace_class(module, by, **settings)

    def _replace_class(self, module: nn.Module, by: str, **settings: Any) -> None:
        self.classes.append((module, type(module)))
        self._record(vars(module))
        modeling_hfslim.replace_class(module, by, **settings)


def _original_heads(module: nn.Module, site: Site, kept: tuple[int, ...]) -> tuple[int, ...]:
    """Return the indices that the kept heads had before any cut."""
    before = getattr(module, "kept_heads", None) or range(site.size)
    return tuple(before[i] for i in kept)
