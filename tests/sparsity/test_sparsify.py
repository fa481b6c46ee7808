"""Single weights go in one call: which ones, what mends them, and that they stay gone."""

import copy

import pytest
import torch
from models import tiny
from structures import Unchanged
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainingArguments

import hfslim
from hfslim import SlimTrainer, WeightPruningCallback, sparsify
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.weights import find_weights, most_kept
from hfslim.pruning import UnusableScoresError
from hfslim.sparsity.sparsegpt import sparsegpt
from hfslim.sparsity.weight_masks import SparsityGoal, remove
from hfslim.sparsity.weight_moments import (
    by_group,
    from_matrices,
    gather_inputs,
    inputs_of,
    matrices,
)

HALF, PATTERN = SparsityGoal(0.5), SparsityGoal.parse(None, "2:4")
DEAD = ("layer.2.attention.self.query", "layer.2.attention.output", "layer.2.intermediate")
DEAD = (*DEAD, "layer.2.output", "pooler")
"""Where the tiny BERT computes what only its first position needs."""


def gpt2():
    fields = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "vocab_size": 64}
    config = AutoConfig.for_model("gpt2", n_positions=40, num_labels=3, pad_token_id=0, **fields)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def _batches(model, examples=16, batch=4, seed=0):
    length = 1600 if model.main_input_name == "input_values" else 8
    whole = example_inputs(model, examples, seed, length)
    return [{k: v[i : i + batch] for k, v in whole.items()} for i in range(0, examples, batch)]


def _padded(batch, by=5):
    short = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    return {k: nn.functional.pad(v, (0, by)) for k, v in short.items()}


def _correlated(rows, columns, seed=0):
    """A weight, and second moments of inputs of unlike sizes, which few causes move."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    examples, causes = 20 * columns, columns // 3
    x = draw(examples, causes) @ draw(causes, columns) / causes**0.5
    x = (x + 0.3 * draw(examples, columns)) * draw(columns).exp()
    return draw(rows, columns), x.T @ x / len(x)


def _by_the_book(weight, second, goal, channels, block=128):
    """SparseGPT without its tricks: an explicit inverse for each column, row by row."""
    weight, zeros = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    rows, columns = weight.shape
    inverses = [torch.linalg.inv(second[j:, j:]) for j in range(columns)]
    costs = torch.stack([inverse[0, 0] for inverse in inverses])
    for j in range(columns):
        if goal.pattern is None and j % block == 0:
            end = min(j + block, columns)
            price = (weight[:, j:end].square() / costs[j:end]).flatten()
            count = round(goal.sparsity * rows * end) - round(goal.sparsity * rows * j)
            order = sorted(range(len(price)), key=lambda i: price[i])
            for i in order[:count]:
                zeros[i // (end - j), j + i % (end - j)] = True
        if goal.pattern is not None and j % channels % goal.pattern.m == 0:
            end = min(j + goal.pattern.m, j - j % channels + channels)
            for row in range(rows):
                price = weight[row, j:end].square() / costs[j:end]
                order = sorted(range(end - j), key=lambda i: price[i])
                for i in order[: max(end - j - goal.pattern.n, 0)]:
                    zeros[row, j + i] = True
        for row in range(rows):
            if zeros[row, j]:
                weight[row, j:] -= weight[row, j] / costs[j] * inverses[j][0].clone()
    return weight.masked_fill(zeros, 0), zeros


def _error(change, second):
    return torch.trace(change @ second @ change.T).item()


@pytest.mark.parametrize("columns", [24, 150])
@pytest.mark.parametrize(
    "goal", [HALF, SparsityGoal(0.3), PATTERN, SparsityGoal.parse(None, "1:3")]
)
def test_sparsegpt_equals_obs_column_by_column(columns, goal):
    weight, second = _correlated(5, columns)
    none = torch.zeros_like(weight, dtype=torch.bool)
    expected, zeros = _by_the_book(weight, second, goal, columns)
    new, found = sparsegpt(weight, second, none, goal, columns)
    assert torch.equal(found, zeros)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)
    assert not new[found].any()
    if goal.pattern is None:
        assert found.sum() == round(goal.sparsity * weight.numel())


def test_the_groups_of_a_pattern_begin_anew_at_each_position_of_a_kernel():
    weight, second = _correlated(5, 30)
    none = torch.zeros_like(weight, dtype=torch.bool)
    expected, zeros = _by_the_book(weight, second, PATTERN, 10)
    new, found = sparsegpt(weight, second, none, PATTERN, 10)
    assert torch.equal(found, zeros)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)
    conv = nn.Conv1d(10, 5, 3)
    assert most_kept(from_matrices(conv, found[None]), 4) == 2


def test_what_is_left_never_errs_more_than_exact_least_squares_allows():
    """Columns left of one that goes cannot make up for it, so OBS is near, not at, the best."""
    weight, second = _correlated(6, 48)
    new, zeros = sparsegpt(weight, second, weight == float("inf"), HALF, 48)
    best = torch.zeros_like(weight)
    for row, kept in enumerate(~zeros):
        target = (weight[row] @ second)[kept]
        best[row, kept] = torch.linalg.solve(second[kept][:, kept], target)
    least, found = _error(weight - best, second), _error(weight - new, second)
    assert least <= found <= 4 * least


@pytest.mark.parametrize("goal", [HALF, PATTERN])
@pytest.mark.parametrize("seed", range(3))
def test_the_more_a_method_knows_the_less_it_errs(goal, seed):
    weight, second = _correlated(32, 64, seed)
    none = torch.zeros_like(weight, dtype=torch.bool)
    scores = {"magnitude": weight.abs(), "wanda": weight.abs() * second.diagonal().sqrt()}
    errors = [_error(weight - sparsegpt(weight, second, none, goal, 64)[0], second)]
    for name in ("wanda", "magnitude"):
        gone = remove({"": scores[name]}, {"": none}, goal, "row")[""]
        errors.append(_error(weight.masked_fill(~gone, 0), second))
    assert 1.2 * errors[0] < errors[1] < errors[2] / 1.2


@pytest.mark.parametrize("goal", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_wanda_keeps_the_largest_weight_times_norm_of_each_row(goal):
    model = tiny("bert")
    data = [_padded(batch) for batch in _batches(model)]
    squares = dict.fromkeys(find_weights(model), 0.0)

    def note(path):
        def hook(module, args, output):
            x = args[0].reshape(4, -1, args[0].shape[-1])
            only = path.endswith(DEAD) or any(f".{dead}." in path for dead in DEAD)
            x = x[:, :1] if only else x[:, :8]
            squares[path] += x.double().square().sum((0, 1))

        return hook

    watched = copy.deepcopy(model)
    for path, module in find_weights(watched).items():
        module.register_forward_hook(note(path))
    with torch.no_grad():
        for batch in data:
            watched(**batch)
    before = copy.deepcopy(model)
    sparsify(model, data, **goal, method="wanda", progress=False)
    for path, module in find_weights(model).items():
        old = before.get_submodule(path).weight
        score = old.double().abs() * squares[path].sqrt()
        gone = torch.zeros_like(score, dtype=torch.bool)
        width = 4 if "pattern" in goal else score.shape[1]
        for row in range(len(score)):
            for start in range(0, score.shape[1], width):
                order = sorted(range(start, start + width), key=lambda i: score[row, i])
                gone[row, order[: width // 2]] = True
        assert torch.equal(module.weight, old.masked_fill(gone, 0)), path


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    model = tiny("bert")
    weights, data = find_weights(model), _batches(model)
    for weighed in (True, False):
        whole, *parts = (
            gather_inputs(model, weights, part, weighed, progress=False)
            for part in (data, data[:1], data[1:])
        )
        for path, (total,) in whole.items():
            for name, value in vars(total).items():
                added = sum(getattr(part[path][0], name) for part in parts)
                torch.testing.assert_close(added, value, rtol=1e-6, atol=1e-6 * value.abs().max())


@pytest.mark.parametrize("weighed", [True, False])
def test_padding_counts_nothing(weighed):
    model = tiny("bert")
    weights, data = find_weights(model), _batches(model, 4)
    one, other = (
        gather_inputs(model, weights, batches, weighed, progress=False)
        for batches in (data, [_padded(batch) for batch in data])
    )
    for path, (total,) in one.items():
        for name, value in vars(total).items():
            close = {"rtol": 1e-4, "atol": 1e-5 * value.abs().max()}
            torch.testing.assert_close(getattr(other[path][0], name), value, **close)
    if not weighed:
        assert one["bert.encoder.layer.0.attention.self.query"][0].weight == 4 * 8
        assert one["bert.pooler.dense"][0].weight == 4


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(6, 4, 5, stride=3, bias=False), (3, 6, 40)),
        (nn.Conv1d(8, 4, 4, padding="same", groups=2, bias=False), (2, 8, 9)),
        (nn.Conv2d(6, 8, 3, 2, 1, dilation=2, groups=2, bias=False), (3, 6, 15, 13)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect", bias=False), (2, 4, 5, 6)),
        (nn.Conv3d(2, 4, (1, 2, 3), bias=False), (2, 2, 4, 5, 6)),
        (nn.Linear(6, 4, bias=False), (2, 5, 6)),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, nn.Module) else "",
)
def test_a_convolution_is_the_matrix_that_it_is_laid_out_as(module, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    laid_out = inputs_of(module, x) @ matrices(module, module.weight).mT
    squares = by_group(module, module(x).square())
    torch.testing.assert_close(laid_out.square().sum(-1), squares, rtol=1e-4, atol=1e-5)
    assert torch.equal(from_matrices(module, matrices(module, module.weight)), module.weight)


FAMILIES = ("bert", "vit", "wav2vec2", "wavlm", "whisper", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_is_exact_after_a_reload_and_obs_errs_least(tmp_path, family):
    model = gpt2() if family == "gpt2" else tiny(family)
    data, errors = _batches(model), {}
    for method in ("wanda", "sparsegpt"):
        small = copy.deepcopy(model)
        result = sparsify(small, data, pattern="2:4", method=method, progress=False)
        assert result.model is small
        # The first convolution of speech models has one input.
        short = ("convolution", "all") if family in ("wav2vec2", "wavlm") else ()
        note = " but for incomplete groups"
        for row in result.sparsity:
            assert row.pattern == "2:4" + (note if row.kind in short else "")
        assert result.errors.keys() == find_weights(model).keys()
        errors[method] = sum(result.errors.values())
    assert errors["sparsegpt"] < 0.6 * errors["wanda"]
    small.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert hfslim.weight_sparsity(reloaded) == result.sparsity
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**data[0]).logits, small(**data[0]).logits)


def test_errors_are_those_of_the_outputs():
    model = tiny("bert")
    data = _batches(model)
    small = copy.deepcopy(model)
    found = sparsify(small, data, 0.5, method="wanda", progress=False).errors
    path = "bert.encoder.layer.0.attention.self.value"
    seen = []
    model.get_submodule(path).register_forward_hook(
        lambda _, args, out: seen.append((args[0], out))
    )
    with torch.no_grad():
        for batch in data:
            model(**batch)
    x, y = (torch.cat([one[i] for one in seen]).flatten(0, 1) for i in (0, 1))
    change = small.get_submodule(path)(x) - y
    expected = change.square().sum() / (y - y.mean(0)).square().sum()
    assert found[path] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_a_fraction_is_exact_and_counts_the_zeros_that_there_are(method):
    model = tiny("bert")
    data = _batches(model)
    sparsify(model, sparsity=0.25, scope="layer", method="magnitude")
    first = {path: module.weight == 0 for path, module in find_weights(model).items()}
    result = sparsify(model, data, 0.5, method=method, progress=False)
    assert result.sparsity[-1].sparsity == pytest.approx(0.5, abs=1e-4)
    for path, module in find_weights(model).items():
        assert (module.weight == 0)[first[path]].all()
        assert not (module.weight == 0).all()
    with pytest.raises(ValueError, match=r"50\.00% of the weights are zero already, more than the"):
        sparsify(model, data, 0.4, method=method)


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_magnitude_removes_the_smallest_of_its_scope(scope):
    model = tiny("bert")
    before = {path: module.weight.abs() for path, module in find_weights(model).items()}
    sparsify(model, sparsity=0.5, method="magnitude", scope=scope)
    expected = remove(before, {p: w < 0 for p, w in before.items()}, HALF, scope)
    for path, module in find_weights(model).items():
        assert torch.equal(module.weight == 0, expected[path])


def test_a_half_precision_model_keeps_its_type_and_pattern():
    model = tiny("bert").to(torch.bfloat16)
    result = sparsify(model, _batches(model), pattern="2:4", progress=False)
    assert result.sparsity[-1].pattern == "2:4"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_later_training_holds_the_zeros_and_can_add_more(tmp_path, family):
    model = gpt2() if family == "gpt2" else tiny(family)
    rows = sparsify(model, _batches(model), pattern="2:4", progress=False).sparsity
    zeros = {path: module.weight == 0 for path, module in find_weights(model).items()}
    data = [{k: v[0] for k, v in b.items()} | {"labels": 1} for b in _batches(model, 16, 1)]
    arguments = {"max_steps": 3, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    arguments |= {"learning_rate": 1e-2, "weight_decay": 0.1}

    def train(callback):
        SlimTrainer(
            model=model,
            args=TrainingArguments(str(tmp_path), **arguments),
            train_dataset=data,
            callbacks=[callback],
        ).train()

    train(WeightPruningCallback())
    assert hfslim.weight_sparsity(model) == rows
    for path, module in find_weights(model).items():
        assert torch.equal(module.weight == 0, zeros[path])
    train(WeightPruningCallback(pattern="1:4"))
    assert {row.pattern for row in hfslim.weight_sparsity(model)} == {"1:4"}


def test_nothing_but_the_named_modules_changes():
    model = tiny("bert")
    before = copy.deepcopy(model)
    sparsify(model, _batches(model), 0.5, target_modules=["query"], progress=False)
    for name, value in before.named_parameters():
        assert torch.equal(model.get_parameter(name), value) == (".query." not in name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either sparsity"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give either sparsity"),
        ({"sparsity": 50}, r"in \(0, 1\)"),
        ({"sparsity": 0.5, "method": "movement"}, "method must be one of"),
        ({"sparsity": 0.5, "scope": "global"}, r"scope of sparsegpt must be one of \['layer'\]"),
        ({"sparsity": 0.5, "method": "wanda", "scope": "global"}, r"wanda must be one of \['row'"),
        ({"sparsity": 0.5, "data": None}, "give data, batches of model inputs, or use"),
        ({"sparsity": 0.5, "data": []}, "the calibration data is empty"),
        ({"sparsity": 0.5, "data": ["a text"]}, "data gives str where a batch is expected"),
        ({"sparsity": 0.5, "max_examples": 0}, "max_examples must be at least 1"),
        ({"sparsity": 0.5, "target_modules": ["querry"]}, "'querry'"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_changes_nothing(arguments, message):
    model = tiny("bert")
    given = {"data": _batches(model), "progress": False} | arguments
    with Unchanged(model), pytest.raises(ValueError, match=message):
        sparsify(model, **given)


def test_what_is_not_finite_is_named():
    model = tiny("bert")
    model.bert.encoder.layer[1].intermediate.dense.bias.data[0] = float("inf")
    with (
        Unchanged(model),
        pytest.raises(UnusableScoresError, match=r"1\.intermediate\.dense' is not"),
    ):
        sparsify(model, _batches(model), 0.5, progress=False)
    model = tiny("bert")
    model.bert.pooler.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(UnusableScoresError, match=r"the weight of 'bert\.pooler\.dense' is not"):
        sparsify(model, _batches(model), 0.5, progress=False)


def test_a_module_on_which_nothing_depends_is_named():
    model = tiny("bert")
    model.bert.spare = nn.Linear(32, 32)
    with Unchanged(model), pytest.raises(ValueError, match=r"no decision depends on 'bert\.spare'"):
        sparsify(model, _batches(model), 0.5, progress=False)
    sparsify(model, _batches(model), 0.5, exclude_modules=["spare"], progress=False)


def test_a_wrapper_is_refused():
    model = tiny("bert")
    with pytest.raises(TypeError, match="DataParallel is a wrapper: pass the model inside"):
        sparsify(nn.DataParallel(model), _batches(model), 0.5)
