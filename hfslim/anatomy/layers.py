"""Find the lists of layers of a model, and the modules that one pass runs several times."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from hfslim.anatomy import layer_lists
from hfslim.anatomy.residual import adds_to_input, are_residual
from hfslim.anatomy.units import LayerPart, Refusal, Site

LINEAR = "linear_attention"
"""The type of layers without attention weights, as configs name it."""


def above(path: str) -> list[str]:
    """Return a path and those of all modules around it, the innermost first."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


class LayerFinder:
    """Finds the lists whose every element holds a unit, the innermost where they nest.

    Args:
        modules: All modules of the model, by path.
        config: The model's config.
        inner: The sites of heads, neurons and experts.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: Any, inner: Sequence[Site]):
        self.modules: Mapping[str, Any] = modules
        self.config = config
        self.inner = {site.path for site in inner}
        self.shared = [path for s in inner if s.twins for path in (s.path, *s.twins)]

    def sites(self) -> Iterator[Site | Refusal]:
        """Yield the lists of layers, or why none of their layers can go."""
        lists = [
            path
            for path, module in self.modules.items()
            if isinstance(module, nn.ModuleList | nn.Sequential) and self._holds_layers(path)
        ]
        # The parts of a T5 layer are a list too, but no layers.
        whole = [p for p in lists if _is_layer(self.modules[p][0])]
        inside = tuple(f"{path}." for path in whole)
        lists = whole + [p for p in lists if p not in whole and not p.startswith(inside)]
        for path in lists:
            if not any(other.startswith(f"{path}.") for other in lists):
                found = self._site(path, lists)
                if found is not None:
                    yield found

    def used(self, site: Site) -> Site:
        """Note how often one pass runs the module of a site, and the dimension of examples."""
        batch = self._batch(site.path) if site.kind == "neurons" else 0
        return replace(site, uses=self._uses(site.path), batch=batch)

    def _site(self, path: str, lists: list[str]) -> Site | Refusal | None:
        layers = self.modules[path]
        parent = self.modules[path.rpartition(".")[0]]
        name = path.rpartition(".")[2]
        first, *others = layer_lists.SIDE_BY_SIDE.get(type(parent).__name__, [name])
        if others and not path.endswith(f".{first}"):
            return None
        uses = self._uses(path)
        runs = self._repeated(path)[0] if uses > 1 and len(layers) == 1 else ""
        reason = self._reason(path, runs, bool(others), lists)
        if reason:
            return Refusal("layers", path, reason)
        fixed, size = self._fixed(path, list(layers)), uses if runs else len(layers)
        if size - len(fixed) <= (0 if fixed else 1):
            bound = self._bound_by_types(path, ())
            return Refusal("layers", path, "their types (layer_types) bind them") if bound else None
        return Site(
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

    def _reason(self, path: str, runs: str, side_by_side: bool, lists: list[str]) -> str:
        """Return why no layer of a list can go; empty if some can."""
        parent = self.modules[path.rpartition(".")[0]]
        if type(parent).__name__ in layer_lists.TANGLED_LAYERS:
            return layer_lists.TANGLED_LAYERS[type(parent).__name__]
        if side_by_side and getattr(parent, "pre_norm", False):
            return "the outputs of its layers are summed outside of them (pre_norm)"
        cut = (getattr(self.config, "hfslim", None) or {}).get("layers", {})
        if runs and (getattr(self.config, runs) != self._uses(path) or path in cut):
            return "its layers are run several times, with the same weights"
        if not side_by_side and self._beside(path, lists):
            return "its layers are spread over several lists"
        if getattr(self.config, "use_weighted_layer_sum", False):
            return "the classifier weighs every layer's output (use_weighted_layer_sum)"
        return ""

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
        fixed = [
            i
            for i, names in enumerate(keys)
            if names != usual
            or (bound and i == 0)
            or any(shared.startswith(f"{path}.{i}.") for shared in self.shared)
        ]
        return tuple(sorted({*fixed, *self._bound_by_types(path, fixed)}))

    def _bound_by_types(self, path: str, fixed: Sequence[int]) -> set[int]:
        """Return the layers that the types of attention in the config bind to their places.

        Some configs compute the types from the positions: only layers behind the last change of
        type can go. Of layers beside linear attention one stays: caches need it.
        """
        around = (getattr(self.modules.get(one), "config", None) for one in above(path)[1:])
        config = next((one for one in around if one is not None), self.config)
        declared = getattr(type(config), "layer_types", None)
        if isinstance(declared, list | tuple) or not getattr(config, "layer_types", None):
            return set()
        types = list(config.layer_types)[: len(self.modules[path])]
        computed = isinstance(declared, property) and declared.fset is None
        bound = {i for i in range(len(types)) if computed and set(types[i:]) != {types[i]}}
        full = [i for i, one in enumerate(types) if one != LINEAR]
        if LINEAR in types and not {*fixed, *bound} & {*full}:
            bound |= {*full[:1]}
        return bound

    def _holds_layers(self, path: str) -> bool:
        layers = list(self.modules[path].children())
        if not layers or any(_is_stage(layer) for layer in layers):
            return False
        if are_residual(layers):
            return True
        if all(_is_layer(layer) for layer in layers):
            # A layer may have no removable unit; those of speech front ends are convolutions.
            linear = nn.Linear | Conv1D
            return all(any(isinstance(m, linear) for m in layer.modules()) for layer in layers)
        return all(
            any(f"{other}.".startswith(f"{path}.{i}.") for other in self.inner)
            for i in range(len(layers))
        )

    def _batch(self, path: str) -> int:
        around = (self.modules.get(one) for one in above(path))
        return int(any(type(module).__name__ in layer_lists.SEQUENCE_FIRST for module in around))

    def _uses(self, path: str) -> int:
        total, share = self._repeated(path)
        uses = getattr(self.config, total) if total else 1
        return uses // (getattr(self.config, share) if share else 1)

    def _repeated(self, path: str) -> tuple[str, str]:
        for one in above(path):
            parent, _, name = one.rpartition(".")
            named = f"{type(self.modules.get(parent)).__name__}.{name}"
            if named in layer_lists.REPEATED:
                return layer_lists.REPEATED[named]
        return "", ""

    def _beside(self, path: str, lists: list[str]) -> bool:
        """Return whether another list of layers lies beside one."""
        parent = path.rpartition(".")[0]
        if isinstance(self.modules[parent], nn.ModuleList) or are_residual(self.modules[path]):
            return False
        return any(p != path and p.rpartition(".")[0] == parent for p in lists)


def _is_stage(module: nn.Module) -> bool:
    return bool(re.search(layer_lists.STAGE, type(module).__name__))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and not _is_stage(module)
