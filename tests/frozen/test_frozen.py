"""What the package does is what was recorded: record.py says what, and how to record it anew."""

import pytest
import record

OLD = record.load()


def told(section, found):
    return record.compared(section, {name: OLD[section].get(name) for name in found}, found)


@pytest.mark.parametrize("case", record.SHORT)
def test_a_model_is_cut_as_before(case):
    cuts = {name: how for name, how in record.CUTS.items() if name in record.SHORT_CUTS}
    found = record.model_case(case, check=False, cuts=cuts)
    old = OLD["families"][case]
    old = {**old, "cuts": {name: old["cuts"][name] for name in cuts}}
    assert record.compared(case, old, found) == []


def test_a_recipe_comes_to_the_same_figures():
    assert record.compared("recipe", OLD["recipe"], record.recipe_figures()) == []


def test_the_verbs_print_the_same_figures():
    assert told("cli", record.verbs(record.SHORT_VERBS)) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", record.THOROUGH)
def test_a_model_is_cut_as_before_in_every_way(case):
    assert told("families", {case: record.model_case(case, False, record.CUTS)}) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", record.ZOO)
def test_a_type_of_the_zoo_is_cut_as_before(case):
    assert told("zoo", {case: record.model_case(case, False, record.USUAL)}) == []


@pytest.mark.slow
def test_all_verbs_print_the_same_figures():
    assert told("cli", record.verbs()) == []


@pytest.mark.parametrize(
    ("old", "new", "differ"),
    [
        ({"a": 1.0}, {"a": 1.0005}, False),
        ({"a": 1.0}, {"a": 1.01}, True),
        ({"a": [1, 2]}, {"a": [1]}, True),
        ({"a": 1}, {"a": True}, True),
        ({"a": 2e-8}, {"a": 3e-8}, True),
        ({"a": [1.0, 2e-8]}, {"a": [1.0, 3e-8]}, False),
        ({"a": 1.0}, {"a": float("nan")}, True),
        ({"a": "x"}, {}, True),
        ({}, {"a": "x"}, True),
        ({"logits": [1.0, 0.0]}, {"logits": [1.0, 5e-5]}, False),
        ({"logits": [1.0, 0.0]}, {"logits": [1.0, 5e-4]}, True),
        ({"logits": [1.0, 0.0], "within": 1e-3}, {"logits": [1.0, 5e-4]}, False),
        ({"logits": [1.0, 0.0]}, {"logits": [1.0, float("nan")]}, True),
        ({"logits": "sensitive", "kept": 1}, {"logits": [1.0], "kept": 1}, False),
        ({"sensitive": True}, {"kept": 1}, False),
        ({"kept": 1}, {"refused": "ValueError"}, True),
    ],
)
def test_differences_are_told(old, new, differ):
    assert bool(record.compared("cli", old, new)) is differ
