"""Phi3ForCausalLM, Phi-3, 3.5 and 4-mini: Llama whose checkpoints hold fused projections.

One tensor holds query, key and value, one gate and up. The rotary embedding is longrope in the
128k models, and turns three quarters of a head in Phi-4-mini.
"""

from __future__ import annotations

from octavo.models.config import ModelConfig
from octavo.models.hf_config import HfConfig
from octavo.models.llama import LlamaForCausalLM


class Phi3ForCausalLM(LlamaForCausalLM):
    """See LlamaForCausalLM."""

    @classmethod
    def read_config(cls, hf: HfConfig) -> ModelConfig:
        rope = hf.rope()
        if rope.rope_type == "yarn":
            # Early files call it so; the parameters are longrope's.
            rope = hf.rope(rope_parameters={**_scaling(hf), "rope_type": "longrope"})
        return hf.config(rope=rope, fused_projections=True, sliding_windows=hf.windows())


def _scaling(hf: HfConfig) -> dict[str, object]:
    return dict(hf.values.get("rope_parameters") or hf.values.get("rope_scaling") or {})
