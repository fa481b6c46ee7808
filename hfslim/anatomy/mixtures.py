"""The names of the parts of mixtures of experts, and the classes that are exceptions."""

EXPERTS_INPUT = ("gate_up_proj", "up_proj")
"""The tensor of all experts whose outputs are their neurons: for gated experts, for others."""

EXPERTS_OUTPUT = "down_proj"
"""The tensor of all experts whose inputs are their neurons."""

EXPERTS_BIAS = "_bias"
"""The suffix of the name of a tensor's bias."""

NEURONS_AT_ONCE = 8
"""Neurons per unit: torch's grouped products take rows of whole 16 bytes."""

NEURON_COUNTS = ("intermediate_size", "intermediate_dim", "ffn_dim")
"""Attributes that count neurons, of the module that holds the experts or of the one around it."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
CHOSEN_EXPERTS = ("top_k", "num_experts_per_tok")
"""Attributes of routers with the number of experts per token."""

EXPERT_GROUPS = ("num_group", "n_group")
"""Attributes of routers with the number of groups of experts that they choose among first."""

TWO_EXPERTS_STAY = (
    *("DeepseekV3TopkRouter", "Mistral4TopkRouter", "AXK1TopkRouter", "AXK2TopkRouter"),
    "PhimoeTopKRouter",
)
"""Routers that always read the scores of the two best experts."""

SORTED_EXPERTS = {
    "JetMoeMoE": "its experts get tokens in an order that tells no example from another"
}
"""Mixtures that cannot be gated, with the reason."""
