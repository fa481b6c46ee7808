"""A criterion from outside the package is registered once and then used by name."""

import pytest
import torch
from models import tiny
from recipe_files import image_recipe
from trainings import arguments, examples
from transformers import Trainer, ViTForImageClassification

import hfslim
from hfslim.pipeline.recipe import RecipeError, parse_recipe
from hfslim.pipeline.runner import run
from hfslim.pruning import CRITERIA, Criterion, register_criterion

STAGES = ("01-transfer", "02-prune")


@pytest.fixture
def late():
    """A criterion by which the units of the highest numbers are the most important."""

    def by_number(model, units, seed):
        return {(s.kind, s.path): torch.arange(1.0, s.size + 1).double() for s in units}

    register_criterion("late", Criterion("this test", weights=by_number, kinds=("heads",)))
    yield "late"
    del CRITERIA["late"]


def _prune(**stage):
    return {
        "prune": {"target": {"sparsity": 0.5}, "units": ["heads"], "criterion": "late", **stage}
    }


def _late(structure):
    kept = {entry.path: entry.kept for entry in structure if entry.kind == "heads"}
    return [heads == tuple(range(4 - len(heads), 4)) for heads in kept.values()]


def test_a_recipe_prunes_by_it(tmp_path, late):
    stages = [{"transfer": {}}, _prune(max_examples=4, reconstruction="none")]
    folder = run(parse_recipe({**image_recipe(tmp_path), "stages": stages}))
    whole, cut = (
        ViTForImageClassification.from_pretrained(folder.parent / name) for name in STAGES
    )
    for before, after in zip(whole.vit.layers, cut.vit.layers, strict=True):
        kept = before.attention.q_proj.weight[8:]  # heads 2 and 3 of 4, four features each
        assert torch.equal(after.attention.q_proj.weight, kept)


def test_a_gradual_stage_prunes_by_it(tmp_path, late):
    stages = [{"transfer": {}}, _prune(max_steps=2, allow_untrained_teacher=True)]
    folder = run(parse_recipe({**image_recipe(tmp_path), "stages": stages}))
    cut = ViTForImageClassification.from_pretrained(folder)
    assert cut.config.num_attention_heads == 2


def test_prune_and_the_callback_prune_by_it(tmp_path, late):
    model = tiny("bert")
    target = {"sparsity": {"heads": 0.5}}
    result = hfslim.prune(
        model, [], target=target, units=["heads"], criterion=late, reconstruction="none"
    )
    assert all(_late(result.structure))
    callback = hfslim.PruningCallback(target, ("heads",), late)
    model = tiny("bert")
    Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=examples(model),
        callbacks=[callback],
    ).train()
    assert all(_late(callback.structure))


def test_it_is_refused_where_it_does_not_fit(tmp_path, late):
    with pytest.raises(ValueError, match="late scores heads, not neurons"):
        hfslim.PruningCallback({"macs": 0.5}, criterion=late)
    with pytest.raises(RecipeError, match="late scores heads, not neurons"):
        parse_recipe(image_recipe(tmp_path) | {"stages": [_prune(units=["neurons"])]})


@pytest.mark.parametrize(
    ("name", "criterion", "message"),
    [
        ("fisher", Criterion("a paper", gradient=torch.abs), "'fisher' is registered already"),
        ("empty", Criterion("a paper"), "'empty' computes no scores: set one of"),
    ],
)
def test_a_name_that_is_taken_and_a_criterion_without_scores_are_refused(name, criterion, message):
    with pytest.raises(ValueError, match=message):
        register_criterion(name, criterion)
