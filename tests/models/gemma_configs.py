"""Settings of tiny Gemma 3n and Gemma 4 models that tests of families and of files share."""

from __future__ import annotations

from typing import Any

LOCAL = "sliding_attention"
GLOBAL = "full_attention"
_LAYERS: dict[str, Any] = {
    "sliding_window": 24,
    "hidden_size_per_layer_input": 12,
    "initializer_range": 0.15,
}
GEMMA_3N: dict[str, Any] = {
    **_LAYERS,
    "num_hidden_layers": 6,
    "layer_types": [LOCAL, GLOBAL] * 3,
    "vocab_size_per_layer_input": 290,
    "laurel_rank": 8,
}
# Its last layers read the caches of earlier ones.
GEMMA_3N_READERS = {
    **GEMMA_3N,
    "head_dim": 40,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.5, 0.0],
}
GEMMA_4: dict[str, Any] = {
    **_LAYERS,
    # More layers would have float32's noise, transformers' own, grow beyond 1e-4.
    "num_hidden_layers": 4,
    "layer_types": [LOCAL, GLOBAL] * 2,
    "vocab_size_per_layer_input": 300,
}
GEMMA_4_READERS = {
    **GEMMA_4,
    "head_dim": 40,
    "global_head_dim": 80,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 9.0,
}
EXPERTS: dict[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 5,
    "top_k_experts": 2,
    "moe_intermediate_size": 40,
}
# Values that are keys, beside experts.
GEMMA_4_EXPERTS = {
    **GEMMA_4,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    **EXPERTS,
}
