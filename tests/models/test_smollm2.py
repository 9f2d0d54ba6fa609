"""The real SmolLM2-135M-Instruct (Q4_1) against transformers with the same weights in float32.

transformers would take half a minute to read the GGUF file; its module is filled here with the
dequantized tensors instead, un-permuted independently of the loader.
"""

from __future__ import annotations

import dataclasses
import itertools
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
# Keys and values of one block of 16 tokens, float32.
BLOCK_BYTES = 16 * 2 * 30 * (3 * 64) * 4
# How the same answers can be come by: (prompts, tokens each), and the engine's flags.
RIDES: dict[str, tuple[int, int, dict[str, Any]]] = {
    # The plain PyTorch ops compute one request at a time: they are given less to say.
    "reference": (1, 24, {"attention_backend": "reference"}),
    "one batch": (10, 200, {"max_num_seqs": 10}),
    "alone": (1, 200, {"max_num_seqs": 1}),
    # Ten answers come to some 150 blocks.
    "chunks and preemption": (
        10,
        200,
        {
            "max_num_seqs": 10,
            "max_num_batched_tokens": 16,
            "kv_cache_memory_bytes": 60 * BLOCK_BYTES,
        },
    ),
    "prefix hits": (5, 200, {"max_num_seqs": 5}),
}
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


class Truth:
    """What transformers finds of sequences; the rides' are the same, so each is computed once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
        """float32 [N, V]: what each of the N tokens was chosen from."""
        ids = (*prompt, *token_ids)
        if ids not in self._logits:
            with torch.inference_mode():
                out = self._model(torch.tensor([ids]), logits_to_keep=len(token_ids) + 1)
            self._logits[ids] = out.logits[0, :-1]
        return self._logits[ids]


@pytest.fixture(scope="module")
def truth(model: Any) -> Truth:
    return Truth(model)


@pytest.mark.parametrize(
    "ride",
    [ride if ride == "alone" else pytest.param(ride, marks=pytest.mark.slow) for ride in RIDES],
)
def test_float32_says_what_transformers_says(
    truth: Truth, driver: Callable[..., Any], ride: str
) -> None:
    """Every token is transformers' own choice after the same beginning, so by induction the whole
    greedy answer is; and its log probabilities are transformers'."""
    num_prompts, num_tokens, config = RIDES[ride]
    engine = driver(None, **{"max_model_len": 512, "threads": 2, **config})
    encode = engine.source.tokenizer.encode
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    prompts = [encode(chat.format(text)) for text in PROMPTS[:num_prompts]]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=3)
    if ride == "prefix hits":
        engine.generate(prompts, dataclasses.replace(params, max_tokens=1))
    outputs = engine.generate(prompts, params)
    if ride == "prefix hits":
        assert all(output.num_cached_tokens >= 16 for output in outputs)
    elif ride == "chunks and preemption":
        assert engine.core.stats()["num_preemptions"] > 0
        assert max(map(len, prompts)) > 16
        assert any(0 < decodes < reqs for decodes, reqs in engine.batch_sizes)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output.token_ids) == num_tokens
        logits = truth(prompt, output.token_ids)
        for i, token in enumerate(output.token_ids):
            best = int(logits[i].argmax())
            lead = float(logits[i, best] - logits[i, token])
            # A tie in float32 may fall either way; anything else is a fault.
            assert best == token or lead < 1e-4, f"token {i}: {token}, not {best}, by {lead}"
        expected = logits.log_softmax(-1)
        rows = [i for i, entries in enumerate(output.logprobs) for _ in entries]
        tokens, logprobs, _ranks = zip(*itertools.chain(*output.logprobs), strict=True)
        assert len(rows) == 4 * num_tokens
        torch.testing.assert_close(
            torch.tensor(logprobs), expected[rows, list(tokens)], atol=1e-3, rtol=0
        )


def perplexity(logits: torch.Tensor, token_ids: list[int]) -> float:
    loss = torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(token_ids[1:]))
    return math.exp(float(loss))


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
def test_rounded_products_keep_the_perplexity(model: Any, smollm2_path: Path) -> None:
    """The default arithmetic of a quantized file, beside its dequantized weights' float32."""
    from octavo.llm import LLM

    llm = LLM(str(smollm2_path), kv_cache_dtype="float32", max_model_len=576, threads=2)
    ids = llm.get_tokenizer().encode(TEXT.read_text())
    loss, expected = 0.0, 0.0
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    for start in range(0, 2048, 512):
        part = ids[start : start + 512]
        [output] = llm.generate([{"prompt_token_ids": part}], params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        for token, entry in zip(part[1:], output.prompt_logprobs[1:], strict=True):
            assert entry is not None
            loss -= entry[token].logprob
        with torch.inference_mode():
            expected += math.log(perplexity(model(torch.tensor([part])).logits[0], part)) * 511
    assert len(ids) >= 2048
    assert abs(math.exp((loss - expected) / (4 * 511)) - 1) < 1e-3


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


def test_conversations_and_prompts_offline(
    smollm2_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from octavo.llm import LLM

    llm = LLM(str(smollm2_path), max_model_len=256, threads=2)
    params = SamplingParams(temperature=0, max_tokens=24)
    system = {"role": "system", "content": "You are a helpful assistant."}
    talks = [
        [system, {"role": "user", "content": f"What is the capital of {country}?"}]
        for country in ("France", "Germany")
    ]
    [paris] = llm.chat(talks[0], params)
    assert "1/1" in capsys.readouterr().err, "there is a progress bar"
    both = llm.chat(talks, params, use_tqdm=False)
    assert not capsys.readouterr().err
    assert both[0].outputs[0].text == paris.outputs[0].text
    for output, city in zip(both, ("Paris", "Berlin"), strict=True):
        assert city in output.outputs[0].text
        assert output.outputs[0].finish_reason == "stop"
    # The template's text, and its ids, are the same prompts.
    assert paris.prompt is not None
    ids = {"prompt_token_ids": paris.prompt_token_ids}
    again = llm.generate([paris.prompt, ids], params, use_tqdm=False)
    for output in again:
        assert output.outputs[0].token_ids == paris.outputs[0].token_ids
    assert llm.get_tokenizer().encode(paris.prompt) == paris.prompt_token_ids
