"""GGUF's tensor names and row order against HF's."""

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
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
# Read with the config (see RopeConfig.freq_factors), not by the model.
ROPE_FREQS = "rope_freqs.weight"
IGNORED = frozenset({ROPE_FREQS})


def from_hf(name: str) -> str:
    """GGUF's name of a tensor of the Llama family.

    Raises:
        KeyError: GGUF has none.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return _TOP[name]
    layer, module, kind = match.groups()
    return f"blk.{layer}.{_IN_LAYER[module]}.{kind}"


def deinterleaved_rows(num_rows: int, num_heads: int) -> Tensor:
    """int64 [num_rows]: row i of HF's weight is row ``result[i]`` of the file's.

    HF turns dimension j of a head together with j + head_dim / 2; llama.cpp stores each such pair
    side by side.
    """
    rows = torch.arange(num_rows).view(num_heads, num_rows // num_heads // 2, 2)
    return rows.transpose(1, 2).reshape(-1)
