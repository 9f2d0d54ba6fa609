"""All layers of an encoder in one call of the Rust core, on a CPU.

A group of texts goes through all layers on one thread, in its caches and without a KV cache, where
single ops would pass every activation through memory. The whole call runs without the GIL.
"""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from octavo import _core

from ..encoder import Dense, EncoderSpec, NormWeights
from .linear import packed
from .tensors import Vector, float32_matrix, ints, optional_vector, vector


class CpuEncoder:
    """See ``encoder.EncoderSpec``. Activations are float32.

    ``rounded``: the products' factors are rounded to int16 with a scale for 384 elements of a row
    (``linear::int16`` in the Rust core); this then holds the weights itself, in half the bytes.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        """
        Raises:
            ValueError: tensors that do not fit each other.
        """
        self.rounded = spec.rounded and _core.cpu_rounds_fast()
        self._size = size = spec.layers[0].o_norm[0].numel()
        layers = [
            SimpleNamespace(
                qkv=_dense(layer.qkv),
                o=_dense(layer.o),
                o_norm=_norm(layer.o_norm, "o_norm", size),
                up=_dense(layer.up),
                down=_dense(layer.down),
                mlp_norm=_norm(layer.mlp_norm, "mlp_norm", size),
            )
            for layer in spec.layers
        ]
        # Vectors are copied, weights shared or rounded: nothing is read by address afterwards.
        core = _core.CpuEncoder(
            layers,
            size,
            num_heads=spec.num_heads,
            eps=spec.eps,
            scale=spec.scale,
            kind=spec.act,
            rounded=self.rounded,
        )
        self.nbytes = core.nbytes
        self._forward = core.forward

    def __call__(self, hidden: Tensor, query_start_loc: Tensor) -> Tensor:
        """hidden float32 [T, D], whole texts end to end, overwritten and returned.

        Raises:
            ValueError: texts that are not all rows in order, or tensors that do not fit.
        """
        states = float32_matrix(hidden, "hidden", self._size)
        starts = ints(query_start_loc, "query_start_loc", query_start_loc.numel())
        self._forward(states, starts)
        return hidden


def _dense(part: Dense) -> tuple[_core.CpuLinear, Vector | None]:
    weight, bias = packed(part[0]), part[1]
    return weight.handle, optional_vector(bias, "bias", weight.shape[0])


def _norm(part: NormWeights, name: str, size: int) -> tuple[Vector, Vector | None]:
    weight, bias = part
    return vector(weight, f"{name}'s weight", size), optional_vector(bias, f"{name}'s bias", size)


def make_encoder(spec: EncoderSpec) -> CpuEncoder:
    """The layers in one call.

    Raises:
        ValueError: tensors that do not fit each other, or a weight of another backend.
    """
    return CpuEncoder(spec)
