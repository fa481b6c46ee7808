"""What can be removed from a model, as data: sites, and the tensors that they cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from rich.console import Console
from rich.table import Table

from hfslim.anatomy.structure import KINDS, Entry, Kind, Structure

SOUGHT: dict[Kind, str] = {
    "heads": "module with projections like 'q_proj', 'k_proj', 'v_proj' and 'out_proj'",
    "neurons": "module with projections like 'fc1' and 'fc2' or 'up_proj' and 'down_proj'",
    "channels": "convolution whose outputs go to convolutions or linear maps, channel by channel",
    "experts": "module with tensors 'gate_up_proj' and 'down_proj' of all experts, beside a router",
    "layers": "ModuleList of layers that hold heads or neurons",
    "dimensions": "norm across the features that every layer reads and adds to",
}
"""What a model lacks where a kind of unit is not found."""


@dataclass(frozen=True)
class Cut:
    """One dimension of one tensor along which the units of a site lie.

    The dimension is a row of blocks, each of `units × width` entries: a fused `[q; k; v]`
    projection has three blocks, a gated FFN's fused input two. What lies around the blocks stays.

    Attributes:
        module: Path of the module that owns the tensor.
        tensor: Name of the parameter or buffer on that module.
        dim: The dimension.
        widths: Consecutive entries per unit, block by block.
        start: Entries before the first block.
    """

    module: str
    tensor: str
    dim: int
    widths: tuple[int, ...] = (1,)
    start: int = 0

    def indices(self, kept: Sequence[int], total: int, length: int) -> torch.Tensor:
        """Return the entries to keep along the dimension.

        Args:
            kept: The units that stay.
            total: The number of units there are.
            length: Size of the dimension.
        """
        unit = torch.as_tensor(kept, dtype=torch.long)
        parts, start = [torch.arange(self.start)], self.start
        for width in self.widths:
            parts.append(start + (unit[:, None] * width + torch.arange(width)).flatten())
            start += total * width
        return torch.cat([*parts, torch.arange(start, length)])

    def by_unit(self, tensor: torch.Tensor, total: int) -> torch.Tensor:
        """Return what each unit has of the tensor, `[total, entries]`."""
        sizes = [total * width for width in self.widths]
        rest = tensor.shape[self.dim] - self.start - sum(sizes)
        blocks = tensor.movedim(self.dim, 0).split([self.start, *sizes, rest])
        return torch.cat([block.reshape(total, -1) for block in blocks[1:-1]], dim=1)


@dataclass(frozen=True)
class Feed:
    """An input in which the units of a site lie side by side, and where they are gated.

    Attributes:
        module: Path of the module that takes it.
        dim: The dimension.
        start: Entries before the first unit.
        width: Consecutive entries per unit.
        ndim: Number of dimensions of the inputs that count, where the module takes others too.
        blocks: How many times over there are all units, block after block.
    """

    module: str
    dim: int = -1
    start: int = 0
    width: int = 1
    ndim: int = 0
    blocks: int = 1

    @property
    def features(self) -> int:
        """Entries per unit."""
        return self.width * self.blocks

    def of(self, value: torch.Tensor, units: int) -> torch.Tensor:
        """Return what an input has of the units, `[..., units · features]`."""
        part = value.movedim(self.dim, -1).narrow(-1, self.start, units * self.features)
        if self.blocks == 1:
            return part
        by_block = part.unflatten(-1, (self.blocks, units, self.width))
        return by_block.transpose(-3, -2).flatten(-3)

    def spread(self, numbers: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Spread one number per unit, `[units]`, so that an input can be multiplied by it."""
        numbers = numbers.to(value.device).repeat_interleave(self.width).repeat(self.blocks)
        rest = value.shape[self.dim] - self.start - len(numbers)
        whole = torch.cat([numbers.new_ones(self.start), numbers, numbers.new_ones(rest)])
        return whole.reshape(-1, *[1] * (value.ndim - 1 - self.dim % value.ndim))


@dataclass(frozen=True)
class Site:
    """A place in a model that holds units of one kind.

    Attributes:
        kind: What the units are.
        path: Module path that names the site: the attention module, the module around the two
            FFN projections, or the list of layers.
        size: Number of units.
        gate: Path of the module whose input carries the units side by side: the attention output
            projection or the second FFN projection; of channels the first that takes them; of
            experts, and neurons inside them, the module that holds all experts. Empty for layers,
            which are gated themselves.
        width: Features per unit in that input.
        cuts: The tensors to slice. Empty for layers.
        attributes: Integer attributes that count units, as paths from the module at `path` (`^` for
            the one around it), with the amount that each unit adds.
        replacement: Name of the class in `modeling_hfslim` that must stand in for the module's own,
            because that one cannot run with some heads missing. Empty if none.
        headless: Settings of the class that stands in once no head is left.
        count_field: Config field in which the module reads its number of heads, where it keeps none
            of its own.
        queries: Query heads per unit.
        shared: Whether all heads share one key and value, which stay.
        uses: How often one forward pass of the model runs the module.
        layer: Path of the removable layer around the site; empty outside of any.
        fixed: Units that cannot be removed.
        inputs: All inputs that carry the units, where that is not just the gate's.
        masked_norms: Of dimensions, the norms that run across them: with some closed, a norm takes
            its statistics over those that are open.
        beside: Of layers, further lists with a part of each, in the order in which they run: the
            last part's output is the layer's.
        streams: Of layers that add to several streams, the arguments that hold them, in the order
            of the outputs.
        partly: Of heads, what stays of those that go: `queries`, `values`, or, for `norms`, queries
            and keys; empty if nothing.
        norms: Of heads, norms that run across all of them, whose inputs stay.
        ends: Of layers that are not called as modules, the names of the modules inside that get
            their input and give their output.
        batch: The dimension of examples in what is gated.
        runs: Of layers that are runs of one module, the config field with their number.
        twins: Further modules with the very same weights, which lose the same units.
        experts: Whether the units are experts or lie inside them, so that what they cost depends on
            each other.
        router: Of experts, path of the module that chooses among them.
        chosen: How many of the experts each token goes to.
        clipped: Attributes, as paths from the module at `path`, that tell this number, which falls
            where fewer experts are left.
    """

    kind: Kind
    path: str
    size: int
    gate: str = ""
    width: int = 1
    cuts: tuple[Cut, ...] = ()
    attributes: tuple[tuple[str, int], ...] = ()
    replacement: str = ""
    headless: tuple[tuple[str, str], ...] = ()
    count_field: str = ""
    queries: int = 1
    shared: bool = False
    uses: int = 1
    layer: str = ""
    fixed: tuple[int, ...] = ()
    inputs: tuple[Feed, ...] = ()
    masked_norms: tuple[Feed, ...] = ()
    beside: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    partly: str = ""
    norms: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    batch: int = 0
    runs: str = ""
    twins: tuple[str, ...] = ()
    experts: bool = False
    router: str = ""
    chosen: int = 0
    clipped: tuple[str, ...] = ()

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the paths of what makes up one of the layers, and goes with it."""
        return () if self.runs else tuple(f"{path}.{index}" for path in (self.path, *self.beside))

    def seen(self, index: int) -> tuple[str, str]:
        """Return the paths of the modules that get a layer's input and give its output."""
        first, *_, last = self.parts(index) * 2
        return (f"{first}.{self.ends[0]}", f"{last}.{self.ends[1]}") if self.ends else (first, last)

    @property
    def feeds(self) -> tuple[Feed, ...]:
        """The inputs in which the units are gated; none for layers."""
        one = (Feed(self.gate, width=self.width),) if self.gate else ()
        return self.inputs or one

    @property
    def gated_at(self) -> list[str]:
        """What tells whether the gates are reached: the site; of dimensions each module."""
        if self.kind != "dimensions":
            return [self.path]
        return [feed.module for feed in (*self.feeds, *self.masked_norms)]

    @property
    def modules(self) -> tuple[Site, ...]:
        """The site as it is in each of the modules that have its weights."""
        inside = self.gate[len(self.path) :]
        twins = (replace(self, path=path, gate=f"{path}{inside}") for path in self.twins)
        return (self, *twins)

    @property
    def needs_one(self) -> bool:
        """Whether at least one unit must stay."""
        return self.kind in ("layers", "channels", "dimensions") or self.experts

    @property
    def coupled(self) -> bool:
        """Whether what a unit costs depends on how many of other sites are left."""
        return self.kind in ("channels", "dimensions") or self.experts

    @property
    def removable(self) -> tuple[int, ...]:
        """Units that may be removed, one by one; where one must stay, not all at once."""
        return tuple(i for i in range(self.size) if i not in self.fixed)


@dataclass(frozen=True)
class Refusal:
    """A place that looks prunable and is not offered, with the reason."""

    kind: Kind
    path: str
    reason: str


@dataclass(frozen=True)
class Units:
    """Everything that can be removed from a model, by kind, layer by layer.

    Attributes:
        sites: The sites, in the order of the model's modules.
        refusals: What is not offered, and why.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...] = ()

    @cached_property
    def _by_key(self) -> dict[tuple[Kind, str], Site]:
        return {(site.kind, site.path): site for site in self.sites}

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def site(self, kind: Kind, path: str) -> Site:
        """Return one site.

        Raises:
            KeyError: The model has no such site.
        """
        try:
            return self._by_key[kind, path]
        except KeyError:
            known = [site.path for site in self.sites if site.kind == kind]
            raise KeyError(
                f"the model has no {kind} at {path!r}; it has {kind} at {known}"
            ) from None

    def of(self, kinds: Iterable[Kind]) -> Units:
        """Return the sites of some kinds only.

        Raises:
            ValueError: A kind is unknown, or the model has no units of it.
        """
        kinds = tuple(kinds)
        if not kinds:
            raise ValueError(f"no kind of unit given: expected some of {list(KINDS)}")
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind of unit {kind!r}: expected some of {list(KINDS)}")
            if not any(site.kind == kind for site in self.sites):
                reasons = [f"{r.path}: {r.reason}" for r in self.refusals if r.kind == kind]
                if not reasons:
                    reasons = [
                        f"found no {SOUGHT[kind]}; docs/add_a_family.md tells how to name them"
                    ]
                raise ValueError(
                    f"this model has no {kind} that can be removed ({'; '.join(reasons[:3])}); "
                    f"it has {sorted({site.kind for site in self.sites}) or 'nothing to prune'}"
                )
        return Units(
            tuple(site for site in self.sites if site.kind in kinds),
            tuple(refusal for refusal in self.refusals if refusal.kind in kinds),
        )

    def full(self) -> Structure:
        """Return the structure that keeps everything."""
        return Structure(
            tuple(Entry(s.kind, s.path, tuple(range(s.size)), s.size) for s in self.sites)
        )

    def complete(self, structure: Structure) -> Structure:
        """Check a structure against the model and fill in the sites it leaves out as kept whole.

        Raises:
            KeyError: The structure names a site that the model does not have.
            ValueError: A count differs, or a unit is removed that cannot be.
        """
        given = {(e.kind, e.path): e for e in structure}
        for (kind, path), entry in given.items():
            site = self.site(kind, path)
            if entry.total != site.size:
                raise ValueError(
                    f"the structure counts {entry.total} {kind} at {path!r}, "
                    f"the model has {site.size}"
                )
            lost = sorted(set(site.fixed) - set(entry.kept))
            if lost:
                raise ValueError(f"{kind} {lost} at {path!r} cannot be removed")
            if site.needs_one and not entry.kept:
                raise ValueError(f"at least one of the {kind} of {path!r} must stay")
        return Structure(
            tuple(
                given.get((s.kind, s.path), Entry(s.kind, s.path, tuple(range(s.size)), s.size))
                for s in self.sites
            )
        )

    def __str__(self) -> str:
        table = Table("kind", "path", "units", "fixed", title="units that can be removed")
        for site in self.sites:
            table.add_row(site.kind, site.path, str(site.size), ", ".join(map(str, site.fixed)))
        for refusal in self.refusals:
            table.add_row(refusal.kind, refusal.path, "–", refusal.reason)
        console = Console(width=120)
        with console.capture() as capture:
            console.print(table)
        return capture.get()
