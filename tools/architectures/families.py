"""A tiny random model of every causal-LM family that transformers knows, one config each.

A family's sizes are found by name: whatever of its default config is called like a width, a depth
or a count is set to a few units. What a family needs beyond that is in `SPECIAL`, what cannot be a
language model of its own on text is in `NOT_TEXT`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["families", "make_model", "tiny_config"]

VOCABULARY = 271
POSITIONS = 256

SIZES: dict[str, Any] = {
    # widths
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim_model": 32, "embedding_size": 32,
    "emb_dim": 32, "word_embed_proj_dim": 32, "input_dim": 32, "hidden_dim": 32,
    "head_dim": 8, "d_kv": 8, "attention_head_size": 8, "dim_head": 8, "d_head": 8,
    "global_head_dim": 8,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "d_inner": 64, "dim_ff": 64,
    "ffn_hidden_size": 64, "dff": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "feed_forward_size": 64, "mlp_hidden_size": 64, "shared_intermediate_size": 64,
    "intermediate_size_mlp": 64, "moe_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "dense_intermediate_size": 64, "attention_hidden_size": 32, "lru_width": 32,
    # depths
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "swa_num_key_value_heads": 2, "swa_num_attention_heads": 4,
    "swa_head_dim": 8, "swa_v_head_dim": 8, "v_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "qk_head_dim": 8,
    # experts
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    # states
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_d_ssm": 64, "mamba_headdim": 8,
    "n_mamba_heads": 2, "state_size": 8, "ssm_state_size": 8, "time_step_rank": 4,
    "mamba_ngroups": 1,
    # vocabulary and positions
    "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "n_positions": POSITIONS,
    "n_ctx": POSITIONS, "max_sequence_length": POSITIONS, "max_seq_len": POSITIONS,
    "context_length": POSITIONS, "original_max_position_embeddings": POSITIONS,
    "sliding_window": 128, "attention_window": 128,
}  # fmt: skip
"""What a size is set to, by the name that a config has for it."""

COMMON: dict[str, Any] = {
    "bos_token_id": 269,
    "eos_token_id": 270,
    "pad_token_id": 268,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "is_decoder": True,
}
"""What every family gets whose config has it."""

LAYER_TYPES = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
"""Lists with a kind for each layer: one layer of each kind is made."""

_MANY_POSITIONS = {"max_position_embeddings": 640}  # they count from the pad token's id on
_MLA = {"num_key_value_heads": 4, "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "qk_head_dim": 16}  # fmt: skip
_ONE_OF_EACH = {"layer_types": ["linear_attention", "full_attention"]}
_GEMMA4 = {
    "per_layer_config": {"1": {"head_dim": 16}},
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip

_DOTS3 = {"num_key_value_heads": 4, "head_dim": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
          "per_layer_config": {"1": {"v_head_dim": 16}}, "index_topk": 16,
          "index_head_dim": 16, "index_n_heads": 2,
          "shared_experts_intermediate_size": 32}  # fmt: skip
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
          "indexer_compress_ratio": 4, "ngram_vocab_size_base": 300, "ple_embed_dim": 32,
          "split_ngram_parts": 1, "hc_lowrank": 8}  # fmt: skip

SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": {**_MLA, **_ONE_OF_EACH, "layer_group_size": 2, "linear_head_dim": 8,
                       "linear_num_heads": 4, "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "camembert": _MANY_POSITIONS,
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_config": {"hidden_size_global": 32},
            "decoder_config": {"hidden_size_global": 32}},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0}
        for kind in ("full_attention", "sliding_attention")}},
    "data2vec-text": _MANY_POSITIONS,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_top_k": 2}},
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v3": _MLA,
    "deepseek_v32": {**_MLA, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 2},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8,
                    "index_topk": 16, "num_key_value_heads": 1, "compress_rates": {
                        "compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"adapter_in_dim": 32}},
    "dots3_note_text": _DOTS3,
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"],
                     "num_kv_shared_layers": 0, "intermediate_size": 64, "laurel_rank": 8,
                     "hidden_size_per_layer_input": 8, "altup_num_inputs": 2,
                     "vocab_size_per_layer_input": VOCABULARY,
                     "activation_sparsity_pattern": [0.5, 0.0]},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": {**_MLA, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 128},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {**_MLA, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**_MLA, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "minicpm3": _MLA,
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16],
                 "attn_layers": ["local", "lsh"], "num_buckets": 2, "hash_seed": 1},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roberta": _MANY_POSITIONS,
    "roberta-prelayernorm": _MANY_POSITIONS,
    "roc_bert": {"pronunciation_embed_dim": 8, "pronunciation_vocab_size": VOCABULARY,
                 "shape_embed_dim": 8, "shape_vocab_size": VOCABULARY},
    "xglm": {"attention_heads": 4, **_MANY_POSITIONS},
    "xlm-roberta": _MANY_POSITIONS,
    "xlm-roberta-xl": _MANY_POSITIONS,
    "xmod": {**_MANY_POSITIONS, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "prophetnet": _MANY_POSITIONS,
    "xlstm": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2},
    "youtu": _MLA,
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16,
              "attention_hidden_size": 64, "num_key_value_heads": 4, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 4,
               "use_mamba_kernels": False, "n_mamba_heads": 8, "adapter_rank": 8,
               "attention_hidden_size": 64, "attention_head_dim": 16},
}  # fmt: skip
"""What a family needs that its names do not tell."""

_AUDIO = "a decoder of audio codes, not of text"
_ASSISTANT = "drafts tokens from the hidden states of another model"
NOT_TEXT: dict[str, str] = {
    "gemma3n": "needs the package timm for its eyes; gemma3n_text stands for its language model",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _AUDIO,
    "musicgen_melody": _AUDIO,
}
"""Families of the mapping that are no language model on text alone, and why."""


def families() -> list[str]:
    """Return the name of every causal-LM family of the installed transformers, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> Any:
    """Return a config of the family with small sizes and the tiny tokenizer's vocabulary."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    return kind(**_shrunk(kind(), SPECIAL.get(family, {})))


def _shrunk(default: Any, special: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that make a small config of the default's class."""
    from transformers import PreTrainedConfig

    arguments: dict[str, Any] = {}
    for name in default.to_dict():
        value = default.__dict__.get(name)
        if isinstance(value, PreTrainedConfig):
            arguments[name] = _shrunk(value, special.get(name, {}))
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            arguments[name] = SIZES[name]
        elif name in COMMON:
            arguments[name] = COMMON[name]
        elif name in LAYER_TYPES and value:
            kinds = list(dict.fromkeys(value))
            arguments[name] = kinds if len(kinds) > 1 else kinds * 2
    own = {
        name: value
        for name, value in special.items()
        if not isinstance(value, dict) or name not in arguments
    }
    arguments |= own
    layers = max((len(arguments.get(name) or ()) for name in LAYER_TYPES), default=0)
    if layers:
        for name in LAYER_TYPES:
            if kinds := arguments.get(name):
                arguments[name] = [*kinds, *[kinds[-1]] * (layers - len(kinds))]
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            if name in arguments:
                arguments[name] = layers
    return arguments


def make_model(family: str, directory: Path) -> Any:
    """Save a random model of the family with the tiny tokenizer; return it, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith.testing.tiny import tiny_tokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model
