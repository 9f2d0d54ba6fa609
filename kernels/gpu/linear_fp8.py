"""Fp8Weight: 8-bit floats on a GPU, by the number of rows.

- one row: ``gemv_fp8``;
- up to MAX_FLOAT_ROWS: ``skinny_8bit``, activations as they are;
- beyond: activations rounded to 8 bits, a scale a row: ``skinny_8bit`` up to MAX_SKINNY_ROWS, then
  cuBLAS, or dequantized where cuBLAS does not take the shape;
- with scales of blocks, or to be computed with exactly: activations as they are in ``skinny_8bit``
  up to MAX_SKINNY_ROWS, then dequantized.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..weights import Norm, Planes
from .activation import gated_activation
from .dequantize_8bit import dequantize_8bit
from .gemv_fp8 import gemv_fp8
from .launch import check_shape
from .limits import capability
from .linear import check_epilogue
from .linear_quantized import QuantizedWeight
from .quantize_fp8 import FP8, quantize_normed, quantize_rows
from .skinny_8bit import skinny_8bit

# bench/gpu_products.py --kinds fp8 --sweep; bench/results/h200-quantized.md.
MAX_FLOAT_ROWS = 16
MAX_SKINNY_ROWS = 64
# Rows and columns of a weight that share a scale in files with scales of blocks.
BLOCK = 128
# The first GPUs with conversions of e4m3.
_CAPABILITY = (8, 9)
# cuBLAS takes 8-bit floats in multiples of it.
_UNIT = 16


class Fp8Weight(QuantizedWeight):
    """q e4m3 [N, K]; scales float32 [N], or [ceil(N / 128), ceil(K / 128)] of blocks."""

    __slots__ = ("_block", "_may_round", "_rowwise", "exact", "q", "scales")

    def __init__(self, q: torch.Tensor, scales: torch.Tensor, exact: bool = False) -> None:
        self.q, self.scales, self.exact = q, scales, exact
        self.shape = n, k = q.shape[0], q.shape[1]
        self._may_round = not exact and scales.ndim == 1
        # cuBLAS has scales of rows there.
        self._rowwise = (
            q.is_cuda and capability(q.device) >= (9, 0) and not (n % _UNIT or k % _UNIT)
        )
        self._block = (0, 0) if scales.ndim == 1 else (BLOCK, BLOCK)
        self.format = "FP8"
        self.nbytes = q.nbytes + scales.nbytes

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        y: torch.Tensor,
    ) -> bool:
        rows, k = x.shape[0], self.shape[1]
        if x.dtype not in (torch.bfloat16, torch.float16):
            return False
        if rows == 1 and k % 4 == 0:
            gemv_fp8(x, self.q, self.scales, bias, y, residual=residual)
            return True
        if self._rounds(rows, y.dtype):
            self._product_of_rounded(*quantize_rows(x), bias, residual, y)
            return True
        if rows > MAX_SKINNY_ROWS:
            return False
        skinny_8bit(
            x, None, self.q, self.scales, bias, y, scale_block=self._block, residual=residual
        )
        return True

    def linear_of_sum(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
        bias: torch.Tensor | None = None,
        *,
        gate: str = "",
    ) -> torch.Tensor | None:
        rows, n = x.shape[0], self.shape[0]
        if not self._rounds(rows, x.dtype) or x.dtype not in (torch.bfloat16, torch.float16):
            return None
        check_shape("x", x, rows, self.shape[1])
        check_epilogue(rows, n, bias, gate, None)
        y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
        self._product_of_rounded(*quantize_normed(x, norm, residual), bias, None, y)
        return gated_activation(y, gate) if gate else y

    def _rounds(self, rows: int, dtype: torch.dtype) -> bool:
        """True if activations of so many rows are rounded, for a result in dtype."""
        if rows <= MAX_FLOAT_ROWS or not self._may_round:
            return False
        return rows <= MAX_SKINNY_ROWS or (self._rowwise and dtype == torch.bfloat16)

    def _product_of_rounded(
        self,
        x: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        y: torch.Tensor,
    ) -> None:
        """residual + x W^T + bias -> y, which may be the residual; x: 8-bit floats, scale [T]."""
        if x.shape[0] <= MAX_SKINNY_ROWS:
            skinny_8bit(x, scale, self.q, self.scales, bias, y, residual=residual)
            return
        torch._scaled_mm(
            x,
            self.q.t(),
            scale[:, None],
            self.scales[None, :],
            bias=None if residual is not None else bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            out=y if residual is None else (out := torch.empty_like(y)),
        )
        if residual is not None:
            residual.add_(out)
            if bias is not None:
                residual.add_(bias)

    def floats(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_8bit(self.q, self.scales, dtype, self._block)

    def select(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.q.view(torch.uint8).index_select(0, ids).view(FP8)
        if self.scales.ndim == 1:
            return found.float() * self.scales.index_select(0, ids)[:, None]
        scales = self.scales.index_select(0, ids // BLOCK).repeat_interleave(BLOCK, 1)
        return found.float() * scales[:, : self.shape[1]]


def prepare_fp8(parts: Sequence[Planes], exact: bool) -> Fp8Weight | None:
    """The parts stacked along N; None if they have no form here."""
    found = [part.in_order().planes for part in parts]
    if any(planes["q"].dtype != FP8 or "codes" in planes for planes in found):
        return None
    if capability(found[0]["q"].device) < _CAPABILITY:
        return None
    q = torch.cat([planes["q"].view(torch.uint8) for planes in found]).view(FP8)
    k = q.shape[1]
    if all(planes["scale"].shape[1] == 1 for planes in found):
        return Fp8Weight(q, torch.cat([p["scale"][:, 0].float() for p in found]), exact)
    scales = [_block_scales(planes["scale"], planes.get("group"), k) for planes in found]
    # Blocks of all but the last part must end with it.
    if any(part.shape[0] % BLOCK for part in parts[:-1]):
        return None
    blocks = [scale for scale in scales if scale is not None]
    return None if len(blocks) < len(scales) else Fp8Weight(q, torch.cat(blocks), exact)


def _block_scales(scale: torch.Tensor, group: torch.Tensor | None, k: int) -> torch.Tensor | None:
    """Scales [N, G], or [N, 1], of blocks of 128 x 128: float32 [ceil(N / 128), ceil(K / 128)].

    None if blocks of that size have more than one.
    """
    n, groups = scale.shape
    columns = -(-k // BLOCK)
    if groups == 1:
        scale = scale.expand(n, columns)
    elif groups != columns:
        return None
    elif group is None:
        if k != columns * BLOCK:
            return None
    elif not torch.equal(group, (torch.arange(k, device=group.device) // BLOCK).to(group.dtype)):
        return None
    first = scale[::BLOCK].float().contiguous()
    same = torch.equal(first.repeat_interleave(BLOCK, 0)[:n], scale.float())
    return first if same else None
