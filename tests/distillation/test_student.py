"""Students of a teacher's own layers, heads, neurons and dimensions."""

import json

import pytest
import torch
from models import auto_class, tiny
from recipe_files import STAGES, text_recipe
from transformers import AutoModelForSequenceClassification

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.distillation import DistillationConfig, DistillationTrainer
from hfslim.distillation.student import student_structure
from hfslim.pipeline.recipe import RecipeError, parse_recipe
from hfslim.pipeline.runner import run


def _batches(model):
    inputs = example_inputs(model, 6, length=10)
    return [{**inputs, "labels": torch.tensor([0, 1, 2, 0, 1, 2])}]


@torch.no_grad()
def test_chosen_layers_are_the_teachers(tmp_path):
    teacher = tiny("bert", num_hidden_layers=4)
    student = hfslim.init_from_teacher(teacher, layers=[0, 3])
    theirs, mine = teacher.bert.encoder.layer, student.bert.encoder.layer
    assert (len(theirs), len(mine), student.config.num_hidden_layers) == (4, 2, 2)
    for name, weight in mine[1].state_dict().items():
        assert torch.equal(weight, theirs[3].state_dict()[name])
    student.save_pretrained(tmp_path)
    again = auto_class("bert").from_pretrained(tmp_path, attn_implementation="eager").eval()
    inputs = example_inputs(teacher, 2, length=10)
    assert torch.equal(again(**inputs).logits, student(**inputs).logits)


def test_a_number_of_layers_is_spread_over_the_depth():
    teacher = tiny("bert", num_hidden_layers=12)
    [entry] = student_structure(teacher, layers=6)
    assert entry.kept == (0, 2, 4, 7, 9, 11)  # those that DistilBERT starts from


def test_heads_follow_the_dimensions_where_the_config_says_so():
    teacher = tiny("bert")
    student = hfslim.init_from_teacher(teacher, layers=2, neurons=24, dimensions=24)
    config = student.config
    sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert sizes == (24, 3, 24)
    assert config.num_hidden_layers == 2
    assert not hasattr(config, "hfslim")
    assert student.bert.encoder.layer[0].intermediate.dense.weight.shape == (24, 24)
    assert teacher.config.hidden_size == 32


def test_the_units_that_stay_are_those_that_data_or_weights_find_important():
    teacher = tiny("vit")
    layer = teacher.vit.layers[1]
    with torch.no_grad():
        layer.mlp.fc2.weight[:, :24] *= 1e-4
        layer.mlp.fc1.weight[:24] *= 1e-4
    inputs = example_inputs(teacher, 4)
    for data in (None, [inputs | {"labels": torch.tensor([0, 1, 2, 0])}]):
        structure = student_structure(teacher, neurons=24, data=data, progress=False)
        assert structure.kept("neurons", "vit.layers.1.mlp") == tuple(range(24, 48))


def test_a_family_whose_config_cannot_say_it_loads_with_hfslim(tmp_path):
    teacher = tiny("mpnet")
    student = hfslim.init_from_teacher(teacher, dimensions=20)
    assert student.config.hfslim
    student.save_pretrained(tmp_path)
    again = auto_class("mpnet").from_pretrained(tmp_path, attn_implementation="eager").eval()
    inputs = example_inputs(teacher, 2, length=10)
    torch.testing.assert_close(again(**inputs).logits, student(**inputs).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({}, "give layers, heads, neurons or dimensions"),
        ({"neurons": 49}, "neurons=49: expected a multiple of 1 up to 48"),
        ({"layers": 7}, "1 to 3; got 7"),
        ({"layers": [0, 0]}, r"layers=\[0, 0\]: give each layer once .*, such as \[0\]"),
        ({"layers": [2, 1]}, r"layers=\[2, 1\]: .* in ascending order, such as \[1, 2\]"),
        ({"layers": [0, 3]}, "3"),
        ({"layers": [-1, 0]}, "-1"),
        ({"layers": []}, "layers"),
        ({"dimensions": 33}, "dimensions=33: expected a multiple of 1 up to 32"),
        ({"dimensions": 20}, r"give one of \[8, 16, 24, 32\]; or give heads too"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        hfslim.init_from_teacher(tiny("bert"), **numbers)


def test_grouped_heads_go_by_whole_groups():
    with pytest.raises(ValueError, match="heads=3: expected a multiple of 2 up to 4"):
        hfslim.init_from_teacher(tiny("llama"), heads=3)
    student = hfslim.init_from_teacher(tiny("llama"), heads=2, dimensions=24)
    config = student.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.hidden_size) == (
        2,
        1,
        24,
    )


def test_a_narrower_student_learns_from_its_teacher(tmp_path):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = tiny("bert", **still)
    with torch.no_grad():
        teacher.classifier.weight *= 10
    student = hfslim.init_from_teacher(teacher, layers=2, dimensions=24, data=_batches(teacher))
    rows = [
        {name: value[0] for name, value in example_inputs(teacher, 1, seed=i, length=10).items()}
        for i in range(16)
    ]
    args = DistillationConfig(
        output_dir=str(tmp_path),
        alpha=1.0,
        max_steps=30,
        learning_rate=3e-3,
        per_device_train_batch_size=16,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
    )
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=args, train_dataset=[{**r, "labels": 0} for r in rows]
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.5 * losses[0]


def test_units_are_those_of_the_teacher():
    assert (
        find_units(hfslim.init_from_teacher(tiny("bert"), heads=2)).of(["heads"]).sites[0].size == 2
    )


def test_a_recipe_takes_a_student_and_teaches_it_by_the_model_it_is_from(tmp_path):
    numbers = {"layers": [1], "dimensions": 12, "max_examples": 4}
    stages = [{"transfer": {}}, {"student": numbers}, *STAGES[2:]]
    folder = run(parse_recipe({**text_recipe(tmp_path), "stages": stages}))
    student = AutoModelForSequenceClassification.from_pretrained(folder)
    sizes = (student.config.hidden_size, student.config.num_attention_heads)
    assert (len(student.bert.encoder.layer), *sizes) == (1, 12, 3)
    report = json.loads((folder.parent / "report.json").read_text())
    assert {row["kind"] for row in report["structure"]} == {"layers", "heads", "dimensions"}


def test_a_recipe_whose_student_does_not_fit_is_refused_before_training(tmp_path):
    stages = [{"transfer": {}}, {"student": {"dimensions": 13}}, *STAGES[2:]]
    with pytest.raises(RecipeError, match=r"give one of \[4, 8, 12, 16\]"):
        run(parse_recipe({**text_recipe(tmp_path), "stages": stages}))
    assert not (tmp_path / "out" / "01-transfer" / "config.json").exists()
