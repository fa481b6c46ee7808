"""The names that mixtures of experts give to their parts, and the ones that are exceptions."""

EXPERTS_INPUT = ("gate_up_proj", "up_proj")
"""The tensor of all experts that ends in their neurons: of gated experts, of others."""

EXPERTS_OUTPUT = "down_proj"
"""The tensor of all experts that starts from their neurons."""

EXPERTS_BIAS = "_bias"
"""What the name of a bias of all experts adds to that of the tensor."""

NEURONS_AT_ONCE = 8
"""Neurons of experts that go at once: torch's grouped products take rows of whole 16 bytes."""

NEURON_COUNTS = ("intermediate_size", "intermediate_dim", "ffn_dim")
"""Attributes of the module that holds the experts, or of the one around it, that count them."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
CHOSEN_EXPERTS = ("top_k", "num_experts_per_tok")
"""Attributes of routers that tell how many experts each token goes to."""

EXPERT_GROUPS = ("num_group", "n_group")
"""Attributes of routers that choose among groups of experts first, if there are several."""

TWO_EXPERTS_STAY = (
    *("DeepseekV3TopkRouter", "Mistral4TopkRouter", "AXK1TopkRouter", "AXK2TopkRouter"),
    "PhimoeTopKRouter",
)
"""Routers that always look for the two best experts."""

SORTED_EXPERTS = {
    "JetMoeMoE": "its experts get tokens in an order that tells no example from another"
}
"""Mixtures that cannot be gated, and why."""
