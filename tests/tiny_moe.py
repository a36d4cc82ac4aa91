"""Tiny random models of every mixture-of-experts architecture that transformers has, as far as replay supports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from trainer.replay.inject import RoutingReplay
from trainer.replay.rows import RoutingRows
from trainer.replay.slots import recorded_rows

NUM_EXPERTS, TOP_K, NUM_TOKENS = 8, 2, 12

TINY: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT: Mapping[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}
_SPARSE: Mapping[str, Any] = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
_GROUPS: Mapping[str, Any] = {"n_group": 4, "topk_group": 2}
_ONE_GROUP: Mapping[str, Any] = {"n_group": 1, "topk_group": 1}
_LINEAR: Mapping[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {**_ONE_GROUP, "num_dense_layers": 1},
    "aria_text": {"moe_num_experts": NUM_EXPERTS, "moe_topk": TOP_K},
    "axk1": {**_LATENT, **_GROUPS},
    "axk2": {**_LATENT, **_GROUPS, **_SPARSE},
    "bailing_hybrid": {**_LATENT, **_GROUPS, "num_expert_group": 4, "num_experts_per_token": TOP_K},
    "beam": {**_GROUPS, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "cohere2_moe": {},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
    },
    "deepseek_v2": {**_LATENT, **_GROUPS, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_LATENT, **_GROUPS},
    "deepseek_v32": {**_LATENT, **_GROUPS, **_SPARSE},
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "num_key_value_heads": 1,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        **_SPARSE,
        "index_head_dim": 8,
        "hc_mult": 2,
    },
    "dots1": {**_GROUPS, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "dots3_note_text": {**_LATENT, **_GROUPS, **_SPARSE},
    "ernie4_5_moe": {
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": TOP_K,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_num_shared_experts": 1,
    },
    "exaone_moe": {**_ONE_GROUP, "num_shared_experts": 1},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": TOP_K},
    "glm4_moe": {**_ONE_GROUP, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**_LATENT, **_ONE_GROUP},
    "glm_moe_dsa": {**_LATENT, **_GROUPS, **_SPARSE},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "shared_intermediate_size": 16,
    },
    "granitemoeshared": {},
    "hunyuan_v1_moe": {"moe_topk": TOP_K},
    "hy_v3": {},
    "hy_v4": {**_LATENT, **_GROUPS},
    "inkling2_text": {},
    "inkling_text": {},
    "jamba": {
        "mamba_d_state": 4,
        "mamba_d_conv": 4,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_hidden_layers": 4,
    },
    "kimi_linear": {**_LATENT, "num_expert_group": 4, "num_experts_per_token": TOP_K},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {"num_experts_per_tok": 1},
    "longcat_flash": {
        **_LATENT,
        "num_hidden_layers": 6,  # of two attentions to one choice of experts
        "moe_topk": TOP_K,
        "zero_expert_num": 4,
        "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 48,
    },
    "mellum": {},
    "mimo_v2_flash": _GROUPS,
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mixtral": {},
    "nemotron_h": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_moe": {},
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": {
        **_LINEAR,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 100,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "ple_embed_dim": 8,
    },
    "solar_open": _ONE_GROUP,
    "zaya": {"num_experts_per_tok": 1},
}
"""By model type of a text model: what its tiny config needs beside `TINY`."""

SLOW = frozenset({"kimi_linear", "qwen3_omni_moe_thinker"})
"""Types that take long: one compiles kernels for half a minute, one has large towers beside its text part."""

NESTED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "aria": ("text_config", ARCHITECTURES["aria_text"]),
    "ernie4_5_vl_moe": (
        "text_config",
        {"moe_num_experts": NUM_EXPERTS, "moe_k": TOP_K, "moe_intermediate_size": [16, 16], **_MROPE},
    ),
    "glm4v_moe": (
        "text_config",
        {**_ONE_GROUP, "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 0]}},
    ),
    "kimi_k25": ("text_config", ARCHITECTURES["deepseek_v3"]),
    "mistral_large4": ("text_config", {**_LATENT, **_GROUPS}),
    "qwen3_omni_moe_thinker": ("text_config", _MROPE),
    "qwen3_vl_moe": ("text_config", _MROPE),
}
"""By model type of a multi-modal model: where its text part is, and what that needs."""

_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
}


def tiny_model(architecture: str, **changes: Any) -> Any:
    """A random model whose routers are not all zero (some types start so)."""
    torch.manual_seed(0)
    if architecture in NESTED:
        place, needs = NESTED[architecture]
        default = AutoConfig.for_model(architecture)
        text = {"model_type": getattr(default, place).model_type, **TINY, **needs, **changes}
        vision = {"model_type": default.vision_config.model_type, **_VISION}
        config = AutoConfig.for_model(architecture, **{place: text, "vision_config": vision})
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    else:
        config = AutoConfig.for_model(architecture, **{**TINY, **ARCHITECTURES.get(architecture, {}), **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def input_ids(num_tokens: int = NUM_TOKENS, seed: int = 1) -> torch.Tensor:
    """int64[1, num_tokens], no special token among them."""
    return torch.randint(3, TINY["vocab_size"], (1, num_tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """float32[1, N, V]."""
    return model(input_ids=input_ids() if ids is None else ids, use_cache=False).logits


def foreign_rows(replay: RoutingReplay, num_tokens: int = NUM_TOKENS, seed: int = 2) -> RoutingRows:
    """Distinct random experts in every routed layer."""
    rng, shape = np.random.default_rng(seed), replay.plan.shape
    ids_NLK = np.zeros((num_tokens, shape.num_layers, shape.top_k), dtype=shape.dtype)
    for site in replay.plan.routers:
        order_NE = rng.random((num_tokens, site.selection.num_scores)).argsort(axis=1)
        ids_NLK[:, site.layer, : site.selection.top_k] = order_NE[:, : site.selection.top_k]
    return recorded_rows(ids_NLK, replay.plan.routed)
