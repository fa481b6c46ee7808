"""PEFT: adapters as teachers, students with adapters, and what they become before a cut."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_models import NAMES, adapted, adapter, base, logits
from distilling import config, examples, rename
from models import tiny
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from places import ROOT, SUPPORT
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

import hfslim
from hfslim import DistillationTrainer, PruningCallback
from hfslim.distillation.losses.capture import Capture
from hfslim.distillation.teacher.teacher import UntrainedTeacherError, load_teacher


@pytest.mark.parametrize("head", [True, False])
def test_an_adapter_teaches_on_a_base_of_its_own(head: bool, tmp_path: Path) -> None:
    source = base(tmp_path, head)
    folder, whole = adapter(tmp_path, source)
    student = rename(tiny("bert", seed=2), *NAMES)
    teacher = load_teacher(folder, student)
    assert isinstance(teacher, PreTrainedModel)
    rows = examples(student, labels=False)
    torch.testing.assert_close(logits(teacher, rows), logits(whole, rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", [True, False])
def test_an_adapter_of_the_students_base_lies_in_the_students_memory(
    head: bool, tmp_path: Path
) -> None:
    source = base(tmp_path, head)
    folder, whole = adapter(tmp_path, source)
    student = adapted(source, seed=2)
    data = examples(student)
    trainer = DistillationTrainer(
        student, config(tmp_path / "run"), teacher=folder, train_dataset=data
    )
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in data]
    expected = logits(whole, rows)
    inside, outside = trainer.teacher.get_base_model(), student.get_base_model()
    ours = {p.data_ptr() for p in outside.parameters()}
    for name, parameter in inside.named_parameters():
        own = "lora_" in name or "classifier" in name
        assert (parameter.data_ptr() in ours) is not own, name
        assert not parameter.requires_grad
    before = {n: p.clone() for n, p in student.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(before) > 4
    assert all(not torch.equal(p, before[n]) for n, p in student.named_parameters() if n in before)
    torch.testing.assert_close(logits(trainer.teacher, rows), expected, rtol=0, atol=1e-5)


def test_memory_holds_the_base_once(tmp_path: Path) -> None:
    path = SUPPORT
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, str(path / "shared_base.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["own"] > 0.9 * found["base"]
    assert found["shared"] < 0.2 * found["base"]


def test_another_base_or_a_trained_one_is_not_shared(tmp_path: Path) -> None:
    source = base(tmp_path)
    folder, _ = adapter(tmp_path, source)
    other = tmp_path / "other"
    other.mkdir()
    for student in (adapted(base(other)), adapted(source).requires_grad_(True)):
        teacher = load_teacher(folder, student)
        mine = {p.data_ptr() for p in student.parameters()}
        assert not any(p.data_ptr() in mine for p in teacher.parameters())


def test_an_adapter_without_a_head_is_no_teacher(tmp_path: Path) -> None:
    source = base(tmp_path, head=False)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
    model = get_peft_model(model, LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    for student in (rename(tiny("bert"), *NAMES), adapted(source)):
        with pytest.raises(UntrainedTeacherError, match=r"classifier\.bias"):
            load_teacher(str(tmp_path / "adapter"), student)


def test_an_adapter_of_other_labels_is_refused(tmp_path: Path) -> None:
    source = base(tmp_path)
    folder, _ = adapter(tmp_path, source)
    student = rename(tiny("bert", seed=2), "yes", "no", "never")
    with pytest.raises(ValueError, match="do not match"):
        DistillationTrainer(student, config(tmp_path / "run"), teacher=folder)


def test_a_merged_student_computes_the_same_and_is_cut(tmp_path: Path) -> None:
    student = adapted(base(tmp_path), target_modules="all-linear")
    rows = examples(student, labels=False)
    expected = logits(student, rows)
    for cut in (
        lambda: hfslim.prune(student, [], {"macs": 0.5}),
        lambda: hfslim.shrink(student.get_base_model(), hfslim.Structure.of({})),
        lambda: hfslim.export(student, tmp_path / "onnx"),
    ):
        with pytest.raises(ValueError, match=r"model = hfslim.merge_adapters\(model\)"):
            cut()
    trainer = DistillationTrainer(
        student,
        config(tmp_path / "run"),
        teacher=rename(tiny("bert", seed=1), *NAMES),
        train_dataset=examples(student),
        callbacks=[PruningCallback({"macs": 0.5})],
    )
    with pytest.raises(ValueError, match="has adapters on"):
        trainer.train()
    plain = hfslim.merge_adapters(student)
    torch.testing.assert_close(logits(plain, rows), expected, rtol=0, atol=1e-5)
    assert all(p.requires_grad for p in plain.parameters())
    assert hfslim.merge_adapters(plain) is plain
    batch = {k: torch.stack([row[k] for row in examples(plain)]) for k in examples(plain)[0]}
    result = hfslim.prune(plain, [batch], {"macs": 0.6}, progress=False)
    assert not result.structure.is_full


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    model = rename(tiny("bert"), *NAMES)
    prefixed = get_peft_model(model, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"PREFIX_TUNING adapters .* cannot be folded"):
        hfslim.merge_adapters(prefixed)


def test_features_are_recorded_with_what_the_adapter_adds(tmp_path: Path) -> None:
    student = adapted(base(tmp_path))
    plain = hfslim.merge_adapters(adapted(base(tmp_path)))
    rows = examples(student, labels=False)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    seen = []
    for model in (student, plain):
        capture = Capture(model, hidden=True, attentions=False, vectors=True)
        with torch.no_grad(), capture.recording() as one:
            model.eval()(**batch)
        seen.append([*one.hidden, *one.vectors])
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_student_with_adapters_resumes(tmp_path: Path) -> None:
    source, states = base(tmp_path), []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        set_seed(0)
        student = adapted(source)
        trainer = DistillationTrainer(
            student,
            config(tmp_path / "run", feature_losses={"hidden_mse": 1.0}),
            teacher=rename(tiny("bert", seed=1), *NAMES),
            train_dataset=examples(student),
        )
        trainer.train(resume_from_checkpoint=resume)
        states.append({n: p for n, p in student.named_parameters() if p.requires_grad})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
