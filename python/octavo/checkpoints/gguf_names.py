"""GGUF's tensor names and row order, from HF's."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    # LFM2's output norm, whatever its name.
    "model.embedding_norm.weight": "token_embd_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    # Phi-3's file calls gate and up together "up".
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    # Hunyuan's head norms.
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.key_layernorm": "attn_k_norm",
    # LFM2.
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    # Mamba-2.
    "mamba.in_proj": "ssm_in",
    "mamba.conv1d": "ssm_conv1d",
    "mamba.norm": "ssm_norm",
    "mamba.out_proj": "ssm_out",
    # Routers, experts, and those that all tokens share.
    "feed_forward.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.wg": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{
        f"{block}.experts.{name}": f"ffn_{theirs}_exps"
        for block in ("mlp", "block_sparse_moe", "feed_forward")
        for names, theirs in (
            (("gate_proj", "w1"), "gate"),
            (("up_proj", "w3"), "up"),
            (("down_proj", "w2"), "down"),
        )
        for name in names
    },
    **{
        f"{shared}.{name}_proj": f"ffn_{name}_shexp"
        for shared in ("mlp.shared_expert", "mlp.shared_experts", "mlp.shared_mlp", "shared_mlp")
        for name in ("gate", "up", "down")
    },
}
# Parameters that are no module's weight or bias.
_PARAMETERS = {
    "self_attn.sinks": "attn_sinks.weight",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.dt_bias": "ssm_dt.bias",
    **{f"mlp.experts.{name}_proj_bias": f"ffn_{name}_exps.bias" for name in ("gate", "up", "down")},
    **{
        f"{block}.e_score_correction_bias": "exp_probs_b.bias"
        for block in ("mlp.gate", "mlp.moe_statics", "block_sparse_moe")
    },
    "feed_forward.expert_bias": "exp_probs_b.bias",
}
# Gemma 2 and 3 have norms before and after each block, and so has GLM-4; OLMo 2 has those after it.
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_AFTER_ATTENTION = {"post_attention_layernorm": "post_attention_norm"}
_OF_ARCHITECTURE = {
    "gemma2": _FOUR_NORMS,
    "gemma3": _FOUR_NORMS,
    "glm4": {
        "post_self_attn_layernorm": "post_attention_norm",
        "post_mlp_layernorm": "post_ffw_norm",
    },
    "glm4moe": _AFTER_ATTENTION,
    "gpt-oss": _AFTER_ATTENTION,
    "olmo2": _FOUR_NORMS,
}
# Architectures whose queries and keys llama.cpp stores with the halves of a head interleaved.
INTERLEAVED = frozenset({"granite", "granitehybrid", "granitemoe", "llama"})
# Held as -exp of itself.
DECAY = ".A_log"
_PARAMETER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
# Read with the config (see RopeConfig), not by the model.
ROPE_FREQS = "rope_freqs.weight"
ROPE_SHORT = "rope_factors_short.weight"
ROPE_LONG = "rope_factors_long.weight"
IGNORED = frozenset({ROPE_FREQS, ROPE_SHORT, ROPE_LONG})


def from_hf(name: str, arch: str = "llama") -> str:
    """GGUF's name of a tensor in a file of the given architecture.

    Raises:
        KeyError: GGUF has none.
    """
    parameter = _PARAMETER.fullmatch(name)
    if parameter is not None and parameter[2] in _PARAMETERS:
        return f"blk.{parameter[1]}.{_PARAMETERS[parameter[2]]}"
    match = _LAYER.fullmatch(name)
    if match is None:
        return _TOP[name]
    layer, module, kind = match.groups()
    own = _OF_ARCHITECTURE.get(arch, {})
    return f"blk.{layer}.{own.get(module) or _IN_LAYER[module]}.{kind}"


def deinterleaved_rows(num_rows: int, num_heads: int) -> Tensor:
    """int64 [num_rows]: row i of HF's weight is row ``result[i]`` of the file's.

    HF turns dimension j of a head together with j + head_dim / 2; llama.cpp stores each such pair
    side by side.
    """
    rows = torch.arange(num_rows).view(num_heads, num_rows // num_heads // 2, 2)
    return rows.transpose(1, 2).reshape(-1)
