"""The names that model families give to the same parts, and the families that are exceptions.

Discovery goes by these names and by shapes; to teach it a family, add a name here.
"""

from __future__ import annotations

from dataclasses import dataclass

QUERY = ("query", "q_proj", "q_lin", "query_proj", "q")
KEY = ("key", "k_proj", "k_lin", "key_proj", "k")
VALUE = ("value", "v_proj", "v_lin", "value_proj", "v")
FUSED_QKV = ("Wqkv",)
"""Projections with the rows `[q; k; v]`, each in the order of the heads."""

ATTENTION_OUTPUT = ("o_proj", "out_proj", "out_lin", "o", "Wo", "^output.dense")
"""Paths from the attention module; `^` starts at its parent."""

HEAD_DIM = ("head_dim", "attention_head_size")
QUERY_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
KEY_HEAD_COUNTS = ("num_key_value_heads",)
ALL_HEADS_SIZE = ("all_head_size",)

PER_HEAD_ROWS = ("pos_key_proj", "pos_query_proj")
"""Further projections with the rows of the query's (DeBERTa-v2's positions)."""

PER_HEAD_TENSORS = (("relative_position_bias", "relative_position_bias_table", 1),)
"""Further tensors with a head axis: module below the attention, tensor, dimension (Swin)."""

ACROSS_HEADS = ("q_norm", "k_norm")
"""Norms that, where they span all heads, make the removal of one head inexact (OLMo2)."""


@dataclass(frozen=True)
class FeedForward:
    """Names of the projections around the neurons, and the blocks of a fused input projection."""

    inputs: tuple[str, ...]
    output: str
    blocks: int = 1


FEED_FORWARDS = (
    FeedForward(("gate_proj", "up_proj"), "down_proj"),
    FeedForward(("gate_up_proj",), "down_proj", blocks=2),
    FeedForward(("intermediate.dense",), "output.dense"),
    FeedForward(("intermediate_dense",), "output_dense"),
    FeedForward(("fc1",), "fc2"),
    FeedForward(("lin1",), "lin2"),
    FeedForward(("Wi",), "Wo", blocks=2),
    FeedForward(("weights_in",), "weights_out", blocks=2),
)

REPLACEMENTS = {
    "WavLMAttention": "WavLMHeads",
    "MPNetSelfAttention": "BiasedHeads",
    "BeitAttention": "BiasedHeads",
}
"""Attention classes that get a full-head bias from outside, or hide their projections from hooks,
with the class of `hfslim.hub.modeling_hfslim` that stands in for them."""

AFTER_FIRST_LAYER = {"DebertaV2Encoder": "conv"}
"""Modules that run right after the first of their parent's layers, which therefore has to stay."""

DEPTH_FIELDS = ("num_hidden_layers", "encoder_layers", "n_layers", "depths")
"""Config fields that set the number of layers, or list it stage by stage."""

LAYER_COUNTS = ("n_layers",)
"""Attributes of the module around a list of layers that hold its length."""

WIDTH_FIELDS = ("intermediate_size", "encoder_ffn_dim", "hidden_dim")
"""Config fields that set the number of neurons of every layer."""

PER_LAYER_FIELDS = ("layer_types",)
"""Config fields with one item a layer."""

FREE_HEAD_SIZE = (
    "audio-spectrogram-transformer",
    "beit",
    "deit",
    "dinov2",
    "llama",
    "qwen2",
    "qwen3",
    "vit",
)
"""Model types whose config has a head size that does not follow from the number of heads."""
