"""By class name: families whose layers are not simply a list that runs in order."""

SIDE_BY_SIDE = dict.fromkeys(
    ("FlaubertModel", "XLMModel"), ("attentions", "layer_norm1", "ffns", "layer_norm2")
)
"""Modules whose layers lie in several lists, in the order in which they run."""

STREAMS = {
    "LiltLayer": ("hidden_states", "layout_inputs"),
    "LukeLayer": ("word_hidden_states", "entity_hidden_states"),
}
"""Layers that add to several streams: the arguments that hold them, in the order of the outputs; a
stream is none of an input without it."""

ENDS = {"SqueezeBertModule": ("attention", "output")}
"""Layers that are not called as modules, but by their forward: names of the modules inside that get
their input and give their output."""

SEQUENCE_FIRST = ("XLNetModel",)
"""Modules inside of which hidden states are `[positions, examples, features]`."""

TANGLED_LAYERS = {
    "ReformerEncoder": "its layers carry two reversible streams",
    "Zamba2Model": "its shared blocks look up their adapters by the number of the layer",
}
"""Modules around a list of layers none of which can go, and why."""

REPEATED = {
    "AlbertTransformer.albert_layer_groups": ("num_hidden_layers", "num_hidden_groups"),
    "PerceiverEncoder.self_attends": ("num_blocks", ""),
}
"""Modules that one forward pass runs several times, by the class around them and their name: the
config fields whose quotient tells how often."""

AFTER_FIRST_LAYER = {"DebertaV2Encoder": "conv"}
"""Modules that run right after the first of their parent's layers, which therefore has to stay."""

FIRST_LAYER_STAYS = ("FunnelLayer",)
"""Layers of which the first in a list does more than the others: Funnel's pools the queries."""

LAYER_COUNTS = ("n_layers", "n_layer", "num_layers", "num_hidden_layers")
"""Attributes of the module around a list of layers that hold its length."""
