"""Every scheme by its ``quant_method``. A new one is a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octavo.checkpoints.schemes.auto_round import AutoRoundScheme
from octavo.checkpoints.schemes.awq import AwqScheme
from octavo.checkpoints.schemes.bitsandbytes import BitsAndBytesScheme
from octavo.checkpoints.schemes.compressed_tensors import CompressedTensorsScheme
from octavo.checkpoints.schemes.dense import DenseScheme
from octavo.checkpoints.schemes.fp8 import Fp8Scheme
from octavo.checkpoints.schemes.gptq import GptqScheme
from octavo.checkpoints.schemes.modelopt import ModelOptScheme
from octavo.checkpoints.schemes.mxfp4 import Mxfp4Scheme
from octavo.checkpoints.schemes.scheme import Scheme
from octavo.errors import ModelLoadError

# quant_method -> the scheme that a quantization_config of that method describes.
SCHEMES: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "auto-round": AutoRoundScheme,
    "awq": AwqScheme,
    "bitsandbytes": lambda _: BitsAndBytesScheme(),
    "compressed-tensors": CompressedTensorsScheme,
    "fbgemm_fp8": Fp8Scheme,
    "fp8": Fp8Scheme,
    "gptq": GptqScheme,
    "modelopt": ModelOptScheme,
    "modelopt_fp4": ModelOptScheme,
    "mxfp4": Mxfp4Scheme,
    "intel/auto-round": AutoRoundScheme,
}

# Files beside config.json that hold what newer ones hold in it -> their quant_method.
CONFIG_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}

# Other names that --quantization may give files of a method, as vLLM calls its kernels for them.
_OTHER_NAMES = {
    "auto_round": "auto-round",
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "inc": "auto-round",
    "intel/auto-round": "auto-round",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
}

# Methods of files that are also ways to round files of none.
_ROUNDINGS = ("fp8", "mxfp4")

_ADVICE = "quantize the model anew to compressed-tensors (llm-compressor), GPTQ, AWQ or GGUF"
# Methods whose files are not read, and the way out where there is a shorter one.
REFUSED = {
    "aqlm": _ADVICE,
    "bitnet": "use the model's bfloat16 files",
    "eetq": _ADVICE,
    "exl2": _ADVICE,
    "exl3": _ADVICE,
    "fp_quant": _ADVICE,
    "higgs": _ADVICE,
    "hqq": _ADVICE,
    "quanto": _ADVICE,
    "quark": _ADVICE,
    "quip": _ADVICE,
    "spqr": _ADVICE,
    "torchao": f"its files are pickled tensor subclasses; {_ADVICE}",
    "vptq": _ADVICE,
}


def method_of(quantization_config: Mapping[str, Any] | None) -> str:
    """The quant_method of a ``quantization_config``; "" where nothing is quantized."""
    config = quantization_config or {}
    method = config.get("quant_method")
    if not method and ("load_in_4bit" in config or "load_in_8bit" in config):
        return "bitsandbytes"  # its first files do not name it
    if not method and "quant_algo" in config:
        return "modelopt"
    return str(method or "")


def is_of_files(quantization: str, method: str) -> bool:
    """True where ``--quantization`` names how the files are quantized already, ``method``.

    False where it names nothing that files hold, or a rounding of files that are not quantized.

    Raises:
        ModelLoadError: it names another method than the files'.
    """
    if quantization not in SCHEMES and quantization not in (*_OTHER_NAMES, *REFUSED, "gguf"):
        return False
    if quantization in _ROUNDINGS and not method:
        return False
    if _OTHER_NAMES.get(quantization, quantization) == _OTHER_NAMES.get(method, method):
        return True
    held = f"quantized by {method!r}" if method else "not quantized"
    advice = "leave it out" if method else "leave it out, or round it at load by w4"
    raise ModelLoadError(
        f"--quantization {quantization} does not fit the checkpoint, which is {held}: {advice}"
    )


def find_scheme(quantization_config: Mapping[str, Any] | None) -> Scheme:
    """The scheme of a config.json's ``quantization_config``; dense without one.

    Raises:
        ModelLoadError: a quant_method that is unknown or not read, with what to convert to; a
            value that is missing or of another type.
    """
    config, method = quantization_config or {}, method_of(quantization_config)
    if not method:
        return DenseScheme()
    make = SCHEMES.get(method)
    if make is None:
        advice = REFUSED.get(method, _ADVICE)
        raise ModelLoadError(f"quantization method {method!r} is not supported: {advice}")
    try:
        return make(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"quantization_config ({method}) cannot be read: {error!r}") from error
