"""Calibration where memory is short."""

import logging

import pytest
import torch
from models import tiny

import hfslim
from hfslim.anatomy import example_inputs, find_units
from hfslim.prune.collect import collect
from hfslim.prune.moments import gather


class _Small:
    """Lets a model run out of memory on more examples than fit, in the last of its layers."""

    def __init__(self, model: torch.nn.Module, fits: int) -> None:
        self.fits, self.sizes = fits, []
        model.bert.encoder.layer[-1].register_forward_pre_hook(self)

    def __call__(self, module: torch.nn.Module, args: tuple) -> None:
        self.sizes.append(len(args[0]))
        if len(args[0]) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _batches(sizes: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    model = tiny("bert")
    batch = example_inputs(model, batch_size=sum(sizes), length=8)
    batch["labels"] = torch.arange(sum(sizes)) % 3
    parts = zip(*(value.split(sizes) for value in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


@pytest.mark.parametrize("criterion", ["fisher", "activation"])
def test_batches_that_do_not_fit_are_halved_with_a_warning(criterion, caplog):
    criteria = {"heads": criterion, "neurons": criterion}
    model, small = tiny("bert"), tiny("bert")
    units = find_units(model).of(["heads", "neurons"])
    expected = collect(model, units, _batches((2, 10)), criteria, progress=False)
    memory = _Small(small, fits=3)
    with caplog.at_level(logging.WARNING, "hfslim"):
        found = collect(small, units, _batches((2, 10)), criteria, progress=False)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-9)
    assert memory.sizes == [2, 10, 2, 5, 2, 3, 3, 3, 1]
    assert "out of memory on 10 examples at once (CUDA out of memory" in caplog.text
    assert "starting anew with 3" in caplog.text


def test_second_moments_are_the_same_in_halves():
    model, small = tiny("bert"), tiny("bert")
    units = find_units(model).of(["heads", "neurons"])
    expected = gather(model, units, _batches((8,)), progress=False)
    _Small(small, fits=4)
    found = gather(small, units, _batches((8,)), progress=False)
    for key, value in expected.items():
        torch.testing.assert_close(found[key].second, value.second, rtol=1e-4, atol=1e-8)
        assert found[key].examples == value.examples == 8


def test_where_single_examples_do_not_fit_the_error_stays():
    model = tiny("bert")
    _Small(model, fits=0)
    with pytest.raises(torch.OutOfMemoryError):
        hfslim.prune(model, _batches((4,)), {"macs": 0.5}, criterion="fisher", progress=False)
