"""Find the units of a model by the names and shapes of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.attention import find_heads
from hfslim.anatomy.channels import find_channels
from hfslim.anatomy.dimensions import find_dimensions
from hfslim.anatomy.experts import find_experts
from hfslim.anatomy.layers import LayerFinder, above
from hfslim.anatomy.model_state import check_unwrapped
from hfslim.anatomy.neurons import find_neurons
from hfslim.anatomy.projections import find_projection
from hfslim.anatomy.sharing import joined
from hfslim.anatomy.structure import KINDS
from hfslim.anatomy.units import Refusal, Site, Units


def find_units(model: nn.Module, dimensions: bool = False) -> Units:
    """List the units that can be removed: heads, neurons, channels, experts, layers, dimensions.

    Heads that share keys and values are one unit, and so are channels that are added to each
    other. Sites that already lost every unit are left out. Nothing is changed. The forward pass of
    a model with convolutions is followed on tensors without contents.

    Args:
        model: A transformers model, pruned before or not.
        dimensions: Whether to find dimensions of the residual stream too, by following the forward
            pass.

    Returns:
        The sites, and the places whose units cannot be removed, with the reason.

    Raises:
        TypeError: The model is no module, or a wrapper around a transformers model.
    """
    check_unwrapped(model)
    refusals = list(_other_modalities(model))
    foreign = tuple(f"{refusal.path}." for refusal in refusals)
    modules = {p: m for p, m in model.named_modules() if not f"{p}.".startswith(foreign)}
    config, find = getattr(model, "config", None), partial(find_projection, modules)
    parts = [
        *(find_heads(path, module, config, find) for path, module in modules.items()),
        *(find_neurons(path, modules, find) for path in modules),
        *(one for path in modules for one in find_experts(path, modules)),
    ]
    narrow = _sites(joined(_sites(parts, refusals), modules), refusals)
    finder = LayerFinder(modules, config, narrow)
    layers = _sites(finder.sites(), refusals)
    around = {
        part: f"{site.path}.{i}"
        for site in layers
        for i in range(site.size)
        for part in site.parts(i)
    } | {f"{site.path}.0": site.path for site in layers if site.layers.runs}
    wide = find_dimensions(model, narrow) if dimensions else []
    taken = {cut for found in wide if isinstance(found, Site) for cut in found.cuts}
    channels = [
        found
        for found in find_channels(model, narrow)
        if isinstance(found, Refusal) or not taken & set(found.cuts)
    ]
    order = {path: i for i, path in enumerate(modules)}
    sites = [finder.used(_place(site, around)) for site in narrow if site.size] + layers
    sites += [
        _place(site, around) for site in _sites([*channels, *wide], refusals) if site.path in order
    ]
    sites.sort(key=lambda site: (order[site.path], site.kind))
    return Units(tuple(sites), tuple(refusals))


def _sites(found: Iterable[Site | Refusal | None], refusals: list[Refusal]) -> list[Site]:
    """Return the sites; append the refusals to a list."""
    sites = []
    for one in found:
        if isinstance(one, Refusal):
            refusals.append(one)
        elif one is not None:
            sites.append(one)
    return sites


def _other_modalities(model: nn.Module) -> Iterator[Refusal]:
    """Refuse the models inside a text classifier that see another modality than its texts."""
    main = getattr(model, "main_input_name", "input_ids")
    reads = "text" in getattr(model, "input_modalities", "text")
    for path, inner in model.named_modules():
        if main != "input_ids" or not isinstance(inner, PreTrainedModel):
            continue
        seen = inner.main_input_name
        if reads and seen == main and "text" not in inner.input_modalities:
            one = inner.input_modalities
            seen = one if isinstance(one, str) else " and ".join(one)
        if seen != main:
            reason = f"it sees {seen}, but texts are classified by {main}"
            yield from (Refusal(kind, path, reason) for kind in KINDS)


def _place(site: Site, layers: Mapping[str, str]) -> Site:
    """Note the removable layer around a site, by the layers' parts."""
    layer = next((layers[path] for path in above(site.path) if path in layers), "")
    # Channels may be added to those of other layers.
    if site.kind in ("channels", "dimensions") and not all(
        cut.module.startswith(f"{layer}.") for cut in site.cuts
    ):
        layer = ""
    return replace(site, layer=layer)
