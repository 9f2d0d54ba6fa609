"""GGUF's tensor names and row order, from HF's."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
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
}
# Gemma 2 and 3 have norms before and after each block.
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Architectures whose queries and keys llama.cpp stores with the halves of a head interleaved.
INTERLEAVED = frozenset({"llama"})
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
    match = _LAYER.fullmatch(name)
    if match is None:
        return _TOP[name]
    layer, module, kind = match.groups()
    four_norms = arch in ("gemma2", "gemma3") and module in _FOUR_NORMS
    theirs = _FOUR_NORMS[module] if four_norms else _IN_LAYER[module]
    return f"blk.{layer}.{theirs}.{kind}"


def deinterleaved_rows(num_rows: int, num_heads: int) -> Tensor:
    """int64 [num_rows]: row i of HF's weight is row ``result[i]`` of the file's.

    HF turns dimension j of a head together with j + head_dim / 2; llama.cpp stores each such pair
    side by side.
    """
    rows = torch.arange(num_rows).view(num_heads, num_rows // num_heads // 2, 2)
    return rows.transpose(1, 2).reshape(-1)
