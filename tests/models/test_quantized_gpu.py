"""Quantized models on a GPU's op set: kept in their bits, and as near to their numbers as bfloat16.

Loading runs anywhere; whole models run on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity import make_prompt
from test_schemes_files import BY_NAME, save

from tiny_encoders import save_tokenizer

gpu = pytest.importorskip("octavo.kernels.gpu.ops")
from octavo.config import EngineConfig  # noqa: E402
from octavo.errors import ModelLoadError  # noqa: E402
from octavo.llm import LLM  # noqa: E402
from octavo.models.source import resolve_model  # noqa: E402
from octavo.runner.dtypes import (  # noqa: E402
    GPU_QUANTIZATIONS,
    ModelDtypes,
    resolve_dtypes,
)
from octavo.runner.loading import load_model  # noqa: E402
from octavo.sampling_params import SamplingParams  # noqa: E402

# A case -> the formats of its first layer's fused query, key and value, and of its down projection.
KEPT = {
    "awq-gemm": ("INT4", "INT4"),
    "awq-whole-k": ("INT4", "INT4"),
    "awq-gemv": ("INT4", "INT4"),
    # The key is dense there.
    "awq-split": ("F16", "INT4"),
    "gptq-4bit-v1": ("INT4", "INT4"),
    "gptq-4bit-v2": ("INT4", "INT4"),
    "gptq-sym": ("INT4", "INT4"),
    "gptq-desc-act": ("F16", "INT4"),
    "gptq-lm-head": ("INT4", "INT4"),
    "auto-round-gptq": ("INT4", "INT4"),
    "ct-w4-sym": ("INT4", "INT4"),
    "ct-w4-asym": ("INT4", "INT4"),
    "ct-fp8-tensor": ("FP8", "FP8"),
    "ct-fp8-channel": ("FP8", "FP8"),
    "ct-fp8-block": ("F16", "FP8"),
    "fp8-tensor": ("FP8", "FP8"),
    "fbgemm-fp8": ("FP8", "FP8"),
    "modelopt-fp8": ("FP8", "FP8"),
    "gptq-8bit-v1": ("F16", "F16"),
    "ct-w8-sym": ("INT8", "INT8"),
    "ct-int8": ("INT8", "INT8"),
    "ct-nvfp4": ("INT4", "INT4"),
    "ct-mxfp4": ("INT4", "INT4"),
    "modelopt-nvfp4": ("F16", "INT4"),
    # The columns of down are no whole blocks.
    "bnb-fp4": ("INT4", "F16"),
    "bnb-nf4": ("INT4", "F16"),
}


# --quantization -> the format of what it leaves, other than FP8.
FORMATS = {"w4": "INT4", "mxfp4": "INT4", "w8": "INT8"}


def first_layer(path: Path, quantize: str | None = None) -> Any:
    """The first layer of the model, loaded for a GPU's ops with activations of 16 bits."""
    source = resolve_model(EngineConfig(model=str(path), device="cpu"))
    dtype = torch.float16
    dtypes = ModelDtypes(dtype, dtype, packed=False, kv_cache=dtype, quantize=quantize)
    model: Any = load_model(source, dtypes, gpu.OPS, max_model_len=64, device=torch.device("cpu"))
    return model.layers[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ops take a CPU's tensors interpreted")
@pytest.mark.parametrize("name", KEPT)
def test_matrices_keep_their_bits(name: str, save_tiny: Callable[..., Any], tmp_path: Path) -> None:
    path, twin = save(BY_NAME[name], save_tiny, tmp_path)
    layer, other = first_layer(path), first_layer(twin)
    for found, dense, expected in (
        (layer.self_attn.qkv_proj.weight, other.self_attn.qkv_proj.weight, KEPT[name][0]),
        (layer.mlp.down_proj.weight, other.mlp.down_proj.weight, KEPT[name][1]),
    ):
        assert found.format == expected
        want = dense.dequantize()
        assert (found.dequantize() - want).norm() < 1e-3 * want.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the ops take a CPU's tensors interpreted")
@pytest.mark.parametrize("asked", GPU_QUANTIZATIONS)
def test_matrices_are_rounded_at_load(asked: str, save_tiny: Callable[..., Any]) -> None:
    path, _ = save_tiny("Llama", hidden_size=256, intermediate_size=384)
    config = EngineConfig(model=str(path), quantization=asked, dtype="float16")
    source = resolve_model(config)
    cuda = torch.device("cuda")
    found = resolve_dtypes(config, source.model_config, source, cuda).quantize
    layer = first_layer(path, found)
    weight = layer.mlp.down_proj.weight
    assert weight.format == FORMATS.get(asked, "FP8")
    if asked == "fp8_per_block":
        assert weight.scales.shape == (2, 3)
    want = first_layer(path).mlp.down_proj.weight.dequantize()
    error = (weight.dequantize() - want).norm() / want.norm()
    assert error < {"w4": 0.13, "mxfp4": 0.15, "w8": 0.01}.get(asked, 0.03)


def test_a_checkpoints_own_method_may_be_named(
    save_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    path, twin = save(BY_NAME["awq-gemm"], save_tiny, tmp_path)

    def rounding(folder: Path, asked: str, device: str = "cuda") -> str | None:
        config = EngineConfig(model=str(folder), quantization=asked)
        source = resolve_model(config)
        return resolve_dtypes(config, source.model_config, source, torch.device(device)).quantize

    for asked in ("awq", "awq_marlin"):
        for device in ("cuda", "cpu"):
            assert rounding(path, asked, device) is None
    assert rounding(twin, "fp8") == "FP8 by channel"
    for asked in ("gptq", "fp8"):
        with pytest.raises(ModelLoadError, match=f"{asked} does not fit .* quantized by 'awq'"):
            rounding(path, asked)
    with pytest.raises(ModelLoadError, match=r"awq does not fit .* is not quantized"):
        rounding(twin, "awq")
    assert rounding(twin, "fp8", "cpu") == "FP8 by channel"
    with pytest.raises(ModelLoadError, match="'w5' is not supported; known: w4, w8, mxfp4, fp8"):
        rounding(twin, "w5", "cpu")


# ------------------------------------------------------------------------------------- on a GPU


def errors(llm: LLM, exact: LLM, prompt: list[int]) -> torch.Tensor:
    """Of the log probabilities of the prompt's tokens, and of each decoded one, against ``exact``."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    decoded = llm.generate([prompt], params)[0].outputs[0]
    tokens = [*prompt, *decoded.token_ids]
    found = [next(iter(step.values())).logprob for step in decoded.logprobs]
    want, got = prompt_logprobs(exact, [tokens]), prompt_logprobs(llm, [tokens])
    return torch.cat([got - want, torch.tensor(found) - want[-len(found) :]]).abs()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", KEPT)
def test_log_probabilities_are_as_near_as_bfloat16s(
    name: str, save_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """Steps of one row, of few and of a prompt's; weights alone are rounded in all of them."""
    path, twin = save(BY_NAME[name], save_tiny, tmp_path)
    for folder in (path, twin):
        save_tokenizer(folder)
    options: dict[str, Any] = {
        "device": "cuda",
        "max_model_len": 256,
        "num_gpu_blocks_override": 64,
    }
    exact = LLM(str(twin), dtype="float32", **options)
    rounded = LLM(str(twin), dtype="bfloat16", **options)
    kept = LLM(str(path), dtype="bfloat16", **options)
    prompts = [make_prompt(length) for length in (3, 12, 40, 100)]
    bound = torch.cat([errors(rounded, exact, prompt) for prompt in prompts]).mean()
    found = torch.cat([errors(kept, exact, prompt) for prompt in prompts]).mean()
    # Activations are rounded to 8 bits, 4 of mantissa less, in steps of more rows than 16.
    rounds = KEPT[name][1] == "FP8" and "block" not in name
    assert found < (25 if rounds else 1.2) * bound, (found, bound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("asked", GPU_QUANTIZATIONS)
def test_rounded_models_answer_alike_alone_and_together(
    asked: str, save_tiny: Callable[..., Any]
) -> None:
    """Company moves log probabilities by less than rounding itself does.

    Not always to the same tokens: where activations are rounded to 8 bits, a product summed in
    another order tips some of them over to the next value.
    """
    path, _ = save_tiny("Llama", hidden_size=256, intermediate_size=384)
    save_tokenizer(path)
    rounded, plain = (
        LLM(
            str(path), device="cuda", dtype="bfloat16", quantization=quantization,
            max_model_len=256, num_gpu_blocks_override=256,
        )
        for quantization in (asked, None)
    )  # fmt: skip
    # All of more than 16 rows, from where activations may be rounded; together of more than 64.
    prompts = [make_prompt(n) for n in range(20, 44, 2)]
    together = prompt_logprobs(rounded, prompts)
    alone = torch.cat([prompt_logprobs(rounded, [prompt]) for prompt in prompts])
    exact = prompt_logprobs(plain, prompts)
    exact_alone = torch.cat([prompt_logprobs(plain, [prompt]) for prompt in prompts])
    apart, moved, noise = (
        float((a - b).abs().mean())
        for a, b in ((together, alone), (together, exact), (exact, exact_alone))
    )
    assert apart < moved + 2 * noise, (apart, moved, noise)
    if not asked.startswith("fp8") or asked == "fp8_per_block":
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        tokens = [out.outputs[0].token_ids for out in rounded.generate(prompts, params)]
        one = [rounded.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
        assert sum(a == b for a, b in zip(tokens, one, strict=True)) > len(prompts) // 2
        assert len({tuple(ids) for ids in tokens}) > 4


def prompt_logprobs(llm: LLM, prompts: list[list[int]]) -> torch.Tensor:
    """Of the prompts' tokens but their first, one after another."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for prompt, out in zip(prompts, llm.generate(prompts, params), strict=True):
        steps = out.prompt_logprobs
        found += [step[token].logprob for step, token in zip(steps[1:], prompt[1:], strict=True)]
    return torch.tensor(found)
