"""Counts agree with figures worked out by hand, and times say what they are times of."""

import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.utils.flop_counter import flop_registry
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hfslim.measuring.measurement import (
    compare,
    count_bytes,
    count_parameters,
    macs,
    macs_by_module,
    measure,
)
from hfslim.measuring.timing import latency

BATCH, TOKENS, WIDTH, NEURONS, LAYERS, LABELS = 2, 7, 32, 48, 2, 3
VOCABULARY, POSITIONS = 50, 16


def bert(attention: str = "sdpa") -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=NEURONS,
        max_position_embeddings=POSITIONS,
        num_labels=LABELS,
    )
    config._attn_implementation = attention
    return BertForSequenceClassification(config)


def text() -> dict[str, torch.Tensor]:
    ids = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Attention(nn.Module):
    def forward(self, query, key, value):
        return nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        time.sleep(self.seconds)
        return x


class Clock:
    """Stands in for the module `time`: time passes only while a Sleeper sleeps."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("hfslim.measuring.timing.time", clock)
    monkeypatch.setitem(globals(), "time", clock)


def test_a_linear_layer_costs_rows_times_in_times_out() -> None:
    assert macs(nn.Linear(5, 3), {"input": torch.zeros(4, 5)}) == 4 * 5 * 3


def test_a_grouped_convolution_costs_output_places_times_filter() -> None:
    convolution = nn.Conv1d(4, 6, kernel_size=3, groups=2)
    assert macs(convolution, {"input": torch.zeros(1, 4, 10)}) == 8 * 6 * (4 // 2) * 3


def test_attention_costs_its_two_products_for_each_query_head() -> None:
    module = nn.Sequential()
    module.add_module("attention", Attention())
    module.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    module.forward = lambda **tensors: module.attention(**tensors)
    inputs = {
        "query": torch.zeros(2, 6, 5, 8),
        "key": torch.zeros(2, 3, 7, 8),
        "value": torch.zeros(2, 3, 7, 8),
    }
    assert macs(module, inputs) == 2 * 6 * (5 * 7 * 8 + 5 * 7 * 8)


def test_torch_still_counts_no_attention_on_the_cpu() -> None:
    """Once this fails, the formula in `hfslim.measure` can go."""
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_costs_what_its_shapes_say(attention: str) -> None:
    projections = 4 * TOKENS * WIDTH * WIDTH
    products = 2 * TOKENS * TOKENS * WIDTH
    ffn = 2 * TOKENS * WIDTH * NEURONS
    head = WIDTH * WIDTH + WIDTH * LABELS
    expected = BATCH * (LAYERS * (projections + products + ffn) + head)
    assert macs(bert(attention), text()) == expected


def test_grouped_query_attention_costs_the_same_under_eager_and_sdpa() -> None:
    def llama(attention: str) -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=NEURONS,
            num_labels=LABELS,
            pad_token_id=0,
        )
        config._attn_implementation = attention
        return LlamaForSequenceClassification(config)

    projections = TOKENS * WIDTH * (2 * WIDTH + 2 * WIDTH // 2)
    ffn = 3 * TOKENS * WIDTH * NEURONS
    classifier = TOKENS * WIDTH * LABELS
    products = 2 * TOKENS * TOKENS * WIDTH
    expected = BATCH * (projections + ffn + classifier + products)
    assert macs(llama("eager"), text()) == expected
    assert macs(llama("sdpa"), text()) == expected


def test_each_module_holds_the_cost_of_what_is_inside_it() -> None:
    model = bert()
    costs = macs_by_module(model, text())
    layer = "bert.encoder.layer.0"
    assert costs[f"{layer}.intermediate"] == BATCH * TOKENS * WIDTH * NEURONS
    assert costs[f"{layer}.attention.self"] == BATCH * (
        3 * TOKENS * WIDTH * WIDTH + 2 * TOKENS * TOKENS * WIDTH
    )
    assert costs[layer] == costs["bert.encoder.layer.1"]
    assert costs["bert.embeddings"] == 0
    assert costs[""] == costs["bert"] + costs["classifier"]
    assert costs.keys() == dict(model.named_modules()).keys()


def test_a_shared_module_costs_once_for_each_use() -> None:
    shared = nn.Linear(4, 4)
    costs = macs_by_module(nn.Sequential(shared, nn.Tanh(), shared), {"input": torch.zeros(1, 4)})
    assert costs == {"": 32, "0": 32, "1": 0}


def test_measuring_leaves_each_module_in_its_mode_and_records_no_gradient() -> None:
    model = bert().train()
    model.bert.embeddings.eval()
    before = [module.training for module in model.modules()]
    measure(model, text(), calls=1, warmup=0)
    assert [module.training for module in model.modules()] == before
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_parameters_with_and_without_embeddings() -> None:
    table = (VOCABULARY + POSITIONS + 2) * WIDTH
    norm = 2 * WIDTH
    layer = 4 * (WIDTH + 1) * WIDTH + (WIDTH + 1) * NEURONS + (NEURONS + 1) * WIDTH + 2 * norm
    head = (WIDTH + 1) * WIDTH + (WIDTH + 1) * LABELS
    assert count_parameters(bert(), embeddings=False) == norm + LAYERS * layer + head
    assert count_parameters(bert()) == table + norm + LAYERS * layer + head


def test_patches_positions_and_special_tokens_of_vit_are_embeddings() -> None:
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    model = ViTForImageClassification(config)
    embeddings = (4 * 4 + 1) * 8 + 8 + (4 + 1) * 8
    assert count_parameters(model) - count_parameters(model, embeddings=False) == embeddings


def test_shared_parameters_count_once() -> None:
    shared = nn.Linear(4, 4)
    assert count_parameters(nn.Sequential(shared, shared)) == 20


def test_bytes_are_the_tensors_of_the_saved_file() -> None:
    model = nn.Sequential(nn.Linear(4, 4).half(), nn.BatchNorm1d(4))
    model.register_buffer("cache", torch.zeros(9), persistent=False)
    file = save(model.state_dict())
    header = 8 + int.from_bytes(file[:8], "little")
    assert count_bytes(model) == len(file) - header


def test_a_latency_states_its_conditions() -> None:
    result = latency(bert().bfloat16(), text(), calls=4, warmup=1)
    assert (result.batch_size, result.calls, result.dtype) == (BATCH, 4, "bfloat16")
    assert (result.threads, result.device) == (torch.get_num_threads(), "cpu")
    assert 0 < result.p50_ms <= result.p95_ms


@pytest.mark.usefixtures("still_clock")
def test_throughput_is_examples_over_time() -> None:
    result = latency(Sleeper(0.01), {"x": torch.zeros(5, 1)}, calls=4, warmup=0)
    assert result.throughput == pytest.approx(500)


def test_floating_point_inputs_follow_the_dtype_of_the_model() -> None:
    assert macs(nn.Linear(5, 3).bfloat16(), {"input": torch.zeros(1, 5)}) == 15


@pytest.mark.usefixtures("still_clock")
def test_comparing_gives_the_ratio_of_medians_inside_its_interval() -> None:
    result = compare(Sleeper(0.02), Sleeper(0.01), {"x": torch.zeros(1)}, calls=9, warmup=1)
    assert result.speedup == pytest.approx(2)
    assert result.low == pytest.approx(2)
    assert result.high == pytest.approx(2)
    assert result.speedup == pytest.approx(result.before.latency_ms / result.after.latency_ms)


def test_a_measurement_states_its_input_and_becomes_plain_values() -> None:
    result = measure(bert(), text(), calls=2, warmup=0)
    assert result.inputs == "input_ids [2, 7], attention_mask [2, 7]"
    assert result.latency_ms == result.latency.p50_ms
    assert result.to_dict()["latency"]["batch_size"] == BATCH


@pytest.mark.parametrize(
    ("inputs", "calls", "message"),
    [({"text": "hello"}, 1, "no tensor.*input_ids"), ({"x": torch.zeros(1)}, 0, "at least 1")],
)
def test_unusable_arguments_are_named(inputs: dict, calls: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latency(Sleeper(0), inputs, calls=calls)


@pytest.mark.gpu
def test_a_gpu_is_named_and_counts_as_the_cpu_does() -> None:
    model = bert()
    expected = macs(model, text())
    result = measure(model.cuda(), text(), calls=3, warmup=1)
    assert result.macs == expected
    assert result.latency.device == f"cuda:0 ({torch.cuda.get_device_name(0)})"
    assert 0 < result.latency.p50_ms <= result.latency.p95_ms


def test_importing_costs_no_transformers() -> None:
    code = "import hfslim.measuring, sys; print('transformers.modeling_utils' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
