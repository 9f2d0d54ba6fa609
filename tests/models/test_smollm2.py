"""The real SmolLM2-135M-Instruct (Q4_1) against transformers with the same weights in float32.

transformers would take half a minute to read the GGUF file; its module is filled here with the
dequantized tensors instead, un-permuted independently of the loader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo._core import GgufFile
from octavo.sampling_params import SamplingParams

# A text that rarely changes.
TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
# The plain PyTorch ops compute one request at a time: they are given less to say.
AMOUNTS = {"native": (10, 200), "reference": (1, 24)}
PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "Explain photosynthesis to a ten-year-old.",
    "Give me a recipe for tomato soup.",
    "def fibonacci(n):",
    "List the planets of the solar system in order.",
    "Translate to German: Good morning, how are you?",
    "Why is the sky blue?",
    "Write a poem about autumn leaves.",
    "What should I see in Rome in two days?",
)
HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def dequantized(path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors as HF names and orders them."""
    file = GgufFile(str(path))
    weights = {}
    for name, (shape, _kind, _offset, _nbytes) in file.tensors().items():
        values = np.empty(shape, np.float32)
        file.dequantize(name, values)
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
        assert match is not None
        layer, module = match.groups()
        if module in ("attn_q", "attn_k"):  # each head's halves are interleaved
            heads = values.reshape(shape[0] // 64, 32, 2, shape[1])
            values = heads.swapaxes(1, 2).reshape(shape)
        prefix = "" if layer is None else f"model.layers.{layer}."
        weights[f"{prefix}{HF_NAMES[module]}.weight"] = torch.from_numpy(values)
    return weights


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Any:
    """transformers' LlamaForCausalLM holding the file's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        module = LlamaForCausalLM(config)
    rotary = module.model.rotary_emb
    result = module.load_state_dict(dequantized(smollm2_path), strict=False, assign=True)
    assert result.missing_keys == ["lm_head.weight"]
    assert not result.unexpected_keys
    module.tie_weights()
    module.model.rotary_emb = type(rotary)(config)
    return module.eval()


def generate(engine: Any, num_prompts: int, params: SamplingParams) -> list[tuple[list[int], Any]]:
    encode = engine.source.tokenizer.encode
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    prompts = [encode(chat.format(text)) for text in PROMPTS[:num_prompts]]
    outputs = engine.generate(prompts, params)
    return list(zip(prompts, outputs, strict=True))


@pytest.mark.slow
def test_float32_says_what_transformers_says(
    model: Any, driver: Callable[..., Any], backend: str
) -> None:
    """Every token is transformers' own choice after the same beginning, so by induction the whole
    greedy answer is; and its log probabilities are transformers'."""
    engine = driver(None, attention_backend=backend, max_num_seqs=10, max_model_len=512, threads=2)
    num_prompts, num_tokens = AMOUNTS[backend]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=3)
    for prompt, output in generate(engine, num_prompts, params):
        assert len(output.token_ids) == num_tokens
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *output.token_ids]])
            logits = model(ids, logits_to_keep=num_tokens + 1).logits[0, :-1]
        for i, token in enumerate(output.token_ids):
            best = int(logits[i].argmax())
            lead = float(logits[i, best] - logits[i, token])
            # A tie in float32 may fall either way; anything else is a fault.
            assert best == token or lead < 1e-4, f"token {i}: {token}, not {best}, by {lead}"
        expected = logits.log_softmax(-1)
        for i, entries in enumerate(output.logprobs):
            for token, logprob, _rank in entries:
                assert logprob == pytest.approx(float(expected[i, token]), abs=1e-3)


def perplexity(logits: torch.Tensor, token_ids: list[int]) -> float:
    loss = torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(token_ids[1:]))
    return math.exp(float(loss))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_perplexity_is_within_a_thousandth(
    form: str, model: Any, smollm2_path: Path, driver: Callable[..., Any], tmp_path: Path
) -> None:
    path = smollm2_path
    if form == "safetensors":
        model.save_pretrained(tmp_path)
        path = tmp_path
    engine = driver(path, tokenizer=str(smollm2_path), max_model_len=512, threads=2)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()  # half a gigabyte, which is mapped or read by now
    token_ids = engine.source.tokenizer.encode(TEXT.read_text())[:512]
    with torch.inference_mode():
        theirs = perplexity(model(torch.tensor([token_ids])).logits[0], token_ids)
    assert 1 < theirs < 100
    assert abs(perplexity(engine.logits(token_ids), token_ids) / theirs - 1) < 1e-3


@pytest.mark.slow
def test_a_prompt_is_as_likely_as_transformers_finds_it(model: Any, smollm2_path: Path) -> None:
    from octavo.llm import LLM

    llm = LLM(dtype="float32", max_model_len=128, max_num_batched_tokens=24, threads=2)
    text = (
        "The capital of France is Paris. Its best-known tower is 330 metres high; 東京 has others."
    )
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=4)
    [output] = llm.generate([text], params, use_tqdm=False)
    ids, found = output.prompt_token_ids, output.prompt_logprobs
    assert found is not None
    assert len(found) == len(ids) > 24
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for entry, row in zip(found[1:], expected[:-1], strict=True):
        assert entry is not None
        assert set(row.topk(4).indices.tolist()) <= set(entry)
        for candidate, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(row[candidate]), abs=2e-3)
    likeliest = max(range(1, len(ids)), key=lambda i: found[i][ids[i]].logprob)
    assert found[likeliest][ids[likeliest]].rank == 1
