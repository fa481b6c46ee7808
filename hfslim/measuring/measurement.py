"""A model's costs: parameters, multiply-accumulates, bytes, time.

All are measured in eval mode without gradients; the model returns in the mode it came in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hfslim.measuring.timing import (
    Inputs,
    Latency,
    describe_inputs,
    evaluating,
    latency,
    paired_latency,
    placed,
)

__all__ = [
    "Comparison",
    "Measurement",
    "compare",
    "count_bytes",
    "count_parameters",
    "macs",
    "macs_by_module",
    "measure",
]


@dataclass(frozen=True)
class Measurement:
    """One model's costs at one stated input.

    Attributes:
        inputs: Names and shapes of the input.
        parameters: Number of parameters, shared ones once.
        parameters_without_embeddings: The same without embeddings, as `count_parameters` does.
        macs: Multiply-accumulates of one forward call of the input.
        bytes: Size of the weights in a safetensors file, less its header.
        latency: Time of a forward call of the input.
    """

    inputs: str
    parameters: int
    parameters_without_embeddings: int
    macs: int
    bytes: int
    latency: Latency

    @property
    def latency_ms(self) -> float:
        """Median time of a forward call, in milliseconds."""
        return self.latency.p50_ms

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Two models measured at one stated input, timed in turn.

    Attributes:
        before: The first model's costs.
        after: The second model's costs.
        speedup: Median time of a call before over median time after: above 1 is faster.
        low: Lower end of the 95 % bootstrap interval of the speedup.
        high: Upper end of the 95 % bootstrap interval of the speedup.
    """

    before: Measurement
    after: Measurement
    speedup: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of plain values."""
        return asdict(self)


def macs(model: nn.Module, inputs: Inputs) -> int:
    """Count the multiply-accumulates of one forward call, as `macs_by_module` does."""
    return macs_by_module(model, inputs)[""]


def macs_by_module(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Count the multiply-accumulates of one forward call, module by module.

    Matrix products, convolutions and the two products of attention count, whichever kernel
    computes them; masks save nothing. Normalisations, activations, softmax, table look-ups and
    other element-wise work do not count.

    Args:
        model: Any module; it runs once.
        inputs: Keyword arguments of `model.forward`.

    Returns:
        The multiply-accumulates inside each module, by its path; the root's is `""`.
    """
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
            torch.ops.aten._grouped_mm: _grouped_flops,
        },
    )
    inputs = placed(model, inputs)
    with evaluating(model), _frozen(model), counter:
        model(**inputs)
    flops = {path: sum(counts.values()) for path, counts in counter.get_flop_counts().items()}
    # The counter names a module by one of its paths, with the root's class in front.
    root = type(model).__name__
    inside: dict[nn.Module, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        counted = flops.get(f"{root}.{path}" if path else "Global", 0)
        inside[module] = inside.get(module, 0) + counted
    return {path: inside[module] // 2 for path, module in model.named_modules()}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters: the counter fails where a module returns one that needs a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def count_parameters(model: nn.Module, embeddings: bool = True) -> int:
    """Count the scalars of all parameters, shared ones once.

    Args:
        model: Any module.
        embeddings: Whether embeddings count. They are: the weights of every `nn.Embedding` (tokens,
            positions, token types), tables of positions and special tokens (a parameter whose own
            name contains `position` or `pos_embed`, or ends in `_token`), and the projection of
            patches (everything under a module named `patch_embed…`).
    """
    if embeddings:
        return sum(parameter.numel() for parameter in model.parameters())
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) not in tables and not _names_an_embedding(name)
    )


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and persistent buffers in a safetensors file, less its header.

    Shared tensors count once.
    """
    saved = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *buffers])


def measure(model: nn.Module, inputs: Inputs, *, calls: int = 30, warmup: int = 5) -> Measurement:
    """Measure parameters, multiply-accumulates, bytes and latency at a stated input.

    Args:
        model: Any module.
        inputs: Keyword arguments of `model.forward`; the first axis is the batch. Tensors are moved
            to the model's device, floating-point ones to its dtype.
        calls: Number of timed calls.
        warmup: Number of calls before the first timed one.

    Raises:
        ValueError: `calls` is less than 1, or the inputs hold no tensor.
    """
    return _measurement(model, inputs, latency(model, inputs, calls=calls, warmup=warmup))


def compare(
    before: nn.Module,
    after: nn.Module,
    inputs: Inputs,
    *,
    before_inputs: Inputs | None = None,
    calls: int = 30,
    warmup: int = 5,
) -> Comparison:
    """Measure two models at the same input, their calls timed in turn.

    Args:
        before: Model to compare with.
        after: Model that should cost less.
        inputs: As for `measure`.
        before_inputs: Inputs of `before`, where they differ.
        calls: Number of timed calls of each model.
        warmup: Number of calls of each model before the first timed one.

    Raises:
        ValueError: `calls` is less than 1, or the inputs hold no tensor.
    """
    theirs = inputs if before_inputs is None else before_inputs
    times = paired_latency(before, after, inputs, before_inputs=theirs, calls=calls, warmup=warmup)
    return Comparison(
        before=_measurement(before, theirs, times.before),
        after=_measurement(after, inputs, times.after),
        speedup=times.speedup,
        low=times.low,
        high=times.high,
    )


def _measurement(model: nn.Module, inputs: Inputs, time: Latency) -> Measurement:
    return Measurement(
        inputs=describe_inputs(inputs),
        parameters=count_parameters(model),
        parameters_without_embeddings=count_parameters(model, embeddings=False),
        macs=macs(model, inputs),
        bytes=count_bytes(model),
        latency=time,
    )


def _sdpa_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any
) -> int:
    # torch 2.13 has no formula for its CPU kernel. Shapes are [batch, heads, tokens, head size];
    # several query heads may share one head of keys and values.
    batch, heads, query_tokens, head_size = query
    key_tokens = key[2]
    return 2 * batch * heads * query_tokens * key_tokens * (head_size + value[3])


def _grouped_flops(rows: torch.Size, experts: torch.Size, *_: Any, **__: Any) -> int:
    # torch 2.13 has no formula for the products of experts. Each of the rows, `[rows, inputs]`,
    # goes to one of the experts, `[experts, inputs, outputs]`.
    return 2 * rows.numel() * experts[-1]


def _names_an_embedding(parameter_name: str) -> bool:
    *modules, own = parameter_name.split(".")
    table = "position" in own or "pos_embed" in own or own.endswith("_token")
    return table or any(module.startswith("patch_embed") for module in modules)
