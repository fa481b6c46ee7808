"""By class name: families whose layers are not one list that runs in order."""

SIDE_BY_SIDE = dict.fromkeys(
    ("FlaubertModel", "XLMModel"), ("attentions", "layer_norm1", "ffns", "layer_norm2")
)
"""Modules whose layers lie in several lists, in the order of the forward pass."""

STREAMS = {
    "LiltLayer": ("hidden_states", "layout_inputs"),
    "LukeLayer": ("word_hidden_states", "entity_hidden_states"),
}
"""Layers that add to several streams: the arguments that hold them, in the order of the outputs. An
argument that is not given is no stream."""

ENDS = {"SqueezeBertModule": ("attention", "output")}
"""Layers that are not called as modules: names of the modules inside that get the layer's input and
give its output."""

SEQUENCE_FIRST = ("XLNetModel",)
"""Modules whose hidden states are `[positions, examples, features]`."""

TANGLED_LAYERS = {
    "ReformerEncoder": "its layers carry two reversible streams",
    "Zamba2Model": "its shared blocks look up their adapters by the number of the layer",
}
"""Modules around lists whose layers cannot go, with the reason."""

REPEATED = {
    "AlbertTransformer.albert_layer_groups": ("num_hidden_layers", "num_hidden_groups"),
    "PerceiverEncoder.self_attends": ("num_blocks", ""),
}
"""Modules that one forward pass runs several times, by the class around them and their name: the
config fields whose quotient is the number of runs."""

AFTER_FIRST_LAYER = {"DebertaV2Encoder": "conv"}
"""Modules that run right after their parent's first layer, which therefore stays."""

FIRST_LAYER_STAYS = ("FunnelLayer",)
"""Layers whose first in a list stays, because it does more (Funnel pools the queries there)."""

LAYER_COUNTS = ("n_layers", "n_layer", "num_layers", "num_hidden_layers")
"""Attributes of the module around a list of layers that hold its length."""

STAGE = r"Stage$|^PvtV2EncoderLayer$"
"""Class names of modules that look like layers, but are stages of layers."""
