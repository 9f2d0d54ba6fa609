"""Files in each quantized format by the format's own tool, with the logits of what the tool reads.

    python tests/models/make_tool_files.py tests/data/quantized [FORMAT ...]

Needs no GPU, but the tools: llmcompressor, auto-round, bitsandbytes (an environment of their own). A
format whose tool is not installed is left out. Every folder holds a tiny random Llama and its
config.json; the file beside it, the logits of the tool's own dequantized weights in float32, the ids
they belong to, and in its metadata the versions that made it. ``test_tool_files.py`` reads them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB = 64
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
PROMPT = [(7 * i * i + 3) % VOCAB for i in range(24)]

# Writes a folder from the float model at a path, and gives the weights that the tool reads from it.
Maker = Callable[[Path, Path], dict[str, torch.Tensor]]


def make_base(path: Path) -> None:
    """A random model whose weights spread as trained ones do, and the tokenizer that tools want."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, bos_token_id=0, eos_token_id=1))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter) * parameter.shape[1] ** -0.5
    model.to(torch.bfloat16).save_pretrained(path)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(path)


def load_base(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.name_or_path = str(path)
    return model


def linear_weights(model: Any) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    names = LlamaForCausalLM(LlamaConfig(**CONFIG)).state_dict()
    return {name: state[name].float() for name in names}


def llm_compressor(scheme: str) -> Maker:
    def make(base: Path, out: Path) -> dict[str, torch.Tensor]:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        model = load_base(base)
        recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
        oneshot(model=model, recipe=recipe)
        model.save_pretrained(out, save_compressed=True)
        return decompressed(out)

    return make


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """What compressed-tensors reads from a folder, in float32: scales are bfloat16 in the files."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    [group] = config["config_groups"].values()
    scheme = QuantizationScheme(**group)
    compressor = BaseCompressor.get_value_from_registry(group.get("format") or config["format"])
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        prefix, suffix = name.rsplit(".", 1)
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        modules.setdefault(prefix, {})[suffix] = tensor
    weights = {}
    for prefix, found in modules.items():
        is_quantized = any(suffix.startswith("weight_") for suffix in found)
        if "weight_global_scale" in found:
            # The compressor itself rounds to bfloat16.
            rows, columns = found["weight_packed"].shape
            q = unpack_fp4_from_uint8(found["weight_packed"], rows, 2 * columns, torch.float32)
            read = {
                "weight": dequantize(
                    q,
                    found["weight_scale"].float(),
                    args=scheme.weights,
                    global_scale=found["weight_global_scale"],
                )
            }
        else:
            read = compressor.decompress(found, scheme) if is_quantized else found
        weights[f"{prefix}.weight"] = read["weight"].float()
    return weights


def bits_and_bytes(**options: Any) -> Maker:
    def make(base: Path, out: Path) -> dict[str, torch.Tensor]:
        config = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        model.save_pretrained(out)
        return {name: dequantized(weight) for name, weight in model.named_parameters()}

    return make


def dequantized(weight: Any) -> torch.Tensor:
    """bitsandbytes' weight as it reads it, any other as it is."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if getattr(weight, "quant_state", None) is not None:
        return dequantize_4bit(weight.data, weight.quant_state).float()
    if getattr(weight, "SCB", None) is not None:
        return int8_vectorwise_dequant(weight.data, weight.SCB).float()
    return weight.data.float()


def auto_round(form: str, **options: Any) -> Maker:
    def make(base: Path, out: Path) -> dict[str, torch.Tensor]:
        from auto_round import AutoRound
        from transformers import AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(base)
        # Without amp its weights stay float32, integers times the file's float16 scales.
        plain = {"iters": 0, "disable_opt_rtn": True, "amp": False, "device_map": "cpu"}
        rounder = AutoRound(model, tokenizer, **plain, **options)
        rounder.quantize()
        weights = linear_weights(rounder.model)
        rounder.save_quantized(str(out), format=form, inplace=False)
        return weights

    return make


MAKERS: dict[str, tuple[str, Maker]] = {
    **{
        f"ct-{scheme.lower().replace('_', '-')}": ("llmcompressor", llm_compressor(scheme))
        for scheme in (
            "W4A16",
            "W4A16_ASYM",
            "W8A16",
            "W8A8",
            "FP8_DYNAMIC",
            "FP8_BLOCK",
            "NVFP4A16",
            "MXFP4A16",
        )
    },
    "bnb-nf4": (
        "bitsandbytes",
        bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    ),
    "bnb-nf4-double": (
        "bitsandbytes",
        bits_and_bytes(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    ),
    "bnb-fp4": ("bitsandbytes", bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "bnb-int8": ("bitsandbytes", bits_and_bytes(load_in_8bit=True)),
    "auto-gptq-sym": ("auto-round", auto_round("auto_gptq", bits=4, group_size=32, sym=True)),
    "auto-gptq-asym": ("auto-round", auto_round("auto_gptq", bits=4, group_size=32, sym=False)),
    "auto-gptq-w8": ("auto-round", auto_round("auto_gptq", bits=8, group_size=128, sym=True)),
    "auto-gptq-w3": ("auto-round", auto_round("auto_gptq", bits=3, group_size=32, sym=True)),
    "auto-gptq-w2": ("auto-round", auto_round("auto_gptq", bits=2, group_size=32, sym=False)),
    "auto-awq": ("auto-round", auto_round("auto_awq", bits=4, group_size=32, sym=False)),
    "auto-round": ("auto-round", auto_round("auto_round", bits=4, group_size=32, sym=True)),
}


def main(folder: Path, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        make_base(base)
        for name, (package, maker) in MAKERS.items():
            if names and name not in names:
                continue
            try:
                versions = {p: version(p) for p in (package, "torch", "transformers")}
            except PackageNotFoundError as missing:
                print(f"{name}: left out, without {missing}")
                continue
            out = Path(temporary) / name
            weights = maker(base, out)
            keep(out, folder / name, weights, versions)
            print(name, sum(f.stat().st_size for f in (folder / name).iterdir()))


def keep(made: Path, to: Path, weights: dict[str, torch.Tensor], versions: dict[str, str]) -> None:
    """The files that a server reads of what a tool wrote, and what it should compute with them."""
    # Some tools add a folder of their own name.
    found = next(made.rglob("config.json")).parent
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for file in [*found.glob("*.safetensors"), found / "config.json"]:
        shutil.copy(file, to / file.name)
    plain = LlamaForCausalLM(LlamaConfig(**CONFIG)).float()
    plain.load_state_dict(weights)
    with torch.inference_mode():
        logits = plain(torch.tensor([PROMPT])).logits[0]
    ids = torch.tensor(PROMPT, dtype=torch.int32)
    expected = {"ids": ids, "logits": logits.contiguous()}
    save_file(expected, to.with_name(f"{to.name}-logits.safetensors"), versions)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
