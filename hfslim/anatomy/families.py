"""The names of attention parts over all model families, and the classes that are exceptions.

Discovery finds units by these names and by shapes. To add a family, add a name here, or an entry to
`ATTENTIONS`; `docs/add_a_family.md` shows how.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from hfslim.anatomy.feed_forwards import FEED_FORWARDS, FeedForward

QUERY = (
    *("query", "q_proj", "q_lin", "query_proj", "q", "Wq", "q_head", "linear_q", "q_b_proj"),
    "q_gate_proj",
)
KEY = ("key", "k_proj", "k_lin", "key_proj", "k", "Wk", "k_head", "linear_k", "kv_b_proj")
VALUE = ("value", "v_proj", "v_lin", "value_proj", "v", "Wv", "v_head", "linear_v", "kv_b_proj")

_Row = TypeVar("_Row")
Layout = Literal["blocks", "heads"]
FUSED_QKV: dict[str, Layout] = {
    "Wqkv": "blocks",
    "qkv": "blocks",
    "qkv_proj": "blocks",
    "c_attn": "blocks",
    "query_key_value": "heads",
    "in_proj": "heads",
}
"""Projections to queries, keys and values at once: the rows are `[q; k; v]`, each in the order of
the heads (`blocks`), or head after head, each `[q; k; v]` (`heads`)."""

ATTENTION_OUTPUT = (
    *("o_proj", "out_proj", "out_lin", "o", "Wo", "linear_out", "post_proj", "c_proj", "proj"),
    *("dense", "^output.dense"),
)
"""Paths from the attention module; `^` starts at its parent."""

HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head")
QUERY_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
KEY_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
QUERIES_PER_KEY = ("num_key_value_groups",)
ALL_HEADS_SIZE = ("all_head_size", "split_size", "inner_dim", "attn_dim")

PER_HEAD_ROWS = (
    *("pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj", "linear_pos"),
    *("continuous_position_bias_mlp.2", "layout_query", "layout_key", "layout_value"),
    *("w2e_query", "e2w_query", "e2e_query"),
)
"""Further projections with rows by head (DeBERTa's and Conformer's positions, LiLT, LUKE)."""

RUN_BY_HEAD = ("gru_rel_pos_linear",)
"""Modules that all heads share, and that run once per head (WavLM)."""

PER_HEAD_TENSORS = (
    ("relative_position_bias.relative_position_bias_table", 1),
    ("relative_position_bias_table", 1),
    *((name, 0) for name in ("logit_scale", "q_bias", "v_bias", "pos_bias_u", "pos_bias_v")),
    ("sinks", 0),
)
"""Further tensors with a head axis: path from the attention, dimension (Swin, DeBERTa)."""

NORM = r"(Layer|RMS)_?Norm"
"""Class names of norms across the last dimension."""

TRAINING_ONLY = ("masked_spec_embed",)
"""Parameters along the residual stream that replace masked features in training."""

WIDTH_STEPS = {"WhisperEncoder": ("embed_positions.weight", 4)}
"""Modules whose width must be a multiple of a number, with a tensor along the width. Whisper's
position embedding consists of sines and cosines, two or more of each."""

ACROSS_HEADS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "q_ln", "k_ln")
"""Norms that need the queries and keys of removed heads, where they span all heads (OLMo2)."""


@dataclass(frozen=True)
class Attention:
    """The parts of one class of attention that the usual names and shapes do not give.

    Names are paths from the attention module; `^` starts at its parent. Empty fields are found by
    the usual names.

    Attributes:
        query: The query projection.
        key: The key projection.
        value: The value projection.
        fused: One projection to all three, with the order of its rows as in `FUSED_QKV`.
        output: The projection whose input holds the heads side by side.
        outputs: Further projections whose inputs hold the heads.
        carrier: A module whose input has a dimension of heads, that dimension, and the number of
            dimensions of the input, where the projections are no modules.
        tensors: Further tensors with a head axis, and the dimension.
        sizes: Attributes that hold the width of all heads.
        counted: Whether an attribute gives the number of heads, because head sizes differ.
        paired: Whether each head of the first half goes with one of the second.
        count_field: The config field in which the module reads its number of heads when it runs.
        keeps_one: Whether the first head must stay, because the module needs one.
        replacement: The class of `modeling_hfslim` that must replace this one.
        headless: Settings of the replacement once no head is left: the argument added to its output
            (`residual`) and the norm after that (`norm`).
    """

    query: str = ""
    key: str = ""
    value: str = ""
    fused: tuple[str, Layout] | None = None
    output: str = ""
    outputs: tuple[str, ...] = ()
    carrier: tuple[tuple[str, int, int], ...] = ()
    tensors: tuple[tuple[str, int], ...] = ()
    sizes: tuple[str, ...] = ()
    counted: bool = False
    paired: bool = False
    count_field: str = ""
    keeps_one: bool = False
    replacement: str = ""
    headless: tuple[tuple[str, str], ...] = ()


def _norm(path: str) -> tuple[tuple[str, int], ...]:
    """Return the tensors of a batch norm, which have an entry per output before it."""
    return tuple((f"{path}.{n}", 0) for n in ("weight", "bias", "running_mean", "running_var"))


REFUSED_HEADS = {
    "ConvBertSelfAttention": "the convolution beside its heads reads the queries of all heads",
    "DogeAttention": "its mask is computed from the values of all heads",
    "JetMoeAttention": "each token chooses its own query projections",
    "LSHSelfAttention": "its hashes are drawn for all heads at once",
    **dict.fromkeys(
        ("LongformerSelfAttention", "PvtV2SelfAttention"),
        "its class shapes the outputs of all heads to the hidden size",
    ),
    "MiniMaxLightningAttention": "a norm runs across all heads",
    "MraSelfAttention": "its attention runs in a CUDA kernel only",
    **dict.fromkeys(
        ("Qwen3_5GatedDeltaNet", "Qwen3NextGatedDeltaNet"),
        "heads of linear attention are not known here",
    ),
}
"""Classes of attention whose heads cannot go, with the reason."""

REFUSED_HEADS_IF: dict[str, tuple[str, str | bool, str]] = {
    **dict.fromkeys(
        (
            *("BigBirdSelfAttention", "BigBirdBlockSparseAttention"),
            *("BigBirdPegasusSelfAttention", "BigBirdPegasusBlockSparseAttention"),
        ),
        ("attention_type", "block_sparse", "its random blocks are drawn head after head"),
    ),
    "Data2VecVisionSelfAttention": (
        *("use_shared_relative_position_bias", True),
        "a bias of all heads comes from outside",
    ),
    "DisentangledSelfAttention": ("talking_head", True, "its heads are mixed with each other"),
    "MvpAttention": ("use_prompt", True, "its prompts have keys and values of all heads"),
    **dict.fromkeys(
        ("Wav2Vec2BertSelfAttention", "Wav2Vec2ConformerSelfAttention"),
        (
            *("position_embeddings_type", "rotary"),
            "its hidden states are turned head by head before any projection",
        ),
    ),
    "Zamba2Attention": (
        *("use_shared_attention_adapter", True),
        "adapters, other ones in every layer, add to its projections",
    ),
}
"""Classes of attention whose heads cannot go at one value of a config field, with the reason."""

ATTENTIONS = {
    "AlbertAttention": Attention(headless=(("residual", "hidden_states"), ("norm", "LayerNorm"))),
    **dict.fromkeys(
        ("BeitAttention", "FalconAttention", "LayoutLMv3SelfAttention", "MPNetSelfAttention"),
        Attention(replacement="BiasedHeads"),
    ),
    "MptAttention": Attention(replacement="BiasedHeads"),
    "BloomAttention": Attention(
        replacement="BiasedHeads", headless=(("residual", "residual"),), sizes=("hidden_size",)
    ),
    "CvtSelfAttention": Attention(
        query="projection_query",
        key="projection_key",
        value="projection_value",
        counted=True,
        sizes=("embed_dim",),
    ),
    "DiffLlamaAttention": Attention(paired=True),
    "FunnelRelMultiheadAttention": Attention(
        headless=(("residual", "query"), ("norm", "layer_norm")),
        counted=True,
        count_field="n_head",
        tensors=(
            *((name, 0) for name in ("r_w_bias", "r_r_bias", "r_s_bias")),
            *((name, 1) for name in ("r_kernel", "seg_embed")),
        ),
    ),
    "GPTBigCodeAttention": Attention(fused=("c_attn", "heads"), sizes=("embed_dim",)),
    "HieraMaskUnitAttention": Attention(sizes=("hidden_size_output",), keeps_one=True),
    **dict.fromkeys(
        ("IBertSelfAttention", "LocalSelfAttention", "LukeSelfAttention"),
        Attention(keeps_one=True),
    ),
    "LiltSelfAttention": Attention(
        outputs=("^layout_output.dense",),
        keeps_one=True,
    ),
    "LevitAttention": Attention(
        fused=("queries_keys_values.linear", "heads"),
        output="projection.linear",
        tensors=(("attention_biases", 0), *_norm("queries_keys_values.batch_norm")),
        sizes=("out_dim_projection",),
        counted=True,
        keeps_one=True,
    ),
    "LevitAttentionSubsample": Attention(
        query="queries.linear",
        key="keys_values.linear",
        value="keys_values.linear",
        output="projection.linear",
        tensors=(
            ("attention_biases", 0),
            *_norm("queries.batch_norm"),
            *_norm("keys_values.batch_norm"),
        ),
        sizes=("out_dim_projection",),
        counted=True,
        keeps_one=True,
    ),
    "NystromformerSelfAttention": Attention(tensors=(("conv.weight", 0),)),
    "SqueezeBertSelfAttention": Attention(output="^post_attention.conv1d", keeps_one=True),
    "XLNetRelativeAttention": Attention(
        # The dropout takes the attention weights (4 dimensions) and the output (3).
        carrier=(("dropout", 1, 4),),
        headless=(("output", ""), ("residual", "h"), ("norm", "layer_norm")),
        tensors=(
            *((name, 1) for name in ("q", "k", "v", "o", "r", "seg_embed")),
            *((name, 0) for name in ("r_r_bias", "r_s_bias", "r_w_bias")),
        ),
    ),
    "MvpAttention": Attention(sizes=("embed_dim",)),
    **dict.fromkeys(("MT5Attention", "T5Attention"), Attention(replacement="SharedBiasHeads")),
    "Phi3Attention": Attention(count_field="num_attention_heads"),
    "UMT5Attention": Attention(tensors=(("relative_attention_bias.weight", 1),)),
    "WavLMAttention": Attention(replacement="WavLMHeads"),
}
"""The exceptions, by class name."""


def attention(module: nn.Module) -> Attention:
    """Return the entry of a module's class, or of a class that it derives from."""
    return _entry(module, ATTENTIONS) or Attention()


def refused_heads(module: nn.Module, config: Any) -> str:
    """Return why no head of a module can go; empty if heads can go."""
    field, value, reason = _entry(module, REFUSED_HEADS_IF) or ("", None, "")
    if field and getattr(config, field, None) == value:
        return f"{reason} ({field}={value!r})"
    return _entry(module, REFUSED_HEADS) or ""


def _entry(module: nn.Module, table: Mapping[str, _Row]) -> _Row | None:
    names = (cls.__name__ for cls in type(module).__mro__)
    return next((table[name] for name in names if name in table), None)


def add_family(
    attentions: Mapping[str, Attention] | None = None,
    feed_forwards: Iterable[FeedForward] = (),
    refused: Mapping[str, str] | None = None,
) -> None:
    """Add a family to discovery, in this process.

    Args:
        attentions: Entries of classes of attention, by class name.
        feed_forwards: Names of projections around neurons, which precede the usual ones.
        refused: Why no head of a class of attention can go, by class name.
    """
    ATTENTIONS.update(attentions or {})
    FEED_FORWARDS[:0] = feed_forwards
    REFUSED_HEADS.update(refused or {})
