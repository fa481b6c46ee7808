"""Every type of the three classification auto classes, tiny: config overrides as data."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hfslim.anatomy.inputs import example_inputs

TASKS = {
    "text": ("AutoModelForSequenceClassification", "SEQUENCE"),
    "image": ("AutoModelForImageClassification", "IMAGE"),
    "audio": ("AutoModelForAudioClassification", "AUDIO"),
}
TABLES = {
    task: getattr(modeling_auto, f"MODEL_FOR_{name}_CLASSIFICATION_MAPPING_NAMES")
    for task, (_, name) in TASKS.items()
}
CASES = tuple(f"{task}/{kind}" for task, table in TABLES.items() for kind in table)

HIDDEN, HEADS, HEAD, LAYERS, NEURONS, VOCABULARY, POSITIONS = 32, 4, 8, 3, 48, 96, 64

# Given to every config, and to each config inside it, that has the field.
COMMON: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "dim"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels"), HEAD),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), NEURONS),
    **dict.fromkeys(("d_ff", "d_inner", "dff", "ffn_dim", "hidden_dim", "n_inner"), NEURONS),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": HIDDEN,
    "embedding_size": 16,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "num_codevectors_per_group": 8,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "use_cache": False,
}

_MLA = {"num_key_value_heads": HEADS, "head_dim": 4}
_VISION = {"hidden_size": HIDDEN, "image_size": 16, "patch_size": 4}
_STAGES = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "mlp_ratio": 2.0}
_WINDOWS = {**_STAGES, "image_size": 16, "patch_size": 2, "window_size": 2}
_PYRAMID = {
    "hidden_sizes": [16, 16, 32, 32],
    "num_attention_heads": [2, 2, 4, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "image_size": 64,
}
_CONV = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
_LATENTS = {
    "num_latents": 8,
    "num_blocks": 2,
    "d_latents": 32,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
    "image_size": 16,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_MAMBA = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}

# The fields of one type that the common ones do not fit.
TYPES: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * LAYERS,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            }
        },
    },
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "esmc": {"num_key_value_heads": HEADS},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lilt": {"hidden_size": 96, "num_attention_heads": HEADS},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "markuplm": {
        "max_xpath_tag_unit_embeddings": 16,
        "max_xpath_subs_unit_embeddings": 16,
        "tag_pad_id": 15,
        "subs_pad_id": 15,
        "max_depth": 4,
        "xpath_unit_hidden_size": 8,
    },
    "minicpm3": _MLA,
    "mistral4": {"num_key_value_heads": HEADS},
    "mobilebert": {"intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    "perceiver": _LATENTS,
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "attention_head_size": HEAD,
        "feed_forward_size": NEURONS,
        "attn_layers": ["local", "lsh", "local"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 16,
        "shape_embed_dim": 8,
        "shape_vocab_size": 16,
    },
    "squeezebert": {"embedding_size": HIDDEN, "num_attention_heads": 2 * HEADS},
    "t5": {"decoder_start_token_id": 0},
    "mt5": {"decoder_start_token_id": 0},
    "umt5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **_MAMBA,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"] * 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        **_MAMBA,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"] * 2,
        "hybrid_layer_ids": [1, 4],
        "n_mamba_heads": 4,
        "chunk_size": 8,
        "adapter_rank": 4,
    },
    "bit": {**_CONV, "num_groups": 4},
    "clip": {"vision_config": _VISION},
    "convnext": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "image_size": 32},
    "convnextv2": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "image_size": 32},
    "cvt": {
        "embed_dim": [16, 16, 32],
        "num_heads": [2, 2, 4],
        "depth": [2, 2, 3],
        "mlp_ratio": [2.0, 2.0, 2.0],
        "drop_path_rate": [0.0, 0.0, 0.0],
    },
    "donut-swin": _WINDOWS,
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "efficientnet": {
        "image_size": 64,
        "width_coefficient": 0.5,
        "depth_coefficient": 1.0,
        "hidden_dim": 640,
    },
    "focalnet": {
        "embed_dim": 16,
        "hidden_sizes": [16, 32],
        "depths": [2, 2],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
        "mlp_ratio": 2.0,
    },
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16, 32, 32],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [16, 32, 32, 48],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
        "hidden_sizes": [16, 32, 32, 48],
        "depths": [1, 1, 2, 1],
    },
    "hiera": {
        "embed_dim": 16,
        "image_size": [32, 32],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "depths": [2, 2, 2],
        "num_heads": [2, 4, 8],
        "mlp_ratio": 2.0,
        "num_query_pool": 2,
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, True, False],
    },
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [16, 32, 32],
        "num_attention_heads": [2, 4, 4],
        "depths": [2, 2, 2],
        "key_dim": [8, 8, 8],
        "down_ops": [["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 4, 2, 2, 2]],
    },
    "metaclip_2": {"vision_config": _VISION},
    "siglip": {"vision_config": _VISION},
    "siglip2": {"vision_config": {**_VISION, "num_patches": 16}},
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilevit": {
        "hidden_sizes": [16, 16, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 16, 32, 32],
        "image_size": 64,
        "patch_size": 2,
    },
    "mobilevitv2": {
        "base_attn_unit_dims": [16, 16, 32],
        "width_multiplier": 0.25,
        "image_size": 64,
        "patch_size": 2,
    },
    "poolformer": {"hidden_sizes": [16, 16, 32, 32], "depths": [2, 2, 2, 2], "mlp_ratio": 2.0},
    "pp_lcnet": {"scale": 0.25, "class_expand": 32},
    "pvt": _PYRAMID,
    "pvt_v2": _PYRAMID,
    "segformer": _PYRAMID,
    "regnet": {**_CONV, "groups_width": 8},
    "resnet": _CONV,
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "swiftformer": {"embed_dims": [16, 16, 32, 32], "depths": [2, 2, 2, 2], "image_size": 64},
    "timm_wrapper": {
        "architecture": "mobilevit_xxs",
        "pretrained_cfg": {"input_size": [3, 64, 64]},
    },
    "textnet": {
        "hidden_sizes": [16, 16, 16, 32, 32],
        "stem_out_channels": 16,
        "image_size": [64, 64],
    },
}


def auto_class(case: str) -> type:
    if ":" in case:
        return type(_own(case, "eager"))
    return getattr(transformers, TASKS[case.split("/")[0]][0])


def tiny(case: str, attention: str = "eager", seed: int = 0, **options: Any) -> PreTrainedModel:
    """Build a type's classifier, weights, biases and norms off their initial values."""
    if ":" in case:
        return _own(case, attention)
    task, kind = case.split("/")
    config = tiny_config(kind, **options)
    classes = TABLES[task][kind]
    config.architectures = [classes if isinstance(classes, str) else classes[0]]
    torch.manual_seed(seed)
    model = auto_class(case).from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    _settle_batch_norms(model.eval())
    return model


@torch.no_grad()
def _settle_batch_norms(model: PreTrainedModel) -> None:
    """Give batch norms statistics that they could have, so that no signal dies on the way."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if norms and model.main_input_name == "pixel_values":
        for norm in norms:
            norm.train().momentum = 1.0
        model(**example_inputs(model, 4, seed=9))
        for norm in norms:
            norm.eval().momentum = 0.1


def _own(case: str, attention: str) -> PreTrainedModel:
    """Call a function `module:name` that builds a small model of a family of one's own."""
    module, _, name = case.partition(":")
    model = getattr(importlib.import_module(module), name)(attention).eval()
    if attention == "sdpa" and not model._supports_sdpa:
        raise ValueError(f"{type(model).__name__} does not support sdpa")
    return model


def tiny_config(kind: str, **options: Any) -> PreTrainedConfig:
    """Return a type's config with the common overrides, its own, and what is asked for."""
    own = TYPES.get(kind, {}) | options
    fields = _common(AutoConfig.for_model(kind))
    for name, value in own.items():
        inside = isinstance(value, dict) and isinstance(fields.get(name), dict)
        fields[name] = fields[name] | value if inside else value
    return AutoConfig.for_model(kind, num_labels=3, **fields)


def _common(config: PreTrainedConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = _common(value)
        elif name in COMMON and isinstance(value, list | tuple) <= isinstance(COMMON[name], tuple):
            fields[name] = COMMON[name]
    return fields
