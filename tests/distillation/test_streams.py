"""The check of the teacher takes nothing from a stream; a step that begins anew counts once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import config, examples
from models import tiny
from torch.utils.data import IterableDataset

from hfslim import DistillationTrainer
from hfslim.distillation.teacher.teacher_quality import UntrainedTeacherError

Row = dict[str, torch.Tensor]


class Stream(IterableDataset[Row]):
    """A stream that may have a length, and may run once."""

    def __init__(self, rows: list[Row], once: bool = False) -> None:
        self.rows, self.once, self.read = rows, once, 0
        self.left = iter(rows)

    def __iter__(self) -> Iterator[Row]:
        for row in self.left if self.once else self.rows:
            self.read += 1
            yield row


class Sized(Stream):
    def __len__(self) -> int:
        return len(self.rows)


class Seen(DistillationTrainer):
    """Keeps the first token of each example that the student is trained on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained: list[int] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.trained += inputs["input_ids"][:, 1].tolist()
        return super().compute_loss(model, inputs, *args, **kwargs)


def rows_for(teacher: Any, count: int, right: bool = True) -> list[Row]:
    """Examples that are told apart by a token, with the teacher's answers as labels, or with one
    that it never gives."""
    rows = examples(teacher, count=count)
    for i, row in enumerate(rows):
        row["input_ids"][1] = 3 + i % 60
        with torch.no_grad():
            answer = teacher(**{k: v[None] for k, v in row.items() if k != "labels"}).logits[0]
        row["labels"] = torch.tensor(i % 3) if not right else answer.argmax()
    return rows


def trainer(folder: Path, rows: Any, teacher: Any, **settings: Any) -> Seen:
    rest = {k: settings.pop(k) for k in ("eval_dataset",) if k in settings}
    fields = {"allow_untrained_teacher": False, "save_strategy": "no", **settings}
    return Seen(tiny("bert"), config(folder, **fields), teacher=teacher, train_dataset=rows, **rest)


@pytest.mark.parametrize("kind", [Stream, Sized])
@pytest.mark.parametrize("once", [False, True])
def test_a_stream_is_trained_on_from_its_first_example(
    kind: type[Stream], once: bool, tmp_path: Path, caplog
) -> None:
    teacher = tiny("bert", seed=1).eval()
    rows = rows_for(teacher, 48)
    stream = kind(rows, once)
    one = trainer(tmp_path, stream, teacher, max_steps=12)
    with caplog.at_level("INFO", "hfslim"):
        one.train()
    assert one.trained == [row["input_ids"][1].item() for row in rows]
    assert stream.read == 48


@pytest.mark.parametrize("steps", [12, 200])
def test_an_untrained_teacher_of_a_stream_is_refused_on_the_first_batches(
    steps: int, tmp_path: Path
) -> None:
    teacher = tiny("bert", seed=1).eval()
    stream = Stream(rows_for(teacher, 600, right=False))
    one = trainer(tmp_path, stream, teacher, max_steps=steps)
    with pytest.raises(UntrainedTeacherError, match="chance"):
        one.train()
    assert stream.read <= 512 + 2 * 4


def test_a_stream_to_evaluate_on_is_not_read_by_the_check(tmp_path: Path) -> None:
    teacher = tiny("bert", seed=1).eval()
    rows = rows_for(teacher, 48)
    held = Sized(rows, once=True)
    one = trainer(tmp_path, rows, teacher, max_steps=2, eval_dataset=held)
    one.train()
    assert held.read == 0
    assert "eval_loss" in one.evaluate() and held.read == 48


def test_the_first_log_is_of_the_batch_size_that_fits(tmp_path: Path, monkeypatch) -> None:
    """`auto_find_batch_size` begins again where a batch does not fit into memory."""
    teacher = tiny("bert", seed=1).eval()
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    fields = {"max_steps": 4, "logging_steps": 4, "save_strategy": "no", "learning_rate": 0.0}
    logs = []
    for size in (4, 8):
        settings = {"per_device_train_batch_size": size, "auto_find_batch_size": size > 4, **fields}
        one = DistillationTrainer(
            tiny("bert", **still),
            config(tmp_path, **settings),
            teacher=teacher,
            train_dataset=rows_for(teacher, 16),
        )
        step = one.training_step

        def scarce(model: Any, inputs: Any, *rest: Any, one: Any = one, step: Any = step) -> Any:
            if len(inputs["labels"]) > 4 and one.state.global_step > 0:
                raise RuntimeError("CUDA out of memory.")
            return step(model, inputs, *rest)

        monkeypatch.setattr(one, "training_step", scarce)
        one.train()
        logs.append(one.state.log_history[0])
    for name in ("loss", "loss_hard", "loss_distillation", "agreement"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4), name
