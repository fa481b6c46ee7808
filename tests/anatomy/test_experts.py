"""Mixtures of experts: whole experts, and the neurons inside them."""

import pytest
import sweep
import torch
import zoo
from structures import Unchanged, uneven
from transformers import Trainer, TrainingArguments

import hfslim
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.measuring.measurement import count_parameters, macs
from hfslim.pruning.gates.gates import Gates
from hfslim.pruning.search.unit_costs import count

EXPERTS, NEURONS = "model.layers.1.mlp", "model.layers.1.mlp.experts"


def _inputs(model, examples=3):
    inputs = example_inputs(model, examples, seed=3, length=12)
    inputs["attention_mask"][0, -4:] = 0
    return inputs


def _keeping(**kept):
    return hfslim.Structure.of({kind: {path: (k, n)} for kind, (path, k, n) in kept.items()})


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        ("mixtral", True),
        # Its tensors are transposed, its gates and ups take turns, and both have biases.
        ("gpt_oss", True),
        # One expert is shared, and of another size.
        ("qwen2_moe", False),
        # Sigmoids, with a bias for the choice that is a buffer; first layers without experts.
        ("deepseek_v3", False),
        # Its router keeps its weights in a module of its own.
        ("hunyuan_v1_moe", False),
        # Two experts, one after the other, each by a softmax of its own.
        ("phimoe", True),
    ],
)
def test_gated_equals_shrunk_equals_reloaded(kind, plain, tmp_path):
    kinds = ("neurons", "experts")
    difference, told = sweep.prove(f"text/{kind}", "eager", kinds, tmp_path)
    assert difference < 1e-5
    assert told == plain


@torch.no_grad()
def test_a_router_chooses_among_open_experts_as_if_there_were_no_others():
    model = zoo.tiny("text/mixtral")
    router = model.get_submodule(f"{EXPERTS}.gate")
    hidden = torch.randn(5, zoo.HIDDEN, generator=torch.Generator().manual_seed(0))
    keys = list(model.state_dict())
    with Unchanged(model), hfslim.gated(model, _keeping(experts=(EXPERTS, (0, 2, 3), 4))):
        assert list(model.state_dict()) == keys
        _, weights, chosen = router(hidden)
    logits = hidden @ router.weight[[0, 2, 3]].T
    best = logits.softmax(-1).topk(2)
    torch.testing.assert_close(weights, best.values / best.values.sum(-1, keepdim=True))
    assert torch.equal(chosen, torch.tensor([0, 2, 3])[best.indices])


@torch.no_grad()
def test_where_fewer_experts_are_left_a_token_goes_to_all_of_them():
    model = zoo.tiny("text/mixtral")
    inputs = _inputs(model)
    structure = _keeping(experts=(EXPERTS, (2,), 4))
    with hfslim.gated(model, structure):
        expected = model(**inputs).logits
    hfslim.shrink(model, structure)
    assert (model(**inputs).logits - expected).abs().max() < 1e-5
    block = model.get_submodule(EXPERTS)
    assert (block.gate.top_k, block.top_k, block.gate.num_experts) == (1, 1, 1)
    assert block.experts.down_proj.shape[0] == 1


def test_the_last_expert_of_a_layer_stays():
    model = zoo.tiny("text/mixtral")
    with Unchanged(model), pytest.raises(ValueError, match="at least one of the experts"):
        hfslim.shrink(model, _keeping(experts=(EXPERTS, (), 4)))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_gradients_of_gates_are_those_of_the_weights_that_they_multiply(kind):
    model = zoo.tiny(f"text/{kind}")
    inputs = _inputs(model, examples=1)
    found = {}
    with Gates(model) as gates:
        gates.on_gradient = lambda site, _, gradient: found.update(
            {(site.kind, site.path): gradient}
        )
        model(**inputs).logits.sum().backward()
        gates.check_fired()
    experts = model.get_submodule(NEURONS)
    product = experts.down_proj * experts.down_proj.grad
    by_expert = product.flatten(1).sum(1)
    by_neuron = product.sum((0, 1 if product.shape[1] == zoo.HIDDEN else 2))
    if kind == "gpt_oss":
        by_expert = by_expert + (experts.down_proj_bias * experts.down_proj_bias.grad).sum(1)
        by_neuron = product.sum((0, 2))
    torch.testing.assert_close(found["experts", EXPERTS][0], by_expert, atol=1e-5, rtol=1e-4)
    by_unit = by_neuron.view(-1, 8).sum(1)
    torch.testing.assert_close(found["neurons", NEURONS][0], by_unit, atol=1e-5, rtol=1e-4)


def test_gates_do_the_same_where_a_backward_pass_runs_layers_again():
    def gradients(checkpointing):
        model = zoo.tiny("text/mixtral").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        found = {}
        with Gates(model) as gates:
            gates.set(_keeping(experts=(EXPERTS, (0, 2), 4), neurons=(NEURONS, (0, 1, 3), 6)))
            gates.on_gradient = lambda site, index, gradient: found.update(
                {(site.kind, site.path, index): gradient}
            )
            model(**_inputs(model)).logits.sum().backward()
        return found | {name: p.grad for name, p in model.named_parameters()}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_kernels_of_half_precision_take_what_is_left(kind):
    model = zoo.tiny(f"text/{kind}").bfloat16()
    structure = uneven(model, kinds=("neurons", "experts"))
    inputs = _inputs(model)
    with hfslim.gated(model, structure):
        expected = model(**inputs).logits
    found = hfslim.shrink(model, structure)(**inputs).logits
    assert (found - expected).abs().max() < 0.05 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("seed", [0, 1])
def test_costs_are_those_of_the_cut_model(kind, seed):
    model = zoo.tiny(f"text/{kind}")
    inputs, units = _inputs(model), find_units(model)
    structure = uneven(model, seed)
    told = [count(model, units, r, inputs).of(units, structure) for r in ("parameters", "macs")]
    hfslim.shrink(model, structure)
    assert told[0] == count_parameters(model)
    assert told[1] == pytest.approx(macs(model, inputs), rel=1e-3)


def test_experts_cost_parameters_but_save_no_work_while_a_token_goes_to_as_many():
    model = zoo.tiny("text/mixtral")
    inputs, units = _inputs(model), find_units(model)
    positions = inputs["input_ids"].numel()
    costs = {r: count(model, units, r, inputs) for r in ("parameters", "macs")}
    two, one = (_keeping(experts=(EXPERTS, kept, 4)) for kept in ((0, 1), (0,)))
    expert = 3 * zoo.HIDDEN * zoo.NEURONS
    saved = {
        (name, n): costs[name].total - costs[name].of(units, units.complete(structure))
        for name in costs
        for n, structure in ((2, two), (1, one))
    }
    assert saved == {
        ("parameters", 2): 2 * (expert + zoo.HIDDEN),
        ("parameters", 1): 3 * (expert + zoo.HIDDEN),
        ("macs", 2): 2 * positions * zoo.HIDDEN,
        ("macs", 1): 3 * positions * zoo.HIDDEN + positions * expert,
    }


def test_experts_go_for_parameters():
    model = zoo.tiny("text/qwen2_moe")
    batches = [_inputs(model) | {"labels": torch.tensor([0, 1, 2])}]
    before = count_parameters(model)
    result = hfslim.prune(
        model, batches, target={"parameters": 0.8}, units=["experts"], progress=False
    )
    kept, total = result.structure.counts()["experts"]
    assert kept < total
    assert count_parameters(model) <= 0.8 * before


def test_experts_go_while_a_trainer_trains(tmp_path):
    model = zoo.tiny("text/mixtral")
    before = count_parameters(model)
    ids = torch.randint(3, zoo.VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row[0] % 3} for row in ids]
    callback = hfslim.PruningCallback(target={"parameters": 0.7}, units=["experts"])
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=3,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    kept, total = callback.structure.counts()["experts"]
    assert kept < total
    assert count_parameters(model) <= 0.7 * before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": ["experts"], "target": {"latency": 0.5}}, "of the latency is left"),
        ({"units": ["experts"], "target": {"macs": 0.5}}, "cannot be reached"),
        ({"criterion": "obs", "target": {"sparsity": 0.5}}, "use criterion='fisher'"),
        ({"criterion": "kl_fisher", "target": {"sparsity": 0.5}}, "such as fisher"),
        ({"units": ["experts"], "uniform": True, "target": {"sparsity": 0.5}}, "leave experts out"),
    ],
)
def test_what_experts_cannot_do_is_refused(arguments, message):
    model = zoo.tiny("text/mixtral")
    batches = [_inputs(model) | {"labels": torch.tensor([0, 1, 2])}]
    with Unchanged(model), pytest.raises(ValueError, match=message):
        hfslim.prune(model, batches, progress=False, **arguments)


def test_experts_that_are_chosen_by_groups_are_refused():
    config = zoo.tiny_config("deepseek_v3")
    config.n_group, config.topk_group = 2, 1
    model = type(zoo.tiny("text/deepseek_v3"))(config)
    reasons = {r.reason for r in find_units(model).refusals if r.kind == "experts"}
    assert reasons == {"its router chooses groups of experts first"}


def test_units_that_are_fixed_stay_whatever_their_scores():
    model = zoo.tiny("text/phimoe")
    batches = [_inputs(model) | {"labels": torch.tensor([0, 1, 2])}]
    result = hfslim.prune(
        model,
        batches,
        target={"sparsity": 0.5},
        units=["experts"],
        criterion="random",
        progress=False,
    )
    assert {entry.kept for entry in result.structure} == {(0, 1)}
