"""Units that a family keeps elsewhere: gradients of their gates by two ways, costs foretold."""

import pytest
import torch
import zoo
from structures import uneven

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import Structure
from hfslim.measuring.measurement import count_parameters, macs_by_module
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.search.unit_costs import count

CASES = [
    *("text/albert", "text/bert", "text/flaubert", "text/lilt", "text/olmo2"),
    *("text/perceiver", "text/squeezebert", "text/xlnet"),
]
COSTS = ("parameters", "macs")


def _gradients_by_example(model, inputs):
    """Return what the gates tell of each example of one batch, `[examples, units]` by site."""
    seen = {}
    gates = Gates(model)

    def note(site, index, gradient):
        sums = seen.setdefault((site.kind, site.path), {})
        assert index not in sums, "one gradient for all that a gate multiplies"
        sums[index] = gradient

    gates.on_gradient = note
    with gates:
        model(**inputs).logits.square().sum().backward()
    return {key: torch.cat([sums[i] for i in sorted(sums)], 1) for key, sums in seen.items()}


def _gradients_by_factor(model, inputs):
    """Differentiate by a factor on every unit, as autograd does it."""
    gates = Gates(model)
    gates.factors = {
        (site.kind, site.path): torch.ones(site.size, requires_grad=True)
        for site in find_units(model)
    }
    with gates:
        model(**inputs).logits.square().sum().backward()
    return {key: factor.grad for key, factor in gates.factors.items()}


@pytest.mark.parametrize("case", CASES)
def test_gates_tell_the_derivative_of_each_example(case):
    model = zoo.tiny(case)
    inputs = example_inputs(model, 3, seed=5, length=8)
    told = _gradients_by_example(model, inputs)
    assert {kind for kind, _ in told} == {"heads", "neurons", "layers"}
    for example in range(3):
        one = {name: value[example : example + 1] for name, value in inputs.items()}
        for key, expected in _gradients_by_factor(model, one).items():
            assert expected.abs().max() > 1e-6, key
            assert torch.allclose(told[key][example], expected, rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize("case", CASES)
def test_costs_are_foretold(case):
    model = zoo.tiny(case)
    inputs = example_inputs(model, 1, length=8)
    units, structure = find_units(model), uneven(model)
    if case == "text/olmo2":
        # What stays of heads that go, goes with the last head, which no unit's cost tells.
        structure = units.complete(
            Structure.of({"heads": {s.path: ([0], s.size) for s in units if s.kind == "heads"}})
        )
    told = {what: count(model, units, what, inputs).of(units, structure) for what in COSTS}
    hfslim.shrink(model, structure)
    assert told["parameters"] == count_parameters(model)
    macs = macs_by_module(model, inputs)[""]
    assert told["macs"] == pytest.approx(macs, rel=1e-3)
    assert told["macs"] > 0.999 * macs
