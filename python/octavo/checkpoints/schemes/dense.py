"""DenseScheme: weights as they were trained, one float tensor each."""

from __future__ import annotations

from octavo.checkpoints.schemes.scheme import Scheme, Tensors, read_dense
from octavo.kernels.weights import Part, Stored


class DenseScheme(Scheme):
    """``prefix.weight`` [N, K] in float32, bfloat16 or float16."""

    def linear(self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
        return read_dense(tensors, prefix, shape, part)
