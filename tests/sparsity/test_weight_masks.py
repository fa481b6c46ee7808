"""Which weights go is decided exactly, by the scores alone."""

import pytest
import torch

from hfslim.anatomy.weights import most_kept
from hfslim.sparsity.weight_masks import Pattern, SparsityGoal, digest, remove

SHAPES = {"a": (6, 8), "b": (4, 12), "conv": (5, 8, 3), "image": (4, 6, 2, 3)}


def _scores(seed=0, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {p: torch.rand(s, generator=generator) for p, s in (shapes or SHAPES).items()}


def _none(scores):
    return {path: torch.zeros_like(score, dtype=torch.bool) for path, score in scores.items()}


def test_a_fraction_of_the_model_goes_exactly_by_rank():
    scores = _scores()
    zeros = remove(scores, _none(scores), SparsityGoal(0.37))
    flat = torch.cat([score.flatten() for score in scores.values()])
    gone = torch.cat([zero.flatten() for zero in zeros.values()])
    assert gone.sum() == round(0.37 * len(flat))
    assert flat[gone].max() < flat[~gone].min()


def test_a_fraction_of_each_layer_or_row_goes_exactly():
    scores = _scores()
    layer = remove(scores, _none(scores), SparsityGoal(0.37), "layer")
    row = remove(scores, _none(scores), SparsityGoal(0.37), "row")
    for path, score in scores.items():
        assert layer[path].sum() == round(0.37 * score.numel())
        assert score[layer[path]].max() < score[~layer[path]].min()
        width = score[0].numel()
        assert row[path].flatten(1).sum(1).tolist() == [round(0.37 * width)] * len(score)
        for one, zero in zip(score, row[path], strict=True):
            assert one[zero].max() < one[~zero].min()


def test_equal_scores_go_in_order():
    scores = {"a": torch.ones(2, 4), "b": torch.ones(1, 4)}
    zeros = remove(scores, _none(scores), SparsityGoal(0.5))
    assert zeros["a"].flatten().tolist() == [True] * 6 + [False] * 2
    assert not zeros["b"].any()


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "3:5"])
def test_a_pattern_keeps_the_best_of_each_group_of_inputs(text):
    pattern = Pattern.parse(text)
    scores = _scores(a=(6, 40), conv=(5, 40, 3))
    zeros = remove(scores, _none(scores), SparsityGoal.parse(None, text))
    for path, score in scores.items():
        rows = score.movedim(1, -1).reshape(-1, pattern.m)
        expected = torch.ones_like(rows, dtype=torch.bool)
        for row, gone in zip(rows, expected, strict=True):
            gone[sorted(range(pattern.m), key=lambda i: row[i])[-pattern.n :]] = False
        assert torch.equal(zeros[path].movedim(1, -1).reshape(-1, pattern.m), expected)
        assert most_kept(zeros[path], pattern.m) == pattern.n


def test_a_group_that_is_not_full_counts_as_filled_with_zeros():
    scores = {"a": torch.tensor([[1.0, 2.0, 3.0, 4.0, 7.0, 5.0, 6.0]])}
    zeros = remove(scores, _none(scores), SparsityGoal.parse(None, "2:4"))["a"]
    assert zeros.tolist() == [[True, True, False, False, False, True, False]]


@pytest.mark.parametrize("goal", [SparsityGoal(0.5), SparsityGoal.parse(None, "2:4")])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_on_the_way_weights_only_go_and_the_goal_is_met_in_the_end(goal, scope):
    before = _none(_scores(a=(6, 8), b=(4, 12)))
    total = sum(zero.numel() for zero in before.values())
    for step in range(1, 5):
        scores = _scores(step, a=(6, 8), b=(4, 12))
        after = remove(scores, before, goal, scope, step / 4)
        assert all((after[path] | ~before[path]).all() for path in before)
        gone = sum(int(zero.sum()) for zero in after.values())
        if goal.pattern is None:
            assert gone == round(step / 8 * total)
        else:
            assert all(most_kept(~zero, 4) <= 2 for zero in after.values())
        before = after
    assert gone == total / 2


def test_the_fraction_starts_from_what_is_removed_already():
    scores = _scores(a=(10, 10))
    first = remove(scores, _none(scores), SparsityGoal(0.4))
    half = remove(scores, first, SparsityGoal(0.8), progress=0.5, initial=0.4)
    assert half["a"].sum() == 60
    assert half["a"][first["a"]].all()


def test_the_digest_tells_zeros_apart():
    scores = _scores()
    zeros = remove(scores, _none(scores), SparsityGoal(0.3))
    assert digest(zeros) == digest(dict(reversed(zeros.items())))
    assert digest(zeros) != digest(remove(scores, _none(scores), SparsityGoal(0.31)))


@pytest.mark.parametrize("text", ["4:2", "0:4", "2", "2:4:8", "4:4", 124])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match="expected the form 'N:M'"):
        SparsityGoal.parse(None, text)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 50])
def test_what_is_no_fraction_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        SparsityGoal.parse(sparsity, None)


@pytest.mark.parametrize("both", [(None, None), (0.5, "2:4")])
def test_exactly_one_goal_is_wanted(both):
    with pytest.raises(ValueError, match="give either sparsity"):
        SparsityGoal.parse(*both)
