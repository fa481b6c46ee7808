"""Find the units of a model by the names and shapes of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy import families
from hfslim.anatomy.units import Cut, Refusal, Site, Units


def find_units(model: nn.Module) -> Units:
    """List what can be removed from a classifier: attention heads, FFN neurons, layers.

    Heads that share keys and values are one unit. Sites that already lost every unit are left
    out. Nothing is changed, and nothing is run.

    Args:
        model: A transformers model, pruned before or not.

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
    narrow = [*finder.heads(), *finder.neurons()]
    layers = list(finder.layers({site.path for site in narrow}))
    around = {f"{site.path}.{i}" for site in layers for i in range(site.size)}
    order = {path: i for i, path in enumerate(finder.modules)}
    sites = [_place(site, around) for site in narrow if site.size] + layers
    sites.sort(key=lambda site: (order[site.path], site.kind))
    return Units(tuple(sites), tuple(finder.refusals))


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.config = getattr(model, "config", None)
        self.refusals: list[Refusal] = []

    def heads(self) -> Iterator[Site]:
        for path, module in self.modules.items():
            query, key, value = (
                self._linear(path, names) or ""
                for names in (families.QUERY, families.KEY, families.VALUE)
            )
            fused = self._linear(path, families.FUSED_QKV)
            output = self._linear(path, families.ATTENTION_OUTPUT)
            head_dim = _first(vars(module).get(name) for name in families.HEAD_DIM)
            if output is None or head_dim is None or not (fused or (query and key and value)):
                continue
            if any(self._spans_heads(f"{path}.{name}", head_dim) for name in families.ACROSS_HEADS):
                reason = "its query and key norms run across all heads, so no head can go exactly"
                self.refusals.append(Refusal("heads", path, reason))
                continue
            if fused:
                queries = units = self._out(fused) // (3 * head_dim)
                cuts = self._rows(fused, head_dim, blocks=3)
            else:
                queries, units = self._out(query) // head_dim, self._out(key) // head_dim
                cuts = [
                    *self._rows(query, queries // max(units, 1) * head_dim),
                    *self._rows(key, head_dim),
                    *self._rows(value, head_dim),
                ]
            group = queries // max(units, 1)
            if self.modules[output].in_features != units * group * head_dim:
                reason = f"{queries} query heads of size {head_dim} do not fit {output!r}"
                self.refusals.append(Refusal("heads", path, reason))
                continue
            for name in families.PER_HEAD_ROWS:
                if f"{path}.{name}" in self.modules:
                    cuts += self._rows(f"{path}.{name}", group * head_dim)
            for owner, tensor, dim in families.PER_HEAD_TENSORS:
                if hasattr(self.modules.get(f"{path}.{owner}"), tensor):
                    cuts.append(Cut(f"{path}.{owner}", tensor, dim, group))
            counts = dict.fromkeys(families.QUERY_HEAD_COUNTS, group)
            counts |= dict.fromkeys(families.KEY_HEAD_COUNTS, 1)
            counts |= dict.fromkeys(families.ALL_HEADS_SIZE, group * head_dim)
            replacement = _first(
                families.REPLACEMENTS.get(cls.__name__) for cls in type(module).__mro__
            )
            yield Site(
                kind="heads",
                path=path,
                size=units,
                gate=output,
                width=group * head_dim,
                cuts=(*cuts, Cut(output, "weight", 1, group * head_dim)),
                attributes=tuple((n, by) for n, by in counts.items() if n in vars(module)),
                replacement=replacement or "",
            )

    def neurons(self) -> Iterator[Site]:
        for path in self.modules:
            for names in families.FEED_FORWARDS:
                inputs = [self._linear(path, (name,)) for name in names.inputs]
                output = self._linear(path, (names.output,))
                if output is None or None in inputs:
                    continue
                size = self.modules[output].in_features
                if all(self._out(i) == size * names.blocks for i in inputs if i):
                    rows = [cut for i in inputs if i for cut in self._rows(i, 1, names.blocks)]
                    yield Site(
                        kind="neurons",
                        path=path,
                        size=size,
                        gate=output,
                        cuts=(*rows, Cut(output, "weight", 1)),
                        attributes=(("intermediate_size", 1),)
                        if "intermediate_size" in vars(self.modules[path])
                        else (),
                    )
                break

    def layers(self, inner: set[str]) -> Iterator[Site]:
        """Find the lists whose every element holds a unit, the innermost where they nest."""
        lists = [
            path
            for path, module in self.modules.items()
            if isinstance(module, nn.ModuleList)
            and len(module)
            and all(_any_below(f"{path}.{i}", inner) for i in range(len(module)))
        ]
        for path in lists:
            if any(other.startswith(f"{path}.") for other in lists):
                continue
            layers = self.modules[path]
            if getattr(self.config, "use_weighted_layer_sum", False):
                reason = "the classifier weighs every layer's output (use_weighted_layer_sum)"
                self.refusals.append(Refusal("layers", path, reason))
                continue
            keys = [frozenset(name for name, _ in layer.named_parameters()) for layer in layers]
            # Where two kinds tie, the later one is usual: the special layer is the first.
            usual = max(reversed(keys), key=keys.count)
            parent = self.modules[path.rpartition(".")[0]]
            after_first = families.AFTER_FIRST_LAYER.get(type(parent).__name__, "")
            bound = getattr(parent, after_first, None) is not None
            fixed = tuple(i for i, names in enumerate(keys) if names != usual or (bound and i == 0))
            if len(layers) - len(fixed) > (0 if fixed else 1):
                yield Site("layers", path, len(layers), fixed=fixed)

    def _linear(self, path: str, names: Iterable[str]) -> str | None:
        for name in names:
            base, name = (path.rpartition(".")[0], name[1:]) if name[0] == "^" else (path, name)
            full = f"{base}.{name}" if base else name
            if isinstance(self.modules.get(full), nn.Linear):
                return full
        return None

    def _rows(self, path: str, width: int, blocks: int = 1) -> list[Cut]:
        tensors = ["weight"] if self.modules[path].bias is None else ["weight", "bias"]
        return [Cut(path, tensor, 0, width, blocks) for tensor in tensors]

    def _out(self, path: str) -> int:
        return self.modules[path].out_features

    def _spans_heads(self, path: str, head_dim: int) -> bool:
        weight = getattr(self.modules.get(path), "weight", None)
        return weight is not None and weight.numel() != head_dim


def _place(site: Site, layers: set[str]) -> Site:
    parts = site.path.split(".")
    above = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return replace(site, layer=_first(path for path in above if path in layers) or "")


def _any_below(path: str, inner: set[str]) -> bool:
    return any(other == path or other.startswith(f"{path}.") for other in inner)


def _first(items: Iterable[Any]) -> Any:
    return next((item for item in items if item), None)
