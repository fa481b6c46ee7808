"""Every loss against its public formula in float64, and against a figure worked out by hand.

The references are written as in the code that their authors published, batch means and all, not as
in hfslim. A loss that is added to hfslim has to be added to the table here.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distilling import config, examples
from models import tiny
from torch import Tensor
from torch.nn import functional as F

from hfslim import DistillationTrainer
from hfslim.distillation.losses import feature_losses, logit_losses
from hfslim.distillation.losses.feature_losses import FEATURE_LOSSES

T = 2.0
LABELS = torch.tensor([0, 3, 4, 1, 2, 0])
LENGTHS = (5, 3)
MASK = torch.tensor([[1] * length + [0] * (5 - length) for length in LENGTHS])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hinton(s: Tensor, t: Tensor) -> Tensor:
    """As in transformers' distillation example."""
    loss = torch.nn.KLDivLoss(reduction="batchmean")
    return loss(F.log_softmax(s / T, dim=-1), F.softmax(t / T, dim=-1)) * T**2


def two_classes_each(s: Tensor, t: Tensor) -> Tensor:
    """One softmax of two for each label: its logit against 0."""
    s, t = (torch.stack([x, torch.zeros_like(x)], -1).flatten(0, 1) for x in (s, t))
    return hinton(s, t)


def mdistiller(s: Tensor, t: Tensor, beta: float = 2.0) -> Tensor:
    """DKD as in megvii-research/mdistiller, with alpha = 1."""
    gt = torch.zeros_like(s).scatter_(1, LABELS[:, None], 1).bool()

    def cat(p: Tensor) -> Tensor:
        return torch.cat([(p * gt).sum(1, keepdim=True), (p * ~gt).sum(1, keepdim=True)], dim=1)

    log_student = cat(F.softmax(s / T, dim=1)).log()
    tckd = F.kl_div(log_student, cat(F.softmax(t / T, dim=1)), reduction="sum") * T**2 / len(s)
    others_t = F.softmax(t / T - 1000.0 * gt, dim=1)
    others_s = F.log_softmax(s / T - 1000.0 * gt, dim=1)
    nckd = F.kl_div(others_s, others_t, reduction="sum") * T**2 / len(s)
    return tckd + beta * nckd


def dist(s: Tensor, t: Tensor) -> Tensor:
    """As in hunto/DIST_KD, with beta = gamma = 1."""

    def inter(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    p, q = (s / T).softmax(dim=1), (t / T).softmax(dim=1)
    return T**2 * (inter(p, q) + inter(p.T, q.T))


LOGITS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "kl": (lambda s, t: logit_losses.kl_divergence(s, t, T), hinton),
    "kl, several labels": (
        lambda s, t: logit_losses.binary_kl_divergence(s, t, T),
        two_classes_each,
    ),
    "kl, regression": (logit_losses.squared_error, F.mse_loss),
    "dkd": (lambda s, t: logit_losses.decoupled_kl(s, t, LABELS, T, 2.0), mdistiller),
    "dist": (lambda s, t: logit_losses.correlation(s, t, T), dist),
}


def by_example(reference: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Apply a reference to the unpadded positions of one example after another, and average."""

    def whole(s: Tensor, t: Tensor) -> Tensor:
        cut = [(slice(None),) * (x.ndim - 3) for x in (s, t)]
        parts = [
            reference(s[i][..., *cut[0], :n, :], t[i][..., *cut[1], :n, :])
            for i, n in enumerate(LENGTHS)
        ]
        return torch.stack(parts).mean()

    return whole


def distilbert(s: Tensor, t: Tensor) -> Tensor:
    target = torch.ones(len(s), dtype=s.dtype)
    return torch.nn.CosineEmbeddingLoss(reduction="mean")(s, t, target)


def distilhubert(s: Tensor, t: Tensor) -> Tensor:
    """As in s3prl, with cos_loss_weight = 1."""
    rec = F.l1_loss(s, t, reduction="none").mean()
    return rec - F.logsigmoid(F.cosine_similarity(s, t, dim=-1)).mean()


def relation(s: Tensor, t: Tensor, heads: int) -> Tensor:
    """MiniLM's relations as in microsoft/unilm: KLDivLoss over all rows of all heads."""

    def rows(x: Tensor) -> Tensor:
        split = x.view(len(x), heads, -1).permute(1, 0, 2)
        return F.softmax(split @ split.transpose(1, 2) / math.sqrt(split.shape[-1]), -1).flatten(
            0, 1
        )

    return F.kl_div(rows(s).log(), rows(t), reduction="batchmean")


def attention_map(s: Tensor, t: Tensor) -> Tensor:
    """The mean over heads, as hfslim compares it, where TinyBERT compares scores head by head."""
    n = s.shape[1]
    return F.mse_loss(s[..., :n].mean(0), t[..., :n].mean(0))


def attention_rows(s: Tensor, t: Tensor) -> Tensor:
    """MiniLM's attention distributions, as in microsoft/unilm."""
    n = s.shape[1]
    s, t = s[..., :n].flatten(0, 1), t[..., :n].flatten(0, 1)
    return F.kl_div(s.log(), t, reduction="batchmean")


def hidden(*, width: int = 6) -> tuple[Tensor, Tensor]:
    return normal(2, 5, 6, seed=0), normal(2, 5, width, seed=1)


def maps(*heads: int) -> tuple[Tensor, Tensor]:
    """Attention probabilities, none of them on padding."""
    closed = (1 - MASK)[:, None, None, :].bool()
    scores = (normal(2, h, 5, 5, seed=h + i) for i, h in enumerate(heads))
    return tuple(x.masked_fill(closed, -torch.inf).softmax(-1) for x in scores)


FEATURES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, Tensor]]] = {
    "hidden_mse": (feature_losses.hidden_mse, by_example(F.mse_loss), hidden()),
    "hidden_cosine": (feature_losses.hidden_cosine, by_example(distilbert), hidden()),
    "hidden_l1_cosine": (feature_losses.hidden_l1_cosine, by_example(distilhubert), hidden()),
    "relations": (
        lambda s, t, mask: feature_losses.relation_kl(s, t, 2, mask),
        by_example(lambda s, t: relation(s, t, 2)),
        hidden(width=8),
    ),
    "attention": (feature_losses.attention_mse, by_example(attention_map), maps(2, 3)),
    "attention rows": (feature_losses.attention_kl, by_example(attention_rows), maps(3, 3)),
}
COVERED = {
    feature_losses.hidden_mse,
    feature_losses.hidden_cosine,
    feature_losses.hidden_l1_cosine,
    feature_losses.relation_kl,
    feature_losses.attention_mse,
}


def test_no_loss_is_without_a_reference() -> None:
    assert {name.split(",")[0] for name in LOGITS} == set(logit_losses.LOGIT_LOSSES)
    assert {loss.function for loss in FEATURE_LOSSES.values()} == COVERED


def test_every_loss_names_its_paper_and_shows_a_value() -> None:
    tables = {"LOGIT_LOSSES", "LogitLoss", "distillation_loss"}
    tables |= {"FEATURE_LOSSES", "FeatureLoss"}
    functions = [
        getattr(module, name)
        for module in (logit_losses, feature_losses)
        for name in set(module.__all__) - tables
    ]
    assert len(functions) == 11
    for function in functions:
        assert "arXiv:" in function.__doc__ and ">>>" in function.__doc__, function.__name__


@pytest.mark.parametrize("name", LOGITS)
def test_a_loss_on_logits_is_its_reference(name: str) -> None:
    ours, reference = LOGITS[name]
    student, teacher = 2 * normal(6, 5, seed=0), 2 * normal(6, 5, seed=1)
    expected = reference(student.double(), teacher.double()).item()
    assert ours(student, teacher).mean().item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert ours(student, student).abs().max() < 1e-6


@pytest.mark.parametrize("name", FEATURES)
def test_a_loss_on_features_is_its_reference(name: str) -> None:
    ours, reference, (student, teacher) = FEATURES[name]
    expected = reference(student.double(), teacher.double()).item()
    value = ours(student, teacher, MASK).mean().item()
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)
    floor = math.log(1 + math.exp(-1)) if name == "hidden_l1_cosine" else 0.0
    assert (ours(student, student, MASK) - floor).abs().max() < 1e-6


def test_dkd_by_hand() -> None:
    # T = 1, label 0: p = (1/2, 3/8, 1/8) of the teacher, q = (1/3, 1/3, 1/3) of the student.
    teacher = torch.tensor([[4.0, 3.0, 1.0]]).log()
    target = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    others = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = logit_losses.decoupled_kl(torch.zeros(1, 3), teacher, torch.tensor([0]), 1.0, 4.0)
    assert loss.item() == pytest.approx(target + 4 * others, abs=1e-6)


def test_dist_by_hand() -> None:
    # Two classes: of either example, and of either class, the probabilities are at odds, ρ = −1.
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = logit_losses.correlation(student, -student, 3.0)
    assert loss.tolist() == pytest.approx([9 * 4, 9 * 4], abs=1e-5)


def test_hidden_cosine_by_hand() -> None:
    # (1, 0) against (3, 4) has the cosine 3/5, against (0, 1) none; the third is padding.
    student = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    teacher = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [-1.0, 0.0]]])
    loss = feature_losses.hidden_cosine(student, teacher, torch.tensor([[1, 1, 0]]))
    assert loss.item() == pytest.approx((0.4 + 1) / 2, abs=1e-6)


def test_relations_by_hand() -> None:
    # One head of size 1, two positions: values (ln 3, 0) relate as softmax((ln 3)², 0), and evenly.
    value = math.log(3)
    teacher, student = torch.tensor([[[value], [0.0]]]), torch.zeros(1, 2, 1)
    p = 1 / (1 + math.exp(-(value**2)))
    expected = (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))) / 2
    assert feature_losses.relation_kl(student, teacher, 1).item() == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("kind", logit_losses.LOGIT_LOSSES)
def test_no_gradient_reaches_the_teacher(kind: str, tmp_path: Path) -> None:
    student, teacher = tiny("bert"), tiny("bert", seed=1)
    seen: list[Tensor] = []
    for module in teacher.modules():
        module.register_forward_hook(lambda _, __, out: seen.append(out))
    trainer = DistillationTrainer(
        student,
        config(tmp_path, logit_loss=kind, feature_losses=dict.fromkeys(FEATURE_LOSSES, 1.0)),
        teacher=teacher,
        train_dataset=examples(student),
    )
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer.train()
    tensors = [x for x in seen if isinstance(x, Tensor)]
    assert len(tensors) > 100 and not any(x.requires_grad for x in tensors)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
