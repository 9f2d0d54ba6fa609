"""LatentAttention: attention over one cached row for all heads, DeepSeek's MLA.

A token's row is its rotated key, which all heads share, and the latent that its keys and values
unfold from. Nothing is unfolded: queries are brought to the latent's space before attention, and
results back from it afterwards (arXiv 2405.04434, "absorbed").
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.opset import OpSet
from octavo.kernels.reference import rotate
from octavo.layers.context import StepContext


class LatentAttention:
    """Rope, store this step's rows, attend to all of the request's.

    ``w_k`` [H, Dn, L], ``w_v`` [H, Dv, L]: from the latent to each head's key and value.
    ``cos_sin``: float32 [max_model_len, R]. ``k_cache``: [num_blocks, 1, block_size, R + L]; empty
    until the runner binds it; ``v_cache`` is the same tensor.
    """

    __slots__ = (
        "_attend",
        "_store",
        "_w_k",
        "_w_v",
        "cos_sin",
        "interleaved",
        "k_cache",
        "scale",
        "v_cache",
    )

    def __init__(
        self,
        ops: OpSet,
        w_k: Tensor,
        w_v: Tensor,
        *,
        cos_sin: Tensor,
        scale: float,
        interleaved: bool,
    ) -> None:
        self._store = ops.store_latent
        self._attend = ops.latent_attention
        self._w_k, self._w_v = w_k, w_v.transpose(1, 2)
        self.cos_sin = cos_sin
        self.scale = scale
        self.interleaved = interleaved
        self.k_cache = torch.empty(0)
        self.v_cache = torch.empty(0)

    def __call__(self, q: Tensor, latent: Tensor, key: Tensor, ctx: StepContext) -> Tensor:
        """q [T, H, Dn + R], latent [T, L] and key [T, R] of this step's tokens -> [T, H * Dv]."""
        tokens, size = len(q), latent.shape[1]
        nope = self._w_k.shape[1]
        table = self.cos_sin[ctx.positions.long()][:, None, :]
        key = rotate(key.float()[:, None], table, self.interleaved)[:, 0].to(q.dtype)
        self._store(torch.cat((key, latent), 1), ctx.slot_mapping, self.k_cache)
        turned = rotate(q[..., nope:].float(), table, self.interleaved).to(q.dtype)
        absorbed = torch.bmm(q[..., :nope].transpose(0, 1), self._w_k).transpose(0, 1)
        out = self._attend(
            torch.cat((turned, absorbed), 2),
            self.k_cache,
            ctx.block_table,
            ctx.slots,
            ctx.seq_lens,
            ctx.query_start_loc,
            scale=self.scale,
            value_dim=size,
            num_decodes=ctx.num_decodes,
            max_query_len=ctx.max_query_len,
            max_seq_len=ctx.max_seq_len,
        )
        values = torch.bmm(out.transpose(0, 1), self._w_v)
        return values.transpose(0, 1).reshape(tokens, -1)
