"""gemv_w4: one row times a weight of 4 bits an element, by dot products of four bytes.

Activations become integers of 16 bits that share a power of two within eight neighbours, finer than
bfloat16 tells them apart, so that one instruction multiplies and adds four of them with as many
weights, which need no conversion. A preceding rms_norm costs no pass of its own: its scale is one
number, multiplied at the end.
"""

# A kernel's tuples grow in loops that are unrolled.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..weights import Norm
from .activation import activate
from .launch import cdiv, next_power_of_2, num_sms, pdl_options
from .skinny_w4 import scale_of
from .w4 import GROUPS, W4

# Of a thread's words in a chunk: each group's sums become floats once for all of them.
MAX_PARTS = 4
# A row is shared by as many as a program may have without exchanging through memory too much.
MAX_THREADS = 256
# By the registers that a thread has.
WARPS_PER_SM = 16


class GemvW4Config(NamedTuple):
    """Tile of gemv_w4_kernel: weight rows of a step, steps of a program, and its warps.

    ahead: a step's words are asked for before those of the step before it are computed with, the
    first ones before the wait for the predecessor.
    """

    block_n: int
    steps: int
    num_warps: int
    ahead: bool


@triton.jit
def bytes_of(a, b, SELECT: tl.constexpr, ASM: tl.constexpr):
    """A word of bytes of a (0 to 3) and b (4 to 7), named by SELECT's digits from the last on."""
    if ASM:
        if SELECT == 0x6420:
            return _permute(a, b, "prmt.b32 $0, $1, $2, 0x6420;")
        elif SELECT == 0x7531:
            return _permute(a, b, "prmt.b32 $0, $1, $2, 0x7531;")
        elif SELECT == 0x5140:
            return _permute(a, b, "prmt.b32 $0, $1, $2, 0x5140;")
        elif SELECT == 0x5410:
            return _permute(a, b, "prmt.b32 $0, $1, $2, 0x5410;")
        else:
            return _permute(a, b, "prmt.b32 $0, $1, $2, 0x7632;")
    else:
        word = a & 0
        for i in tl.static_range(4):
            at = (SELECT >> (4 * i)) & 7
            source = a if at < 4 else b
            word |= ((source >> (8 * (at % 4))) & 255) << (8 * i)
        return word


@triton.jit
def _permute(a, b, CODE: tl.constexpr):
    return tl.inline_asm_elementwise(CODE, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def add_products(a, b, c, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """c and the products of the bytes of a, unsigned, with those of b."""
    if ASM:
        if SIGNED:
            return tl.inline_asm_elementwise(
                "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32,
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32,
                is_pure=True, pack=1,
            )  # fmt: skip
    else:
        for i in tl.static_range(4):
            factor = (b >> (8 * i)) & 255
            if SIGNED:
                factor = factor - ((factor & 128) << 1)
            c += ((a >> (8 * i)) & 255) * factor
        return c


@triton.jit
def unit_of(largest):
    """(value of 1, its inverse) of integers of 14 bits and a sign for floats up to ``largest``."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    # Numbers so small are of no consequence, and have no inverse of this kind.
    exponent = tl.maximum(exponent, 40)
    unit = ((exponent - 13) << 23).to(tl.float32, bitcast=True)
    unit = tl.where(exponent == 255, float("nan"), unit)
    return unit, ((267 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def pack_integers(x, inverse, ASM: tl.constexpr):
    """x float32 [Q, 8] times inverse [Q] as integers of 16 bits: their bytes and sums.

    Returns (upper bytes of the first four and of the last, signed; lower ones, unsigned; the sum):
    [Q] each.
    """
    Q: tl.constexpr = x.shape[0]
    # Added to 1.5 * 2^23 a float's last bits are the nearest integer's.
    bits = (x * inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True)
    even, odd = tl.split(tl.reshape(bits, (Q, 4, 2)))
    x04, x26 = tl.split(tl.reshape(even, (Q, 2, 2)))
    x15, x37 = tl.split(tl.reshape(odd, (Q, 2, 2)))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    a = bytes_of(x0, x1, 0x5140, ASM)
    b = bytes_of(x2, x3, 0x5140, ASM)
    c = bytes_of(x4, x5, 0x5140, ASM)
    d = bytes_of(x6, x7, 0x5140, ASM)
    low0 = bytes_of(a, b, 0x5410, ASM)
    high0 = bytes_of(a, b, 0x7632, ASM)
    low1 = bytes_of(c, d, 0x5410, ASM)
    high1 = bytes_of(c, d, 0x7632, ASM)
    ones = low0 * 0 + 0x01010101
    total = integer_product(ones, ones, high0, high1, low0, low1, low0 * 0, ASM)
    return high0, high1, low0, low1, total


@triton.jit
def integer_product(q0, q1, high0, high1, low0, low1, begin, ASM: tl.constexpr):
    """begin and the products of eight bytes with as many integers of 16 bits."""
    high = add_products(q1, high1, add_products(q0, high0, q0 * 0, True, ASM), True, ASM)
    low = add_products(q1, low1, add_products(q0, low0, begin, False, ASM), False, ASM)
    return high * 256 + low


@triton.jit
def load_normed(
    x, norm_weight, k, K, squares, weight_offset, HAS_NORM: tl.constexpr, EVEN: tl.constexpr
):
    """x at k [Q, 8], in float32 and times the norm's weights; squares [Q] with those of x added."""
    if EVEN:
        value = tl.load(x + k).to(tl.float32)
    else:
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares += tl.sum(value * value, 1)
        if EVEN:
            weight = tl.load(norm_weight + k).to(tl.float32)
        else:
            weight = tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
        value = value * (weight + weight_offset)
    return value, squares


@triton.jit
def integers_of_group(
    x, norm_weight, k, K, squares, weight_offset,
    HAS_NORM: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """x at k [T, 8] and PARTS - 1 times STRIDE behind it as integers of one unit a row.

    Returns (pack_integers of each part, sum of all, unit, squares).
    """
    values = ()
    largest = squares * 0.0
    for part in tl.static_range(PARTS):
        value, squares = load_normed(
            x, norm_weight, k + part * STRIDE, K, squares, weight_offset, HAS_NORM, EVEN
        )
        largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
        values = values + (value,)  # noqa: RUF005
    unit, inverse = unit_of(largest)
    integers = ()
    total = tl.zeros(largest.shape, dtype=tl.int32)
    for part in tl.static_range(PARTS):
        high0, high1, low0, low1, of_part = pack_integers(values[part], inverse, ASM)
        integers = integers + ((high0, high1, low0, low1),)  # noqa: RUF005
        total += of_part
    return integers, total, unit, squares


@triton.jit
def load_words(tiles, mask, PARTS: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr):
    """Words of all parts: [BLOCK_N, 4 T] each."""
    words = ()
    for part in tl.static_range(PARTS):
        if EVEN:
            w = tl.load(tiles + part * STRIDE, eviction_policy="evict_first")
        else:
            w = tl.load(tiles + part * STRIDE, mask=mask, other=0, eviction_policy="evict_first")
        words = words + (w,)  # noqa: RUF005
    return words


@triton.jit
def row_of(i, N, GATE: tl.constexpr):
    """The weight row of the i-th output: gate and up in turns where there is a gate.

    Outputs beyond the weight's compute the last one again.
    """
    row = i if GATE == "" else i // 2 + (i % 2) * (N // 2)
    return tl.minimum(row, N - 1)


@triton.jit
def gemv_w4_kernel(
    x,  # [1, K]
    words,  # [N, W] int32
    scales,  # [N, 4 chunks]
    zeros,  # as scales
    bias,  # [N]
    residual,  # [1, OUT]
    norm_weight,  # [K]
    y,  # [1, OUT]
    N,
    K,
    NUM_CHUNKS,
    eps,
    weight_offset,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATE: tl.constexpr,  # "" or the activation of the gate half
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,  # threads that share a row, or more
    STEPS: tl.constexpr,
    PARTS: tl.constexpr,  # of a thread's words in a chunk, four each
    EVEN: tl.constexpr,  # the threads have K as their columns
    AHEAD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = GROUP // 2
    SHARE: tl.constexpr = PAIRS // (4 * PARTS)  # threads of a chunk
    UPPER: tl.constexpr = 0xF0F0F0F0 - (1 << 32)
    MIDDLE: tl.constexpr = 8 if ZERO == "" else (16 if ZERO == "zero" else 0)
    width = NUM_CHUNKS * PAIRS
    c = tl.arange(0, 4 * BLOCK_T)
    of_row = c // (4 * SHARE) * PAIRS + c % (4 * SHARE)
    in_row = (of_row < width)[None, :]
    t = tl.arange(0, BLOCK_T)
    chunk = t // SHARE
    in_chunks = (chunk < NUM_CHUNKS)[:, None]
    block = tl.arange(0, BLOCK_N)
    begin = tl.program_id(0) * (STEPS * BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # Weights are written by no kernel: the first may be on their way before the wait.
    if AHEAD:
        tiles = words + row_of(begin + block, N, GATE)[:, None] * width + of_row[None, :]
        ws = load_words(tiles, in_row, PARTS, 4 * SHARE, EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
    k = chunk[:, None] * (4 * GROUP) + t[:, None] % SHARE * 8 + tl.arange(0, 8)[None, :]
    squares = tl.zeros([BLOCK_T], dtype=tl.float32)
    xs = ()
    totals = ()
    units = ()
    for j in tl.static_range(4):
        integers, total, unit, squares = integers_of_group(
            x, norm_weight, k + j * GROUP, K, squares, weight_offset, HAS_NORM, EVEN, PARTS,
            8 * SHARE, ASM,
        )  # fmt: skip
        # Groups 1 and 3 lie in the upper halves of bytes, where they count 16 times.
        xs = xs + (integers,)  # noqa: RUF005
        totals = totals + (total * 16 if j % 2 else total,)  # noqa: RUF005
        units = units + (unit * 0.0625 if j % 2 else unit,)  # noqa: RUF005
    norm_scale = 1.0
    if HAS_NORM:
        norm_scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    for step in range(STEPS):
        i = begin + step * BLOCK_N + block
        n = row_of(i, N, GATE)
        if not AHEAD:
            tiles = words + n[:, None] * width + of_row[None, :]
            ws = load_words(tiles, in_row, PARTS, 4 * SHARE, EVEN)
        # Rows come last from here on: the layout that loads of scales are given is then the words'.
        fours = n[None, :] * NUM_CHUNKS + chunk[:, None]
        scale4 = tl.load(scales.to(tl.pointer_type(tl.int64)) + fours, mask=in_chunks, other=0)
        if ZERO != "":
            zero4 = tl.load(zeros.to(tl.pointer_type(tl.int64)) + fours, mask=in_chunks, other=0)
        if AHEAD:
            after = words + row_of(i + BLOCK_N, N, GATE)[:, None] * width + of_row[None, :]
            next_ws = load_words(after, in_row, PARTS, 4 * SHARE, EVEN)
        acc = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
        for half in tl.static_range(2):
            # Two of a word's bytes are of groups 0 and 1 of the chunk, two of groups 2 and 3.
            for odd in tl.static_range(2):
                total = totals[2 * half + odd]
                low = (total * -MIDDLE)[:, None] + tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.int32)
                high = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.int32)
                for part in tl.static_range(PARTS):
                    w02, w13 = tl.split(tl.reshape(ws[part], (BLOCK_N, BLOCK_T, 2, 2)))
                    w0, w2 = tl.split(w02)
                    w1, w3 = tl.split(w13)
                    p = bytes_of(tl.trans(w0), tl.trans(w1), 0x7531 if half else 0x6420, ASM)
                    q = bytes_of(tl.trans(w2), tl.trans(w3), 0x7531 if half else 0x6420, ASM)
                    p = p & (UPPER if odd else 0x0F0F0F0F)
                    q = q & (UPPER if odd else 0x0F0F0F0F)
                    high0, high1, low0, low1 = xs[2 * half + odd][part]
                    high = add_products(p, high0[:, None], high, True, ASM)
                    high = add_products(q, high1[:, None], high, True, ASM)
                    low = add_products(p, low0[:, None], low, False, ASM)
                    low = add_products(q, low1[:, None], low, False, ASM)
                product = high * 256 + low
                if ZERO == "zero":
                    zero2 = (zero4 >> 32 if half else zero4).to(tl.int32)
                    product += (zero2 >> 16 if odd else zero2 & 255) * total[:, None]
                part_sum = scale_of(scale4, 2 * half + odd, scales) * product.to(tl.float32)
                if ZERO == "add":
                    offset = scale_of(zero4, 2 * half + odd, zeros)
                    part_sum += offset * total.to(tl.float32)[:, None]
                acc += units[2 * half + odd][:, None] * part_sum
        out = tl.sum(acc, 0) * norm_scale
        if HAS_BIAS:
            out += tl.load(bias + n).to(tl.float32)
        if GATE == "":
            at = i
            outputs = N
        else:
            gate, up = tl.split(tl.reshape(out, (BLOCK_N // 2, 2)))
            out = activate(gate, GATE) * up
            at = (begin + step * BLOCK_N) // 2 + tl.arange(0, BLOCK_N // 2)
            outputs = N // 2
        if HAS_RESIDUAL:
            out += tl.load(residual + at, mask=at < outputs, other=0.0).to(tl.float32)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=at < outputs)
        if AHEAD:
            ws = next_ws


def threads_of_row(weight: W4) -> int:
    """Threads that share a row."""
    quads = weight.group // 8
    return weight.chunks * quads // min(quads, MAX_PARTS)


def takes(weight: W4) -> bool:
    """True if ``gemv_w4`` has a form for the weight."""
    integers = not weight.e2m1 and weight.codes is None
    return integers and threads_of_row(weight) <= MAX_THREADS and weight.words.numel() < 2**31


def plan_gemv_w4(n: int, threads: int, device: torch.device) -> GemvW4Config:
    """The tile of one row times a weight of n rows, each shared by so many threads.

    ``bench/gpu_products.py --kinds w4 --sweep`` prints the alternatives.
    """
    if device.type != "cuda":
        # Interpreted, a program takes as long whatever its size.
        return GemvW4Config(64, 1, 1, False)
    # One thread has a place along K: more warps would exchange what they know of the activations.
    warps = max(next_power_of_2(threads) // 32, 1)
    if warps > 1:
        return GemvW4Config(4, 3, warps, False)
    # All rows at once in the warps that fit: what is known of the activations serves many rows.
    steps = cdiv(n, 2 * WARPS_PER_SM * num_sms(device))
    return GemvW4Config(2, min(steps, 8), 1, False) if steps > 2 else GemvW4Config(4, 1, 1, True)


def gemv_w4(
    x: torch.Tensor,
    weight: W4,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    norm: Norm | None = None,
    gate: str = "",
    config: GemvW4Config | None = None,
) -> torch.Tensor:
    """One row: x [1, K], weight [N, K] -> y [1, N] (gated: [1, N / 2]), filled and returned."""
    n, k = weight.shape
    chunks, quads = weight.chunks, weight.group // 8
    parts = min(quads, MAX_PARTS)
    threads = threads_of_row(weight)
    config = config or plan_gemv_w4(n, threads, x.device)
    block_t = next_power_of_2(threads)
    gemv_w4_kernel[(cdiv(n, config.block_n * config.steps),)](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        bias if bias is not None else x,
        residual if residual is not None else x,
        norm.weight if norm is not None else x,
        y,
        n,
        k,
        chunks,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.weight_offset,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_NORM=norm is not None,
        GATE=gate,
        ZERO=weight.zero,
        GROUP=weight.group,
        BLOCK_N=config.block_n,
        BLOCK_T=block_t,
        STEPS=config.steps,
        PARTS=parts,
        EVEN=block_t == threads and chunks * GROUPS * weight.group == k,
        AHEAD=config.ahead,
        ASM=not triton.knobs.runtime.interpret,
        num_warps=config.num_warps,
        num_stages=1,
        **pdl_options(),
    )
    return y
