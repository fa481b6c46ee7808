"""Make a structure physical: smaller dense modules of the same class, proved equal to the gates."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfslim.anatomy import layer_lists
from hfslim.anatomy.adapters import check_merged
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.structure import Structure
from hfslim.anatomy.units import Site, Units
from hfslim.hub.format import blueprint, modeling_hfslim, reload
from hfslim.hub.format.depth import check_layer_types, configs, layer_types, set_depth
from hfslim.pruning.surgery.proof import (
    Returns,
    Settings,
    check_equal,
    probe_inputs,
    run_gated,
    tell_unseen,
)
from hfslim.pruning.surgery.reversible_slices import Parted

logger = logging.getLogger(__name__)


def shrink(
    model: PreTrainedModel,
    structure: Structure,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """Remove the units that a structure does not keep, in place.

    The model keeps its class; its config is brought up to date, so that the stock
    `save_pretrained` writes it and `from_pretrained` loads it. Before and after the cut the model
    runs: its outputs must be those of the gated model, or the cut is taken back; a warning tells
    where they change too little to see that. What is cut off is kept until then, and no tensor is
    held twice.

    Args:
        model: The model itself, not a wrapper, and not one that an optimizer is training: its
            parameters are replaced.
        structure: The units to keep.
        inputs: What to run it on; small random inputs if not given.

    Returns:
        The same model.

    Raises:
        KeyError: The structure names a site that the model does not have.
        ValueError: It counts other numbers of units, or removes one that cannot go; or the model
            has tensors that its class does not build.
        RuntimeError: The cut model does not equal the gated one, or its config would tell layers
            the attention of others; the model is as before.
    """
    check_merged(model)
    units = find_units(model, structure.has("dimensions"))
    structure = units.complete(structure)
    if structure.is_full:
        logger.info("nothing to remove")
        return model
    blueprint.check_built(model)
    if inputs is None:
        inputs = probe_inputs(model)
    expected, returns = run_gated(model, units, structure, inputs)
    tell_unseen(expected, model, inputs)
    types = layer_types(model, units)
    surgery = _Surgery(model, sparing=True)
    try:
        surgery.cut(units, structure, returns)
        depth = set_depth(model, units, structure)
        check_layer_types(model, types, structure)
        surgery.remember_settings()
        check_equal(expected, model, inputs)
        changed = blueprint.describe(model, units, structure, depth)
        check_layer_types(model, types, structure)
        if changed:
            check_equal(expected, model, inputs)
    except BaseException:
        surgery.undo()
        raise
    surgery.finish()
    reload.carry_file(model)
    logger.info("shrunk to %s (%s)", structure, structure.digest())
    return model


@contextmanager
def cut_for_now(
    model: PreTrainedModel, units: Units, structure: Structure, returns: Returns
) -> Iterator[None]:
    """Cut a model inside the block only, unchecked, its config untouched.

    The whole tensors stay beside the cut ones: going back takes no time, and what is timed next
    finds them where they were.

    Args:
        model: The model itself, not a wrapper.
        units: Its sites.
        structure: The units to keep, of every site.
        returns: What `attention_returns` gives for the model.

    Yields:
        Nothing.
    """
    surgery = _Surgery(model, sparing=False)
    try:
        surgery.cut(units, structure, returns)
        yield
    finally:
        surgery.undo()


class _Surgery:
    """Changes to a model that can be taken back.

    Args:
        model: The model.
        sparing: Whether no tensor is to be held twice meanwhile.
    """

    def __init__(self, model: PreTrainedModel, sparing: bool) -> None:
        self.model = model
        self.parted = Parted(model, sparing)
        self.before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.classes: list[tuple[nn.Module, type]] = []
        self.configs = [(config, dict(vars(config))) for config in configs(model)]

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
                self._tell(one, kept)
                if site.kind == "heads":
                    self._replace(one, kept, returns[site.path])
        # Last, because the paths of the sites count the layers as they were.
        for site in lists:
            kept = structure.kept("layers", site.path)
            for path in () if site.layers.runs else (site.path, *site.layers.beside):
                layers = cast(nn.ModuleList, self.model.get_submodule(path))
                for module in layers.modules():
                    self._remember(vars(module), module._modules)
                modeling_hfslim.keep_layers(layers, kept)
            around = self.model.get_submodule(site.path.rpartition(".")[0])
            for name in layer_lists.LAYER_COUNTS:
                if name in vars(around):
                    self._remember(vars(around))
                    setattr(around, name, len(kept))

    def remember_settings(self) -> None:
        """Be able to take back whatever modules are told from now on."""
        self._remember(*(vars(module) for module in self.model.modules()))

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
        self.parted.restore()

    def finish(self) -> None:
        """Let go of what was removed; nothing can be taken back from now on."""
        self.before.clear()
        self.parted.let_go()

    def _remember(self, *mappings: dict[str, Any]) -> None:
        self.before.extend((mapping, dict(mapping)) for mapping in mappings)

    def _slice(self, narrowed: Mapping[Site, tuple[int, ...]]) -> None:
        """Cut tensors once along each dimension, where several sites may have units."""
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
            self._remember(vars(module), module._parameters, module._buffers)
            old = getattr(module, name)
            if name == "original1" and hasattr(module, "original0"):
                self._keep_weight(module, index.to(old.device), dim)
            same = id(old), dim, tuple(index.tolist())
            if same not in made:
                made[same] = self.parted.select(old, dim, index)
            # Modules that shared a weight go on sharing it.
            owner: Any = module._buffers if name in module._buffers else module._parameters
            owner[name] = made[same]
        self.parted.restore_used(self.model)
        for path in dict.fromkeys(path for path, *_ in indices):
            module = self.model.get_submodule(path)
            modeling_hfslim.update_sizes(module, groups_stay=path in in_blocks)

    def _keep_weight(self, module: nn.Module, index: torch.Tensor, dim: int) -> None:
        """Keep the weight that a weight norm makes of what is left of its direction."""
        both = [module.get_parameter(name) for name in ("original0", "original1")]
        length, direction = (self.parted.whole(one) for one in both)
        over = tuple(d for d in range(length.ndim) if length.shape[d] == 1)
        if dim in over:
            left = direction.index_select(dim, index).norm(dim=over, keepdim=True)
            shorter = length * left / direction.norm(dim=over, keepdim=True)
            module._parameters["original0"] = nn.Parameter(shorter, both[0].requires_grad)

    def _tell(self, site: Site, kept: tuple[int, ...]) -> None:
        """Bring what modules tell of their units up to date."""
        gate = self.model.get_submodule(site.gate)
        if isinstance(gate, Conv1D) and not kept:
            self._become(gate, "Inputless")
        module = self.model.get_submodule(site.path)
        self._remember(vars(module))
        for name, value in vars(module).items():
            if isinstance(value, dict) and name.endswith("_cache"):
                # LeViT keeps its position bias from one call in eval mode to the next.
                vars(module)[name] = {}
        told = {name: by * len(kept) for name, by in site.attributes}
        told |= dict.fromkeys(site.experts.clipped, min(site.experts.chosen, len(kept)))
        around = self.model.get_submodule(site.path.rpartition(".")[0])
        for path, value in told.items():
            owner, _, name = path.rpartition(".")
            holder = around if name[0] == "^" else module.get_submodule(owner)
            self._remember(vars(holder))
            setattr(holder, name.removeprefix("^"), value)

    def _replace(self, site: Site, kept: tuple[int, ...], returns: Settings) -> None:
        for path in site.heads.norms if kept else ():
            norm = self.model.get_submodule(path)
            had = getattr(norm, "kept_heads", None) or range(site.size)
            count = getattr(norm, "head_count", site.size)
            now = tuple(had[i] for i in kept)
            self._become(norm, "AcrossHeads", kept_heads=now, head_count=count)
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
            settings |= {
                "count_field": site.heads.count_field,
                "head_count": site.heads.queries * len(kept),
            }
        elif site.heads.replacement:
            had = getattr(module, "kept_heads", None) or range(site.size)
            settings["kept_heads"] = tuple(had[i] for i in kept)
        if issubclass(modeling_hfslim.REPLACEMENTS[by], modeling_hfslim.BiasedHeads):
            settings["bias_heads"] = getattr(module, "bias_heads", 0) or site.size
        self._become(module, by, **settings)

    def _become(self, module: nn.Module, by: str, **settings: Any) -> None:
        self.classes.append((module, type(module)))
        self._remember(vars(module))
        modeling_hfslim.replace_class(module, by, **settings)
