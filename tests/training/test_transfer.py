"""What trains in transfer learning, when it begins to, and what pulls it back."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distilling import examples
from models import tiny
from recipe_files import STEP, image_recipe
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hfslim import L2SP, GradualUnfreezing, SlimTrainer, train_head_only
from hfslim.pipeline.recipe import RecipeError, parse_recipe
from hfslim.pipeline.runner import run
from hfslim.training.transfer import head_modules, with_lora


def train(
    model: PreTrainedModel, folder: Path, *callbacks: TrainerCallback, **settings: Any
) -> SlimTrainer:
    resume = settings.pop("resume", None)
    arguments = TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "save_steps": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            **settings,
        },
    )
    trainer = SlimTrainer(
        model, arguments, train_dataset=examples(model), callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", ["classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("vit", ["classifier"]),
        ("wav2vec2", ["projector", "classifier"]),
        ("whisper", ["projector", "classifier"]),
        ("llama", ["score"]),
    ],
)
def test_the_head_is_what_the_encoder_is_not(family: str, head: list[str]) -> None:
    model = tiny(family)
    assert head_modules(model) == head
    train_head_only(model)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(head)


class Watch(TrainerCallback):
    """Keeps the names of the parameters that each optimizer step changed, and the norms."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_step_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, self.before[n])}
        self.changed.append(moved)


def test_layers_begin_one_after_another_from_the_head_down(tmp_path: Path) -> None:
    watch = Watch()
    # Groups: head with pooler, three layers, embeddings; all after half of eight steps.
    train(tiny("bert"), tmp_path, GradualUnfreezing(0.5), watch, weight_decay=0.1)
    parts = ("classifier", "layer.2.", "layer.1.", "layer.0.", "embeddings")
    text = ["\n".join(names) for names in watch.changed]
    begun = [next(i for i, names in enumerate(text) if part in names) for part in parts]
    assert begun == [0, 1, 2, 3, 4]


def test_the_norm_of_a_gradient_is_that_of_what_trains(tmp_path: Path) -> None:
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    norms = []
    for callbacks in ((), (GradualUnfreezing(1.0),)):
        set_seed(0)
        model = tiny("vit", **options)
        if not callbacks:
            train_head_only(model)
            # The final norm comes after the last layer, and so trains with the head.
            model.vit.layernorm.requires_grad_(True)
        trainer = train(model, tmp_path, *callbacks, max_steps=1, save_strategy="no")
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("callback", [GradualUnfreezing, L2SP])
def test_a_resumed_training_equals_an_uninterrupted_one(callback: Any, tmp_path: Path) -> None:
    states = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        set_seed(0)
        model = tiny("bert")
        train(model, tmp_path, callback(), resume=resume)
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_pull_is_the_gradient_of_the_penalty(tmp_path: Path) -> None:
    gradients: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})

    class Move(TrainerCallback):
        """Moves every weight away from where it began, after the Trainer was made."""

        def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)

    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    start = {n: p.clone() for n, p in tiny("vit", **options).named_parameters()}
    for callbacks in ((Move(),), (Move(), L2SP(0.5, head=0.2))):
        set_seed(0)
        model = tiny("vit", **options)
        settings = {"max_steps": 1, "save_strategy": "no", "learning_rate": 0.0}
        trainer = train(model, tmp_path, *callbacks, Keep(), max_grad_norm=0.0, **settings)
    plain, pulled = gradients
    penalty = 0.0
    for name, parameter in model.named_parameters():
        head = name.startswith("classifier")
        moved = parameter.detach() if head else parameter.detach() - start[name].detach()
        factor = 0.2 if head else 0.5
        torch.testing.assert_close(pulled[name], plain[name] + factor * moved)
        penalty += factor / 2 * moved.square().sum().item()
    assert trainer.state.log_history[0]["loss_l2_sp"] == pytest.approx(penalty, rel=1e-5)


def test_the_pull_keeps_weights_nearer_to_where_they_began(tmp_path: Path) -> None:
    distances = []
    for callbacks in ((), (L2SP(20.0, head=0.0),)):
        set_seed(0)
        model = tiny("vit")
        start = [p.detach().clone() for p in model.vit.parameters()]
        train(model, tmp_path, *callbacks, max_steps=30, save_strategy="no", optim="sgd")
        pairs = zip(model.vit.parameters(), start, strict=True)
        distances.append(sum((p - w).square().sum().item() for p, w in pairs))
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize("callback", [GradualUnfreezing, L2SP])
@pytest.mark.parametrize(
    ("split", "told"),
    [
        ({"fsdp": True}, "FSDP splits between them: use DDP$"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, "ZeRO-2 splits between them: use"),
    ],
)
def test_what_needs_whole_parameters_is_refused_where_they_are_split(
    callback: type, split: dict[str, Any], told: str
) -> None:
    args = SimpleNamespace(**{"fsdp": False, "deepspeed_plugin": None} | split)
    with pytest.raises(ValueError, match=f"{callback.__name__} needs on each process what {told}"):
        callback().on_train_begin(args, None, model=tiny("vit"))


def test_lora_trains_adapters_and_the_head_alone(tmp_path: Path) -> None:
    model = with_lora(tiny("wav2vec2"), rank=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n and "modules_to_save" not in n} == set()
    assert any("projector" in name for name in trained)
    assert not any("feature_extractor" in name for name in trained)


@pytest.mark.parametrize("method", ["head", "gradual", "lora"])
def test_a_recipe_transfers_in_each_way(method: str, tmp_path: Path) -> None:
    recipe = image_recipe(tmp_path)
    recipe["training"] = {**STEP, "max_steps": 2}
    recipe["stages"] = [{"transfer": {"method": method}}]
    folder = run(parse_recipe(recipe))
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not (folder / "adapter_config.json").exists()
    assert model.config.id2label == {0: "blue", 1: "red"}


def test_settings_that_contradict_are_refused(tmp_path: Path) -> None:
    recipe = image_recipe(tmp_path)
    for settings, message in (
        ({"method": "lora", "l2_sp": 0.1}, "does not train them"),
        ({"unfrozen_at": 0.0}, "unfrozen_at"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"method": "heads"}, "did you mean 'head'"),
    ):
        recipe["stages"] = [{"transfer": settings}]
        with pytest.raises(RecipeError, match=message):
            parse_recipe(recipe)
    with pytest.raises(ValueError, match="until"):
        GradualUnfreezing(0.0)
    with pytest.raises(ValueError, match="not both 0"):
        L2SP(0.0, 0.0)
