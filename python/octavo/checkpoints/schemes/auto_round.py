"""AutoRoundScheme: auto-round's own files, in the layouts of GPTQ or AWQ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.checkpoints.schemes.awq import AwqScheme
from octavo.checkpoints.schemes.gptq import GptqModule, is_zero_bias, module_of, read_gptq
from octavo.checkpoints.schemes.scheme import Scheme, Tensors, read_dense
from octavo.errors import ModelLoadError
from octavo.kernels.weights import Part, Stored


class AutoRoundScheme(Scheme):
    """auto-round's own config over GPTQ's or AWQ's tensors; scales may be negative.

    ``packing_format``: auto_round:auto_gptq (v1) or auto_round:auto_awq (gemm). ``extra_config``: a
    module's name, or a regex for the whole of it -> its own bits and group_size.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._module = module_of(config)
        self._extra: Mapping[str, Mapping[str, Any]] = config.get("extra_config") or {}
        packing = str(config.get("packing_format") or config.get("backend"))
        self._awq = AwqScheme(config) if packing.endswith("auto_awq") else None
        if self._awq is None and not packing.endswith("auto_gptq"):
            raise ModelLoadError(
                f"auto-round: packing_format {packing!r} is not read; export it as auto_gptq"
            )

    def linear(self, tensors: Tensors, prefix: str, shape: tuple[int, int], part: Part) -> Stored:
        if f"{prefix}.qweight" not in tensors:
            return read_dense(tensors, prefix, shape, part)
        if self._awq is not None:
            return self._awq.linear(tensors, prefix, shape, part)
        return read_gptq(tensors, prefix, shape, part, self._of(prefix), 1)

    def _of(self, prefix: str) -> GptqModule:
        values = self._extra.get(prefix)
        if values is None:
            matches = (v for p, v in self._extra.items() if re.fullmatch(p, prefix))
            values = next(matches, {})
        own = {key: values[key] for key in ("bits", "group_size") if key in values}
        return replace(self._module, **own)

    def is_spare(self, tensors: Tensors, name: str) -> bool:
        return is_zero_bias(tensors, name)
