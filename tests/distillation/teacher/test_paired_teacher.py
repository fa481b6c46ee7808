"""A teacher of another family reads each raw example by its own processor."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from distilling import config, rename
from models import tiny
from paired_teachers import TEXTS, WORDS, text_losses, text_trainer, tokenizer
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedModel,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hfslim.distillation import DistillationTrainer, PairedCollator, teacher_inputs
from hfslim.pipeline.recipe import parse_recipe
from hfslim.pipeline.runner import run
from hfslim.pipeline.task_examples import TaskExamples
from hfslim.reporting.report import Report
from hfslim.tasks import DataConfig
from hfslim.tasks.audio import read_audio

NAMES = {0: "no", 1: "yes"}


def saved(folder: Path, family: str, processor: Any, seed: int = 0, **fields: Any) -> str:
    model = tiny(family, num_labels=2, seed=seed, **fields)
    model.config.id2label, model.config.label2id = NAMES, {v: k for k, v in NAMES.items()}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def images(size: int, mean: float) -> ViTImageProcessorPil:
    side = {"height": size, "width": size}
    return ViTImageProcessorPil(size=side, image_mean=[mean] * 3, image_std=[0.25] * 3)


def text(folder: Path) -> tuple[str, str, dict[str, Any]]:
    for split in ("train", "held"):
        rows = [f"{one},{NAMES[i % 2]}" for i, one in enumerate(TEXTS)]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    data = {"train_file": f"{folder}/train.csv", "validation_file": f"{folder}/held.csv"}
    student = saved(folder / "student", "bert", tokenizer(*WORDS))
    teacher = saved(folder / "teacher", "distilbert", tokenizer("of", *reversed(WORDS)), seed=1)
    return student, teacher, {**data, "max_seq_length": 8}


def image(folder: Path) -> tuple[str, str, dict[str, Any]]:
    random = np.random.default_rng(0)
    for split in ("train", "held"):
        for name in NAMES.values():
            (folder / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    data = {"train_dir": f"{folder}/train", "validation_dir": f"{folder}/held"}
    student = saved(folder / "student", "vit", images(16, 0.5))
    other = {"image_size": 32, "patch_size": 8}
    return student, saved(folder / "teacher", "deit", images(32, 0.2), seed=1, **other), data


def speech(folder: Path) -> tuple[str, str, dict[str, Any]]:
    random = np.random.default_rng(0)
    for split in ("train", "held"):
        for name in NAMES.values():
            (folder / split / name).mkdir(parents=True)
            for i in range(6):
                wave = 0.1 * random.standard_normal(1600 + 200 * i)
                soundfile.write(folder / split / name / f"{i}.wav", wave, 8000)
    data = {"train_dir": f"{folder}/train", "validation_dir": f"{folder}/held"}
    student = saved(folder / "student", "wav2vec2", Wav2Vec2FeatureExtractor(sampling_rate=8000))
    extractor = WhisperFeatureExtractor(feature_size=16, sampling_rate=16000, chunk_length=1)
    fields = {"max_source_positions": 50}
    return student, saved(folder / "teacher", "whisper", extractor, seed=1, **fields), data


def alone(task: str, bench: TaskExamples, raw: datasets.Dataset, parts: dict[str, Any]) -> Any:
    """Return what the teacher's own processor makes of one raw example, or of several."""
    processor = parts["teacher_processor"][0]
    if task == "image-classification":
        raw = raw.cast_column("image", datasets.Image())
    column = raw[bench.examples.columns[0]]
    if task == "text-classification":
        return [processor(one, return_tensors="pt") for one in column]
    if task == "image-classification":
        return [processor(one.convert("RGB"), return_tensors="pt") for one in column]
    waves = [read_audio(one, 16000, 20) for one in raw.cast_column("audio", RAW)["audio"]]
    return [processor(one, sampling_rate=16000, return_tensors="pt") for one in waves]


RAW = datasets.Audio(decode=False)
TASKS = {
    "text-classification": text,
    "image-classification": image,
    "audio-classification": speech,
}


@pytest.mark.parametrize("task", TASKS)
def test_a_teacher_answers_as_it_does_alone_on_the_raw_example(task: str, tmp_path: Path) -> None:
    student, teacher, data = TASKS[task](tmp_path)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    bench = TaskExamples.prepare(task, DataConfig(**data), None, 0, arguments, student)
    parts = bench.taught_parts([teacher])
    settings = config(tmp_path, remove_unused_columns=not bench.task.lazy)
    trainer = DistillationTrainer(bench.load_model(student), settings, **parts)
    model = trainer.teacher
    own = alone(task, bench, bench.examples.train, parts)
    with torch.no_grad():
        accepted = [{k: v for k, v in one.items() if k != "token_type_ids"} for one in own]
        expected = torch.cat([model(**one).logits for one in accepted])
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    batches = list(trainer.get_test_dataloader(parts["train_dataset"]))
    ours = torch.cat([trainer.answers.of(batch).logits for batch in batches])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    read = {k for k in trainer.teachers.of_student(batches[0]) if k != "labels"}
    assert read == set(bench.task.collator(bench.processor)([bench.train[0]])) - {"labels"}


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_distils_from_a_teacher_of_another_family(task: str, tmp_path: Path) -> None:
    student, teacher, data = TASKS[task](tmp_path)
    step = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 1}
    recipe = {
        "task": task,
        "model": student,
        "teacher": teacher,
        "data": data,
        "training": {**step, "save_strategy": "no", "disable_tqdm": True},
        "stages": [
            {
                "distil": {
                    "allow_untrained_teacher": True,
                    "teacher_cache": str(tmp_path / "cache"),
                }
            },
            {"measure": {"batch_sizes": [1]}},
        ],
        "output_dir": str(tmp_path / "out"),
    }
    assert run(parse_recipe(recipe)) == tmp_path / "out" / "01-distil"
    report = Report.load(tmp_path / "out" / "02-measure")
    compared = report.comparisons[0]
    inputs = AutoModel.from_pretrained(teacher).main_input_name
    assert compared.before.inputs.startswith(inputs) or inputs in compared.before.inputs
    assert report.quality[0].teacher is not None
    assert len(np.load(tmp_path / "cache" / "logits.npy")) >= 6


def test_cached_equals_uncached_and_resumes(tmp_path: Path) -> None:
    live = text_losses(tmp_path / "live", None)
    cached = text_losses(tmp_path / "cached", tmp_path / "cache")
    assert len(live) == 4 and cached == pytest.approx(live, rel=0, abs=1e-5)
    checkpoint = str(tmp_path / "cached" / "checkpoint-2")
    assert text_losses(tmp_path / "cached", tmp_path / "cache", checkpoint) == cached


def test_a_cache_is_not_that_of_the_teacher_under_another_processor(tmp_path: Path) -> None:
    prints = set()
    for mean in (0.2, 0.5):
        trainer = DistillationTrainer(
            tiny("vit"),
            config(tmp_path),
            teacher=tiny("deit", seed=1),
            teacher_processor=images(16, mean),
        )
        prints.add(trainer.teachers.fingerprint())
    assert len(prints) == 2


def test_the_students_augmentation_does_not_miss_the_teachers_cache(tmp_path: Path) -> None:
    trainer = text_trainer(tmp_path, tmp_path / "cache", save_strategy="no")

    def augmented(batch: dict[str, Any]) -> dict[str, Any]:
        rows = [torch.randint(5, 13, (len(ids),)).tolist() for ids in batch["input_ids"]]
        return {**batch, "input_ids": rows}

    trainer.train_dataset = trainer.train_dataset.with_transform(augmented)
    trainer.train()
    assert [e["teacher_cache_hits"] for e in trainer.state.log_history[:-1]] == [1.0] * 4


def test_losses_by_position_are_for_inputs_that_are_cut_alike(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="makes other tokens or frames"):
        text_trainer(tmp_path, feature_losses={"hidden_mse": 1.0}).train()
    rows = [
        {
            "pixel_values": torch.rand(3, 16, 16),
            **teacher_inputs({"pixel_values": torch.rand(3, 32, 32)}),
            "labels": i % 3,
        }
        for i in range(8)
    ]
    trainer = DistillationTrainer(
        tiny("vit"),
        config(tmp_path, feature_losses={"hidden_mse": 1.0}),
        teacher=tiny("vit", seed=1, image_size=32, patch_size=8),
        teacher_processor=images(32, 0.2),
        train_dataset=rows,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss_hidden_mse"] > 0


def teach(folder: Path, teacher: PreTrainedModel | str, processor: Any, **parts: Any) -> None:
    ours = tokenizer(*WORDS)
    names = "LABEL_0", "LABEL_1"
    if isinstance(teacher, str):
        names = tuple(AutoConfig.from_pretrained(teacher).id2label.values())
    DistillationTrainer(
        rename(tiny("bert", num_labels=2), *names),
        config(folder),
        teacher=teacher,
        teacher_processor=processor,
        processing_class=ours,
        **parts,
    )


def test_what_a_teacher_would_misread_is_refused_with_the_fix(tmp_path: Path) -> None:
    teacher = tiny("distilbert", num_labels=2, seed=1)
    with pytest.raises(ValueError, match=r"makes pixel_values, the teacher .* reads 'input_ids'"):
        teach(tmp_path, teacher, images(16, 0.5))
    with pytest.raises(ValueError, match=r"ids up to 64, .* a vocabulary of 64"):
        teach(tmp_path, teacher, tokenizer(*(f"w{i}" for i in range(60))))
    for given in (teacher, [teacher]):
        with pytest.raises(ValueError, match=r"1 teachers and 2 of teacher_processor"):
            teach(tmp_path, given, [None, None])
    with pytest.raises(ValueError, match=r"2 teachers and 1 of teacher_processor"):
        teach(tmp_path, [teacher, teacher], tokenizer(*WORDS))
    with pytest.raises(ValueError, match=r"makes pixel_values, the teacher"):
        teach(tmp_path, teacher, [images(16, 0.5)])
    folder = saved(tmp_path / "t", "bert", tokenizer(*reversed(WORDS)), seed=1)
    with pytest.raises(ValueError, match=r"pass teacher_processor=<its tokenizer>"):
        teach(tmp_path, folder, None)
    with pytest.raises(ValueError, match=r"than the processor.*saved with the teacher"):
        teach(tmp_path, folder, tokenizer(*WORDS))
    collate = PairedCollator(lambda rows: {"labels": torch.zeros(len(rows))}, {"teacher_": dict})
    with pytest.raises(ValueError, match=r"nothing that begins with 'teacher_'.*teacher_inputs"):
        collate([{"input_ids": [1], "labels": 0}])


def test_a_folder_without_a_tokenizer_is_asked_nothing(tmp_path: Path) -> None:
    model = tiny("bert", num_labels=2, seed=1)
    model.save_pretrained(tmp_path / "teacher")
    teach(tmp_path, str(tmp_path / "teacher"), None)
