"""Time of single calls, of one model or of two in turn."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = [
    "Inputs",
    "Latency",
    "Mark",
    "PairedLatency",
    "call_seconds",
    "describe_inputs",
    "evaluating",
    "in_turn",
    "latency",
    "mark",
    "paired",
    "paired_latency",
    "placed",
    "seconds_between",
    "summarise",
]

Inputs = Mapping[str, Any]
Mark = Any
"""A moment in a device's work, as `mark` gives it: a `torch.Event`, or seconds on the CPU."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Latency:
    """Times of single forward calls, and their conditions.

    Attributes:
        p50_ms: Median time of a call, in milliseconds.
        p95_ms: 95th percentile of the time of a call, in milliseconds.
        throughput: Examples per second over all timed calls.
        batch_size: Examples per call.
        calls: Number of timed calls.
        threads: CPU threads that torch may use inside an operator.
        dtype: Type of the weights.
        device: The model's device.
    """

    p50_ms: float
    p95_ms: float
    throughput: float
    batch_size: int
    calls: int
    threads: int
    dtype: str
    device: str


@dataclass(frozen=True)
class PairedLatency:
    """Times of two models that ran in turn, and how much faster the second is.

    Attributes:
        before: Times of the first model.
        after: Times of the second model.
        speedup: Median time of the first over median time of the second.
        low: Lower end of the 95 % bootstrap interval of the speedup.
        high: Upper end of the 95 % bootstrap interval of the speedup.
    """

    before: Latency
    after: Latency
    speedup: float
    low: float
    high: float


def latency(model: nn.Module, inputs: Inputs, *, calls: int = 30, warmup: int = 5) -> Latency:
    """Time single forward calls.

    Args:
        model: Model to run, in eval mode, without gradients.
        inputs: Keyword arguments of `model.forward`; the first axis is the batch.
        calls: Number of timed calls.
        warmup: Number of calls before the first timed one.

    Raises:
        ValueError: `calls` is less than 1, or the inputs hold no tensor.
    """
    return _summary(model, inputs, _interleaved([model], [inputs], calls, warmup)[0])


def paired_latency(
    before: nn.Module,
    after: nn.Module,
    inputs: Inputs,
    *,
    before_inputs: Inputs | None = None,
    calls: int = 30,
    warmup: int = 5,
) -> PairedLatency:
    """Time two models in turn, call by call, so that a change of load affects both.

    The arguments and errors are those of `hfslim.measuring.compare`.
    """
    theirs = inputs if before_inputs is None else before_inputs
    first, second = _interleaved([before, after], [theirs, inputs], calls, warmup)
    return paired(first, second, _summary(before, theirs, first), _summary(after, inputs, second))


def paired(first: np.ndarray, second: np.ndarray, before: Latency, after: Latency) -> PairedLatency:
    """Return the speedup of two series of calls, with a bootstrap interval over pairs of calls.

    The seconds of both, `[calls]`, were taken in turn; `before` and `after` summarise them.
    """
    calls = len(first)
    resampled = np.random.default_rng(0).integers(0, calls, size=(2000, calls))
    ratios = np.median(first[resampled], axis=1) / np.median(second[resampled], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    speedup = float(np.median(first) / np.median(second))
    return PairedLatency(before, after, speedup, float(low), float(high))


def describe_inputs(inputs: Inputs) -> str:
    """Return names and shapes of tensors, as in `input_ids [1, 128], attention_mask [1, 128]`."""
    return ", ".join(f"{name} {list(t.shape)}" for name, t in _tensors(inputs).items())


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode without gradients, and each module back in its mode afterwards.

    BigBird replaces its sparse attention by a full one after a short text; that is undone too.
    """
    training = [(m, m.training) for model in models for m in model.modules()]
    attention: list[tuple[Any, str]] = [
        (m, str(m.attention_type)) for m, _ in training if hasattr(m, "set_attention_type")
    ]
    for model in models:
        model.eval()
    try:
        # Not inference mode: tensors that a model caches there cannot be used in training.
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for module, kind in attention:
            module.set_attention_type(kind)


def _reference(model: nn.Module) -> torch.Tensor:
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())


def _tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(
            f"The inputs hold no tensor: {sorted(inputs)} was given, keyword arguments of "
            "model.forward were expected, such as input_ids or pixel_values of shape [batch, ...]."
        )
    return tensors


def placed(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Move tensors to the model's device, and floating-point ones to its dtype.

    Raises:
        ValueError: The inputs hold no tensor.
    """
    reference = _reference(model)
    moved = dict(inputs)
    for name, tensor in _tensors(inputs).items():
        dtype = reference.dtype if tensor.is_floating_point() else None
        moved[name] = tensor.to(reference.device, dtype)
    return moved


def _interleaved(
    models: list[nn.Module], inputs: list[Inputs], calls: int, warmup: int
) -> list[np.ndarray]:
    clocks = [
        functools.partial(call_seconds, m, placed(m, own), _reference(m).device)
        for m, own in zip(models, inputs, strict=True)
    ]
    with evaluating(*models):
        return in_turn(clocks, calls, warmup)


def in_turn(clocks: Sequence[Callable[[], float]], calls: int, warmup: int) -> list[np.ndarray]:
    """Time several functions in turn, call by call, after `warmup` calls of each.

    Each function runs once and returns the seconds that it took; the result holds the seconds of
    each, `[calls]`.

    Raises:
        ValueError: `calls` is less than 1.
    """
    if calls < 1:
        raise ValueError(f"calls={calls} was given, at least 1 timed call was expected.")
    seconds = np.empty((len(clocks), calls))
    for _ in range(warmup):
        for clock in clocks:
            clock()
    for call in range(calls):
        # The order alternates, so that none always finds another's data in the CPU's caches.
        order = range(len(clocks)) if call % 2 == 0 else reversed(range(len(clocks)))
        for index in order:
            seconds[index, call] = clocks[index]()
    return list(seconds)


def call_seconds(
    run: Callable[..., Any], inputs: Mapping[str, Any], device: torch.device = CPU
) -> float:
    """Call once and return the seconds until a device, idle at first, has done the work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = mark(device)
    run(**inputs)
    return seconds_between(start, mark(device))


def mark(device: torch.device) -> Mark:
    """Return this moment in a device's work: on the CPU by the wall clock, elsewhere an event."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record(torch.accelerator.current_stream(device))
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Return the seconds between two marks of one device, once it has reached both."""
    if isinstance(end, torch.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000
    return end - start


def _summary(model: nn.Module, inputs: Inputs, seconds: np.ndarray) -> Latency:
    reference = _reference(model)
    device = str(reference.device)
    if reference.device.type == "cuda":
        device = f"{device} ({torch.cuda.get_device_name(reference.device)})"
    dtype = str(reference.dtype).removeprefix("torch.")
    return summarise(seconds, len(next(iter(_tensors(inputs).values()))), dtype, device)


def summarise(seconds: np.ndarray, batch_size: int, dtype: str, device: str) -> Latency:
    """Summarise the seconds of calls, `[calls]`."""
    return Latency(
        p50_ms=float(np.percentile(seconds, 50) * 1000),
        p95_ms=float(np.percentile(seconds, 95) * 1000),
        throughput=float(batch_size * len(seconds) / seconds.sum()),
        batch_size=batch_size,
        calls=len(seconds),
        threads=torch.get_num_threads(),
        dtype=dtype,
        device=device,
    )
