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

from hfslim.adapters import check_merged
from hfslim.anatomy import Site, Units, example_inputs, find_units, layer_lists
from hfslim.hub import blueprint, modeling_hfslim, reload
from hfslim.hub.depth import configs, set_depth
from hfslim.prune.gates import Gates
from hfslim.structure import Structure
from hfslim.timing import evaluating

logger = logging.getLogger(__name__)

Settings = dict[str, Any]
Returns = dict[str, Settings]
"""What each attention module returns, as settings of the class that may stand in for it."""

PROBE_LENGTH = {"input_ids": 16, "input_values": 4000, "input_features": 64}
RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
HALF_TOLERANCE = 5e-2


def shrink(
    model: PreTrainedModel,
    structure: Structure,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """Remove the units that a structure does not keep, in place.

    The model keeps its class; its config is brought up to date, so that the stock
    `save_pretrained` writes it and `from_pretrained` loads it. Before and after the cut the model
    runs once: its outputs must be those of the gated model, or the cut is taken back.

    Args:
        model: The model itself, not a wrapper, and not one that an optimizer is training: its
            parameters are replaced.
        structure: The units to keep.
        inputs: What to run it on; small random inputs if not given.

    Returns:
        The same model.

    Raises:
        KeyError: The structure names a site that the model does not have.
        ValueError: It counts other numbers of units, or removes one that cannot go.
        RuntimeError: The cut model does not equal the gated one; the model is as before.
    """
    check_merged(model)
    units = find_units(model, structure.has("dimensions"))
    structure = units.complete(structure)
    if structure.is_full:
        logger.info("nothing to remove")
        return model
    if inputs is None:
        inputs = _probe_inputs(model)
    expected, returns = _probe(model, units, structure, inputs)
    surgery = _Surgery(model)
    try:
        surgery.cut(units, structure, returns)
        depth = set_depth(model, units, structure)
        surgery.remember_settings()
        _check_equal(expected, model, inputs)
        if blueprint.describe(model, units, structure, depth):
            _check_equal(expected, model, inputs)
    except BaseException:
        surgery.undo()
        raise
    reload.carry_file(model)
    logger.info("shrunk to %s (%s)", structure, structure.digest())
    return model


def check_gates(model: PreTrainedModel, units: Units) -> None:
    """Check by one forward pass that gates on a model's units act, before training relies on them.

    Raises:
        RuntimeError: Some do not.
    """
    with Gates(model, units) as gates:
        _logits(model, _probe_inputs(model))
        gates.check_fired()


@contextmanager
def cut_for_now(
    model: PreTrainedModel, units: Units, structure: Structure, returns: Returns
) -> Iterator[None]:
    """Cut a model inside the block only, unchecked, its config untouched.

    Args:
        model: The model itself, not a wrapper.
        units: Its sites.
        structure: The units to keep, of every site.
        returns: What `attention_returns` gives for the model.

    Yields:
        Nothing.
    """
    surgery = _Surgery(model)
    try:
        surgery.cut(units, structure, returns)
        yield
    finally:
        surgery.undo()


def attention_returns(model: PreTrainedModel, units: Units) -> Returns:
    """Run a model once, to see what each attention module returns."""
    return _probe(model, units, units.full(), _probe_inputs(model))[1]


class _Surgery:
    """Changes to a model that can be taken back."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
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
            for path in () if site.runs else (site.path, *site.beside):
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
        made: dict[tuple[int, int, tuple[int, ...]], Any] = {}
        for (path, name, dim), index in indices.items():
            module = self.model.get_submodule(path)
            self._remember(vars(module), module._parameters, module._buffers)
            old = getattr(module, name)
            if name == "original1" and hasattr(module, "original0"):
                self._keep_weight(module, index.to(old.device), dim)
            same = id(old), dim, tuple(index.tolist())
            if same not in made:
                made[same] = old.detach().index_select(dim, index.to(old.device))
                if name not in module._buffers:
                    made[same] = nn.Parameter(made[same], requires_grad=old.requires_grad)
            # Modules that shared a weight go on sharing it.
            (module._buffers if name in module._buffers else module._parameters)[name] = made[same]
        for path in dict.fromkeys(path for path, *_ in indices):
            module = self.model.get_submodule(path)
            modeling_hfslim.tell_sizes(module, groups_stay=path in in_blocks)

    def _keep_weight(self, module: nn.Module, index: torch.Tensor, dim: int) -> None:
        """Keep the weight that a weight norm makes of what is left of its direction."""
        length, whole = (module.get_parameter(name) for name in ("original0", "original1"))
        over = tuple(d for d in range(length.ndim) if length.shape[d] == 1)
        if dim in over:
            direction = whole.detach()
            left = direction.index_select(dim, index).norm(dim=over, keepdim=True)
            shorter = length.detach() * left / direction.norm(dim=over, keepdim=True)
            module._parameters["original0"] = nn.Parameter(shorter, length.requires_grad)

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
        told |= dict.fromkeys(site.clipped, min(site.chosen, len(kept)))
        around = self.model.get_submodule(site.path.rpartition(".")[0])
        for path, value in told.items():
            owner, _, name = path.rpartition(".")
            holder = around if name[0] == "^" else module.get_submodule(owner)
            self._remember(vars(holder))
            setattr(holder, name.removeprefix("^"), value)

    def _replace(self, site: Site, kept: tuple[int, ...], returns: Settings) -> None:
        for path in site.norms if kept else ():
            norm = self.model.get_submodule(path)
            had = getattr(norm, "kept_heads", None) or range(site.size)
            count = getattr(norm, "head_count", site.size)
            now = tuple(had[i] for i in kept)
            self._become(norm, "AcrossHeads", kept_heads=now, head_count=count)
        module = self.model.get_submodule(site.path)
        by = site.replacement or ("" if kept else "Headless")
        if not by:
            return
        settings: dict[str, Any] = {}
        if not kept:
            inside = site.gate.removeprefix(f"{site.path}.")
            settings = {"output": inside if inside != site.gate else ""}
            settings |= returns | dict(site.headless)
        if by == "CountedHeads":
            settings |= {"count_field": site.count_field, "head_count": site.queries * len(kept)}
        elif site.replacement:
            had = getattr(module, "kept_heads", None) or range(site.size)
            settings["kept_heads"] = tuple(had[i] for i in kept)
        if issubclass(modeling_hfslim.REPLACEMENTS[by], modeling_hfslim.BiasedHeads):
            settings["bias_heads"] = getattr(module, "bias_heads", 0) or site.size
        self._become(module, by, **settings)

    def _become(self, module: nn.Module, by: str, **settings: Any) -> None:
        self.classes.append((module, type(module)))
        self._remember(vars(module))
        modeling_hfslim.replace_class(module, by, **settings)


def _probe_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return example_inputs(model, batch_size=2, length=PROBE_LENGTH.get(model.main_input_name))


def _probe(
    model: PreTrainedModel,
    units: Units,
    structure: Structure,
    inputs: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, Returns]:
    """Run the gated model; return its logits and what each attention module returns."""
    returns: Returns = {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, __: tuple, output: Any) -> None:
            returns[path] = {"returns": 0 if isinstance(output, torch.Tensor) else len(output)}
            if isinstance(output, list):
                returns[path]["listed"] = True

        return hook

    attentions = [site.path for site in units if site.kind == "heads"]
    handles = [model.get_submodule(p).register_forward_hook(note(p)) for p in attentions]
    try:
        # Sites that stay whole need not be reached by gates.
        cut = [e for e in structure if len(e.kept) < e.total]
        gates = Gates(model, Units(tuple(units.site(e.kind, e.path) for e in cut)))
        gates.set(Structure(tuple(cut)))
        with gates:
            logits = _logits(model, inputs)
            gates.check_fired()
    finally:
        for handle in handles:
            handle.remove()
    return logits, returns


def _logits(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with evaluating(model):
        return model(**inputs).logits


def _check_equal(
    expected: torch.Tensor, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> None:
    remedy = (
        "so this family cannot be cut like this; nothing was changed. Leave the kind of unit that "
        "causes it out of `units`"
    )
    try:
        found = _logits(model, inputs)
    except Exception as error:
        raise RuntimeError(f"the cut model does not run ({error}), {remedy}") from error
    if not torch.isfinite(expected).all():
        raise RuntimeError("the gated model's output is not finite, so the cut cannot be checked")
    tolerance = RELATIVE_TOLERANCE.get(expected.dtype, HALF_TOLERANCE)
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise RuntimeError(
            f"the cut model differs from the gated one by {difference:.2g} in its logits, {remedy}"
        )
