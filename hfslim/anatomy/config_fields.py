"""Names of the config fields that set a model's size, over all families."""

DEPTH_FIELDS = (
    *("num_hidden_layers", "encoder_layers", "n_layers", "n_layer", "num_layers"),
    "depths",
)
"""Config fields that set the number of layers, or list it stage by stage."""

WIDTH_FIELDS = ("intermediate_size", "encoder_ffn_dim", "hidden_dim", "d_ff", "n_inner", "ffn_dim")
"""Config fields that set the number of neurons of every layer."""

EXPERT_WIDTH_FIELDS = ("moe_intermediate_size", "intermediate_size")
"""Config fields that set the number of neurons of every expert."""

EXPERT_COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Config fields that set the number of experts of every layer that has any."""

CHOSEN_EXPERTS_FIELD = "num_experts_per_tok"
"""Config field with the number of experts that each token goes to."""

STREAM_FIELDS = (
    *("hidden_size", "embedding_size", "pooler_hidden_size", "output_hidden_size"),
    *("d_model", "dim", "n_embd", "embed_dim", "emb_dim", "classifier_proj_size", "conv_dim"),
)
"""Config fields that set the width of the residual stream, or an equal width."""

GROUP_FIELDS = ("num_conv_pos_embedding_groups",)
"""Config fields with the number of groups that a convolution of the residual stream has."""

PER_LAYER_FIELDS = (
    *("layer_types", "mlp_layer_types", "attention_layers", "attention_window"),
    *("no_rope_layers", "layers_block_type"),
)
"""Config fields with one item a layer."""

HEAD_SIZE_FIELDS = ("head_dim", "d_kv")
"""Config fields with the size of a head, where it does not follow from the number of heads."""
