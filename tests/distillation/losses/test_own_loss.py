"""Losses from outside of the package, registered and used by a recipe."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distilling import config
from recipe_files import image_recipe
from torch import Tensor

from hfslim.distillation import FeatureLoss, LogitLoss, register_loss
from hfslim.distillation.losses.feature_losses import FEATURE_LOSSES
from hfslim.distillation.losses.logit_losses import LOGIT_LOSSES, distillation_loss
from hfslim.pipeline.recipe import parse_recipe
from hfslim.pipeline.runner import run
from hfslim.reporting.report import Report


def logit_mse(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return ((student - teacher) / temperature).square().mean(-1)


def hidden_l1(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    return (student - teacher).abs().mean((1, 2))


@pytest.fixture(autouse=True)
def own_losses() -> Iterator[None]:
    register_loss("logit_mse", LogitLoss(logit_mse))
    register_loss("hidden_l1", FeatureLoss(hidden_l1, on="hidden"))
    yield
    del LOGIT_LOSSES["logit_mse"], FEATURE_LOSSES["hidden_l1"]


def test_a_recipe_trains_on_own_losses_and_logs_them(tmp_path: Path) -> None:
    recipe = image_recipe(tmp_path)
    recipe["training"] = {**recipe["training"], "logging_steps": 1}
    losses = {"logit_loss": "logit_mse", "feature_losses": {"hidden_l1": 2.0}}
    recover = {"recover": {"allow_untrained_teacher": True, **losses}}
    recipe["stages"] = [*recipe["stages"][:2], recover]
    run(parse_recipe(recipe))
    report = Report.load(tmp_path / "out")
    first = {name: one["value"][0] for name, one in report.history[-1]["series"].items()}
    logits = 0.5 * first["loss_hard"] + 0.5 * first["loss_distillation"]
    assert first["loss"] == pytest.approx(logits + 2 * first["loss_hidden_l1"], rel=1e-3)
    assert first["loss_hidden_l1"] > 0 and first["loss_distillation"] > 0
    assert "(logit_mse) + 2 · loss_hidden_l1" in report.provenance.losses["03-recover"]


def test_an_own_logit_loss_gets_the_temperature_and_is_for_its_problems(tmp_path: Path) -> None:
    student, teacher = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 1.0]])
    loss = distillation_loss(student, teacher, "single_label_classification", 2.0, "logit_mse")
    assert loss.tolist() == [(1 + 4) / 2]
    assert "loss_distillation (logit_mse)" in config(tmp_path, logit_loss="logit_mse").objective
    with pytest.raises(ValueError, match=r"'logit_mse' is for single_label.*this is regression"):
        distillation_loss(student, teacher, "regression", 2.0, "logit_mse")


def test_a_loss_that_no_trainer_can_call_or_log_is_refused() -> None:
    for name in ("kl", "hidden_mse", "hard"):
        with pytest.raises(ValueError, match=f"loss '{name}' is registered already"):
            register_loss(name, LogitLoss(logit_mse))
    with pytest.raises(ValueError, match=r"takes \['gamma'\].*it can take \['beta', 'labels'"):
        LogitLoss(lambda student, teacher, gamma: student.sum(-1))


def test_a_mean_over_the_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGIT_LOSSES, "mean", LogitLoss(lambda s, t: (s - t).mean()))
    both = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"'mean' returned shape \[\]; expected one value"):
        distillation_loss(both, both, "single_label_classification", 1.0, "mean")
