"""Random inputs of several sizes, to trace a model and to compare its export."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hfslim.anatomy.inputs import example_inputs

__all__ = ["input_names", "inputs_of", "probes", "sample_inputs"]


def sample_inputs(
    model: PreTrainedModel, names: Sequence[str]
) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """Return inputs for tracing, and the free axes of each."""
    sample = inputs_of(model, names, 2)
    other = inputs_of(model, names, 3, length=_shorter(sample))
    return sample, {
        name: [dim for dim in range(tensor.dim()) if tensor.shape[dim] != other[name].shape[dim]]
        for name, tensor in sample.items()
    }


def probes(model: PreTrainedModel, names: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """Return inputs of several sizes; with a mask, the end of one example is padding."""
    whole = inputs_of(model, names, 1, seed=1)
    short = inputs_of(model, names, 3, seed=2, length=_shorter(whole))
    if "attention_mask" in short:
        length = short["attention_mask"].shape[1]
        short["attention_mask"][0, max(length // 2, 1) :] = 0
    return [whole, short, inputs_of(model, names, 4, seed=3)]


def inputs_of(
    model: PreTrainedModel,
    names: Sequence[str],
    batch_size: int,
    seed: int = 0,
    length: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return random inputs of a batch size, with a mask and token types if `names` has them."""
    inputs = example_inputs(model, batch_size, seed, length)
    shape = next(iter(inputs.values())).shape[:2]
    for name in names:
        if name == "attention_mask" and name not in inputs:
            inputs[name] = torch.ones(shape, dtype=torch.long)
        elif name == "token_type_ids":
            generator = torch.Generator().manual_seed(seed)
            inputs[name] = torch.randint(model.config.type_vocab_size, shape, generator=generator)
    return inputs


def _shorter(sample: Mapping[str, torch.Tensor]) -> int:
    return max(next(iter(sample.values())).shape[1] * 3 // 4, 1)


def input_names(model: PreTrainedModel, processor: Any) -> tuple[str, ...]:
    """Return the names of inputs that the processor gives and the model takes."""
    taken = inspect.signature(model.forward).parameters
    names = [name for name in getattr(processor, "model_input_names", ()) if name in taken]
    if getattr(processor, "return_attention_mask", True) is False:
        names = [name for name in names if name != "attention_mask"]
    return tuple(names)
