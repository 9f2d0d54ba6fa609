"""The op set on a CPU, through the Rust core. Semantics: ``reference.py``.

Every function checks dtype, device, contiguity and shape before it hands addresses to Rust, so a
wrong call is a ValueError and never a read out of bounds. Sizes and index values are checked again
there. A step calls some two hundred of these functions, so each keeps to a few attribute reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo import _core

from . import reference
from .decoder import Decoder, DecoderSpec
from .encoder import Encoder, EncoderSpec
from .packed import PackedLinear, QuantTensor, stack_shape

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

# ------------------------------------------------------------------------------------- the machine


def set_num_threads(n: int) -> None:
    """Use n threads, the caller included; 0: every core this process may use.

    Raises:
        ValueError: n is negative.
    """
    if n < 0:
        raise ValueError(f"threads must not be negative, not {n}")
    _core.cpu_set_num_threads(n)


def num_threads() -> int:
    """Threads the kernels use."""
    return _core.cpu_num_threads()


def level() -> str:
    """The instruction set in use: scalar, neon, avx2 or avx512 (OCTAVO_CPU_LEVEL overrides)."""
    return _core.cpu_level()


# ----------------------------------------------------------------------------------------- checks


def _refuse(t: object, name: str, want: str) -> ValueError:
    if not isinstance(t, Tensor):
        return ValueError(f"{name} must be a tensor, not {type(t).__name__}")
    layout = "contiguous" if t.is_contiguous() else "not contiguous"
    return ValueError(
        f"{name} must be {want}; it is {t.dtype} {tuple(t.shape)} on {t.device}, {layout}"
    )


def _float(t: Tensor, name: str) -> int:
    """The dtype code of a contiguous float tensor on the CPU."""
    code = _CODES.get(t.dtype)
    if code is None or not t.is_cpu or not t.is_contiguous():
        raise _refuse(t, name, "a contiguous float32, bfloat16 or float16 CPU tensor")
    return code


def _matrix(t: Tensor, name: str) -> tuple[int, int, int]:
    """(dtype code, rows, columns)"""
    code = _float(t, name)
    if t.dim() != 2:
        raise _refuse(t, name, "2-D")
    rows, cols = t.shape
    return code, rows, cols


def _vector(t: Tensor | None, name: str, size: int) -> tuple[int, int]:
    """(address, dtype code) of a float vector, (0, 0) of None."""
    if t is None:
        return 0, 0
    code = _float(t, name)
    if t.numel() != size or t.dim() != 1:
        raise _refuse(t, name, f"of shape ({size},)")
    return t.data_ptr(), code


def _ints(t: Tensor, name: str, size: int) -> int:
    """The address of an int32 vector."""
    if (
        t.dtype != torch.int32
        or not t.is_cpu
        or not t.is_contiguous()
        or t.numel() != size
        or t.dim() != 1
    ):
        raise _refuse(t, name, f"a contiguous int32 CPU tensor of shape ({size},)")
    return t.data_ptr()


def _caches(k: Tensor, v: Tensor) -> tuple[int, tuple[int, int, int, int, int]]:
    """(dtype code, blocks, heads, block_size, head_dim, elements from block to block)"""
    code = _CODES.get(k.dtype)
    shape = k.shape
    if code is None or not k.is_cpu or len(shape) != 4:
        raise _refuse(k, "k_cache", "a 4-D float CPU tensor")
    blocks, heads, size, dim = shape
    stride = k.stride()
    if v.shape != shape or v.dtype != k.dtype or v.stride() != stride or not v.is_cpu:
        raise _refuse(v, "v_cache", "like k_cache")
    if stride[1:] != (size * dim, dim, 1) and k.numel():
        raise _refuse(k, "k_cache", "contiguous within a block")
    return code, (blocks, heads, size, dim, stride[0])


# ---------------------------------------------------------------------------------------- weights


class CpuLinear(PackedLinear):
    """A weight in the Rust core's memory, laid out for this machine's instruction set.

    exact: quantized weights meet float32 activations, and products are float32's. Otherwise
    activations are rounded per group of 32 to two int8 parts, 12 bits with 4-bit weights and 16
    with others (relative errors of 4e-4 and 2e-5, two to three times as fast) or, where many rows
    meet AMX, weights are rounded to bfloat16 and activations to two such parts (1e-3).
    """

    def __init__(
        self,
        handle: _core.CpuLinear,
        shape: tuple[int, int],
        kind: str,
        dtype: torch.dtype,
        exact: bool,
    ) -> None:
        self.handle = handle
        self.forward = handle.forward
        self.shape = shape
        self.kind = kind
        self.dtype = dtype
        self.exact = exact
        self.nbytes = handle.nbytes

    def dequantize(self) -> Tensor:
        ids = torch.arange(self.shape[0], dtype=torch.int32)
        return embedding(ids, self, out_dtype=torch.float32)


def prepare_linear(
    weight: Tensor | QuantTensor | Sequence[Tensor | QuantTensor],
    *,
    exact: bool = False,
    level: str | None = None,
) -> CpuLinear:
    """Pack one weight, or several stacked along N, for ``linear`` and ``embedding``.

    Every kind keeps its own numbers, in a layout of about the file's size, and so does each part
    of a stack that mixes them. The inputs may be freed afterwards.
    level: an instruction set other than this process's, for tests.

    Raises:
        ValueError: nothing to pack, shapes that do not stack, an unknown dtype.
    """
    parts = [weight] if isinstance(weight, Tensor | QuantTensor) else list(weight)
    n, k = stack_shape(parts)
    kinds = [p.kind if isinstance(p, QuantTensor) else _plain_kind(p) for p in parts]
    direct = [_direct(p, kind) for p, kind in zip(parts, kinds, strict=True)]
    described = [
        (
            p.data.data_ptr(),
            p.data.numel(),
            p.shape[0],
            p.kind,
            0 if p.row_permutation is None else p.row_permutation.data_ptr(),
        )
        for p in direct
    ]
    handle = _core.CpuLinear(n, k, described, level)
    plain = {kind: dtype for dtype, kind in _KINDS.items()}
    dtype = plain.get(kinds[0], torch.float32) if len(set(kinds)) == 1 else torch.float32
    return CpuLinear(handle, (n, k), "+".join(dict.fromkeys(kinds)), dtype, exact)


def _plain_kind(weight: Tensor) -> str:
    kind = _KINDS.get(weight.dtype)
    if kind is None or not weight.is_cpu:
        raise _refuse(weight, "weight", "a float32, bfloat16 or float16 CPU tensor")
    return kind


def _direct(weight: Tensor | QuantTensor, kind: str) -> QuantTensor:
    """The weight as bytes on the CPU."""
    if isinstance(weight, Tensor):
        data = weight.detach().contiguous().view(-1).view(torch.uint8)
        return QuantTensor(data, kind, (weight.shape[0], weight.shape[1]))
    if not weight.data.is_cpu:
        raise _refuse(weight.data, "weight.data", "a CPU tensor")
    perm = weight.row_permutation
    if perm is None or perm.is_contiguous():
        return weight
    return QuantTensor(weight.data, kind, weight.shape, perm.contiguous())


def linear(
    x: Tensor,
    weight: Tensor | PackedLinear,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See reference.linear. A plain tensor as weight goes through torch: prepare_linear is faster.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    if not isinstance(weight, CpuLinear):
        return _plain_linear(x, weight, bias, out_dtype)
    code = _CODES.get(x.dtype)
    n, k = weight.shape
    if code is None or not x.is_cpu or not x.is_contiguous() or x.dim() != 2 or x.shape[1] != k:
        raise _refuse(x, "x", f"a contiguous float32, bfloat16 or float16 CPU tensor (T, {k})")
    rows = x.shape[0]
    if out_dtype is None:
        out_dtype, out_code = x.dtype, code
    else:
        found = _CODES.get(out_dtype)
        if found is None:
            raise ValueError(f"out_dtype must be float32, bfloat16 or float16, not {out_dtype}")
        out_code = found
    bias_ptr, bias_code = (0, 0) if bias is None else _vector(bias, "bias", n)
    out = torch.empty((rows, n), dtype=out_dtype)
    weight.forward(
        x.data_ptr(),
        code,
        rows,
        rows * k,
        bias_ptr,
        bias_code,
        out.data_ptr(),
        out_code,
        weight.exact,
    )
    return out


def _plain_linear(
    x: Tensor, weight: Tensor | PackedLinear, bias: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    if not isinstance(weight, Tensor):
        raise ValueError(f"a {type(weight).__name__} was prepared for another device")
    _, _, k = _matrix(x, "x")
    if weight.dim() != 2 or weight.shape[1] != k or not weight.is_cpu:
        raise _refuse(weight, "weight", f"a CPU tensor (N, {k})")
    return reference.linear(x, weight, bias, out_dtype=out_dtype)


def embedding(
    ids: Tensor,
    weight: Tensor | PackedLinear,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See reference.embedding.

    Raises:
        ValueError: an id outside the weight's rows, or tensors that do not fit.
    """
    tokens = ids.numel()
    ptr = _ints(ids, "ids", tokens)
    if isinstance(weight, CpuLinear):
        out = torch.empty((tokens, weight.shape[1]), dtype=out_dtype or weight.dtype)
        code = _float(out, "out")
        weight.handle.embedding(ptr, tokens, scale, out.data_ptr(), code)
        return out
    if not isinstance(weight, Tensor):
        raise ValueError(f"a {type(weight).__name__} was prepared for another device")
    if tokens and not 0 <= int(ids.min()) <= int(ids.max()) < weight.shape[0]:
        raise ValueError(f"a token id is outside the vocabulary of {weight.shape[0]}")
    y = torch.nn.functional.embedding(ids, weight)
    if scale != 1.0:
        y = y.float() * scale
    return y.to(out_dtype or weight.dtype)


# ------------------------------------------------------------------------------------------ norms


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """See reference.rms_norm. The new residual is written into ``residual``.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    return _norm(x, weight, None, eps, residual, False, weight_offset)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See reference.layer_norm. The new residual is written into ``residual``.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    return _norm(x, weight, bias, eps, residual, True, 0.0)


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    is_layer_norm: bool,
    weight_offset: float,
) -> Tensor | tuple[Tensor, Tensor]:
    code, rows, cols = _matrix(x, "x")
    weight_ptr, weight_code = _vector(weight, "weight", cols)
    bias_ptr, bias_code = (0, 0) if bias is None else _vector(bias, "bias", cols)
    residual_ptr = 0
    if residual is not None:
        if (
            residual.dtype != x.dtype
            or residual.shape != x.shape
            or not residual.is_cpu
            or not residual.is_contiguous()
        ):
            raise _refuse(residual, "residual", "like x")
        residual_ptr = residual.data_ptr()
        if residual_ptr == x.data_ptr() and x.numel():
            raise ValueError("residual must not be x itself")
    out = torch.empty_like(x)
    _core.cpu_norm(
        x.data_ptr(),
        code,
        rows,
        cols,
        residual_ptr,
        weight_ptr,
        weight_code,
        bias_ptr,
        bias_code,
        is_layer_norm,
        eps,
        weight_offset,
        out.data_ptr(),
    )
    return out if residual is None else (out, residual)


# ------------------------------------------------------------------------------------ activations


def activation(x: Tensor, kind: str) -> Tensor:
    """See reference.activation.

    Raises:
        ValueError: an unknown kind, or a tensor that does not fit.
    """
    code = _float(x, "x")
    out = torch.empty_like(x)
    _core.cpu_activation(kind, False, x.data_ptr(), code, 1, x.numel(), out.data_ptr())
    return out


def gated_activation(x: Tensor, kind: str) -> Tensor:
    """See reference.gated_activation.

    Raises:
        ValueError: an unknown kind, or a tensor that does not fit.
    """
    code, rows, cols = _matrix(x, "x")
    if cols % 2:
        raise _refuse(x, "x", "of an even number of columns")
    if kind not in ("silu", "gelu", "gelu_tanh"):
        raise ValueError(f"unknown gated activation {kind!r}")
    out = torch.empty((rows, cols // 2), dtype=x.dtype)
    _core.cpu_activation(kind, True, x.data_ptr(), code, rows, cols // 2, out.data_ptr())
    return out


# -------------------------------------------------------------------------------------- attention


def qk_norm_rope_store_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    """See reference.qk_norm_rope_store_kv.

    Raises:
        ValueError: a position or slot out of range, or tensors that do not fit.
    """
    code, tokens, cols = _matrix(qkv, "qkv")
    cache_code, shape = _caches(k_cache, v_cache)
    if shape[1] != num_kv_heads or shape[3] != head_dim:
        raise _refuse(k_cache, "k_cache", f"of {num_kv_heads} heads of {head_dim}")
    if cols != (num_heads + 2 * num_kv_heads) * head_dim:
        raise _refuse(qkv, "qkv", f"(T, ({num_heads} + 2 * {num_kv_heads}) * {head_dim})")
    table_code, max_pos, rot = _matrix(cos_sin, "cos_sin")
    if table_code != 0:
        raise _refuse(cos_sin, "cos_sin", "float32")
    q_norm_ptr = k_norm_ptr = norm_code = 0
    if q_norm is not None:
        q_norm_ptr, norm_code = _vector(q_norm, "q_norm", head_dim)
    if k_norm is not None:
        k_norm_ptr, k_norm_code = _vector(k_norm, "k_norm", head_dim)
        if q_norm is not None and k_norm_code != norm_code:
            raise _refuse(k_norm, "k_norm", "of q_norm's dtype")
        norm_code = k_norm_code
    q = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype)
    _core.cpu_rope(
        qkv.data_ptr(),
        code,
        tokens,
        _ints(positions, "positions", tokens),
        cos_sin.data_ptr(),
        max_pos,
        rot,
        _ints(slot_mapping, "slot_mapping", tokens),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        cache_code,
        shape,
        num_heads,
        q_norm_ptr,
        k_norm_ptr,
        norm_code,
        eps,
        weight_offset,
        interleaved,
        q.data_ptr(),
    )
    return q


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    num_decodes: int,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """See reference.paged_attention. Rows of no request are undefined.

    Raises:
        ValueError: a length, slot or block out of range, or tensors that do not fit.
    """
    code = _float(q, "q")
    cache_code, shape = _caches(k_cache, v_cache)
    if q.dim() != 3 or q.shape[2] != shape[3]:
        raise _refuse(q, "q", f"(T, heads, {shape[3]})")
    tokens, num_heads, head_dim = q.shape
    if (
        block_table.dtype != torch.int32
        or not block_table.is_cpu
        or not block_table.is_contiguous()
        or block_table.dim() != 2
    ):
        raise _refuse(block_table, "block_table", "a contiguous 2-D int32 CPU tensor")
    table_rows, max_blocks = block_table.shape
    requests = slots.numel()
    out = torch.empty((tokens, num_heads * head_dim), dtype=q.dtype)
    _core.cpu_attention(
        q.data_ptr(),
        code,
        tokens,
        num_heads,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        cache_code,
        shape,
        block_table.data_ptr(),
        table_rows,
        max_blocks,
        _ints(slots, "slots", requests),
        _ints(seq_lens, "seq_lens", requests),
        _ints(query_start_loc, "query_start_loc", requests + 1),
        requests,
        scale,
        sliding_window,
        softcap,
        causal,
        max_seq_len,
        out.data_ptr(),
    )
    return out


# -------------------------------------------------------------------------------- moe and sampling


def prepare_experts(
    experts: Sequence[Sequence[Tensor | QuantTensor]], *, exact: bool = False
) -> list[CpuLinear]:
    """One packed weight per expert, of its parts stacked along N.

    Raises:
        ValueError: as prepare_linear.
    """
    return [prepare_linear(parts, exact=exact) for parts in experts]


def moe(
    x: Tensor,
    router_logits: Tensor,
    w13: Tensor | Sequence[Tensor | PackedLinear],
    w2: Tensor | Sequence[Tensor | PackedLinear],
    top_k: int,
    renormalize: bool,
    *,
    kind: str = "silu",
) -> Tensor:
    """See reference.moe: each expert's rows go through ``linear`` together."""
    probs, experts = router_logits.float().softmax(-1).topk(top_k, -1)
    if renormalize:
        probs = probs / probs.sum(-1, keepdim=True)
    # Rows in the order of their experts, so that each expert's are a slice.
    order = experts.reshape(-1).argsort(stable=True)
    counts = torch.bincount(experts.reshape(-1), minlength=router_logits.shape[1]).tolist()
    out = torch.zeros(x.shape, dtype=torch.float32)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            chosen = order[start : start + count]
            start += count
            rows = chosen // top_k
            hidden = gated_activation(linear(x[rows].float(), w13[expert]), kind)
            weights = probs.reshape(-1)[chosen, None]
            out.index_add_(0, rows, linear(hidden, w2[expert]) * weights)
    return out.to(x.dtype)


sample = reference.sample


def make_decoder(spec: DecoderSpec) -> Decoder | None:
    """All layers in one call; None where a weight is not packed for it.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    # It uses this module's checks.
    from .cpu_decoder import make_decoder

    return make_decoder(spec)


def make_encoder(spec: EncoderSpec) -> Encoder | None:
    """As ``make_decoder``, of an encoder.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    from .cpu_encoder import make_encoder

    return make_encoder(spec)


def _logits(logits: Tensor) -> tuple[int, int]:
    code, rows, vocab = _matrix(logits, "logits")
    if code != 0 or vocab == 0:
        raise _refuse(logits, "logits", "float32 (S, V)")
    return rows, vocab


def argmax(logits: Tensor) -> Tensor:
    """See reference.argmax.

    Raises:
        ValueError: logits that are not a contiguous float32 matrix.
    """
    rows, vocab = _logits(logits)
    out = torch.empty(rows, dtype=torch.int32)
    _core.cpu_argmax(logits.data_ptr(), rows, vocab, out.data_ptr())
    return out


def selected_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.selected_logprobs.

    Raises:
        ValueError: an id outside the vocabulary, or tensors that do not fit.
    """
    rows, vocab = _logits(logits)
    if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] == 0:
        raise _refuse(ids, "ids", f"({rows}, C) with C > 0")
    columns = ids.shape[1]
    ids_ptr = _ints(ids.view(-1), "ids", rows * columns)
    out = torch.empty((rows, columns), dtype=torch.float32)
    ranks = torch.empty(rows, dtype=torch.int32)
    _core.cpu_selected_logprobs(
        logits.data_ptr(), rows, vocab, ids_ptr, columns, out.data_ptr(), ranks.data_ptr()
    )
    return out, ranks
