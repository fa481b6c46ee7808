"""Compare two scorings of the same units, such as those of two seeds, criteria or classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

from hfslim.anatomy.structure import KINDS, Key, Kind


@dataclass(frozen=True)
class UnitAgreement:
    """The agreement of two scorings of the units of one kind.

    Attributes:
        kind: The kind of unit.
        rank_correlation: Spearman's, over all units of the kind; nan if all scores are equal.
        by_site: The rank correlation over the units of each site.
        shared: By the fraction of units kept, the fraction of the units kept by one scoring that
            the other keeps too. Independent scorings share that fraction of units on average.
        kept_by_both: By the fraction of units kept and by site, the units that both keep.
    """

    kind: Kind
    rank_correlation: float
    by_site: Mapping[str, float]
    shared: Mapping[float, float]
    kept_by_both: Mapping[float, Mapping[str, tuple[int, ...]]]


def unit_agreement(
    first: Mapping[Key, Tensor],
    second: Mapping[Key, Tensor],
    kept: Sequence[float] = (0.75, 0.5, 0.25),
) -> list[UnitAgreement]:
    """Compare two scorings of the same units, kind by kind.

    Units of two models correspond if both models were trained from the same weights; the heads of
    models trained from scratch are in random order.

    Args:
        first: Importance by kind and site, `[units]`, as `PruneResult.scores`.
        second: The other scoring.
        kept: Fractions of the units of a kind to keep, those of the highest scores over all sites;
            of equal scores the first.

    Returns:
        The agreement for each kind.

    Raises:
        ValueError: The scorings are of different units, or a fraction is not between 0 and 1.
    """
    differ = [k for k in first.keys() | second.keys() if _size(first, k) != _size(second, k)]
    if differ:
        kind, path = min(differ)
        sizes = " and ".join(str(_size(scores, (kind, path))) for scores in (first, second))
        raise ValueError(
            f"not the same units: at the {kind} of {path!r} there are {sizes}; compare two models "
            "of one shape, scored by the same kinds of units"
        )
    if not all(0 < fraction <= 1 for fraction in kept):
        raise ValueError(f"kept is fractions above 0 and up to 1, got {list(kept)}")
    return [
        _of_kind(
            kind,
            [
                ({path: scores[kind, path] for k, path in first if k == kind})
                for scores in (first, second)
            ],
            kept,
        )
        for kind in KINDS
        if any(k == kind for k, _ in first)
    ]


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation; nan if all values of one side are equal.

    Examples:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([10.0, 30.0, 20.0]))
        0.5
    """
    ranks = torch.from_numpy(rankdata(torch.stack([first, second]).numpy(), axis=1))
    ranks -= ranks.mean(1, keepdim=True)
    norms = ranks.square().sum(1).prod().sqrt()
    return (ranks.prod(0).sum() / norms).item()


def _of_kind(
    kind: Kind, pair: Sequence[Mapping[str, Tensor]], kept: Sequence[float]
) -> UnitAgreement:
    paths = list(pair[0])
    flat = [torch.cat([scores[path] for path in paths]) for scores in pair]
    places = [(path, unit) for path in paths for unit in range(len(pair[0][path]))]
    shared, both = {}, {}
    for fraction in kept:
        number = max(round(fraction * len(places)), 1)
        best = [set(f.argsort(descending=True, stable=True)[:number].tolist()) for f in flat]
        common = sorted(best[0] & best[1])
        shared[fraction] = len(common) / number
        both[fraction] = {
            path: tuple(places[i][1] for i in common if places[i][0] == path) for path in paths
        }
    by_site = {path: rank_correlation(pair[0][path], pair[1][path]) for path in paths}
    return UnitAgreement(kind, rank_correlation(*flat), by_site, shared, both)


def _size(scores: Mapping[Key, Tensor], key: Key) -> int:
    return len(scores[key]) if key in scores else 0
