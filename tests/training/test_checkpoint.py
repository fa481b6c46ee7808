from pathlib import Path

import pytest
import torch
from structures import uneven
from trainings import arguments, build, difference, examples
from transformers import PreTrainedModel, Trainer

from hfslim.pruning import shrink
from hfslim.training.checkpoint import CheckpointMixin, SlimTrainer

FAMILIES = ["bert", "vit", "swin", "audio-spectrogram-transformer", "wav2vec2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_equals_an_uninterrupted_one(family: str, tmp_path: Path) -> None:
    whole = build(family)
    SlimTrainer(whole, arguments(tmp_path / "run"), train_dataset=examples(whole)).train()
    resumed = build(family)
    trainer = SlimTrainer(resumed, arguments(tmp_path / "run"), train_dataset=examples(resumed))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert difference(whole, build(family)) > 1e-4
    assert difference(whole, resumed) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_model_and_its_folder_hold_the_saved_weights(family: str, tmp_path: Path) -> None:
    model = build(family)
    saved: dict[int, dict[str, torch.Tensor]] = {}

    class FirstIsBest(SlimTrainer):
        def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
            saved[self.state.global_step] = {
                name: value.clone() for name, value in self.model.state_dict().items()
            }
            return {"eval_loss": float(self.state.global_step)}

    settings = arguments(tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    data = examples(model)
    trainer = FirstIsBest(model, settings, train_dataset=data, eval_dataset=data)
    trainer.train()
    best = saved[2]
    assert any(not torch.equal(best[name], value) for name, value in saved[4].items())
    assert all(torch.equal(best[name], value) for name, value in model.state_dict().items())
    trainer.save_model()
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        reloaded, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(torch.equal(best[name], value) for name, value in reloaded.state_dict().items())


def test_a_pruned_model_resumes_exactly(tmp_path: Path) -> None:
    def pruned() -> PreTrainedModel:
        model = build("vit")
        return shrink(model, uneven(model))

    whole, resumed = pruned(), pruned()
    SlimTrainer(whole, arguments(tmp_path), train_dataset=examples(whole)).train()
    trainer = SlimTrainer(resumed, arguments(tmp_path), train_dataset=examples(resumed))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert difference(whole, resumed) == 0.0
    reloaded = type(whole).from_pretrained(tmp_path / "checkpoint-4")
    assert difference(whole, reloaded) == 0.0


def test_a_final_export_keeps_the_key_names_of_the_hub(tmp_path: Path) -> None:
    model = build("vit")
    trainer = SlimTrainer(model, arguments(tmp_path / "run"), train_dataset=examples(model))
    trainer.train()
    trainer.save_model()
    model.save_pretrained(tmp_path / "plain")
    name = "model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_checkpoint_with_other_keys_is_refused(tmp_path: Path) -> None:
    model = build("vit")
    Trainer(model, arguments(tmp_path), train_dataset=examples(model)).train()
    trainer = SlimTrainer(build("vit"), arguments(tmp_path), train_dataset=examples(model))
    with pytest.raises(ValueError, match="does not hold the weights of this model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_keys_that_share_a_loaded_tensor_are_not_missing(tmp_path: Path) -> None:
    class Plain(CheckpointMixin, Trainer):
        pass

    model = build("bert")
    model.also = torch.nn.ParameterDict({"weight": model.classifier.weight})
    trainer = Plain(model, arguments(tmp_path))
    keys = torch.nn.modules.module._IncompatibleKeys
    trainer._issue_warnings_after_load(keys(["also.weight"], []))
    with pytest.raises(ValueError, match=r"1 missing \(classifier.bias\)"):
        trainer._issue_warnings_after_load(keys(["also.weight", "classifier.bias"], []))
