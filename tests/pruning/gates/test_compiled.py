"""`torch.compile`, by backends that only trace: the same training, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
from distilling import config, examples
from models import tiny
from transformers import set_seed

from hfslim import (
    DistillationTrainer,
    LayerDropCallback,
    PruningCallback,
    WeightPruningCallback,
)


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> DistillationTrainer:
    set_seed(0)
    small = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0}
    student, teacher = (
        tiny("bert", "sdpa", seed=i, attention_probs_dropout_prob=0.0, **small) for i in (0, 1)
    )
    return DistillationTrainer(
        student,
        config(folder, logging_steps=1, save_strategy="no", **settings),
        teacher=teacher,
        train_dataset=examples(student),
        callbacks=list(callbacks),
    )


def test_a_compiled_student_and_teacher_train_as_they_do_otherwise(tmp_path: Path) -> None:
    logged = []
    for settings in ({}, {"torch_compile_backend": "eager", "teacher_compile": "aot_eager"}):
        callback = WeightPruningCallback(0.5)
        run = trainer(tmp_path, callback, **settings)
        run.train()
        names = ("loss", "loss_distillation", "weight_sparsity")
        logged.append([[e[n] for n in names] for e in run.state.log_history[:-1]])
        compiled = run.teacher._compiled_call_impl is not None
        wrapped = type(run.model_wrapped).__name__ == "OptimizedModule"
        assert compiled == wrapped == bool(settings)
        run.save_model(str(tmp_path / "out"))
    for one, other in zip(*logged, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert not [name for name in run.model.state_dict() if "_orig_mod" in name]


@pytest.mark.parametrize(
    ("callback", "settings", "message"),
    [
        (PruningCallback({"macs": 0.6}), {}, "PruningCallback opens and closes gates"),
        (LayerDropCallback(0.5), {}, "LayerDropCallback opens and closes gates"),
        (None, {"feature_losses": {"hidden_mse": 1.0}}, "which torch.compile hides"),
    ],
)
def test_what_compiling_would_hide_is_refused(
    callback: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    callbacks = [] if callback is None else [callback]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, *callbacks, torch_compile_backend="eager", **settings).train()


def test_a_compiled_teacher_shows_no_features(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave teacher_compile out"):
        config(tmp_path, teacher_compile="eager", feature_losses={"hidden_mse": 1.0})
