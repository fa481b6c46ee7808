"""The names of the projections around neurons, over all model families."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FeedForward:
    """Names of the modules around the neurons.

    Attributes:
        inputs: The projections whose outputs are the neurons.
        output: The projection whose input they are.
        blocks: Blocks of the rows of a fused input projection.
        between: A depthwise convolution in the middle, which needs one neuron or more.
        norm: A batch norm in the middle.
        across: A norm across all neurons in the middle, so that none can go.
    """

    inputs: tuple[str, ...]
    output: str
    blocks: int = 1
    between: str = ""
    norm: str = ""
    across: str = ""


FEED_FORWARDS = [
    FeedForward(("gate_proj", "up_proj"), "down_proj"),
    FeedForward(("up_proj",), "down_proj"),
    FeedForward(("gate_up_proj",), "down_proj", blocks=2),
    FeedForward(("intermediate.dense",), "output.dense"),
    FeedForward(("layout_intermediate.dense",), "layout_output.dense"),
    FeedForward(("intermediate.conv1d",), "output.conv1d"),
    FeedForward(("intermediate_dense",), "output_dense"),
    FeedForward(("dense.dense",), "output.dense"),
    FeedForward(("fc1",), "fc2", between="dwconv.dwconv"),
    FeedForward(("fc1",), "fc2"),
    FeedForward(("fc11", "fc12"), "fc2"),
    FeedForward(("fc_in",), "fc_out"),
    FeedForward(("c_fc",), "c_proj"),
    FeedForward(("lin1",), "lin2"),
    FeedForward(("linear_1",), "linear_2"),
    FeedForward(("linear_up.linear",), "linear_down.linear", norm="linear_up.batch_norm"),
    FeedForward(("linear_fc1",), "linear_fc2"),
    FeedForward(("layer_1",), "layer_2"),
    FeedForward(("pwconv1",), "pwconv2", across="grn"),
    FeedForward(("dense1",), "dense2", between="dwconv.dwconv"),
    FeedForward(("dense1",), "dense2"),
    FeedForward(("dense_h_to_4h",), "dense_4h_to_h"),
    FeedForward(("wi_0", "wi_1"), "wo"),
    FeedForward(("wi",), "wo"),
    FeedForward(("ffn",), "ffn_output"),
    FeedForward(("ffn.0",), "ffn.2"),
    FeedForward(("Wi",), "Wo", blocks=2),
    FeedForward(("weights_in",), "weights_out", blocks=2),
    FeedForward(("w1", "w3"), "w2"),
    FeedForward(("w1", "w2"), "w3"),
]

REFUSED_NEURONS = {"Zamba2MLP": "adapters, other ones in every layer, add to them"}
"""Modules whose neurons cannot go, with the reason."""

NEURON_COUNTS = ("intermediate_size", "intermediate_dim")
"""Attributes of the feed-forward module that count its neurons."""
