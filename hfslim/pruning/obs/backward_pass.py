"""Gradients of a model's decision at the outputs of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import track
from torch import nn
from transformers import PreTrainedModel

from hfslim.measuring.timing import evaluating, placed
from hfslim.pruning.scores.collect import frozen
from hfslim.pruning.scores.finite import check_finite, check_gradients
from hfslim.pruning.scores.importance import fisher_factors
from hfslim.training.objective import ProblemType, logits_of, problem_type

OnOutputGradient = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Called with a module's path, its input, and the gradient of a decision factor at its output."""


def run_backward(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    on_gradient: OnOutputGradient,
    progress: bool = True,
    after_forward: Callable[[], None] = lambda: None,
    title: str = "second moments",
) -> int:
    """Run data through a model once, and back-propagate the `decision_factors` of each batch.

    `on_gradient` is called for each of the modules, each use of it and each factor. No labels are
    needed, and the model is not changed.

    Returns:
        The number of examples, on this rank.
    """
    examples = 0
    with _hooks(modules, on_gradient), evaluating(model), frozen(model), torch.enable_grad():
        for batch in track(batches, title, disable=not progress, transient=True):
            inputs = dict(placed(model, batch))
            labels = inputs.pop("labels", inputs.pop("label", None))
            logits = logits_of(model(**inputs))
            after_forward()
            check_finite(model, inputs, logits)
            check_gradients(model, logits)
            examples += len(logits)
            factors = decision_factors(logits, problem_type(model.config, labels)).sum(0)
            for number, factor in enumerate(factors, 1):
                factor.backward(retain_graph=number < len(factors))
    return examples


def decision_factors(
    logits: torch.Tensor, problem: ProblemType, temperature: float = 2.0, outcomes: int = 8
) -> torch.Tensor:
    """Return scalars whose squared gradients add up to the Fisher information of the decision.

    For one class per example the decision is the likeliest class against all others. With `p` its
    probability, the curvature of the divergence is `(∂p)² / (p (1 − p))`, the squared gradient of
    `√(p (1 − p)) · log(p / (1 − p))` with the square root held constant: one backward pass for any
    number of classes. For the other problems see `fisher_factors`.

    From logits, `[examples, classes]`, to `[examples, factors]`. The temperature is above 1, so
    that certain examples count too; `outcomes` limits the number of labels or outputs.

    Examples:
        >>> decision_factors(torch.zeros(1, 4), "single_label_classification")  # √(3/16) log(1/3)
        tensor([[-0.9514]])
    """
    if problem != "single_label_classification":
        return fisher_factors(logits, problem, temperature)[:, :outcomes]
    log_p = (logits.float() / temperature).log_softmax(-1)
    top = log_p.detach().argmax(-1, keepdim=True)
    others = log_p.scatter(-1, top, float("-inf")).logsumexp(-1, keepdim=True)
    ours = log_p.gather(-1, top)
    return temperature * ((ours + others) / 2).exp().detach() * (ours - others)


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], on_gradient: OnOutputGradient) -> Iterator[None]:
    def hook(path: str) -> Callable[..., Any]:
        def watch(module: nn.Module, args: tuple, output: Any) -> Any:
            x = args[0].detach()
            # The linear layers of I-BERT return a scale, too.
            value, *others = output if isinstance(output, tuple) else (output,)
            if not value.requires_grad:
                # A copy, because Falcon adds to it in place, which a leaf does not allow.
                value = value.detach().requires_grad_().clone()
            if torch.is_grad_enabled():
                value.register_hook(lambda g: on_gradient(path, x, g))
            return (value, *others) if isinstance(output, tuple) else value

        return watch

    handles = [module.register_forward_hook(hook(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
