"""Several teachers teach by their weighted mean, each in the student's order of labels."""

from pathlib import Path

import pytest
import torch
from distilling import config, examples, rename, str_folder
from models import tiny
from transformers import set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hfslim import DistillationTrainer
from hfslim.distillation.teacher.teacher_quality import UntrainedTeacherError
from hfslim.distillation.teacher.teachers import mean_logits
from hfslim.pipeline.recipe import parse_recipe
from hfslim.pipeline.runner import run

ONE = torch.tensor([[2.0, 0.0, -1.0]])
OTHER = torch.tensor([[-1.0, 1.0, 3.0]])
WEIGHTS = [0.75, 0.25]


def test_a_mean_of_probabilities_is_that_of_each_problem() -> None:
    single = mean_logits([ONE, OTHER], WEIGHTS, "probabilities", "single_label_classification")
    expected = 0.75 * ONE.softmax(-1) + 0.25 * OTHER.softmax(-1)
    torch.testing.assert_close(single.softmax(-1), expected, rtol=0, atol=1e-6)
    several = mean_logits([ONE, OTHER], WEIGHTS, "probabilities", "multi_label_classification")
    expected = 0.75 * ONE.sigmoid() + 0.25 * OTHER.sigmoid()
    torch.testing.assert_close(several.sigmoid(), expected, rtol=0, atol=1e-6)
    outputs = mean_logits([ONE, OTHER], WEIGHTS, "probabilities", "regression")
    torch.testing.assert_close(outputs, torch.tensor([[1.25, 0.25, 0.0]]))
    logits = mean_logits([ONE, OTHER], WEIGHTS, "logits", "single_label_classification")
    torch.testing.assert_close(logits, torch.tensor([[1.25, 0.25, 0.0]]))


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_each_teacher_is_put_into_the_students_order(mean: str, tmp_path: Path) -> None:
    student = rename(tiny("bert"), "a", "b", "c")
    teachers = [
        rename(tiny("bert", seed=1), "C", "A", "B"),
        rename(tiny("distilbert", seed=2), "b", "c", "a"),
    ]
    settings = config(tmp_path, teacher_weights=[3.0, 1.0], teacher_mean=mean)
    trainer = DistillationTrainer(
        student, settings, teacher=teachers, train_dataset=examples(student)
    )
    batch = next(iter(trainer.get_train_dataloader()))
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        one = teachers[0](**ids).logits[:, [1, 2, 0]]
        other = teachers[1](**ids).logits[:, [2, 0, 1]]
    expected = (0.75 * one + 0.25 * other).softmax(-1)
    if mean == "probabilities":
        expected = 0.75 * one.softmax(-1) + 0.25 * other.softmax(-1)
    ours = trainer.answers.of(batch).logits.softmax(-1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["teacher_time_share"] < 1


def test_cached_equals_uncached_and_knows_its_weights(tmp_path: Path) -> None:
    losses = []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        set_seed(0)
        student = tiny("bert")
        trainer = DistillationTrainer(
            student,
            config(tmp_path, teacher_cache=cache, logging_steps=1, save_strategy="no"),
            teacher=[tiny("bert", seed=1), tiny("bert", seed=2)],
            train_dataset=examples(student),
        )
        trainer.train()
        losses.append([e["loss_distillation"] for e in trainer.state.log_history[:-1]])
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=0, abs=1e-5)
    before = trainer.teachers.fingerprint()
    trainer.teachers.weights = [0.6, 0.4]
    assert trainer.teachers.fingerprint() != before


def test_the_one_that_knows_nothing_is_named(tmp_path: Path) -> None:
    student = tiny("vit")
    skilled, idle = tiny("vit", seed=1), tiny("deit", seed=2)
    data = examples(student, count=600)
    with torch.no_grad():
        idle.classifier.weight.zero_()
        for start in range(0, 600, 100):
            rows = data[start : start + 100]
            answers = skilled(pixel_values=torch.stack([row["pixel_values"] for row in rows]))
            for row, logits in zip(rows, answers.logits, strict=True):
                row["labels"] = logits.argmax()
    folders = [str_folder(skilled, tmp_path / "skilled"), str_folder(idle, tmp_path / "idle")]
    trainer = DistillationTrainer(
        student,
        config(tmp_path, allow_untrained_teacher=False),
        teacher=folders,
        train_dataset=data,
    )
    with pytest.raises(UntrainedTeacherError, match=r"accuracy of \S*idle/teacher on 512"):
        trainer.train()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    student = tiny("bert")
    two = [tiny("bert", seed=1), tiny("bert", seed=2)]
    with pytest.raises(ValueError, match=r"2 teachers and 3 of teacher_weights"):
        settings = config(tmp_path, teacher_weights=[1.0, 1.0, 1.0])
        DistillationTrainer(student, settings, teacher=two)
    with pytest.raises(ValueError, match=r"\['multi_label.*', 'single_label.*'\]; they must agree"):
        kinds = ("single_label_classification", "multi_label_classification")
        others = [tiny("bert", seed=i, problem_type=kind) for i, kind in enumerate(kinds)]
        DistillationTrainer(student, config(tmp_path), teacher=others)
    with pytest.raises(ValueError, match="compare with one teacher"):
        settings = config(tmp_path, feature_losses={"hidden_mse": 1.0})
        data = examples(student)
        DistillationTrainer(student, settings, teacher=two, train_dataset=data).train()
    with pytest.raises(ValueError, match="teacher_weights holds 0"):
        config(tmp_path, teacher_weights=[1.0, 0.0])
    with pytest.raises(ValueError, match="teacher_mean is 'median'"):
        config(tmp_path, teacher_mean="median")


def test_a_recipe_names_several(tmp_path: Path) -> None:
    digits = [str(i) for i in range(10)]
    folders = [
        str_folder(rename(tiny("vit", num_labels=10, seed=i), *digits), tmp_path / str(i))
        for i in range(3)
    ]
    recipe = {
        "task": "image-classification",
        "model": folders[0],
        "teacher": folders[1:],
        "data": {"dataset_name": "digits", "max_train_samples": 8, "max_eval_samples": 8},
        "training": {"max_steps": 1, "use_cpu": True, "disable_tqdm": True},
        "stages": [{"distil": {"allow_untrained_teacher": True, "teacher_weights": [2.0, 1.0]}}],
        "output_dir": str(tmp_path / "out"),
    }
    size = {"height": 16, "width": 16}
    ViTImageProcessorPil(size=size).save_pretrained(folders[0])
    assert parse_recipe(recipe).teacher == tuple(folders[1:])
    run(parse_recipe(recipe))
    recipe["teacher"] = [folders[1], str(tmp_path / "none")]
    with pytest.raises(ValueError, match="teacher: no folder"):
        parse_recipe(recipe)
