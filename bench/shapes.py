"""Shape: a decoder's sizes, and the tensors and keys of its GGUF file, for bench/cpu_models.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import gguf
    import numpy as np


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; ``arch``: GGUF's name of its family; ``rotated``: of a head; 0: all."""

    arch: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    rotated: int = 0

    # GGUF's names of norms.
    ffn_norm: ClassVar[str] = "ffn_norm"
    output_norm: ClassVar[str] = "output_norm"

    @property
    def attention_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.layers

    def matrices(self, layer: int) -> dict[str, tuple[int, int]]:
        """A layer's matrices [N, K] by GGUF's names."""
        d, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "attn_q": (q, d),
            "attn_k": (kv, d),
            "attn_v": (kv, d),
            "attn_output": (d, q),
            "ffn_gate": (self.intermediate, d),
            "ffn_up": (self.intermediate, d),
            "ffn_down": (d, self.intermediate),
        }

    def vectors(self, layer: int) -> dict[str, np.ndarray[Any, Any]]:
        """A layer's float32 tensors."""
        import numpy as np

        ones = np.ones(self.hidden, np.float32)
        found = {"attn_norm.weight": ones, f"{self.ffn_norm}.weight": ones}
        return found | (self.head_norms() if self.arch == "qwen3" else {})

    def head_norms(self) -> dict[str, np.ndarray[Any, Any]]:
        """Norms of each head's query and key."""
        import numpy as np

        ones = np.ones(self.head_dim, np.float32)
        return {"attn_q_norm.weight": ones, "attn_k_norm.weight": ones}

    def write_keys(self, writer: gguf.GGUFWriter) -> None:
        """The keys of its sizes."""
        writer.add_context_length(16_384)
        writer.add_embedding_length(self.hidden)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(self.intermediate)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads_of())
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.rotated or self.head_dim)
        writer.add_rope_freq_base(500_000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(self.vocabulary)

    def kv_heads_of(self) -> Any:
        """Of all layers, or of each."""
        return self.kv_heads

    def layer_weights(self) -> int:
        """Weights of all layers."""
        layers = (self.matrices(layer).values() for layer in range(self.layers))
        return sum(n * k for sizes in layers for n, k in sizes)

    def kv_bytes(self) -> int:
        """Bytes of a token's keys and values in bfloat16."""
        return self.attention_layers * 2 * self.kv_heads * self.head_dim * 2
