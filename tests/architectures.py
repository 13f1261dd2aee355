"""Tiny models of mlx-lm's model types, with random weights.

`COMMON` holds the settings that many types share, under all the names that they give them;
`ARCHITECTURES` adds what is a type's own, with as many kinds of layers as it has. A type reads the
settings that it knows.
"""

import re
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm.models

from tests.tiny import VOCAB, random_model

DEFINES_A_MODEL = re.compile(r"^class Model\(|^from .* import Model\b", re.MULTILINE)

# fmt: off
COMMON: dict[str, Any] = {
    # The trunk: two layers of width 32.
    "vocab_size": VOCAB, "num_vocab": VOCAB, "embedding_size": VOCAB,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "model_dim": 32,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2,
    "num_transformer_layers": 2,
    "intermediate_size": 64, "n_inner": 64, "ff_intermediate_size": 64, "intermediate_size_mlp": 64,
    "ffn_hidden_size": 64, "shared_intermediate_size": 64, "dense_intermediate_size": 64,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5, "norm_eps": 1e-5, "norm_epsilon": 1e-5, "post_norm_eps": 1e-6,
    "tie_word_embeddings": True,

    # Attention: four heads of eight, two of keys and values.
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "n_kv_heads": 2, "num_attention_groups": 2,
    "head_dim": 8, "qk_head_dim": 16, "hidden_size_per_head": 8, "kv_channels": 8,
    "attention_bias": False, "mlp_bias": False, "use_bias": False, "use_qkv_bias": False,
    "use_qk_norm": True, "qk_norm": True, "qkv_bias": False,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "block_size": 256,
    "model_max_length": 256,
    "rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.5,
    "rotary_dim": 4, "rotary_emb_base": 10000, "rotary_pct": 0.5,
    "query_pre_attn_scalar": 8.0, "sliding_window": 4, "sliding_window_size": 4, "window_size": 4,
    "sliding_window_pattern": 2, "attention_window_size": 4,
    "kv_lora_rank": 16, "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64,

    # Mixtures of experts: two of four, and a shared one.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_top_k": 2, "moe_topk": 2, "moe_k": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "num_shared_expert": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "moe_hidden_size": 32,
    "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16, "share_expert_dim": 16,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_layer_freq": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "routed_scaling_factor": 1.0,
    "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",

    # Convolutions, states and linear attention.
    "conv_kernel": 4, "conv_L_cache": 3, "conv_bias": False, "use_conv_bias": True,
    "conv1d_width": 4, "conv_window": 2,
    "state_size": 4, "ssm_state_size": 8, "time_step_rank": 2, "n_groups": 1,
    "time_step_limit": (0.0, 100.0), "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_num_heads": 4, "mamba_d_head": 8,
    "mamba_head_dim": 8, "mamba_n_groups": 1, "mamba_proj_bias": False, "mamba_conv_bias": True,
    "mamba_chunk_size": 16,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True,
    "layer_group_size": 2, "group_norm_size": 2,

    # Scales.
    "logits_scaling": 2.0, "attention_multiplier": 0.35, "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5, "dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0,
    "logits_soft_cap": 30.0, "final_logit_softcapping": 30.0, "output_multiplier": 0.5,
}

WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "mscale": 1.0,
        "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
LLAMA4_ROPE = {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1,
               "original_max_position_embeddings": 128}
ROPE_BY_TYPE = {kind: {"rope_theta": 10000.0, "rope_type": "default"}
                for kind in ("sliding_attention", "full_attention")}
KDA = {"linear_attn_config": {"num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4,
                              "kda_layers": [1], "full_attn_layers": [2]}}
LONGCAT = {"attention_method": "MLA", "zero_expert_type": "identity", "zero_expert_num": 2,
           "mla_scale_q_lora": True, "mla_scale_kv_lora": True}
GEMMA3N = {**WINDOWS, "num_hidden_layers": 4, "layer_types": WINDOWS["layer_types"] * 2,
           "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB,
           "rope_local_base_freq": 10000.0, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
           "intermediate_size": [64, 64, 64, 64],
           "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "altup_coef_clip": 120.0,
           "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 4}
GEMMA4 = {**WINDOWS, "model_type": "gemma4_text", "num_hidden_layers": 4,
          "layer_types": WINDOWS["layer_types"] * 2, "num_kv_shared_layers": 2,
          "global_head_dim": 16, "vocab_size_per_layer_input": VOCAB,
          "hidden_size_per_layer_input": 8, "rope_parameters": ROPE_BY_TYPE}
LLAMA4 = {"num_experts_per_tok": 1, "no_rope_layers": [1, 0], "attention_chunk_size": 8,
          "interleave_moe_layer_step": 2}
LFM2 = {"layer_types": ["conv", "full_attention"], "block_dim": 32, "block_ff_dim": 64,
        "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
        "use_expert_bias": True}
HYBRID = {"num_hidden_layers": 2, "full_attention_interval": 2}
NEMOTRON_NAS_BLOCK = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}}


def _with_text(**text: Any) -> dict[str, Any]:
    return {"text_config": {**COMMON, **text}}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afm7": {"num_kv_reuse_layers": 1, "num_layers": 3, "hidden_dim": 32},
    "afmoe": WINDOWS,
    "apertus": {"post_norm": False, "hidden_act": "xielu"},
    "baichuan_m1": {"sliding_window_layers": [0], "tie_word_embeddings": False},
    "bailing_hybrid": {},
    "bailing_moe": {},
    "bailing_moe_linear": {},
    "bailing_moe_v3": {},
    "cohere": {},
    "cohere2": {},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek": {},
    "deepseek_v2": {"rope_scaling": YARN},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "deepseek_v41": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone": {},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {**WINDOWS, "is_moe_layer": [False, True]},
    "falcon_h1": {},
    "gear": {"layer_types": ["conv_mixer", "sliding_attention", "full_attention"],
             "num_hidden_layers": 3},
    "gemma": {},
    "gemma2": {},
    "gemma3": _with_text(model_type="gemma3_text"),
    "gemma3_text": {},
    "gemma3n": _with_text(model_type="gemma3n_text", **GEMMA3N),
    "gemma4": _with_text(**GEMMA4),
    "gemma4_text": GEMMA4,
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 10000.0}},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": WINDOWS,
    "gptj": {},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "helium": {},
    "hunyuan": {"use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2,
                "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": {"loop_window_size": 4},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
              "expert_layer_period": 2},
    "kimi_k25": _with_text(rope_scaling=YARN),
    "kimi_k3": _with_text(**KDA, hidden_act="situ"),
    "kimi_linear": KDA,
    "kimi_vl": _with_text(),
    "laguna": {**WINDOWS, "rope_parameters": ROPE_BY_TYPE, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2-vl": _with_text(model_type="lfm2", **LFM2),
    "lfm2": LFM2,
    "lfm2_moe": LFM2,
    "lille-130m": {"n_embd": 96},
    "llama": WINDOWS,
    "llama4": _with_text(model_type="llama4_text", **LLAMA4, num_hidden_layers=4),
    "llama4_text": LLAMA4,
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": {**LONGCAT, "ngram_vocab_size_ratio": 3, "emb_neighbor_num": 2,
                            "emb_split_num": 2},
    "mamba": {},
    "mamba2": {"hidden_size": 16},
    "mellum": {**WINDOWS, "rope_parameters": ROPE_BY_TYPE},
    "mimo": {},
    "mimo_v2_flash": {"hybrid_layer_pattern": [1, 0], "moe_layer_freq": [0, 1],
                      "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
                      "swa_rope_theta": 10000.0, "swa_num_attention_heads": 4,
                      "swa_num_key_value_heads": 2, "swa_head_dim": 8, "swa_v_head_dim": 8},
    "minicpm": {},
    "minicpm3": {"rope_scaling": {}},
    "minimax": {},
    "minimax_m3_vl": _with_text(moe_layer_freq=[0, 1]),
    "ministral3": {**WINDOWS, "rope_parameters": LLAMA4_ROPE},
    "mistral3": _with_text(model_type="ministral3", rope_parameters=LLAMA4_ROPE, **WINDOWS),
    "mistral4": {"rope_parameters": LLAMA4_ROPE},
    "mixtral": {},
    "muse_glimmer": {**WINDOWS, "layer_rope_theta": [10000.0, 0.0]},
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron-nas": {"block_configs": [NEMOTRON_NAS_BLOCK] * 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "E"]},
    "olmo2": {},
    "olmo3": WINDOWS,
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "olmoe": {},
    "openelm": {"num_query_heads": [4, 4], "num_kv_heads": [2, 2], "ffn_multipliers": [2.0, 2.0],
                "ffn_dim_divisor": 8},
    "phi": {},
    "phi3": {"partial_rotary_factor": 1.0},
    # It masks tokens by their numbers, which must exist.
    "phi3small": {"vocab_size": 100_352, "dense_attention_every_n_layers": 2,
                  "gegelu_limit": 20.0},
    "phimoe": {},
    "phixtral": {},
    "pixtral": _with_text(model_type="llama"),
    "plamo": {"n_shared_head": 2},
    "plamo2": {"num_hidden_layers": 4},
    "plamo3": {},
    "qwen": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen2_vl": _with_text(model_type="qwen2"),
    "qwen3": {},
    "qwen3_5": _with_text(**HYBRID, num_experts=0),
    "qwen3_5_moe": _with_text(**HYBRID),
    "qwen3_moe": {},
    "qwen3_next": HYBRID,
    "qwen3_vl": _with_text(model_type="qwen3"),
    "qwen3_vl_moe": _with_text(model_type="qwen3_moe"),
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8,
              "decay_low_rank_dim": 8},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "spark2_5": {**WINDOWS, "hidden_act": "gelu", "rope_parameters": ROPE_BY_TYPE},
    "stablelm": {},
    "starcoder2": {},
    "step3p5": WINDOWS,
    "talkie": {},
    "telechat3": {},
    "youtu_llm": {},
}
# fmt: on

NOT_BUILT = {
    "bitnet": "it needs Metal",
    "muse_spark": "it needs Metal",
    "olmo": "it needs the package ai2-olmo",
    "prism_hadamard_qwen35": "its layers are those of a given quantised checkpoint",
}


def build(model_type: str, seed: int = 0) -> nn.Module:
    """Make a tiny model of `model_type` in float32 and eval mode, with weights from `seed`."""
    return random_model({"model_type": model_type, **COMMON, **ARCHITECTURES[model_type]}, seed)


def model_types() -> list[str]:
    """Return the names of mlx-lm's model types: its modules that define a model."""
    folder = Path(next(iter(mlx_lm.models.__path__)))
    texts = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    return sorted(name for name, text in texts.items() if DEFINES_A_MODEL.search(text))


def vocab_size(model_type: str) -> int:
    """Return how many tokens `build` gives a type."""
    return ARCHITECTURES[model_type].get("vocab_size", VOCAB)
