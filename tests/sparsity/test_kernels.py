"""2:4 weights on torch's kernels for them, or a refusal that names the reason."""

import copy

import pytest
import torch
from models import tiny

from hfslim import semi_structured, sparsify
from hfslim.anatomy.inputs import example_inputs

WIDE = {"hidden_size": 128, "intermediate_size": 256}


def test_the_cpu_is_refused_with_the_reason():
    model = tiny("bert")
    sparsify(model, pattern="2:4", method="magnitude")
    with pytest.raises(ValueError, match=r"need a CUDA device, the model is on cpu, where zeros"):
        semi_structured(model)


@pytest.mark.gpu
def test_the_kernels_compute_what_the_dense_model_does():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    model = tiny("bert", **WIDE)
    sparsify(model, pattern="2:4", method="magnitude")
    model = model.to("cuda", torch.float16)
    dense = copy.deepcopy(model)
    taken = semi_structured(model)
    assert len(taken) == 3 * 6 + 1
    inputs = example_inputs(model, 32, length=16)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs).logits, dense(**inputs).logits, rtol=1e-2, atol=1e-2
        )


@pytest.mark.gpu
def test_what_the_kernels_cannot_take_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"the model is in torch\.float32: convert it"):
        semi_structured(tiny("bert", **WIDE).cuda())
    dense = tiny("bert", **WIDE).to("cuda", torch.float16)
    with pytest.raises(ValueError, match="no linear layer has at most 2 nonzero weights of each 4"):
        semi_structured(dense)
