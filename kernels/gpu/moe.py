"""moe: rows are sorted by expert, then two grouped matrix products over the sorted rows.

Every expert's rows are padded to whole tiles, and the number of tiles is bounded by the shapes
alone: nothing waits for the host, so that the op can be captured into a CUDA graph. Tiles beyond
the last expert's do nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import torch
import triton
import triton.language as tl

from ..reference import stack_dense
from ..routing import Routing
from ..weights import ExpertBiases, Experts, Stored, dense, has_gate
from .activation import activation, gated_activation
from .grouped_quantized import SortedRows, grouped_quantized, stack_experts
from .launch import cdiv, check_shape, check_tensors, pdl_options
from .linear_fp8 import Fp8Weight
from .linear_w4 import W4Weight

# All experts' weights of one product.
Grouped: TypeAlias = torch.Tensor | W4Weight | Fp8Weight

# Few rows an expert is the rule (decodes): the smallest tile of the matrix units.
BLOCK_M_FEW, BLOCK_M_MANY = 16, 64
BLOCK_N = 64
BLOCK_K = 64


@triton.jit
def grouped_linear_kernel(
    x,  # [rows, K]
    weight,  # [E, N, K]
    y,  # [slots, N]
    slot_ids,  # [tiles * BLOCK_M]: which slot (token * top_k + choice) a row of a tile is
    tile_experts,  # [tiles]; E: an unused tile
    slot_weights,  # [slots] float32
    bias,  # [E, N]; None: none
    num_slots,
    num_experts,
    N,
    K,
    SLOTS_PER_ROW: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.load(tile_experts + tile)
    if expert < num_experts:
        slots = tl.load(slot_ids + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        used = slots < num_slots
        rows = (slots // SLOTS_PER_ROW).to(tl.int64)
        x_tiles = x + rows[:, None] * K + k[None, :]
        w_tiles = weight + (expert.to(tl.int64) * N + n[None, :]) * K + k[:, None]
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            in_k = start + k < K
            xk = tl.load(x_tiles + start, mask=used[:, None] & in_k[None, :], other=0.0)
            wk = tl.load(w_tiles + start, mask=in_k[:, None] & (n < N)[None, :], other=0.0)
            acc += tl.dot(xk, wk, input_precision="ieee")
        if bias is not None:
            added = tl.load(bias + expert.to(tl.int64) * N + n, mask=n < N, other=0.0)
            acc += added.to(tl.float32)[None, :]
        if HAS_WEIGHTS:
            acc *= tl.load(slot_weights + slots, mask=used, other=0.0)[:, None]
        out = y + slots.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out, acc.to(y.dtype.element_ty), mask=used[:, None] & (n < N)[None, :])


def _sort_by_expert(
    experts: torch.Tensor, num_experts: int, block_m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """experts int64 [slots] -> (slot_ids [tiles * block_m], tile_experts [tiles]), int32.

    No value is read on the host.
    """
    slots, device = experts.numel(), experts.device
    order = experts.argsort(stable=True)
    ordered = experts[order]
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    first = counts.cumsum(0) - counts
    tiles = (counts + block_m - 1) // block_m
    tiles_end = tiles.cumsum(0)
    rank = torch.arange(slots, device=device) - first[ordered]
    place = (tiles_end - tiles)[ordered] * block_m + rank
    most = cdiv(slots, block_m) + min(num_experts, slots)
    slot_ids = torch.full((most * block_m,), slots, dtype=torch.int32, device=device)
    slot_ids[place] = order.to(torch.int32)
    numbers = torch.arange(most, device=device)
    return slot_ids, torch.searchsorted(tiles_end, numbers, right=True).to(torch.int32)


def moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w13: Grouped,
    w2: Grouped,
    routing: Routing,
    *,
    biases: ExpertBiases | None = None,
    kind: str = "silu",
    count: int | None = None,
    first: int = 0,
) -> torch.Tensor:
    """Mixture of E MLPs: each row of x [T, D] goes to the experts that routing chooses.

    Args:
        x: [T, D].
        router_logits: [T, E].
        w13: [E, 2F, D], gate rows, then up rows, or [E, F, D] without a gate; quantized [E 2F, D].
        w2: [E, D, F]; quantized [E D, F].
        biases: of gate and up [E, 2F], and of down [E, D].
        count, first: of fewer experts than the router has, how many these are, and the number of
            the first. What is chosen of the others adds nothing.

    Returns:
        [T, D].

    Raises:
        ValueError: on a wrong shape, layout or device.
    """
    check_tensors(x=x, router_logits=router_logits)
    tokens, hidden = x.shape
    check_shape("router_logits", router_logits, tokens, router_logits.shape[1])
    num_experts = router_logits.shape[1] if count is None else count
    is_part = num_experts < router_logits.shape[1]
    height = w13.shape[-2] if isinstance(w13, torch.Tensor) else w13.shape[0] // num_experts
    inner = w2.shape[-1]
    is_gated = has_gate(height, inner)
    _check_experts("w13", w13, num_experts, height, hidden)
    _check_experts("w2", w2, num_experts, hidden, inner)
    if not tokens:
        return torch.empty_like(x)
    weights, experts = routing.choose(router_logits)
    top_k = routing.top_k
    gate_up_bias, down_bias = (None, None) if biases is None else biases
    slots = tokens * top_k
    block_m = BLOCK_M_MANY if slots >= 32 * router_logits.shape[1] else BLOCK_M_FEW
    chosen, num_sorted = experts.reshape(-1), num_experts
    if is_part:
        # The others' rows are one more expert's, whose tiles the kernels pass over.
        chosen, num_sorted = chosen - first, num_experts + 1
        chosen = torch.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
    slot_ids, tile_experts = _sort_by_expert(chosen, num_sorted, block_m)
    slot_weights = weights.reshape(-1).contiguous()

    def grouped(
        rows: torch.Tensor, weight: Grouped, bias: torch.Tensor | None, top: int, weighted: bool
    ) -> torch.Tensor:
        if not isinstance(weight, torch.Tensor):
            ordered = SortedRows(slot_ids, tile_experts, slot_weights, slots, num_experts)
            return grouped_quantized(
                rows, weight, bias, ordered, slots_per_row=top, weighted=weighted, block_m=block_m
            )
        n, k = weight.shape[1:]
        out = torch.empty((slots, n), dtype=x.dtype, device=x.device)
        grouped_linear_kernel[(tile_experts.numel(), cdiv(n, BLOCK_N))](
            rows,
            weight,
            out,
            slot_ids,
            tile_experts,
            slot_weights,
            bias,
            slots,
            num_experts,
            n,
            k,
            SLOTS_PER_ROW=top,
            HAS_WEIGHTS=weighted,
            BLOCK_M=block_m,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            num_stages=3,
            **pdl_options(),
        )
        return out

    act = gated_activation if is_gated else activation
    activated = act(grouped(x, w13, gate_up_bias, top_k, False), kind)
    out = grouped(activated, w2, down_bias, 1, True).view(tokens, top_k, hidden)
    if is_part:
        # Nothing has been written for what is chosen of the others.
        out = out.masked_fill((chosen == num_experts).view(tokens, top_k, 1), 0.0)
    return out.float().sum(1).to(x.dtype)


def _check_experts(name: str, weight: Grouped, num_experts: int, n: int, k: int) -> None:
    """Raises ValueError: experts of another shape."""
    if isinstance(weight, torch.Tensor):
        check_tensors(**{name: weight})
        check_shape(name, weight, num_experts, n, k)
    elif weight.shape != (num_experts * n, k):
        raise ValueError(f"{name} must be {[num_experts * n, k]}, not {list(weight.shape)}")


class GpuExperts(Experts):
    """w13 [E, 2F, D] (gate rows, then up rows) and w2 [E, D, F], both dense or both quantized.

    Without a gate w13 is [E, F, D]. Quantized ones are weights [E 2F, D] and [E D, F].
    """

    __slots__ = ("biases", "count", "num_elements", "w2", "w13")

    def __init__(
        self,
        gate_up: Sequence[Sequence[Stored]],
        down: Sequence[Stored],
        biases: ExpertBiases | None = None,
    ) -> None:
        self.biases = biases
        self.count = len(down)
        self.num_elements = sum(
            part.shape[0] * part.shape[1] for part in itertools.chain(down, *gate_up)
        )
        w13 = stack_experts(gate_up)
        w2 = None if w13 is None else stack_experts([[part] for part in down])
        self.w13: Grouped
        self.w2: Grouped
        if w13 is not None and w2 is not None:
            self.w13, self.w2 = w13, w2
            return
        self.w13 = torch.stack([stack_dense(parts) for parts in gate_up])
        self.w2 = torch.stack([dense(part) for part in down])

    def mix(
        self,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        routing: Routing,
        *,
        kind: str = "silu",
        first: int = 0,
    ) -> torch.Tensor:
        return moe(
            x,
            router_logits,
            self.w13,
            self.w2,
            routing,
            biases=self.biases,
            kind=kind,
            count=self.count,
            first=first,
        )


def prepare_experts(
    gate_up: Sequence[Sequence[Stored]],
    down: Sequence[Stored],
    *,
    biases: ExpertBiases | None = None,
    exact: bool = False,
) -> GpuExperts:
    """Experts of each one's gate and up parts [F, D], and of each one's down part [D, F]."""
    return GpuExperts(gate_up, down, biases)
