"""Shapes of hybrids for bench/cpu_models.py: the tensors and keys of their GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shapes import Shape

if TYPE_CHECKING:
    import gguf
    import numpy as np


@dataclass(frozen=True)
class Lfm2Shape(Shape):
    """LFM2: short convolutions in all layers but ``attention``."""

    attention: tuple[int, ...] = ()
    width: int = 3

    output_norm = "token_embd_norm"

    @property
    def attention_layers(self) -> int:
        return len(self.attention)

    def matrices(self, layer: int) -> dict[str, tuple[int, int]]:
        found, d = super().matrices(layer), self.hidden
        if layer in self.attention:
            return found
        kept = {name: size for name, size in found.items() if name.startswith("ffn")}
        return kept | {"shortconv.in_proj": (3 * d, d), "shortconv.out_proj": (d, d)}

    def vectors(self, layer: int) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        found = super().vectors(layer)
        if layer in self.attention:
            return found | self.head_norms()
        taps = np.full((self.hidden, self.width), 1 / self.width, np.float32)
        return found | {"shortconv.conv.weight": taps}

    def write_keys(self, writer: gguf.GGUFWriter) -> None:
        super().write_keys(writer)
        writer.add_shortconv_l_cache(self.width)

    def kv_heads_of(self) -> Any:
        return [self.kv_heads if i in self.attention else 0 for i in range(self.layers)]


@dataclass(frozen=True)
class Qwen35Shape(Shape):
    """Qwen3.5: the gated delta rule in three layers of four, with ``states`` heads of ``size``."""

    states: int = 16
    size: int = 128
    width: int = 4

    ffn_norm = "post_attention_norm"

    @property
    def attention_layers(self) -> int:
        return self.layers // 4

    def matrices(self, layer: int) -> dict[str, tuple[int, int]]:
        found, d, inner = super().matrices(layer), self.hidden, self.states * self.size
        if layer % 4 == 3:
            # Each head's query is followed by its gate.
            return found | {"attn_q": (2 * self.heads * self.head_dim, d)}
        kept = {name: size for name, size in found.items() if name.startswith("ffn")}
        return kept | {
            "attn_qkv": (3 * inner, d),
            "attn_gate": (inner, d),
            "ssm_alpha": (self.states, d),
            "ssm_beta": (self.states, d),
            "ssm_out": (d, inner),
        }

    def vectors(self, layer: int) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        found = super().vectors(layer)
        if layer % 4 == 3:
            return found | self.head_norms()
        taps = (3 * self.states * self.size, self.width)
        return found | {
            "ssm_conv1d.weight": np.full(taps, 1 / self.width, np.float32),
            "ssm_dt.bias": np.zeros(self.states, np.float32),
            "ssm_a": np.full(self.states, -1.0, np.float32),
            "ssm_norm.weight": np.ones(self.size, np.float32),
        }

    def write_keys(self, writer: gguf.GGUFWriter) -> None:
        super().write_keys(writer)
        writer.add_full_attention_interval(4)
        writer.add_rope_dimension_sections([11, 11, 10, 0])
        writer.add_ssm_conv_kernel(self.width)
        writer.add_ssm_state_size(self.size)
        writer.add_ssm_group_count(self.states)
        writer.add_ssm_inner_size(self.states * self.size)
        writer.add_ssm_time_step_rank(self.states)


LFM2_1_2B = Lfm2Shape(
    *("lfm2", 16, 2048, 32, 8, 64, 8192, 65_536, True),
    attention=(2, 5, 8, 10, 12, 14),
)
QWEN3_5_0_8B = Qwen35Shape("qwen35", 24, 1024, 8, 2, 256, 3584, 248_320, True, rotated=64)
