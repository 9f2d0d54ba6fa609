"""CpuWeight and CpuExperts: weights in the Rust core's memory, laid out for this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo import _core

from ..formats.dense import DENSE_DTYPES, DENSE_FORMATS
from ..formats.gguf import BLOCK_FORMATS
from ..formats.gguf_grids import GRIDS
from ..formats.grouped import GROUPED_FORMATS
from ..routing import Routing
from ..weights import (
    ExpertBiases,
    Experts,
    Norm,
    Planes,
    Stored,
    Weight,
    has_gate,
    stacked_shape,
)
from .blocks import as_rows, column_order
from .elementwise import activation, gated_activation, rms_norm
from .tensors import FLOATS, float_type, ints, optional_vector, refuse


class CpuWeight(Weight):
    """A weight packed for this machine's instruction set.

    dtype: of ``rows`` where none is asked for.
    activation_bits: of the activations that quantized weights meet. 32: they are float32, and so
        are products. 16: they are rounded in groups, to an int16 or to two int8 parts, 12 bits with
        4-bit weights and 16 with others (relative errors of 4e-4 and 2e-5) or, where many rows meet
        AMX, weights are rounded to bfloat16 and activations to two such parts (1e-3). 8: to one
        int8 part, where that is faster.
    """

    __slots__ = ("_forward", "activation_bits", "dtype", "format", "handle", "nbytes", "shape")

    def __init__(
        self,
        handle: _core.CpuLinear,
        shape: tuple[int, int],
        format: str,
        dtype: torch.dtype,
        activation_bits: int,
    ) -> None:
        self.handle = handle
        self._forward = handle.forward
        self.shape = shape
        self.format = format
        self.dtype = dtype
        self.activation_bits = activation_bits
        self.nbytes = handle.nbytes

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        gate: str = "",
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if norm is not None:
            normed = rms_norm(x, norm.weight, norm.eps, weight_offset=norm.weight_offset)
            assert isinstance(normed, Tensor)
            x = normed
        if not gate and residual is None:
            return self._product(x, bias, out_dtype)
        y = self._product(x, bias, None)
        if gate:
            y = gated_activation(y, gate)
        if residual is None:
            return y if out_dtype is None else y.to(out_dtype)
        return residual.add_(y)

    def _product(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
        element = FLOATS.get(x.dtype)
        n, k = self.shape
        if (
            element is None
            or not x.is_cpu
            or not x.is_contiguous()
            or x.dim() != 2
            or x.shape[1] != k
        ):
            raise refuse(x, "x", f"a contiguous float32, bfloat16 or float16 CPU tensor (T, {k})")
        rows = x.shape[0]
        if out_dtype is None:
            out_dtype, out_element = x.dtype, element
        else:
            found = FLOATS.get(out_dtype)
            if found is None:
                raise ValueError(f"out_dtype must be float32, bfloat16 or float16, not {out_dtype}")
            out_element = found
        out = torch.empty((rows, n), dtype=out_dtype)
        self._forward(
            (x.data_ptr(), element, rows, k),
            optional_vector(bias, "bias", n),
            self.activation_bits,
            (out.data_ptr(), out_element, rows, n),
        )
        return out

    def rows(self, ids: Tensor, scale: float = 1.0, out_dtype: torch.dtype | None = None) -> Tensor:
        tokens, k = ids.numel(), self.shape[1]
        places = ints(ids, "ids", tokens)
        out = torch.empty((tokens, k), dtype=out_dtype or self.dtype)
        to = (out.data_ptr(), float_type(out, "out"), tokens, k)
        self.handle.embedding(places, scale, to)
        return out

    def dequantize(self) -> Tensor:
        ids = torch.arange(self.shape[0], dtype=torch.int32)
        return self.rows(ids, out_dtype=torch.float32)


def prepare(
    parts: Sequence[Stored],
    *,
    exact: bool = False,
    activation_bits: int = 16,
    level: str | None = None,
) -> CpuWeight:
    """Pack parts, stacked along N.

    Formats keep their own numbers, in a layout of about the file's size, and so does each part of a
    stack that mixes them; what has no such layout is dense. The inputs may be freed afterwards.

    exact: activations are float32; else they have ``activation_bits``: see CpuWeight.
    level: an instruction set other than this process's, for tests.

    Raises:
        ValueError: nothing to pack, parts that do not stack, an unknown dtype.
    """
    n, k = stacked_shape(parts)
    orders = (column_order(part) for part in parts if isinstance(part, Planes))
    columns = next((order for order in orders if order is not None), None)
    stored = [_stored(part, columns) for part in parts]
    described = [
        (
            (part.blocks.data_ptr(), "U8", part.blocks.numel()),
            part.blocks.shape[0],
            part.kind,
            None if part.order is None else (part.order.data_ptr(), "I64", len(part.order)),
        )
        for part in stored
    ]
    order = None if columns is None else (columns.data_ptr(), "I64", k)
    handle = _core.CpuLinear(n, k, described, level, order)
    formats = list(dict.fromkeys(part.format for part in stored))
    dtype = DENSE_DTYPES.get(formats[0], torch.float32) if len(formats) == 1 else torch.float32
    return CpuWeight(handle, (n, k), "+".join(formats), dtype, 32 if exact else activation_bits)


class _Stored(NamedTuple):
    """Rows of bytes that the Rust core reads, and the format that they come from.

    order: int64 [N], of the rows, or None.
    """

    blocks: Tensor
    kind: str
    format: str
    order: Tensor | None


def _stored(weight: Stored, columns: Tensor | None) -> _Stored:
    """A weight as the core reads it; columns: int64 [K], the order to bring them to."""
    if isinstance(weight, Tensor):
        name = DENSE_FORMATS.get(weight.dtype)
        if name is None or not weight.is_cpu:
            raise refuse(weight, "weight", "a float32, bfloat16 or float16 CPU tensor")
        weight = weight.detach() if columns is None else weight.detach()[:, columns]
        n, k = weight.shape
        data = weight.contiguous().view(-1).view(torch.uint8)
        return _Stored(data.view(n, k * weight.itemsize), name, name, None)
    if not next(iter(weight.planes.values())).is_cpu:
        raise refuse(next(iter(weight.planes.values())), "blocks", "a CPU tensor")
    order = None if weight.row_order is None else weight.row_order.contiguous()
    if weight.format in GROUPED_FORMATS:
        rows = as_rows(weight, columns)
        if rows is not None:
            return _Stored(rows.blocks, rows.kind, weight.format, order)
    elif weight.format in BLOCK_FORMATS and weight.format not in GRIDS and columns is None:
        return _Stored(weight.planes["blocks"], weight.format, weight.format, order)
    # Without a packed form of its own: dense, as a file's dense weights are.
    return _stored(weight.dense(), columns)


def packed(weight: Weight) -> CpuWeight:
    """A weight of this op set, for calls that hand it to Rust.

    Raises:
        ValueError: it is another backend's.
    """
    if not isinstance(weight, CpuWeight):
        raise ValueError(f"a {type(weight).__name__} was prepared for another device")
    return weight


class CpuExperts(Experts):
    """One packed weight for each expert's gate and up rows, and one for its down rows."""

    __slots__ = ("_act", "biases", "num_elements", "w2", "w13")

    def __init__(
        self,
        w13: Sequence[CpuWeight],
        w2: Sequence[CpuWeight],
        biases: ExpertBiases | None = None,
    ) -> None:
        self.w13, self.w2 = w13, w2
        is_gated = has_gate(w13[0].shape[0], w2[0].shape[1])
        self._act = gated_activation if is_gated else activation
        self.biases = biases
        self.num_elements = sum(weight.num_elements for weight in (*w13, *w2))

    def mix(
        self,
        x: Tensor,
        router_logits: Tensor,
        routing: Routing,
        *,
        kind: str = "silu",
        first: int = 0,
    ) -> Tensor:
        probs, experts = routing.choose(router_logits)
        biases = self.biases
        # Rows in the order of their experts, so that each expert's are a slice.
        order = experts.reshape(-1).argsort(stable=True)
        counts = torch.bincount(experts.reshape(-1), minlength=router_logits.shape[1]).tolist()
        out = torch.zeros(x.shape, dtype=torch.float32)
        start = sum(counts[:first])
        for expert, count in enumerate(counts[first : first + len(self.w13)]):
            if count:
                chosen = order[start : start + count]
                start += count
                rows = chosen // routing.top_k
                bias = None if biases is None else biases.gate_up[expert]
                hidden = self._act(self.w13[expert].linear(x[rows].float(), bias), kind)
                weights = probs.reshape(-1)[chosen, None]
                bias = None if biases is None else biases.down[expert]
                out.index_add_(0, rows, self.w2[expert].linear(hidden, bias) * weights)
        return out.to(x.dtype)


def prepare_experts(
    gate_up: Sequence[Sequence[Stored]],
    down: Sequence[Stored],
    *,
    biases: ExpertBiases | None = None,
    exact: bool = False,
    activation_bits: int = 16,
) -> CpuExperts:
    """Experts of each one's gate and up parts [F, D], and of each one's down part [D, F].

    Raises:
        ValueError: as ``prepare``.
    """
    return CpuExperts(
        [prepare(parts, exact=exact, activation_bits=activation_bits) for parts in gate_up],
        [prepare([part], exact=exact, activation_bits=activation_bits) for part in down],
        biases,
    )
