"""Teachers in 8 or 16 bits: nearly the same answers, a part of the memory."""

from pathlib import Path

import pytest
import torch
from adapter_models import adapted, adapter, base, logits
from distilling import config, examples
from models import tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfslim import DistillationTrainer
from hfslim.distillation.teacher.teacher import load_teacher, run_teacher
from hfslim.distillation.teacher.weights import fingerprint, to_int8


def test_a_row_is_rounded_to_127_steps_of_its_largest_number() -> None:
    layer = nn.Linear(3, 2, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[127.0, 1.4, -63.6], [0.0, 0.0, 0.0]]))
    to_int8(layer)
    assert layer.weight.tolist() == [[127.0, 1.0, -64.0], [0.0, 0.0, 0.0]]
    numbers = layer.parametrizations.weight.original0
    assert numbers.dtype == torch.int8 and numbers.tolist()[0] == [127, 1, -64]


def linear_bytes(model: PreTrainedModel) -> int:
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]
    kept = [
        m.parametrizations.weight.original0 if hasattr(m, "parametrizations") else m.weight
        for m in maps
    ]
    return sum(weight.numel() * weight.element_size() for weight in kept)


@pytest.mark.parametrize("family", ["vit", "wavlm", "whisper"])
def test_eight_bits_answer_nearly_the_same(family: str, tmp_path: Path) -> None:
    student, whole = tiny(family), tiny(family, seed=1)
    whole.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, student, dtype=torch.int8)
    rows = examples(student, labels=False)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    ours, exact = run_teacher(teacher, batch, None), run_teacher(whole, batch, None)
    assert 0 < (ours - exact).abs().max() < 0.02 * exact.abs().max()
    assert linear_bytes(teacher) * 4 == linear_bytes(whole)


@pytest.mark.parametrize("short", ["int8", "bfloat16"])
def test_short_numbers_teach_logits_and_features_and_are_cached(short: str, tmp_path: Path) -> None:
    losses = []
    for dtype, cache in ((short, None), (short, "a"), (short, "a"), (None, "b")):
        student = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = DistillationTrainer(
            student,
            config(
                tmp_path,
                teacher_dtype=dtype,
                teacher_cache=cache and str(tmp_path / cache),
                teacher_cache_features=cache is not None,
                feature_losses={"minilm_v2": 1.0},
                logging_steps=1,
                save_strategy="no",
            ),
            teacher=tiny("bert", seed=1),
            train_dataset=examples(student),
        )
        trainer.train()
        log = trainer.state.log_history[:-1]
        losses.append([e[n] for e in log for n in ("loss_distillation", "loss_minilm_v2")])
    for cached in losses[1:3]:
        assert cached == pytest.approx(losses[0], rel=0, abs=1e-5)
    assert losses[3] != losses[0] and losses[3] == pytest.approx(losses[0], rel=0.05)


def test_a_teacher_quantized_by_its_own_config_is_taken_as_it_is() -> None:
    teacher = tiny("bert", seed=1)
    teacher.is_quantized = True
    assert load_teacher(teacher, tiny("bert")) is teacher
    with pytest.raises(ValueError, match=r"quantized by its own config.*leave teacher_dtype out"):
        load_teacher(teacher, tiny("bert"), dtype=torch.bfloat16)


def test_an_adapter_on_the_students_base_may_be_in_eight_bits(tmp_path: Path) -> None:
    source = base(tmp_path)
    folder, whole = adapter(tmp_path, source)
    student = adapted(source, seed=2)
    teacher = load_teacher(folder, student, dtype=torch.int8)
    rows = examples(student, labels=False)
    ours, exact = logits(teacher, rows), logits(whole, rows)
    assert 0 < (ours - exact).abs().max() < 0.05 * exact.abs().max()
    trainer = DistillationTrainer(
        student,
        config(tmp_path, feature_losses={"hidden_mse": 1.0, "minilm_v2": 1.0}),
        teacher=teacher,
        train_dataset=examples(student),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss_minilm_v2"] > 0


class Packed(Tensor):
    """A weight as quantizers keep them: its bytes are no plain tensor's."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_quantized_weights_of_others_are_told_apart_by_their_values() -> None:
    prints = set()
    for number in (0.0, 1.0, 1.0):
        layer = nn.Linear(2, 2, bias=False)
        values = torch.full((2, 2), number).as_subclass(Packed)
        layer.weight = nn.Parameter(values, requires_grad=False)
        prints.add(fingerprint(layer, None))
    assert len(prints) == 2


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher_dtype is 'int9'.*'int8'"):
        config(tmp_path, teacher_dtype="int9")
