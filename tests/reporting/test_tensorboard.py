"""What a user watches: the figures of a training, in the file that TensorBoard reads."""

from pathlib import Path

import pytest
from distilling import config, examples
from models import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hfslim import L2SP, DistillationTrainer, PruningCallback, WeightPruningCallback

WATCHED = {
    "loss",
    "loss_hard",
    "loss_distillation",
    "loss_hidden_mse",
    "loss_minilm_v2",
    "loss_l2_sp",
    "agreement",
    "teacher_time_share",
    "teacher_cache_hits",
    "kept_heads",
    "weight_sparsity",
}


@pytest.mark.parametrize("cached", [False, True])
def test_every_figure_of_a_training_is_in_tensorboards_file(
    cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    student = tiny("bert")
    losses = {} if cached else {"hidden_mse": 1.0, "minilm_v2": 1.0}
    settings = config(
        tmp_path,
        feature_losses=losses,
        teacher_cache=str(tmp_path / "cache") if cached else None,
        report_to="tensorboard",
        logging_steps=1,
        save_strategy="no",
    )
    callbacks = [
        L2SP(0.01),
        PruningCallback({"sparsity": {"heads": 0.5}}, ("heads",)),
        WeightPruningCallback(0.3, start=0.5, end=1.0),
    ]
    trainer = DistillationTrainer(
        student,
        settings,
        teacher=tiny("bert", seed=1),
        train_dataset=examples(student),
        callbacks=callbacks,
    )
    trainer.train()
    events = EventAccumulator(str(next((tmp_path / "events").rglob("events.*")).parent))
    events.Reload()
    names = {"loss_hidden_mse", "loss_minilm_v2"} if cached else {"teacher_cache_hits"}
    for name in WATCHED - names:
        history = [entry[name] for entry in trainer.state.log_history if name in entry]
        written = [event.value for event in events.Scalars(f"train/{name}")]
        assert len(written) == 4
        assert written == pytest.approx(history, rel=1e-5), name
