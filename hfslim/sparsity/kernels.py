"""2:4 sparse kernels of torch for inference."""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from hfslim.anatomy.weights import find_weights, most_kept, weight_of

logger = logging.getLogger(__name__)

CAPABILITY = (8, 0)
"""Least compute capability of CUDA devices that multiply 2:4 sparse matrices."""


@torch.no_grad()
def semi_structured(model: PreTrainedModel) -> list[str]:
    """Convert the 2:4 weights of linear layers to torch's semi-structured tensors, for inference.

    The kernels skip the zeros. Weights that are dense, or of unsupported sizes, do not change. Save
    the model first: such tensors can be neither saved nor trained.
    (Mishra et al. 2021, arXiv 2104.08378; `torch.sparse.to_sparse_semi_structured`.)

    Args:
        model: A model with 2:4 zeros, on a CUDA device, in float16 or bfloat16; changed in place.

    Returns:
        The paths of the converted modules.

    Raises:
        ValueError: There are no such kernels for the device or type, or no weight is supported.
    """
    if model.device.type != "cuda":
        raise ValueError(
            f"2:4 kernels need a CUDA device, the model is on {model.device}, where zeros bring "
            "no speed; move it by model.to('cuda', torch.float16), or remove structure with "
            "hfslim.prune"
        )
    capability = torch.cuda.get_device_capability(model.device)
    if capability < CAPABILITY:
        raise ValueError(
            f"2:4 kernels need compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more, "
            f"{torch.cuda.get_device_name(model.device)} has {capability[0]}.{capability[1]}"
        )
    if model.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"the model is in {model.dtype}: convert it by model.to(torch.float16) or "
            "model.to(torch.bfloat16)"
        )
    taken, left = [], {}
    for path, module in find_weights(model, ".*").items():
        weight = weight_of(module)
        if not isinstance(module, nn.Linear) or most_kept(weight == 0, 4) > 2:
            continue
        if weight.shape[1] % 4:
            left[path] = f"4 does not divide its {weight.shape[1]} inputs, so the last are dense"
            continue
        try:
            sparse = torch.sparse.to_sparse_semi_structured(weight.detach())
        except RuntimeError as error:
            left[path] = str(error)
            continue
        module.weight = nn.Parameter(sparse, requires_grad=False)
        taken.append(path)
    if left:
        path, reason = next(iter(left.items()))
        logger.warning(
            "%d linear layers do not run on 2:4 kernels, such as %s: %s", len(left), path, reason
        )
    if not taken:
        reason = next(
            iter(left.values()), "no linear layer has at most 2 nonzero weights of each 4"
        )
        raise ValueError(f"no weight can run on 2:4 kernels: {reason}")
    logger.info("%d linear layers run on 2:4 kernels", len(taken))
    return taken
