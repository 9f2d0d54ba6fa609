"""Every scheme by its ``quant_method``. A new one is a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octavo.checkpoints.schemes.dense import DenseScheme
from octavo.checkpoints.schemes.scheme import Scheme
from octavo.errors import ModelLoadError

# quant_method -> the scheme that a quantization_config of that method describes.
SCHEMES: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {}


def find_scheme(quantization_config: Mapping[str, Any] | None) -> Scheme:
    """The scheme of a config.json's ``quantization_config``; dense without one.

    Raises:
        ModelLoadError: an unknown quant_method.
    """
    config = quantization_config or {}
    method = config.get("quant_method")
    if not method:
        return DenseScheme()
    make = SCHEMES.get(method)
    if make is None:
        raise ModelLoadError(f"quantization method {method!r} is not supported")
    return make(config)
