from pathlib import Path

import pytest
import torch
from distilling import config, examples, rename, str_folder
from models import tiny
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hfslim import DistillationConfig, DistillationTrainer, SlimTrainer
from hfslim.distillation.teacher.teacher_quality import UntrainedTeacherError


def test_a_config_is_training_arguments_plus_three_fields(tmp_path: Path) -> None:
    line = f"--output_dir {tmp_path} --temperature 4 --alpha 0.9 --learning_rate 1e-3 --use_cpu"
    (parsed,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(line.split())
    assert (parsed.temperature, parsed.alpha, parsed.learning_rate) == (4.0, 0.9, 1e-3)
    default = DistillationConfig(output_dir=str(tmp_path))
    assert (default.temperature, default.alpha) == (2.0, 0.5)
    assert default.allow_untrained_teacher is False


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.0), ("temperature", float("nan")), ("alpha", 1.1)]
)
def test_values_out_of_range_are_refused(field: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=field):
        config(tmp_path, **{field: value})


def test_a_trainer_needs_a_teacher_a_config_and_matching_labels(tmp_path: Path) -> None:
    student = tiny("bert")
    with pytest.raises(ValueError, match="has no teacher"):
        DistillationTrainer(student, config(tmp_path))
    with pytest.raises(TypeError, match="needs a DistillationConfig"):
        DistillationTrainer(student, TrainingArguments(str(tmp_path)), teacher=tiny("bert"))
    with pytest.raises(ValueError, match="do not match"):
        other = rename(tiny("bert"), "a", "b", "c")
        DistillationTrainer(rename(tiny("bert"), *"xyz"), config(tmp_path), teacher=other)
    with pytest.raises(ValueError, match="would ignore compute_loss_func"):
        SlimTrainer(student, TrainingArguments(str(tmp_path)), compute_loss_func=max)


@pytest.mark.parametrize("family", ["bert", "vit", "wav2vec2", "whisper"])
def test_a_student_learns_to_answer_as_its_teacher(family: str, tmp_path: Path) -> None:
    set_seed(0)
    teacher = rename(tiny(family, seed=1), "a", "b", "c")
    student = rename(tiny(family, attention_dropout=0.0), "C", "A", "B")
    data = examples(student, labels=False)
    settings = config(tmp_path, alpha=1.0, max_steps=30, learning_rate=1e-2, save_strategy="no")
    trainer = DistillationTrainer(
        student, settings, teacher=str_folder(teacher, tmp_path), train_dataset=data
    )
    trainer.train()
    first, *_, last = [entry["loss_distillation"] for entry in trainer.state.log_history[:-1]]
    assert last < 0.2 * first
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        ours = student.eval()(**batch).logits.softmax(-1)
        theirs = teacher.eval()(**batch).logits.softmax(-1)[:, [2, 0, 1]]
    assert (ours - theirs).abs().mean() < 0.1


def test_every_term_is_logged_and_the_loss_is_their_weighted_sum(tmp_path: Path) -> None:
    student = tiny("bert")
    trainer = DistillationTrainer(
        student,
        config(tmp_path, alpha=0.3, gradient_accumulation_steps=2),
        teacher=tiny("bert", seed=1),
        train_dataset=examples(student),
    )
    trainer.train()
    logged = trainer.state.log_history[:-1]
    assert len(logged) == 2
    for entry in logged:
        weighted = 0.7 * entry["loss_hard"] + 0.3 * entry["loss_distillation"]
        assert entry["loss"] == pytest.approx(weighted, rel=1e-5)
        assert 0.3 < entry["loss_hard"] < 3


def test_alpha_zero_is_training_on_labels_alone(tmp_path: Path) -> None:
    plain, distilled = tiny("vit"), tiny("vit")
    data = examples(plain)
    settings = config(tmp_path, alpha=0.0, save_strategy="no")
    SlimTrainer(plain, settings, train_dataset=data).train()
    teacher = tiny("vit", seed=1)
    DistillationTrainer(distilled, settings, teacher=teacher, train_dataset=data).train()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, distilled.state_dict()[name])


def test_evaluation_and_prediction_use_the_student_alone(tmp_path: Path) -> None:
    student, teacher = tiny("bert"), tiny("bert", seed=1)
    data = examples(student, count=10)

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        assert prediction.predictions.shape == (10, 3)
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    trainer = DistillationTrainer(
        student, config(tmp_path), teacher=teacher, eval_dataset=data, compute_metrics=accuracy
    )
    metrics = trainer.evaluate()
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        expected = student.eval()(**batch)
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    right = (expected.logits.argmax(-1) == batch["labels"]).float().mean().item()
    assert metrics["eval_accuracy"] == pytest.approx(right)
    predicted = trainer.predict([{k: v for k, v in row.items() if k != "labels"} for row in data])
    assert predicted.label_ids is None
    assert torch.allclose(torch.tensor(predicted.predictions), expected.logits, atol=1e-6)


def test_the_teacher_stays_as_it_was_and_out_of_the_checkpoint(tmp_path: Path) -> None:
    student, teacher = tiny("vit"), tiny("vit", seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = DistillationTrainer(
        student, config(tmp_path), teacher=teacher, train_dataset=examples(student)
    )
    trainer.train()
    assert trainer.teacher is teacher and not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    _, info = type(student).from_pretrained(tmp_path / "checkpoint-4", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]


def test_a_resumed_distillation_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    students = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        set_seed(0)
        student = tiny("vit", hidden_dropout_prob=0.1)
        teacher = tiny("vit", seed=1)
        trainer = DistillationTrainer(
            student, config(tmp_path), teacher=teacher, train_dataset=examples(student)
        )
        trainer.train(resume_from_checkpoint=resume)
        students.append(student.state_dict())
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())


def test_a_teacher_at_chance_level_is_refused_on_train(tmp_path: Path) -> None:
    student = tiny("vit")
    teacher = tiny("vit", seed=1)
    with torch.no_grad():
        teacher.classifier.weight.zero_()
    trainer = DistillationTrainer(
        student,
        config(tmp_path, allow_untrained_teacher=False),
        teacher=teacher,
        train_dataset=examples(student, count=600),
    )
    with pytest.raises(UntrainedTeacherError, match=r"512 examples is 0\.333, which is chance"):
        trainer.train()


def test_training_without_labels_needs_alpha_one(tmp_path: Path) -> None:
    student = tiny("bert")
    data = examples(student, labels=False)
    trainer = DistillationTrainer(
        student, config(tmp_path), teacher=tiny("bert", seed=1), train_dataset=data
    )
    with pytest.raises(ValueError, match="has no 'labels'"):
        trainer.train()


@pytest.mark.parametrize("setting", [{"distil_until": 0.5}, {"alpha_end": 0.5}])
def test_a_part_without_the_teacher_asks_for_labels_at_once(
    setting: dict[str, float], tmp_path: Path
) -> None:
    student = tiny("bert")
    trainer = DistillationTrainer(
        student,
        config(tmp_path, alpha=1.0, **setting),
        teacher=tiny("bert", seed=1),
        train_dataset=examples(student, labels=False),
    )
    with pytest.raises(ValueError, match=r"=0\.5 trains on them: name the label column"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_term_that_ends_between_two_logs_is_the_mean_of_its_own_steps(tmp_path: Path) -> None:
    logs = []
    for every in (1, 4):
        set_seed(0)
        student = tiny("bert")
        trainer = DistillationTrainer(
            student,
            config(tmp_path, distil_until=0.5, logging_steps=every, save_strategy="no"),
            teacher=tiny("bert", seed=1),
            train_dataset=examples(student),
        )
        trainer.train()
        logs.append(trainer.state.log_history[:-1])
    single, together = logs
    for name, steps in (("loss_distillation", 2), ("agreement", 2), ("loss_hard", 4)):
        values = [entry[name] for entry in single if name in entry]
        assert len(values) == steps
        assert together[0][name] == pytest.approx(sum(values) / steps, rel=1e-5)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_agreement_is_on_all_labels_and_not_of_numbers(problem: str, tmp_path: Path) -> None:
    student, teacher = tiny("bert"), tiny("bert", seed=1, problem_type=problem)
    data = examples(student, count=4)
    for i, row in enumerate(data):
        row["labels"] = torch.tensor([1.0, 0.0, float(i % 2)])
    ids = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        teacher.classifier.weight.mul_(0.1).add_(student.classifier.weight)
        for model in (student, teacher):  # All labels are likely, in another order.
            model.classifier.bias.add_(5)
        answers = [model(ids).logits for model in (student, teacher)]
    settings = config(tmp_path, max_steps=1, logging_steps=1, alpha=1.0, save_strategy="no")
    trainer = DistillationTrainer(student, settings, teacher=teacher, train_dataset=data)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    entry = trainer.state.log_history[0]
    if problem == "regression":
        assert "agreement" not in entry
    else:
        assert (answers[0].argmax(1) == answers[1].argmax(1)).float().mean() == 0.5
        assert entry["agreement"] == 1.0


def test_labels_tell_the_problem_to_the_config_without_a_loss_on_them(tmp_path: Path) -> None:
    student = tiny("bert")
    data = examples(student)
    for row in data:
        row["labels"] = torch.tensor([1.0, 0.0, 1.0])
    teacher = tiny("bert", seed=1)
    DistillationTrainer(
        student, config(tmp_path, alpha=1.0), teacher=teacher, train_dataset=data
    ).train()
    assert student.config.problem_type == "multi_label_classification"


def test_a_teacher_may_read_columns_that_the_student_does_not(tmp_path: Path) -> None:
    student, teacher = tiny("distilbert"), tiny("bert", seed=1)
    data = examples(student)
    for row in data:
        row["token_type_ids"] = torch.ones_like(row["input_ids"])
    seen = []
    teacher.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["token_type_ids"].sum().item()),
        with_kwargs=True,
    )
    trainer = DistillationTrainer(
        student, config(tmp_path), teacher=teacher, train_dataset=data, eval_dataset=data
    )
    trainer.train()
    assert seen == [4 * 12] * len(seen) and len(seen) == 4
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize("option", ["bf16", "gradient_checkpointing"])
def test_mixed_precision_and_gradient_checkpointing_change_little(
    option: str, tmp_path: Path
) -> None:
    losses = []
    for value in (False, True):
        set_seed(0)
        student = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        settings = config(tmp_path, max_steps=1, logging_steps=1, **{option: value})
        teacher = tiny("bert", seed=1)
        trainer = DistillationTrainer(
            student, settings, teacher=teacher, train_dataset=examples(student)
        )
        trainer.train()
        losses.append([trainer.state.log_history[0][n] for n in ("loss_hard", "grad_norm")])
    tolerance = 0.05 if option == "bf16" else 1e-5
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def test_label_smoothing_is_for_training_on_one_label(tmp_path: Path) -> None:
    student = tiny("bert", num_labels=1)
    data = examples(student)
    settings = config(tmp_path, label_smoothing_factor=0.1)
    trainer = DistillationTrainer(
        student, settings, teacher=tiny("bert", num_labels=1, seed=1), train_dataset=data
    )
    with pytest.raises(ValueError, match="single-label classification only"):
        trainer.train()


def test_the_argument_parser_explains_every_argument() -> None:
    own = set(DistillationConfig.__annotations__)
    helps = {action.dest: action.help for action in HfArgumentParser(DistillationConfig)._actions}
    assert {name for name in own if not helps[name]} == set()
    assert helps["alpha"].startswith("Weight in [0, 1] of the loss on the teacher's logits")
