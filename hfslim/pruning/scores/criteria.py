"""The table of criteria: what each is computed from, by which function, after which paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.structure import KINDS, Key, Kind
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.scores import importance
from hfslim.pruning.scores.layers import loss_delta, spaced

Criteria = str | Mapping[Kind, str]
"""The name of a criterion, or one for each kind of unit."""
Labels = Literal["needed", "optional", "unused"]
Rows = torch.Tensor | slice
"""A choice of the examples of a batch, `[examples]`."""
Scoring = Callable[[torch.Tensor], torch.Tensor]
WeightScoring = Callable[[nn.Module, Units, int], dict[Key, torch.Tensor]]
RemovalScoring = Callable[
    [PreTrainedModel, Units, Sequence[Mapping[str, Any]], bool], dict[Key, torch.Tensor]
]

OUTPUT_NORM = 1e-5
"""λ of K-prune, the weight of the output norm."""


@dataclass(frozen=True)
class GatedActivations:
    """The activations that the gates of a site multiply in one batch.

    Attributes:
        site: The site.
        before: For layers the input, else the same as `after`; `[examples, positions, features]`.
        after: The gated activations; for layers the output.
        weight: `[examples, positions]`, 0 for padding, 1 elsewhere.
        projection: Weight of the projection of the gated features, `[outputs, features]`; None for
            layers.
    """

    site: Site
    before: torch.Tensor
    after: torch.Tensor
    weight: torch.Tensor
    projection: torch.Tensor | None

    @property
    def added(self) -> torch.Tensor:
        """The contribution of the units; for layers, to the residual stream."""
        return self.after - self.before if self.site.kind == "layers" else self.after

    def of(self, rows: Rows) -> GatedActivations:
        """Return the activations of some examples."""
        return replace(
            self, before=self.before[rows], after=self.after[rows], weight=self.weight[rows]
        )

    @property
    def units(self) -> int:
        """Number of units in the batch: 1 for layers, which are scored one by one."""
        return 1 if self.site.kind == "layers" else self.site.size


@dataclass(frozen=True)
class Criterion:
    """How units are scored. The sources that are set add up.

    Every score is a sum over examples, so that batches and processes add their scores.

    Attributes:
        paper: The source in the literature.
        gradient: From `∂loss/∂gate`, `[examples, units]`, to `[units]`.
        loss: The loss that `gradient` differentiates: the loss by the labels (in training, the
            training loss), or the divergence from the model's own predictions, factor by factor
            (`hfslim.pruning.scores.importance.fisher_factors`).
        temperature: Temperature of the predictions.
        activation: From `GatedActivations` to `[units]`.
        weights: From the model and a seed, to `[units]` by site.
        removal: From the model and batches, by removing units in turn, to `[units]` by site.
        eliminates: Whether units are removed in turn, from second moments, while the remaining
            weights are updated (`hfslim.pruning.obs.reconstruction.obs_scores`).
        learned: Whether gates are learned in training, all under one budget
            (`hfslim.pruning.in_training.learned_gates.LearnedGates`).
        labels: Whether the loss needs labels; where they are optional and missing, the model's own
            predictions replace them.
        kinds: The kinds of units that it can score.
        per_layer: Whether the scores of heads and neurons are divided by their L2 norm per layer.
        accumulates: Whether scores add up over the whole training, or restart at each decision.
        when: `calibration`, `training` or both.
    """

    paper: str
    gradient: Scoring | None = None
    loss: Literal["labels", "predictions"] = "labels"
    temperature: float = 1.0
    activation: Callable[[GatedActivations], torch.Tensor] | None = None
    weights: WeightScoring | None = None
    removal: RemovalScoring | None = None
    eliminates: bool = False
    learned: bool = False
    labels: Labels = "unused"
    kinds: tuple[Kind, ...] = KINDS
    per_layer: bool = False
    accumulates: bool = False
    when: tuple[str, ...] = ("calibration", "training")


def _activation(batch: GatedActivations) -> torch.Tensor:
    return importance.activation(batch.added * batch.weight.unsqueeze(-1), batch.units)


def _block_influence(batch: GatedActivations) -> torch.Tensor:
    return importance.block_influence(batch.before, batch.after, batch.weight)


def _output_norm(batch: GatedActivations) -> torch.Tensor:
    if batch.projection is None:
        raise ValueError(
            f"kl_fisher needs the weight matrix that projects the {batch.site.kind} at "
            f"{batch.site.path!r}, and there is none: choose another criterion, such as fisher"
        )
    norm = importance.output_norm(batch.added, batch.projection, batch.units, batch.weight)
    return OUTPUT_NORM * norm


CRITERIA: dict[str, Criterion] = {
    "obs": Criterion(
        "ZipLM, Kurtic et al. 2023, arXiv 2302.04089; LLM Surgeon, arXiv 2312.17244",
        eliminates=True,
        kinds=("heads", "neurons", "channels", "layers"),
        when=("calibration",),
    ),
    "fisher": Criterion(
        "Kwon et al. 2022, arXiv 2204.09656", gradient=importance.fisher, labels="optional"
    ),
    "kl_fisher": Criterion(
        "K-prune, Park et al. 2023, arXiv 2308.03449",
        gradient=lambda gradient: importance.fisher(gradient) / 2,
        loss="predictions",
        temperature=2.0,
        activation=_output_norm,
        kinds=("heads", "neurons"),
    ),
    "taylor": Criterion(
        "Michel et al. 2019, arXiv 1905.10650",
        gradient=importance.taylor,
        labels="needed",
        per_layer=True,
    ),
    "movement": Criterion(
        "Sanh et al. 2020, arXiv 2005.07683",
        gradient=importance.movement,
        labels="needed",
        accumulates=True,
        when=("training",),
    ),
    "l0": Criterion(
        "Louizos et al. 2018, arXiv 1712.01312; CoFi, Xia et al. 2022, arXiv 2204.00408",
        learned=True,
        kinds=("heads", "neurons", "layers"),
        when=("training",),
    ),
    "activation": Criterion("Minitron, arXiv 2407.14679", activation=_activation),
    "block_influence": Criterion(
        "ShortGPT, Men et al. 2024, arXiv 2403.03853",
        activation=_block_influence,
        kinds=("layers",),
    ),
    "loss_delta": Criterion(
        "greedy backward selection",
        removal=loss_delta,
        labels="needed",
        kinds=("layers",),
        when=("calibration",),
    ),
    "spaced": Criterion(
        "Fan et al. 2019, arXiv 1909.11556",
        weights=lambda model, units, seed: spaced(units),
        kinds=("layers",),
    ),
    "magnitude": Criterion(
        "L2 norm of the weights",
        weights=lambda model, units, seed: importance.magnitude(model, units),
    ),
    "random": Criterion(
        "control", weights=lambda model, units, seed: importance.random_scores(units, seed)
    ),
}


def register_criterion(name: str, criterion: Criterion) -> None:
    """Add a criterion to the table, under the name by which `criterion` arguments give it.

    `hfslim.prune`, `PruningCallback` and recipes find it there. Register it before the recipe is
    parsed, and in every process.

    Args:
        name: A name that `CRITERIA` does not have yet.
        criterion: How it scores, by `gradient`, `activation`, `weights` or `removal`.

    Raises:
        ValueError: The name is taken, or the criterion sets none of these four.
    """
    if name in CRITERIA:
        raise ValueError(f"criterion {name!r} is registered already: choose another name")
    sources = ("gradient", "activation", "weights", "removal")
    if not any(getattr(criterion, source) for source in sources):
        raise ValueError(f"criterion {name!r} computes no scores: set one of {list(sources)}")
    CRITERIA[name] = criterion


def usual_criterion(
    kinds: Iterable[Kind], when: str = "calibration", sites: Iterable[Site] = ()
) -> str:
    """Return the default criterion: `obs` where it can be used, else `fisher`."""
    obs = CRITERIA["obs"]
    fits = when in obs.when and set(kinds) <= set(obs.kinds)
    return "obs" if fits and not any(site.experts.inside for site in sites) else "fisher"


def criteria_by_kind(
    criterion: Criteria, kinds: Iterable[Kind], when: str = "calibration"
) -> dict[Kind, str]:
    """Return the name of the criterion of each kind of unit.

    Raises:
        ValueError: A kind or a criterion is unknown, a criterion cannot score that kind or be used
            at that time, a kind has none, or learned gates are mixed with scored ones.
    """
    given = dict(criterion) if isinstance(criterion, Mapping) else None
    result: dict[Kind, str] = {}
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of unit {kind!r}: expected some of {list(KINDS)}")
        name = criterion if given is None else given.get(kind)
        valid = [n for n, c in CRITERIA.items() if kind in c.kinds and when in c.when]
        if not isinstance(name, str) or name not in CRITERIA:
            raise ValueError(f"criterion for {kind}: got {name!r}, expected one of {valid}")
        entry = CRITERIA[name]
        if kind not in entry.kinds:
            raise ValueError(
                f"{name} scores {' and '.join(entry.kinds)}, not {kind}; for {kind} use one of "
                f"{valid}, by criterion={{{kind!r}: …}}"
            )
        if when not in entry.when:
            needs = {
                "calibration": f"{name} is measured while training: use PruningCallback, in a "
                "recipe num_train_epochs, or",
                "training": f"{name} is measured on calibration data, for a cut in one go: use "
                "hfslim.prune, in a recipe no schedule, num_train_epochs or max_steps, or",
            }
            raise ValueError(f"{needs[when]} one of {valid}")
        result[kind] = name
    if learns(result) and len(set(result.values())) > 1:
        raise ValueError(
            "l0 learns the gates of all kinds under one budget, so it cannot be mixed with other "
            f"criteria: use criterion='l0'; got {result}"
        )
    return result


def learns(criteria: Mapping[Kind, str]) -> bool:
    """Return whether gates are learned instead of scored."""
    return any(CRITERIA[name].learned for name in criteria.values())


def check_labels(criteria: Mapping[Kind, str]) -> None:
    """Raise a ValueError if a criterion needs labels; call it where the data has none."""
    needing = sorted({name for name in criteria.values() if CRITERIA[name].labels == "needed"})
    if needing:
        free = [
            name
            for name, entry in CRITERIA.items()
            if entry.labels != "needed" and "calibration" in entry.when
        ]
        raise ValueError(
            f"criterion {', '.join(needing)} needs labels and the calibration data has none: add "
            f"`labels` to the batches, or use one of {free}"
        )
