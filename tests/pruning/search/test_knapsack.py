import itertools
import random

import pytest

from hfslim.pruning.search.knapsack import choose


def _groups(seed, ties=False):
    draw = random.Random(seed)
    loss = (lambda: draw.randint(0, 2)) if ties else draw.random
    return [
        [(draw.randint(0, 9), loss()) for _ in range(draw.randint(1, 5))]
        for _ in range(draw.randint(1, 5))
    ]


def _best(groups, budget):
    fits = (
        sum(loss for _, loss in options)
        for options in itertools.product(*groups)
        if sum(cost for cost, _ in options) <= budget
    )
    return min(fits, default=None)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(100))
def test_equals_brute_force(seed, ties):
    groups = _groups(seed, ties)
    for budget in (0, 7, 15, 40):
        chosen, best = choose(groups, budget), _best(groups, budget)
        if best is None:
            assert chosen is None
        else:
            options = [group[i] for group, i in zip(groups, chosen, strict=True)]
            assert sum(cost for cost, _ in options) <= budget
            assert sum(loss for _, loss in options) == pytest.approx(best, abs=1e-12)


def test_equal_options_are_chosen_by_their_order():
    same = [(2, 1.0), (2, 1.0), (1, 1.0)]
    assert choose([same, same], 4) == [2, 2]
    assert choose([same[:2], same[:2]], 4) == [0, 0]


def test_no_group_costs_nothing():
    assert choose([], 0) == []
