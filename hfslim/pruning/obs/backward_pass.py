"""Run a model forward and backward, and hear what its decision asks of the modules inside."""

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
from hfslim.pruning.scores.importance import divergence_roots
from hfslim.training.objective import ProblemType, logits_of, problem_type

Heard = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Called with a module's path, its input, and the gradient of a decision root at its output."""


def listen(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    heard: Heard,
    progress: bool = True,
    ran: Callable[[], None] = lambda: None,
    title: str = "second moments",
) -> int:
    """Run data through a model, and its decisions backward, once.

    No labels are needed, and the model is not changed.

    Args:
        model: The model, not a wrapper.
        modules: The modules to listen at, by path.
        batches: Model inputs; labels are passed over.
        heard: Called for each module, each use of it and each root.
        progress: Whether to show a progress bar.
        ran: Called after each forward pass.
        title: What the progress bar says.

    Returns:
        The number of examples, on this rank.

    Raises:
        UnusableScoresError: Logits are not finite; the message names the module that is to blame.
    """
    examples = 0
    with _hooks(modules, heard), evaluating(model), frozen(model), torch.enable_grad():
        for batch in track(batches, title, disable=not progress, transient=True):
            inputs = {k: v for k, v in placed(model, batch).items() if k not in ("labels", "label")}
            logits = logits_of(model(**inputs))
            ran()
            check_finite(model, inputs, logits)
            check_gradients(model, logits)
            examples += len(logits)
            roots = decision_roots(logits, problem_type(model.config)).sum(0)
            for number, root in enumerate(roots, 1):
                root.backward(retain_graph=number < len(roots))
    return examples


def decision_roots(
    logits: torch.Tensor, problem: ProblemType, temperature: float = 2.0, outcomes: int = 8
) -> torch.Tensor:
    """Write how a model's decision listens to its insides as squares of gradients.

    For one class per example the decision is that for the likeliest class against all others. With
    `p` its probability, the curvature of the divergence is `(∂p)² / (p (1 − p))`, the square of the
    gradient of `√(p (1 − p)) · log(p / (1 − p))`, the square root held constant: one backward pass,
    however many classes there are. For the other problems see `divergence_roots`.

    Args:
        logits: `[examples, classes]`.
        problem: What the logits mean.
        temperature: Of the probabilities; above 1, so that sure examples count too.
        outcomes: Questions or outputs at most, where there are several.

    Returns:
        `[examples, roots]`.

    Examples:
        >>> decision_roots(torch.zeros(1, 4), "single_label_classification")  # √(3/16) log(1/3)
        tensor([[-0.9514]])
    """
    if problem != "single_label_classification":
        return divergence_roots(logits, problem, temperature)[:, :outcomes]
    log_p = (logits.float() / temperature).log_softmax(-1)
    top = log_p.detach().argmax(-1, keepdim=True)
    others = log_p.scatter(-1, top, float("-inf")).logsumexp(-1, keepdim=True)
    ours = log_p.gather(-1, top)
    return temperature * ((ours + others) / 2).exp().detach() * (ours - others)


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], heard: Heard) -> Iterator[None]:
    def hook(path: str) -> Callable[..., Any]:
        def show(module: nn.Module, args: tuple, output: Any) -> Any:
            x = args[0].detach()
            # I-BERT's maps return a scale, too.
            value, *others = output if isinstance(output, tuple) else (output,)
            if not value.requires_grad:
                # A copy, because what is added in place, as in Falcon, can be no leaf.
                value = value.detach().requires_grad_().clone()
            if torch.is_grad_enabled():
                value.register_hook(lambda g: heard(path, x, g))
            return (value, *others) if isinstance(output, tuple) else value

        return show

    handles = [module.register_forward_hook(hook(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
