"""VectorForm: vectors as an answer holds them: numbers, base64, or bytes in place of JSON."""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson
from starlette.responses import Response

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from octavo.pooling import Pooled

# vLLM's names of a number's type -> torch's.
DTYPES: Final = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
ENDIANNESS: Final = ("native", "little", "big")
# The last two are no JSON: all vectors end to end, the first of them with a header of their places.
ENCODINGS: Final = ("float", "base64", "bytes", "bytes_only")


@dataclass(frozen=True, slots=True)
class VectorForm:
    """``encoding_format``, ``embed_dtype`` and ``endianness`` of a request, as vLLM has them.

    The last two are of base64 and bytes; numbers in JSON have no type.
    """

    encoding: str = "float"
    dtype: str = "float32"
    endianness: str = "native"

    @property
    def is_json(self) -> bool:
        """True where the answer is JSON."""
        return self.encoding in ("float", "base64")

    def in_json(self, values: Pooled) -> Any:
        """One text's value in a JSON answer."""
        return values if self.encoding == "float" else self.base64(values)

    def base64(self, values: Pooled) -> str:
        """One text's numbers as base64."""
        return base64.b64encode(self._bytes(values)).decode()

    def response(self, rows: Sequence[Pooled], about: dict[str, Any]) -> Response:
        """The answer that is no JSON: the vectors of each text, end to end.

        Args:
            about: what a JSON answer has beside ``data``.
        """
        parts = [self._bytes(row) for row in rows]
        headers = {}
        if self.encoding == "bytes":
            entries, start = [], 0
            for index, (row, part) in enumerate(zip(rows, parts, strict=True)):
                entries.append(
                    {
                        "index": index,
                        "embed_dtype": self.dtype,
                        "endianness": self.endianness,
                        "start": start,
                        "end": (start := start + len(part)),
                        "shape": row.shape,
                    }
                )
            headers["metadata"] = orjson.dumps({**about, "data": entries}).decode()
        return Response(b"".join(parts), media_type="application/octet-stream", headers=headers)

    def _bytes(self, values: Pooled) -> bytes:
        found: NDArray[Any] = np.ascontiguousarray(values, np.float32)
        if self.dtype == "float16":
            found = found.astype(np.float16)
        elif self.dtype != "float32":
            found = _of_torch(found, DTYPES[self.dtype])
        swaps = self.endianness not in ("native", sys.byteorder)
        return (found.byteswap() if swaps else found).tobytes()


def _of_torch(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Values of a type that numpy has none for, as whole numbers of its size."""
    # Imported here: a server that has only loaded its routes needs no torch.
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    whole = torch.uint16 if kind.itemsize == 2 else torch.uint8
    found: NDArray[Any] = torch.from_numpy(values.copy()).to(kind).view(whole).numpy()
    return found


def quantized(rows: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Vectors in one of sentence-transformers' precisions.

    A bit is 1 where a number is not negative, the first the highest. Of int8 and uint8 the ranges
    are -1 to 1, the bounds of vectors of length 1, so that vectors of all requests compare.
    """
    match kind:
        case "ubinary":
            return np.packbits(rows >= 0, axis=1)
        case "binary":
            return (np.packbits(rows >= 0, axis=1).astype(np.int16) - 128).astype(np.int8)
        case _:
            steps = (rows.clip(-1, 1) + 1) / np.float32(2 / 255)
            return steps.astype(np.uint8) if kind == "uint8" else (steps - 128).astype(np.int8)
