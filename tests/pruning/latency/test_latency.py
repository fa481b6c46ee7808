import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
import zoo
from models import FAMILIES, tiny
from structures import Unchanged, uneven
from transformers import ResNetForImageClassification

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.slices import Cut
from hfslim.anatomy.units import Site, Units
from hfslim.measuring.timing import evaluating
from hfslim.pruning import UnreachableTargetError
from hfslim.pruning.latency import latency_measurement, latency_search, latency_table
from hfslim.pruning.latency.latency_search import TOLERANCE, to_save
from hfslim.pruning.latency.latency_table import Curve, LatencyTable
from hfslim.pruning.search.best import best_structure
from hfslim.pruning.surgery.proof import attention_returns
from hfslim.pruning.surgery.surgery import cut_for_now
from hfslim.pruning.target import Target

HEADS, NEURONS, LAYERS = 3, 8, 2


class WorkClock:
    """A clock that only multiplications move: what a linear layer takes is known."""

    PER_CALL, PER_MAC = 1e-5, 1e-8

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def work(self, module, args, output):
        if isinstance(module, torch.nn.Linear):
            self.now += self.PER_CALL + self.PER_MAC * args[0].numel() * module.out_features
        elif isinstance(module, torch.nn.Conv2d):
            work = output.numel() * module.weight.shape[1:].numel()
            self.now += self.PER_CALL + self.PER_MAC * work


@pytest.fixture
def clock(monkeypatch, tmp_path):
    clock = WorkClock()
    monkeypatch.setattr("hfslim.measuring.timing.time", clock)
    monkeypatch.setattr(latency_measurement, "SECONDS", 0.0)
    monkeypatch.setattr(latency_search, "SECONDS", 0.0)
    monkeypatch.setenv(latency_table.CACHE, str(tmp_path))
    handle = torch.nn.modules.module.register_module_forward_hook(clock.work)
    yield clock
    handle.remove()


def _units(layers=True):
    cut = (Cut("any", "weight", 0),)
    sites = [Site("layers", "l", LAYERS)] if layers else []
    for i in range(LAYERS):
        around = f"l.{i}" if layers else ""
        sites.append(Site("heads", f"l.{i}.a", HEADS, cuts=cut, layer=around))
        sites.append(Site("neurons", f"l.{i}.f", NEURONS, cuts=cut, layer=around))
    return Units(tuple(sites))


def _table(step=4):
    """Costs that are not linear: a sub-layer costs something as soon as it has one unit."""
    heads = Curve((0, 1, HEADS), (0.0, 10.0, 20.0))
    neurons = Curve((0, step, NEURONS), (0.0, 6.0, 10.0))
    site = {}
    for i in range(LAYERS):
        site |= {("heads", f"l.{i}.a"): heads, ("neurons", f"l.{i}.f"): neurons}
    inside = LAYERS * (20 + 10 + 5)
    return LatencyTable(inside + 7.0, {f"l.{i}": 5.0 for i in range(LAYERS)}, site, step)


def _scores(units, seed):
    draw = torch.Generator().manual_seed(seed)
    return {(s.kind, s.path): torch.rand(s.size, generator=draw).double() for s in units}


def test_fixed_units_stay_however_little_they_matter():
    units = Units(tuple(replace(s, fixed=(2,)) if s.kind == "heads" else s for s in _units()))
    scores = _scores(units, 0)
    for layer in range(LAYERS):
        scores["heads", f"l.{layer}.a"][2] = 0.0
    found = best_structure(units, scores, Target("latency", 0.4), _table())
    kept = found.kept("layers", "l")
    assert all(2 in found.kept("heads", f"l.{layer}.a") for layer in kept)


def _lost(units, structure, scores):
    layers = structure.kept("layers", "l")
    gone = sum(scores["layers", "l"][i].item() for i in range(LAYERS) if i not in layers)
    for e in structure:
        if e.kind != "layers" and int(e.path.split(".")[1]) in layers:
            gone += sum(scores[e.kind, e.path][u].item() for u in set(range(e.total)) - set(e.kept))
    return gone


def _every_structure(units, scores):
    def best(kind, path, width):
        return sorted(scores[kind, path].argsort(descending=True)[:width].tolist()), sizes[kind]

    sizes = {"heads": HEADS, "neurons": NEURONS}
    widths = {"heads": range(HEADS + 1), "neurons": (0, 4, 8)}
    narrow = [(s.kind, s.path) for s in units if s.kind != "layers"]
    for chosen in itertools.product(*(widths[kind] for kind, _ in narrow)):
        for layers in ((0,), (1,), (0, 1)):
            sites = {"heads": {}, "neurons": {}, "layers": {"l": (layers, LAYERS)}}
            for (kind, path), width in zip(narrow, chosen, strict=True):
                sites[kind][path] = best(kind, path, width)
            yield hfslim.Structure.of(sites)


@pytest.mark.parametrize("kept", [0.2, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_best_of_all_structures(seed, kept):
    units, table = _units(), _table()
    scores = _scores(units, seed)
    found = best_structure(units, scores, Target("latency", kept), table)
    fits = [
        _lost(units, s, scores)
        for s in _every_structure(units, scores)
        if table.of(units, s) <= kept * table.total
    ]
    assert table.of(units, found) <= kept * table.total
    assert _lost(units, found, scores) == pytest.approx(min(fits), abs=1e-12)


def test_neurons_are_kept_in_the_numbers_that_the_device_computes_without_waste():
    units = _units(layers=False)
    found = best_structure(units, _scores(units, 0), Target("latency", 0.6), _table(step=4))
    assert {len(e.kept) for e in found if e.kind == "neurons"} <= {0, 4, 8}


def test_the_least_reachable_is_told_and_can_be_reached():
    units, table = _units(), _table()
    scores = _scores(units, 0)
    with pytest.raises(UnreachableTargetError) as failure:
        best_structure(units, scores, Target("latency", 0.05), table)
    least = float(re.search(r"(0\.\d+) of the latency", str(failure.value))[1])
    found = best_structure(units, scores, Target("latency", least), table)
    assert table.of(units, found) == 7 + 5
    assert len(found.kept("layers", "l")) == 1


def test_within_never_brings_a_unit_back():
    units, table = _units(), _table()
    before = units.full()
    for step, kept in enumerate((0.8, 0.6, 0.5, 0.3)):
        found = best_structure(
            units, _scores(units, step), Target("latency", kept), table, within=before
        )
        assert found.within(before)
        assert table.of(units, found) <= kept * table.total
        before = found


def test_a_correction_scales_savings_and_leaves_the_whole():
    units, table = _units(), _table()
    cut = best_structure(units, _scores(units, 0), Target("latency", 0.5), table)
    corrected = table.corrected(0.5)
    assert corrected.of(units, units.full()) == pytest.approx(table.total)
    saved, corrected_saved = (t.total - t.of(units, cut) for t in (table, corrected))
    assert corrected_saved == pytest.approx(saved / 2)


# WavLM runs its projections as modules only when heads are missing; the clock would see a jump.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "wavlm"])
@pytest.mark.usefixtures("clock")
def test_a_measured_table_tells_what_every_cut_takes(family):
    model = tiny(family)
    length = 1200 if model.main_input_name == "input_values" else 12
    # Channels have no table: what one takes depends on the others.
    units = find_units(model).of(["heads", "neurons", "layers"])
    inputs = example_inputs(model, length=length)
    with Unchanged(model):
        table = latency_measurement.measure_table(model, units, inputs, progress=False)
    returns = attention_returns(model, units)
    with latency_measurement.Stopwatch(model, []) as watch, evaluating(model):
        watch.run(inputs)
        assert table.total == pytest.approx(1000 * watch.seconds[""])
        for seed in range(3):
            structure = units.complete(uneven(model, seed, kinds=("heads", "neurons", "layers")))
            with cut_for_now(model, units, structure, returns):
                watch.run(inputs)
            assert table.of(units, structure) == pytest.approx(1000 * watch.seconds[""], rel=1e-6)


def _batches(model):
    return [example_inputs(model, 4, length=8) | {"labels": torch.arange(4) % 3}]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("units", [("heads", "neurons"), ("heads", "neurons", "layers")])
def test_the_latency_asked_for_is_met(units):
    model, whole = tiny("bert"), tiny("bert")
    inputs = example_inputs(model, length=16)
    result = hfslim.prune(
        model, _batches(model), {"latency": 0.6}, units=units, inputs=inputs, progress=False
    )
    with (
        latency_measurement.Stopwatch(model, []) as small,
        latency_measurement.Stopwatch(whole, []) as large,
    ):
        small.run(inputs), large.run(inputs)
        ratio = small.seconds[""] / large.seconds[""]
    (only,) = result.tries
    assert only.measured == pytest.approx(ratio) == pytest.approx(only.predicted)
    assert ratio <= 0.6 * (1 + TOLERANCE)
    if "layers" not in units:
        assert ratio >= 0.6 * (1 - TOLERANCE)
    assert {len(e.kept) % 16 for e in result.structure if e.kind == "neurons"} == {0}


@pytest.mark.usefixtures("clock")
def test_a_wrong_table_is_corrected_by_what_was_measured(monkeypatch, caplog):
    real = latency_measurement.measure_table
    monkeypatch.setattr(
        latency_measurement, "measure_table", lambda *a, **k: real(*a, **k).corrected(0.8)
    )
    model = tiny("bert")
    with caplog.at_level("INFO", logger="hfslim.pruning.latency.latency_search"):
        result = hfslim.prune(model, _batches(model), {"latency": 0.6}, progress=False)
    first, *_, last = result.tries
    assert abs(first.measured - 0.6) > 0.06
    assert abs(last.measured - 0.6) < 0.02
    assert sum("latency, try" in message for message in caplog.messages) == len(result.tries)


def test_savings_that_are_not_proportional_are_met_by_the_third_try():
    savings = [(0.0, 0.0)]
    for _ in range(3):
        by_table = to_save(savings, 0.5)
        savings.append((by_table, 0.42 + 1.6 * (by_table - 0.5)))
    assert savings[-1][1] == pytest.approx(0.5)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("heads", "neurons"), [(0.5, 1.3), (1.6, 0.6)])
def test_a_table_that_is_wrong_by_kind_still_leads_to_the_latency(monkeypatch, heads, neurons):
    real = latency_measurement.measure_table

    def skewed(*args, **options):
        table, factor = real(*args, **options), {"heads": heads, "neurons": neurons}
        return replace(
            table,
            site={
                key: Curve(curve.widths, tuple(factor[key[0]] * ms for ms in curve.ms))
                for key, curve in table.site.items()
            },
        )

    monkeypatch.setattr(latency_measurement, "measure_table", skewed)
    model = tiny("bert", hidden_size=48, num_attention_heads=12, intermediate_size=192)
    tries = hfslim.prune(model, _batches(model), {"latency": 0.6}, progress=False).tries
    assert abs(tries[0].measured - 0.6) > 0.03
    assert abs(tries[-1].measured - 0.6) < 0.02


def _resnet():
    torch.manual_seed(0)
    config = zoo.tiny_config("resnet")
    config.embedding_size, config.hidden_sizes = 48, [64, 96]
    return ResNetForImageClassification(config).eval()


def _bert():
    return tiny("bert", hidden_size=96, num_attention_heads=12, intermediate_size=192)


@pytest.mark.parametrize(
    ("build", "units"),
    [
        (_resnet, ["channels"]),
        (_resnet, ["channels", "layers"]),
        (_bert, ["heads", "neurons", "dimensions"]),
    ],
)
def test_a_latency_is_met_without_a_table_where_units_share_their_costs(build, units, clock):
    clock.PER_CALL = 1e-3
    model, whole = build(), build()
    inputs = example_inputs(model, length=16)
    data = [example_inputs(model, 4, length=16) | {"labels": torch.arange(4) % 3}]
    result = hfslim.prune(model, data, {"latency": 0.8}, units, inputs=inputs, progress=False)
    with (
        latency_measurement.Stopwatch(model, []) as small,
        latency_measurement.Stopwatch(whole, []) as large,
    ):
        small.run(inputs), large.run(inputs)
        ratio = small.seconds[""] / large.seconds[""]
    # What a call takes whatever its width is what makes latency differ from what is counted.
    assert len(result.tries) > 1
    assert ratio in [pytest.approx(done.measured) for done in result.tries]
    assert ratio == pytest.approx(0.8, rel=0.06)
    kept = [e for e in result.structure if e.kind in ("neurons", "channels", "dimensions")]
    assert any(len(e.kept) < e.total for e in kept)
    assert {len(e.kept) % 16 for e in kept if len(e.kept) < e.total} == {0}


def test_what_is_counted_may_have_to_fall_to_the_least_that_can_be_reached(clock):
    """Where calls take most of the time, the first guess asks for more than there is."""
    clock.PER_CALL = 1e-2
    model = _resnet()
    data = [example_inputs(model, 4) | {"labels": torch.arange(4) % 3}]
    with pytest.raises(UnreachableTargetError) as failure:
        hfslim.prune(model, data, {"latency": 0.01}, ["channels"], progress=False)
    least = failure.value.least
    assert 0.3 < least < 0.9
    result = hfslim.prune(model, data, {"latency": least}, ["channels"], progress=False)
    assert len(result.tries) > 1
    assert result.tries[-1].measured == pytest.approx(least, rel=TOLERANCE)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("build", "units"), [(lambda: tiny("bert"), ["heads", "neurons"]), (_resnet, ["channels"])]
)
def test_a_latency_that_cannot_be_reached_is_refused_before_scoring(build, units):
    model = build()

    def data():
        raise AssertionError("the data was touched")
        yield

    with Unchanged(model), pytest.raises(UnreachableTargetError, match="of the latency is left"):
        hfslim.prune(model, data(), {"latency": 0.01}, units, progress=False)


@pytest.mark.usefixtures("clock")
def test_a_table_is_measured_once_for_its_conditions(tmp_path, caplog):
    model = tiny("bert")
    units, inputs = find_units(model), example_inputs(model, length=12)
    first = latency_measurement.latency_table(model, units, inputs, progress=False)
    (file,) = (tmp_path / "latency").iterdir()
    assert json.loads(file.read_text())["conditions"]["threads"] == torch.get_num_threads()
    caplog.clear()
    with caplog.at_level("INFO"):
        again = latency_measurement.latency_table(
            tiny("bert", seed=1), units, inputs, progress=False
        )
    assert again == first
    assert not any("timing" in message for message in caplog.messages)
    latency_measurement.latency_table(
        model, units, example_inputs(model, 2, length=12), progress=False
    )
    latency_measurement.latency_table(model, units.of(["heads"]), inputs, progress=False)
    assert len(list((tmp_path / "latency").iterdir())) == 3


@pytest.mark.usefixtures("clock")
def test_a_damaged_table_is_measured_anew(tmp_path, caplog):
    model = tiny("bert")
    units, inputs = find_units(model), example_inputs(model, length=12)
    first = latency_measurement.latency_table(model, units, inputs, progress=False)
    (file,) = (tmp_path / "latency").iterdir()
    file.write_text('{"conditions": ')
    again = latency_measurement.latency_table(model, units, inputs, progress=False)
    assert "is damaged" in caplog.text
    assert again == LatencyTable.from_dict(json.loads(file.read_text())["table"])
    assert again.total == pytest.approx(first.total)


def test_a_module_that_does_not_run_cannot_be_timed():
    model = tiny("bert")
    model.idle = torch.nn.Identity()
    inputs = example_inputs(model, length=4)
    with latency_measurement.Stopwatch(model, ["idle"]) as watch:
        with pytest.raises(RuntimeError, match=r"does not run \['idle'\] as modules"):
            watch.run(inputs)
