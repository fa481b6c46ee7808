"""Find the units of a model by the names and shapes of its modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from hfslim.anatomy import families, feed_forwards, layer_lists
from hfslim.anatomy.attention import find_heads
from hfslim.anatomy.channels import find_channels
from hfslim.anatomy.dimensions import find_dimensions
from hfslim.anatomy.experts import find_experts
from hfslim.anatomy.grouped import cuts_of, feed_of, groups_of
from hfslim.anatomy.projections import Projection
from hfslim.anatomy.residual import adds_to_input, are_residual
from hfslim.anatomy.sharing import joined
from hfslim.anatomy.structure import KINDS
from hfslim.anatomy.units import Cut, Feed, LayerPart, Refusal, Site, Units


def find_units(model: nn.Module, dimensions: bool = False) -> Units:
    """List what can be removed: heads, FFN neurons, channels, experts, layers, dimensions.

    Heads that share keys and values are one unit, and so are channels that are added to each
    other. Sites that already lost every unit are left out. Nothing is changed; of a model with
    convolutions the forward pass is followed, without weights and without computing anything.

    Args:
        model: A transformers model, pruned before or not.
        dimensions: Whether to look for dimensions of the residual stream too, by following the
            forward pass.

    Returns:
        The sites, and the places that are not offered, with the reason.

    Raises:
        TypeError: The model is no module, or a wrapper around a transformers model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got {model!r}: load it with from_pretrained first")
    inner = next((name for name, m in model.named_modules() if isinstance(m, PreTrainedModel)), "")
    if inner and not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is a wrapper: pass the model inside, its {inner!r}; merge "
            "adapters first (`merge_and_unload()`)"
        )
    finder = _Finder(model)
    narrow = finder.own([*finder.heads(), *finder.neurons(), *finder.experts()])
    layers = list(finder.layers({site.path for site in narrow}))
    around = {
        part: f"{site.path}.{i}"
        for site in layers
        for i in range(site.size)
        for part in site.parts(i)
    } | {f"{site.path}.0": site.path for site in layers if site.layers.runs}
    order = {path: i for i, path in enumerate(finder.modules)}
    sites = [finder.used(_place(site, around)) for site in narrow if site.size] + layers
    wide = find_dimensions(model, narrow) if dimensions else []
    taken = {cut for found in wide if isinstance(found, Site) for cut in found.cuts}
    for found in [*find_channels(model, narrow), *wide]:
        if isinstance(found, Site) and found.kind == "channels" and taken & set(found.cuts):
            continue
        if isinstance(found, Refusal):
            finder.refusals.append(found)
        elif found.path in order:
            sites.append(_place(found, around))
    sites.sort(key=lambda site: (order[site.path], site.kind))
    return Units(tuple(sites), tuple(finder.refusals))


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        self.refusals: list[Refusal] = []
        self.shared: list[str] = []
        foreign = tuple(self._foreign(model))
        self.modules = {
            path: module
            for path, module in model.named_modules()
            if not f"{path}.".startswith(foreign)
        }
        self.config = getattr(model, "config", None)

    def _foreign(self, model: nn.Module) -> Iterator[str]:
        """Find the models inside that see another modality than the classifier's main input."""
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
                self.refusals += [Refusal(kind, path, reason) for kind in KINDS]
                yield f"{path}."

    def heads(self) -> Iterator[Site]:
        for path, module in self.modules.items():
            found = find_heads(path, module, self.config, self.projection)
            if isinstance(found, Refusal):
                self.refusals.append(found)
            elif found is not None:
                yield found

    def neurons(self) -> Iterator[Site]:
        for path, module in self.modules.items():
            if type(module).__name__ in feed_forwards.REFUSED_NEURONS:
                reason = feed_forwards.REFUSED_NEURONS[type(module).__name__]
                self.refusals.append(Refusal("neurons", path, reason))
                continue
            for names in feed_forwards.FEED_FORWARDS:
                inputs = [self.projection(path, (name,)) for name in names.inputs]
                output = self.projection(path, (names.output,))
                rows = [i.rows(*[1] * names.blocks) for i in inputs if i]
                middle = [f"{path}.{name}" for name in (names.between, names.norm) if name]
                if output is None or len(rows) < len(inputs) or set(middle) - set(self.modules):
                    continue
                for name in middle:
                    tensors = _tensors(self.modules[name])
                    rows.append([Cut(name, tensor, 0) for tensor, t in tensors.items() if t.ndim])
                if names.across and f"{path}.{names.across}" in self.modules:
                    reason = f"{names.across!r} runs across all of them, so none can go exactly"
                    self.refusals.append(Refusal("neurons", path, reason))
                    break
                blocks = groups_of([*(i for i in inputs if i), output])
                if blocks:
                    yield Site(
                        kind="neurons",
                        path=path,
                        size=output.inputs // blocks,
                        feeds=(feed_of(output, blocks, 1),),
                        cuts=cuts_of([i for i in inputs if i], output, blocks, 1),
                        fixed=(0,),
                    )
                    break
                size = output.inputs
                if all(i.outputs == size * names.blocks for i in inputs if i):
                    counts = [n for n in feed_forwards.NEURON_COUNTS if vars(module).get(n) == size]
                    yield Site(
                        kind="neurons",
                        path=path,
                        size=size,
                        feeds=(Feed(output.path),),
                        cuts=(*(cut for cuts in rows for cut in cuts), *output.columns(1)),
                        attributes=tuple((name, 1) for name in counts),
                        fixed=(0,) if middle else (),
                    )
                    break

    def experts(self) -> Iterator[Site]:
        for path in self.modules:
            for found in find_experts(path, self.modules):
                if isinstance(found, Refusal):
                    self.refusals.append(found)
                else:
                    yield found

    def own(self, sites: Iterable[Site]) -> list[Site]:
        """Join sites that share weights, and note what cannot go for that."""
        found = list(joined(sites, self.modules))
        self.refusals += [one for one in found if isinstance(one, Refusal)]
        own = [one for one in found if isinstance(one, Site)]
        self.shared = [path for s in own if s.twins for path in (s.path, *s.twins)]
        return own

    def layers(self, inner: set[str]) -> Iterator[Site]:
        """Find the lists whose every element holds a unit, the innermost where they nest."""
        lists = [
            path
            for path, module in self.modules.items()
            if isinstance(module, nn.ModuleList | nn.Sequential) and self._holds_layers(path, inner)
        ]
        # The parts of a T5 layer are a list too, but no layers.
        whole = [p for p in lists if _is_layer(self.modules[p][0])]
        inside = tuple(f"{path}." for path in whole)
        lists = whole + [p for p in lists if p not in whole and not p.startswith(inside)]
        for path in lists:
            if any(other.startswith(f"{path}.") for other in lists):
                continue
            parent = self.modules[path.rpartition(".")[0]]
            around = type(parent).__name__
            if around in layer_lists.TANGLED_LAYERS:
                reason = layer_lists.TANGLED_LAYERS[around]
                self.refusals.append(Refusal("layers", path, reason))
                continue
            first, *others = layer_lists.SIDE_BY_SIDE.get(around, [path.rpartition(".")[2]])
            if not path.endswith(f".{first}") and others:
                continue
            if others and getattr(parent, "pre_norm", False):
                reason = "what its layers add is summed outside of them (pre_norm)"
                self.refusals.append(Refusal("layers", path, reason))
                continue
            uses, runs = self._uses(path), ""
            layers = self.modules[path]
            if uses > 1 and len(layers) == 1:
                runs = self._runs(path)
                told = (getattr(self.config, "hfslim", None) or {}).get("layers", {})
                if getattr(self.config, runs) != uses or path in told:
                    reason = "its layers are run several times, with the same weights"
                    self.refusals.append(Refusal("layers", path, reason))
                    continue
            if not others and self._beside(path, lists):
                reason = "its layers are spread over several lists"
                self.refusals.append(Refusal("layers", path, reason))
                continue
            if getattr(self.config, "use_weighted_layer_sum", False):
                reason = "the classifier weighs every layer's output (use_weighted_layer_sum)"
                self.refusals.append(Refusal("layers", path, reason))
                continue
            fixed = self._fixed(path, list(layers))
            size = uses if runs else len(layers)
            if size - len(fixed) > (0 if fixed else 1):
                yield Site(
                    kind="layers",
                    path=path,
                    size=size,
                    fixed=fixed,
                    uses=1 if runs else uses,
                    batch=self._batch(path),
                    layers=LayerPart(
                        runs=runs,
                        beside=tuple(path.removesuffix(first) + other for other in others),
                        streams=layer_lists.STREAMS.get(type(layers[0]).__name__, ()),
                        ends=layer_lists.ENDS.get(type(layers[0]).__name__, ()),
                    ),
                )

    def _fixed(self, path: str, layers: Sequence[nn.Module]) -> tuple[int, ...]:
        """Return the layers of a list that have to stay."""
        if are_residual(layers):
            return tuple(i for i, one in enumerate(layers) if not adds_to_input(one))
        keys = [frozenset(name for name, _ in layer.named_parameters()) for layer in layers]
        # Where two kinds tie, the later one is usual: the special layer is the first.
        usual = max(reversed(keys), key=keys.count)
        parent = self.modules[path.rpartition(".")[0]]
        after_first = layer_lists.AFTER_FIRST_LAYER.get(type(parent).__name__, "")
        bound = getattr(parent, after_first, None) is not None
        bound |= type(layers[0]).__name__ in layer_lists.FIRST_LAYER_STAYS
        return tuple(
            i
            for i, names in enumerate(keys)
            if names != usual
            or (bound and i == 0)
            or any(shared.startswith(f"{path}.{i}.") for shared in self.shared)
        )

    def _holds_layers(self, path: str, inner: set[str]) -> bool:
        layers = list(self.modules[path].children())
        if not layers or any(re.search(families.STAGE, type(layer).__name__) for layer in layers):
            return False
        if are_residual(layers):
            return True
        if all(_is_layer(layer) for layer in layers):
            # Some layers may have no unit that is offered; those of speech front ends are no such.
            linear = nn.Linear | Conv1D
            return all(any(isinstance(m, linear) for m in layer.modules()) for layer in layers)
        return all(_any_below(f"{path}.{i}", inner) for i in range(len(layers)))

    def used(self, site: Site) -> Site:
        """Note how often the module of a site is run, and on examples in which dimension."""
        batch = self._batch(site.path) if site.kind == "neurons" else 0
        return replace(site, uses=self._uses(site.path), batch=batch)

    def _batch(self, path: str) -> int:
        around = (self.modules.get(above) for above in _above(path))
        return int(any(type(module).__name__ in layer_lists.SEQUENCE_FIRST for module in around))

    def _uses(self, path: str) -> int:
        total, share = self._repeated(path)
        uses = getattr(self.config, total) if total else 1
        return uses // (getattr(self.config, share) if share else 1)

    def _runs(self, path: str) -> str:
        return self._repeated(path)[0]

    def _repeated(self, path: str) -> tuple[str, str]:
        for above in _above(path):
            parent, _, name = above.rpartition(".")
            named = f"{type(self.modules.get(parent)).__name__}.{name}"
            if named in layer_lists.REPEATED:
                return layer_lists.REPEATED[named]
        return "", ""

    def _beside(self, path: str, lists: list[str]) -> bool:
        parent = path.rpartition(".")[0]
        if isinstance(self.modules[parent], nn.ModuleList) or are_residual(self.modules[path]):
            return False
        return any(p != path and p.rpartition(".")[0] == parent for p in lists)

    def projection(self, path: str, names: Iterable[str]) -> Projection | None:
        """Return the first of some names below a path that is a projection."""
        for name in names:
            base, name = (path.rpartition(".")[0], name[1:]) if name[0] == "^" else (path, name)
            full = f"{base}.{name}" if base else name
            found = Projection.at(full, self.modules.get(full))
            if found is not None:
                return found
        return None


def _place(site: Site, layers: Mapping[str, str]) -> Site:
    layer = _first(layers.get(path) for path in _above(site.path)) or ""
    # Channels may be added to those of other layers.
    if site.kind in ("channels", "dimensions") and not all(
        c.module.startswith(f"{layer}.") for c in site.cuts
    ):
        layer = ""
    return replace(site, layer=layer)


def _above(path: str) -> list[str]:
    """Return a path and those of all that it lies in, the innermost first."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and not re.search(
        families.STAGE, type(module).__name__
    )


def _any_below(path: str, inner: set[str]) -> bool:
    return any(other == path or other.startswith(f"{path}.") for other in inner)


def _first(items: Iterable[Any]) -> Any:
    return next((item for item in items if item), None)
