"""GGUF's tensor names and row order, from HF's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    # LFM2's output norm, whatever its name.
    "model.embedding_norm.weight": "token_embd_norm.weight",
    "lm_head.weight": "output.weight",
    # Encoders of BERT's kind.
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
    # Mamba's, and hybrids'.
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    # Families with LayerNorm.
    "transformer.word_embeddings.weight": "token_embd.weight",
    "transformer.wte.weight": "token_embd.weight",
    "transformer.norm_f.weight": "output_norm.weight",
    "lm_head.bias": "output.bias",
    **{
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in (
            ("model.final_layernorm", "output_norm"),
            ("model.norm", "output_norm"),
            ("transformer.ln_f", "output_norm"),
            ("transformer.word_embeddings_layernorm", "token_embd_norm"),
        )
        for kind in ("weight", "bias")
    },
    # Gemma 3n's and 4's, of each layer's vectors.
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "model.altup_projections.weight": "altup_proj.weight",
    "model.altup_unembed_projections.weight": "altup_unembd_proj.weight",
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
    # Families with LayerNorm.
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "self_attn.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "ln_attn": "attn_norm_2",
    "ln_mlp": "attn_norm",
    "norm_1": "attn_norm",
    "norm_2": "ffn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.out_proj": "attn_output",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
    # Both forms of Mamba.
    **{
        f"{mixer}.{name}": theirs
        for mixer in ("mamba", "mixer")
        for name, theirs in (("x_proj", "ssm_x"), ("dt_proj", "ssm_dt"))
    },
    **{f"mamba.{name}_layernorm": f"ssm_{name}_norm" for name in ("dt", "b", "c")},
    "mamba.in_proj": "ssm_in",
    "mamba.conv1d": "ssm_conv1d",
    "mamba.norm": "ssm_norm",
    "mamba.out_proj": "ssm_out",
    **{
        f"mixer.{name}": theirs
        for name, theirs in (
            ("in_proj", "ssm_in"),
            ("conv1d", "ssm_conv1d"),
            ("norm", "ssm_norm"),
            ("out_proj", "ssm_out"),
            ("q_proj", "attn_q"),
            ("k_proj", "attn_k"),
            ("v_proj", "attn_v"),
            ("o_proj", "attn_output"),
            ("up_proj", "ffn_up"),
            ("down_proj", "ffn_down"),
            ("gate", "ffn_gate_inp"),
            ("fc1_latent_proj", "ffn_latent_down"),
            ("fc2_latent_proj", "ffn_latent_up"),
        )
    },
    # Falcon-H1.
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    # The only norm of a layer of Mamba-2 and Nemotron-H.
    "norm": "attn_norm",
    # BERT.
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
    # The gated delta rule.
    "linear_attn.in_proj_qkvz": "ssm_in",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    # Kimi's delta attention.
    **{f"self_attn.{name}_conv1d": f"ssm_conv1d_{name}" for name in "qkv"},
    **{f"self_attn.{name}_proj": f"ssm_{name}" for name in ("f_a", "f_b", "g_a", "g_b")},
    "self_attn.b_proj": "ssm_beta",
    "self_attn.o_norm": "ssm_norm",
    # Gemma 3n and 4.
    "altup.correction_coefs": "altup_correct_coef",
    "altup.modality_router": "altup_router",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.router_norm": "altup_router_norm",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "post_per_layer_input_norm": "post_norm",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "router.proj": "ffn_gate_inp",
    **{f"experts.{name}_proj": f"ffn_{name}_exps" for name in ("gate", "up", "down")},
    # Latent attention.
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    # Routers, experts, and those that all tokens share.
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.router": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.wg": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{
        f"{block}.experts.{name}": f"ffn_{theirs}_exps"
        for block in ("mlp", "block_sparse_moe", "feed_forward", "mixer")
        for names, theirs in (
            (("gate_proj", "w1"), "gate"),
            (("up_proj", "w3"), "up"),
            (("down_proj", "w2"), "down"),
        )
        for name in names
    },
    **{
        f"{shared}.{name}_proj": f"ffn_{name}_shexp"
        for shared in (
            "block_sparse_moe.shared_experts",
            "feed_forward.shared_expert",
            "mlp.shared_expert",
            "mlp.shared_experts",
            "mlp.shared_mlp",
            "mixer.shared_experts",
            "shared_mlp",
        )
        for name in ("gate", "up", "down")
    },
}
# Parameters that are no module's weight or bias.
_PARAMETERS = {
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.attention_sink_bias": "attn_sinks.weight",
    "altup.correct_output_scale": "altup_correct_scale.weight",
    "layer_scalar": "layer_output_scale.weight",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "router.scale": "ffn_gate_inp.scale",
    # Falcon-H1's, without a suffix.
    "pre_ff_layernorm.weight": "ffn_norm",
    **{
        f"{mixer}.{name}": theirs
        for mixer in ("linear_attn", "mamba", "mixer", "self_attn")
        for name, theirs in (("A_log", "ssm_a"), ("D", "ssm_d"), ("dt_bias", "ssm_dt.bias"))
    },
    **{f"mlp.experts.{name}_proj_bias": f"ffn_{name}_exps.bias" for name in ("gate", "up", "down")},
    **{
        f"{block}.e_score_correction_bias": "exp_probs_b.bias"
        for block in (
            "block_sparse_moe",
            "block_sparse_moe.gate",
            "mixer.gate",
            "mlp.gate",
            "mlp.moe_statics",
        )
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
    "gemma3n": _FOUR_NORMS,
    "gemma4": _FOUR_NORMS,
    "glm4": {
        "post_self_attn_layernorm": "post_attention_norm",
        "post_mlp_layernorm": "post_ffw_norm",
    },
    "glm4moe": _AFTER_ATTENTION,
    "gpt-oss": _AFTER_ATTENTION,
    "jamba": {"pre_ff_layernorm": "ffn_norm"},
    "olmo2": _FOUR_NORMS,
    "qwen35": _AFTER_ATTENTION,
    "qwen35moe": _AFTER_ATTENTION,
    "qwen3next": _AFTER_ATTENTION,
}
# Architectures whose queries and keys llama.cpp stores with the halves of a head interleaved.
INTERLEAVED = frozenset({"granite", "granitehybrid", "granitemoe", "llama", "mistral3", "smollm3"})
# The layer and the module of a tensor in GGUF's names.
BLOCK = re.compile(r"blk\.(\d+)\.(\w+)")
# Held as -exp of itself.
DECAY = ".A_log"
_LAYERS = r"(?:(?:model|backbone)\.layers|encoder\.layer|transformer\.(?:h|blocks))"
_PARAMETER = re.compile(_LAYERS + r"\.(\d+)\.(.+)")
_LAYER = re.compile(_LAYERS + r"\.(\d+)\.(.+)\.(weight|bias)")
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
    own = _OF_ARCHITECTURE.get(arch, {})
    match = _LAYER.fullmatch(name)
    parameter = _PARAMETER.fullmatch(name)
    if parameter is not None and parameter[2] in _PARAMETERS and not (match and match[2] in own):
        return f"blk.{parameter[1]}.{_PARAMETERS[parameter[2]]}"
    if match is None:
        return _TOP[name]
    layer, module, kind = match.groups()
    return f"blk.{layer}.{own.get(module) or _IN_LAYER[module]}.{kind}"


def deinterleaved_rows(num_rows: int, num_heads: int) -> Tensor:
    """int64 [num_rows]: row i of HF's weight is row ``result[i]`` of the file's.

    HF turns dimension j of a head together with j + head_dim / 2; llama.cpp stores each such pair
    side by side.
    """
    rows = torch.arange(num_rows).view(num_heads, num_rows // num_heads // 2, 2)
    return rows.transpose(1, 2).reshape(-1)


@dataclass(frozen=True, slots=True)
class TiledHeads:
    """The order of value heads in Qwen3.5's files, which have more of them than key heads.

    config.json's have all value heads of a key head together, llama.cpp the first of every key
    head, then the second, and so on.
    """

    num_keys: int
    num_values: int
    keys: int  # rows of queries and keys together, before those of values

    @staticmethod
    def of(metadata: Mapping[str, Any]) -> TiledHeads | None:
        """A file's; None where both orders are one."""
        arch = str(metadata.get("general.architecture"))
        if arch not in ("qwen35", "qwen35moe"):
            return None
        num_keys = int(metadata[f"{arch}.ssm.group_count"])
        num_values = int(metadata[f"{arch}.ssm.time_step_rank"])
        if num_keys == num_values:
            return None
        return TiledHeads(
            num_keys, num_values, 2 * num_keys * int(metadata[f"{arch}.ssm.state_size"])
        )

    def rows(self, name: str, num_rows: int) -> Tensor | None:
        """As ``deinterleaved_rows``, for a tensor of the file's; None: its order is kept."""
        if name in ("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt", "attn_gate"):
            return self._untiled(num_rows)
        if name in ("attn_qkv", "ssm_conv1d"):
            values = self._untiled(num_rows - self.keys) + self.keys
            return torch.cat([torch.arange(self.keys), values])
        return None

    def _untiled(self, num_rows: int) -> Tensor:
        rows = torch.arange(num_rows).view(-1, self.num_keys, num_rows // self.num_values)
        return rows.transpose(0, 1).reshape(-1)
