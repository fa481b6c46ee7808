"""Sparsify with a share of the data on each process, train on, write each one's weights."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from models import tiny
from transformers import TrainingArguments, set_seed

from hfslim import SlimTrainer, WeightPruningCallback, sparsify
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.weights import find_weights

METHODS = {"sparsegpt": {"pattern": "2:4"}, "wanda": {"sparsity": 0.5}}


def run(folder: Path, share: slice) -> dict:
    results = {}
    for method, goal in METHODS.items():
        set_seed(0)
        model = tiny("bert")
        batch = example_inputs(model, 24, 0, 8)
        data = [{name: value[share] for name, value in batch.items()}]
        sparsify(model, data, **goal, method=method, progress=False)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        zeros = {path: module.weight == 0 for path, module in find_weights(model).items()}
        texts = batch["input_ids"].tolist()
        trainer = SlimTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder / method),
                per_device_train_batch_size=4,
                max_steps=3,
                learning_rate=1e-2,
                weight_decay=0.1,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": texts, "labels": [0, 1, 2] * 8}),
            callbacks=[WeightPruningCallback()],
        )
        trainer.train()
        for path, module in find_weights(model).items():
            assert torch.equal(module.weight == 0, zeros[path]), (method, path)
            assert not torch.equal(module.weight, weights[f"{path}.weight"]), (method, path)
        results[method] = {"sparse": weights, "trained": model.state_dict()}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    target = Path(sys.argv[1])
    torch.save(run(target, (slice(0, 17), slice(17, 24))[rank]), target / f"{rank}.pt")
    torch.distributed.destroy_process_group()
