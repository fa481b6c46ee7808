"""Names of the config fields that set a model's size, over all families."""

DEPTH_FIELDS = (
    "num_hidden_layers",
    "encoder_layers",
    "n_layers",
    "n_layer",
    "num_layers",
    "depths",
)
"""Config fields that set the number of layers, or list it stage by stage."""

WIDTH_FIELDS = ("intermediate_size", "encoder_ffn_dim", "hidden_dim", "d_ff", "n_inner", "ffn_dim")
"""Config fields that set the number of neurons of every layer."""

PER_LAYER_FIELDS = (
    "layer_types",
    "mlp_layer_types",
    "attention_layers",
    "attention_window",
    "no_rope_layers",
    "layers_block_type",
)
"""Config fields with one item a layer."""

HEAD_SIZE_FIELDS = ("head_dim", "d_kv")
"""Config fields with the size of a head, where it does not follow from the number of heads."""
