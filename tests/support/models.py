"""Tiny models of the supported families, built from their configs."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_TEXT = {**_WIDTHS, "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 40}
_IMAGE = {**_WIDTHS, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
_SPEECH = {
    **_WIDTHS,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0}

_CONFIGS = {
    "bert": _TEXT,
    "roberta": {**_TEXT, "pad_token_id": 1},
    "distilbert": {
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 48,
        "vocab_size": 64,
        "max_position_embeddings": 40,
    },
    "electra": {**_TEXT, "embedding_size": 16},
    "deberta-v2": {
        **_TEXT,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["c2p", "p2c"],
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
        "share_att_key": False,
    },
    "modernbert": {
        **_TEXT,
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "classifier_pooling": "mean",
    },
    "mpnet": {**_TEXT, "pad_token_id": 1},
    "vit": _IMAGE,
    "deit": _IMAGE,
    "dinov2": {**_IMAGE, "mlp_ratio": 2},
    "beit": {**_IMAGE, "use_relative_position_bias": True},
    "beit-shared": {**_IMAGE, "use_shared_relative_position_bias": True},
    "swin": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 2,
        "mlp_ratio": 2.0,
    },
    "wav2vec2": _SPEECH,
    "hubert": _SPEECH,
    "wavlm": {**_SPEECH, "num_buckets": 16, "max_bucket_distance": 32},
    "audio-spectrogram-transformer": {
        **_WIDTHS,
        "intermediate_size": 48,
        "num_mel_bins": 16,
        "max_length": 24,
        "patch_size": 8,
        "frequency_stride": 8,
        "time_stride": 8,
    },
    "whisper": {
        "d_model": 32,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 8,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "classifier_proj_size": 16,
    },
    "llama": _DECODER,
    "qwen2": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 16},
}
FAMILIES = tuple(_CONFIGS)

_ARCHITECTURES = {"deit": "DeiTForImageClassification"}
_AUTO = {
    **dict.fromkeys(
        ("vit", "deit", "dinov2", "beit", "beit-shared", "swin"), AutoModelForImageClassification
    ),
    **dict.fromkeys(
        ("wav2vec2", "hubert", "wavlm", "audio-spectrogram-transformer", "whisper"),
        AutoModelForAudioClassification,
    ),
}


def auto_class(family: str) -> type:
    return _AUTO.get(family, AutoModelForSequenceClassification)


def tiny(
    family: str, attention: str = "eager", num_labels: int = 3, seed: int = 0, **overrides: object
) -> PreTrainedModel:
    """Build a model of a few thousand parameters, biases and norms off their initial values."""
    fields = {**_CONFIGS[family], "num_labels": num_labels, **overrides}
    config = AutoConfig.for_model(family.removesuffix("-shared"), **fields)
    if family in _ARCHITECTURES:
        config.architectures = [_ARCHITECTURES[family]]
    torch.manual_seed(seed)
    model = auto_class(family).from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
