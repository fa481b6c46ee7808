import itertools
import json
import subprocess
import sys

import pytest
import torch
from models import FAMILIES, auto_class, tiny
from places import SUPPORT
from structures import Unchanged

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.measuring.measurement import macs
from hfslim.pruning.search import unit_costs as pricing
from hfslim.pruning.search.plain_config import check_plain
from hfslim.pruning.search.uniform import uniform_structure
from hfslim.pruning.target import Target, UnreachableTargetError

SHORT = {"input_values": 1200}


def _inputs(model):
    return example_inputs(model, 2, length=SHORT.get(model.main_input_name, 8))


def _expressible(model):
    kinds = dict.fromkeys(site.kind for site in find_units(model))
    found = []
    for kind in kinds:
        try:
            check_plain(model, find_units(model).of([kind]))
            found.append(kind)
        except ValueError:
            continue
    return tuple(found)


def _scores(units, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {(s.kind, s.path): torch.rand(s.size, generator=draw).double() for s in units}


def _uniform(units, dropped, heads, neurons, scores):
    width = {"heads": heads, "neurons": neurons}
    sites = {}
    for s in units:
        if s.kind == "layers":
            kept = [i for i in range(s.size) if i not in dropped]
        elif s.layer and int(s.layer.rpartition(".")[2]) in dropped:
            kept = range(s.size)
        else:
            kept = scores[s.kind, s.path].argsort(descending=True)[: width[s.kind]].tolist()
        sites.setdefault(s.kind, {})[s.path] = (kept, s.size)
    return hfslim.Structure.of(sites)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_finds_the_best_uniform_structure(kept):
    model = tiny("vit")
    units = find_units(model)
    scores = _scores(units)
    costs = pricing.count(model, units, "macs", _inputs(model))
    found = uniform_structure(units, scores, Target("macs", kept), costs)

    def lost(structure):
        gone = 0.0
        layers = next(iter(s for s in units if s.kind == "layers"))
        left = structure.kept("layers", layers.path)
        for e in structure:
            if (
                e.kind == "layers"
                or int(units.site(e.kind, e.path).layer.rpartition(".")[2]) in left
            ):
                inside = set(range(e.total)) - set(e.kept)
                gone += sum(scores[e.kind, e.path][i].item() for i in inside)
        return gone

    order = next(v for (k, _), v in scores.items() if k == "layers").argsort().tolist()
    options = (
        _uniform(units, set(order[:number]), heads, neurons, scores)
        for number, heads, neurons in itertools.product(range(3), range(1, 5), range(1, 49))
    )
    best = min(lost(s) for s in options if costs.of(units, s) <= kept * costs.total)
    assert costs.of(units, found) <= kept * costs.total
    assert lost(found) == pytest.approx(best, abs=1e-12)


def test_the_least_reachable_is_told():
    model = tiny("vit")
    units = find_units(model).of(["heads", "neurons"])
    costs = pricing.count(model, units, "macs", _inputs(model))
    with pytest.raises(UnreachableTargetError, match="of the macs are left"):
        uniform_structure(units, _scores(units), Target("macs", 0.01), costs)


def test_sparsity_removes_the_same_number_everywhere():
    units = find_units(tiny("vit"))
    target = Target("sparsity", sparsity={"heads": 0.5, "neurons": 0.25, "layers": 0.3})
    found = uniform_structure(units, _scores(units), target)
    (layers,) = (e for e in found if e.kind == "layers")
    assert len(layers.kept) == 2
    for e in found:
        around = units.site(e.kind, e.path).layer
        if e.kind != "layers" and int(around.rpartition(".")[2]) in layers.kept:
            assert len(e.kept) == (2 if e.kind == "heads" else 36)
    with pytest.raises(UnreachableTargetError, match="at most 2 of 3 layers"):
        uniform_structure(units, _scores(units), Target("sparsity", sparsity={"layers": 0.9}))


def test_the_kinds_that_a_config_can_say_are_told():
    model = tiny("bert")
    with (
        Unchanged(model),
        pytest.raises(ValueError, match=r"fewer \['heads'\].*\['layers', 'neuro"),
    ):
        check_plain(model, find_units(model))


def test_a_model_that_was_cut_unevenly_is_refused():
    model = tiny("vit")
    data = [example_inputs(model, 2) | {"labels": torch.tensor([0, 1])}]
    hfslim.prune(model, data, {"macs": 0.6}, progress=False)
    with Unchanged(model), pytest.raises(ValueError, match="was cut before"):
        hfslim.prune(model, data, {"macs": 0.6}, uniform=True, progress=False)


def test_layers_that_differ_by_their_position_are_not_plain():
    assert _expressible(tiny("swin")) == ()
    with pytest.raises(ValueError, match="can express none of the kinds in `units`"):
        check_plain(tiny("swin"), find_units(tiny("swin")).of(["layers"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_cut_leaves_a_plain_config(family):
    model = tiny(family)
    units = _expressible(model)
    if units:
        data = [_inputs(model) | {"labels": torch.tensor([0, 1])}]
        hfslim.prune(model, data, {"macs": 0.6}, units, uniform=True, progress=False)
        assert not getattr(model.config, "hfslim", None)


def test_uniform_cuts_load_without_hfslim(tmp_path):
    """By the stock classes, in a process where hfslim cannot be imported."""
    cases, expected = [], {}
    for family in ("bert", "vit", "whisper", "wav2vec2", "qwen2"):
        model = tiny(family)
        units = _expressible(model)
        inputs = _inputs(model)
        whole = macs(model, inputs)
        data = [inputs | {"labels": torch.tensor([0, 1])}]
        hfslim.prune(model, data, {"macs": 0.6}, units, inputs=inputs, uniform=True, progress=False)
        assert macs(model, inputs) <= 0.6 * whole
        folder = tmp_path / family
        model.save_pretrained(folder)
        torch.save(inputs, folder / "inputs.pt")
        with torch.no_grad():
            expected[folder] = model(**inputs).logits
        cases.append([str(folder), auto_class(family).__name__, False])
    script = SUPPORT / "without_hfslim.py"
    subprocess.run([sys.executable, str(script), json.dumps(cases)], check=True)
    for folder, logits in expected.items():
        outputs = torch.load(folder / "outputs.pt")
        torch.testing.assert_close(outputs["first"], logits)
        torch.testing.assert_close(outputs["second"], logits)
