"""The sites of a model, whose units can be removed, and the places where none can."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from rich.console import Console
from rich.table import Table

from hfslim.anatomy.slices import Cut, Feed
from hfslim.anatomy.structure import KINDS, Entry, Key, Kind, Structure

SOUGHT: dict[Kind, str] = {
    "heads": "module with projections like 'q_proj', 'k_proj', 'v_proj' and 'out_proj'",
    "neurons": "module with projections like 'fc1' and 'fc2' or 'up_proj' and 'down_proj'",
    "channels": "convolution whose outputs go to convolutions or linear maps, channel by channel",
    "experts": "module with tensors 'gate_up_proj' and 'down_proj' of all experts, beside a router",
    "layers": "ModuleList of layers that hold heads or neurons",
    "dimensions": "norm across the features that every layer reads and adds to",
}
"""The part of a model that discovery looks for, by kind of unit."""


@dataclass(frozen=True)
class HeadPart:
    """What only a site of heads has.

    Attributes:
        queries: Query heads per unit.
        shared: Whether all heads share one key and value, which stay.
        norms: Norms across all heads: queries and keys of removed heads stay, because the norms
            need them.
        replacement: The class of `modeling_hfslim` that must replace the module's own class, which
            cannot run with some heads missing. Empty if none.
        headless: Settings of the replacement once no head is left.
        count_field: Config field in which the module reads its number of heads, if it does.
    """

    queries: int = 1
    shared: bool = False
    norms: tuple[str, ...] = ()
    replacement: str = ""
    headless: tuple[tuple[str, str], ...] = ()
    count_field: str = ""


@dataclass(frozen=True)
class LayerPart:
    """What only a site of layers has.

    Attributes:
        runs: Config field with the number of layers, where one module runs several times.
        beside: Further lists with a part of each layer, in the order in which they run; the last
            part's output is the layer's.
        streams: Arguments that hold the streams, in the order of the outputs, where layers add to
            several.
        ends: Names of the modules inside a layer that get its input and give its output, where the
            layer itself is not called as a module.
    """

    runs: str = ""
    beside: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpertPart:
    """What only a site of experts, or of neurons inside experts, has.

    Attributes:
        inside: Whether the units are experts or lie inside them, so that their costs depend on each
            other.
        router: Path of the module that chooses among the experts.
        chosen: Experts per token.
        clipped: Attributes that hold `chosen`, as paths from the site's module. The number falls
            where fewer experts are left.
    """

    inside: bool = False
    router: str = ""
    chosen: int = 0
    clipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """A place in a model that holds units of one kind.

    Attributes:
        kind: What the units are.
        path: Module path that names the site: the attention module, the module around the two
            FFN projections, or the list of layers.
        size: Number of units.
        feeds: Inputs that carry the units side by side, where they are gated: of the attention
            output projection, of the second FFN projection, of all convolutions that take the
            channels, of the module that holds all experts. Empty for layers, which are gated
            themselves.
        cuts: The tensors to slice. Empty for layers.
        attributes: Integer attributes that count units, as paths from the module at `path` (`^` for
            the one around it), with the amount that each unit adds.
        fixed: Units that cannot be removed.
        layer: Path of the removable layer around the site; empty outside of any.
        uses: Number of times that one forward pass of the model runs the module.
        batch: The dimension of examples in what is gated.
        twins: Further modules with the very same weights, which lose the same units.
        masked_norms: Norms across the units of a site of dimensions. With some units closed, a norm
            takes its statistics over the open ones.
        heads: What only heads have.
        layers: What only layers have.
        experts: What only experts, and neurons inside them, have.
    """

    kind: Kind
    path: str
    size: int
    feeds: tuple[Feed, ...] = ()
    cuts: tuple[Cut, ...] = ()
    attributes: tuple[tuple[str, int], ...] = ()
    fixed: tuple[int, ...] = ()
    layer: str = ""
    uses: int = 1
    batch: int = 0
    twins: tuple[str, ...] = ()
    masked_norms: tuple[Feed, ...] = ()
    heads: HeadPart = HeadPart()
    layers: LayerPart = LayerPart()
    experts: ExpertPart = ExpertPart()

    @property
    def key(self) -> Key:
        """Kind and path, by which sites are looked up."""
        return self.kind, self.path

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the paths of the modules that make up one layer, and go with it."""
        lists = () if self.layers.runs else (self.path, *self.layers.beside)
        return tuple(f"{path}.{index}" for path in lists)

    def seen(self, index: int) -> tuple[str, str]:
        """Return the paths of the modules that get a layer's input and give its output."""
        first, *_, last = self.parts(index) * 2
        if self.layers.ends:
            first, last = (f"{first}.{self.layers.ends[0]}", f"{last}.{self.layers.ends[1]}")
        return first, last

    @property
    def gate(self) -> str:
        """Path of the first module whose input carries the units; empty for layers."""
        return self.feeds[0].module if self.feeds else ""

    @property
    def width(self) -> int:
        """Features per unit in that input."""
        return self.feeds[0].features if self.feeds else 1

    @property
    def gated_at(self) -> list[str]:
        """Paths whose gates must all be reached: the site's; for dimensions each module's."""
        if self.kind != "dimensions":
            return [self.path]
        return [feed.module for feed in (*self.feeds, *self.masked_norms)]

    @property
    def modules(self) -> tuple[Site, ...]:
        """The site in each of the modules that share its weights."""
        inside = self.gate[len(self.path) :]
        return self, *(
            replace(self, path=path, feeds=(replace(self.feeds[0], module=f"{path}{inside}"),))
            for path in self.twins
        )

    @property
    def needs_one(self) -> bool:
        """Whether at least one unit must stay."""
        return self.kind in ("layers", "channels", "dimensions") or self.experts.inside

    @property
    def coupled(self) -> bool:
        """Whether the cost of a unit depends on the number of units kept at other sites."""
        return self.kind in ("channels", "dimensions") or self.experts.inside

    @property
    def removable(self) -> tuple[int, ...]:
        """Units that can be removed, though not all at once where `needs_one` holds."""
        return tuple(i for i in range(self.size) if i not in self.fixed)


@dataclass(frozen=True)
class Refusal:
    """A place whose units cannot be removed, with the reason."""

    kind: Kind
    path: str
    reason: str


@dataclass(frozen=True)
class Units:
    """All units that can be removed from a model.

    Attributes:
        sites: The sites, in the order of the model's modules.
        refusals: The places whose units cannot be removed.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...] = ()

    @cached_property
    def _by_key(self) -> dict[Key, Site]:
        return {site.key: site for site in self.sites}

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
                reasons = [f"{r.path}: {r.reason}" for r in self.refusals if r.kind == kind] or [
                    f"found no {SOUGHT[kind]}; docs/add_a_family.md shows how to name them"
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
        return self.complete(Structure(()))

    def complete(self, structure: Structure) -> Structure:
        """Check a structure against the model; sites that it leaves out are kept whole.

        Raises:
            KeyError: The structure names a site that the model does not have.
            ValueError: A count differs, or a fixed unit is removed.
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
                given.get(s.key, Entry(s.kind, s.path, tuple(range(s.size)), s.size))
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
