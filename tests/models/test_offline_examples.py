"""What offline programs written for vLLM do, on real models: the import is all that differs."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    EngineArgs,
    PoolingParams,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
)
from octavo.distributed import cleanup_dist_env_and_memory
from octavo.errors import InvalidParameterError, UnsupportedParameterError
from octavo.sampling_params import RequestOutputKind
from octavo.utils.argparse_utils import FlexibleArgumentParser
from octavo.v1.metrics.reader import Counter, Histogram
from tiny_encoders import save_encoder

PARIS = "The capital of France is"


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return LLM(model=str(smollm2_path), max_model_len=512, seed=0, max_logprobs=-1)


# --------------------------------------------------------------- generate, chat


def test_generate(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags of the engine and of sampling on one command line."""
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=str(smollm2_path), max_model_len=256)
    group = parser.add_argument_group("Sampling parameters")
    group.add_argument("--max-tokens", type=int)
    group.add_argument("--temperature", type=float)
    words = ["prog", "--max-tokens", "4", "--temperature", "0", "--swap-space", "4"]
    monkeypatch.setattr(sys, "argv", words)
    args: dict[str, Any] = vars(parser.parse_args())
    max_tokens, temperature = args.pop("max_tokens"), args.pop("temperature")
    llm = LLM(**args)
    sampling_params = llm.get_default_sampling_params()
    sampling_params.max_tokens = max_tokens
    sampling_params.temperature = temperature
    outputs = llm.generate([PARIS, "Two plus two is"], sampling_params, use_tqdm=False)
    assert [output.prompt for output in outputs] == [PARIS, "Two plus two is"]
    assert "Paris" in outputs[0].outputs[0].text
    assert all(len(output.outputs[0].token_ids) == 4 for output in outputs)
    assert all(output.outputs[0].finished() for output in outputs)


def test_prompts_of_every_form(llm: LLM) -> None:
    sampling_params = SamplingParams(1, 0.0, 0.0, 1.0, 0.0, max_tokens=4)
    token_ids = llm.get_tokenizer().encode(PARIS)
    prompts = [PARIS, token_ids, TextPrompt(prompt=PARIS), TokensPrompt(prompt_token_ids=token_ids)]
    outputs = llm.generate(prompts, sampling_params, use_tqdm=False)
    assert len({output.outputs[0].text for output in outputs}) == 1
    assert len({tuple(output.prompt_token_ids) for output in outputs}) == 1


def test_without_texts(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=4, logprobs=1)
    quiet = SamplingParams(temperature=0, max_tokens=4, logprobs=1, detokenize=False)
    [told, untold] = llm.generate([PARIS] * 2, [plain, quiet], use_tqdm=False)
    assert told.outputs[0].text
    assert untold.outputs[0].text == ""
    assert untold.outputs[0].token_ids == told.outputs[0].token_ids
    assert untold.outputs[0].logprobs is not None
    assert {one.decoded_token for one in untold.outputs[0].logprobs[0].values()} == {None}


def test_logprobs_of_the_whole_vocabulary(llm: LLM) -> None:
    settings = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    [output] = llm.generate(PARIS, settings, use_tqdm=False)
    assert output.outputs[0].logprobs is not None
    [position] = output.outputs[0].logprobs
    assert len(position) == llm.model_config.get_vocab_size()
    assert math.fsum(math.exp(one.logprob) for one in position.values()) == pytest.approx(
        1, abs=1e-3
    )


def test_chat(llm: LLM) -> None:
    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    settings = SamplingParams(temperature=0, max_tokens=12)
    [output] = llm.chat(conversation, settings, False)
    assert "Paris" in output.outputs[0].text
    outputs = llm.chat([conversation] * 3, settings, use_tqdm=False)
    assert {one.outputs[0].text for one in outputs} == {output.outputs[0].text}
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert ids == output.prompt_token_ids
    begun = [*conversation, {"role": "assistant", "content": "The capital"}]
    [goes_on] = llm.chat(begun, settings, use_tqdm=False, continue_final_message=True)
    assert goes_on.prompt is not None
    assert goes_on.prompt.endswith("The capital")
    with pytest.raises(ValueError, match="chat_template_content_format"):
        llm.chat(begun, settings, chat_template_content_format="html")


def test_a_template_of_one_s_own(smollm2_path: Path) -> None:
    template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    llm = LLM(str(smollm2_path), chat_template=template, max_model_len=64)
    settings = SamplingParams(temperature=0, max_tokens=1)
    [output] = llm.chat([{"role": "user", "content": "x"}], settings, use_tqdm=False)
    assert output.prompt == "<x>"


def test_the_tokenizer_is_transformers_own(llm: LLM) -> None:
    from transformers import PreTrainedTokenizerBase

    tokenizer = llm.get_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    own = llm._engine.tokenizer
    for text in (PARIS, "naïve café 日本語 🦊", "<|im_start|>user\nHi<|im_end|>", "  a  b\n"):
        ids = tokenizer.encode(text)
        assert ids == own.encode(text)
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == own.decode(ids, False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == own.decode(ids)
    assert tokenizer.eos_token_id in llm._engine.eos_token_ids
    assert len(tokenizer) == own.vocab_size == len(tokenizer.get_vocab())
    assert tokenizer.convert_ids_to_tokens([5]) == [own.id_to_token(5)]


# ------------------------------------------------------- prefix caching, metrics


def test_prefix_caching(smollm2_path: Path) -> None:
    prefix = "You are an expert in many fields, patient and precise. " * 12
    prompts = [prefix + text for text in ("Name a fruit:", "Name a city:")]
    settings = SamplingParams(temperature=0.0, max_tokens=6)
    plain = LLM(model=str(smollm2_path), enable_prefix_caching=False, max_model_len=512)
    expected = [output.outputs[0].text for output in plain.generate(prompts, settings)]
    del plain
    cleanup_dist_env_and_memory()
    cached = LLM(model=str(smollm2_path), enable_prefix_caching=True, max_model_len=512)
    cached.generate(prompts[0], settings)
    outputs = cached.generate(prompts, settings)
    assert [output.outputs[0].text for output in outputs] == expected
    assert all(output.num_cached_tokens >= 96 for output in outputs)
    assert cached.reset_prefix_cache()
    assert cached.generate(prompts[0], settings)[0].num_cached_tokens == 0


def test_metrics(smollm2_path: Path) -> None:
    llm = LLM(model=str(smollm2_path), disable_log_stats=False, max_model_len=128)
    llm.generate([PARIS] * 3, SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
    values = {metric.name: metric for metric in llm.get_metrics()}
    tokens = values["vllm:generation_tokens"]
    assert isinstance(tokens, Counter)
    assert tokens.value == 15
    latencies = values["vllm:inter_token_latency_seconds"]
    assert isinstance(latencies, Histogram)
    assert latencies.count == 12
    assert latencies.sum > 0


# ------------------------------------------------------- embed, classify, score


def test_embed(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    args = EngineArgs(model=str(tmp_path), runner="pooling", enforce_eager=True, threads=1)
    llm = LLM(**dataclasses.asdict(args))
    outputs = llm.embed(["w5 w6", "w7"], use_tqdm=False)
    assert all(len(o.outputs.embedding) == o.outputs.hidden_size == 120 for o in outputs)
    assert llm.model_config.embedding_size == 120
    params = PoolingParams(dimensions=16)
    [cut] = llm.embed("w5 w6", pooling_params=params, use_tqdm=False)
    whole = outputs[0].outputs.embedding[:16]
    length = math.hypot(*whole) if llm._pooling_info("embed").normalizes else 1.0
    assert cut.outputs.embedding == pytest.approx([x / length for x in whole], abs=1e-5)
    [short] = llm.embed(
        "w5 " * 30, pooling_params=PoolingParams(truncate_prompt_tokens=8), use_tqdm=False
    )
    assert len(short.prompt_token_ids) == 8
    each = [PoolingParams(dimensions=16), PoolingParams(truncate_prompt_tokens=8)]
    first, second = llm.embed(["w5 w6", "w5 " * 30], pooling_params=each, use_tqdm=False)
    assert first.outputs.embedding == pytest.approx(cut.outputs.embedding, abs=1e-5)
    assert len(second.prompt_token_ids) == 8
    with pytest.raises(ValueError, match="2 pooling params for 1 prompts"):
        llm.encode("w5", each)
    [bare] = llm.encode("w5 w6", use_tqdm=False, tokenization_kwargs={"add_special_tokens": False})
    assert len(bare.prompt_token_ids) == 2
    [same] = llm.encode("w5 w6", PoolingParams(), pooling_task="embed", use_tqdm=False)
    assert same.outputs.data.tolist() == pytest.approx(outputs[0].outputs.embedding, abs=1e-5)
    with pytest.raises(InvalidParameterError, match="dimensions must be at most 120"):
        llm.embed("w5", pooling_params=PoolingParams(dimensions=121))
    with pytest.raises(InvalidParameterError, match="task must be embed"):
        llm.embed("w5", pooling_params=PoolingParams(task="classify"))
    with pytest.raises(UnsupportedParameterError, match="no LoRA"):
        llm.embed("w5", lora_request=object())  # type: ignore[arg-type]
    for field, value in (("runner", "generate"), ("convert", "classify"), ("task", "generate")):
        with pytest.raises(ValueError, match=f"{field} is '{value}', but this model is made to"):
            LLM(str(tmp_path), threads=1, **{field: value})


def test_embed_async(tmp_path: Path) -> None:
    save_encoder(tmp_path)

    async def main() -> list[float]:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(tmp_path), threads=1))
        params = PoolingParams(dimensions=16)
        found = [one async for one in engine.encode("w5 w6", params, "id")]
        with pytest.raises(ValueError, match="maximum context"):
            async for _ in engine.encode("w5 " * 400, PoolingParams(), "long"):
                pass
        engine.shutdown()
        [output] = found
        assert output.request_id == "id"
        assert output.finished
        return list(output.outputs.data.tolist())

    values = asyncio.run(asyncio.wait_for(main(), 60))
    llm = LLM(str(tmp_path), task="embed", threads=1)
    [same] = llm.embed("w5 w6", pooling_params=PoolingParams(dimensions=16), use_tqdm=False)
    assert values == pytest.approx(same.outputs.embedding, abs=1e-5)


def test_classify(tmp_path: Path) -> None:
    save_encoder(tmp_path, "BertForSequenceClassification", num_labels=4)
    llm = LLM(model=str(tmp_path), runner="pooling", convert="classify", threads=1)
    [output] = llm.classify("w5 w6", use_tqdm=False)
    assert len(output.outputs.probs) == output.outputs.num_classes == 4
    assert sum(output.outputs.probs) == pytest.approx(1, abs=1e-5)
    [raw] = llm.classify(
        "w5 w6", pooling_params=PoolingParams(use_activation=False), use_tqdm=False
    )
    least = max(raw.outputs.probs)
    powers = [math.exp(logit - least) for logit in raw.outputs.probs]
    assert [p / sum(powers) for p in powers] == pytest.approx(output.outputs.probs, abs=1e-5)
    with pytest.raises(InvalidParameterError, match="dimensions needs a model that embeds"):
        llm.classify("w5", pooling_params=PoolingParams(dimensions=2))


def test_score(tmp_path: Path) -> None:
    save_encoder(tmp_path, "BertForSequenceClassification")
    llm = LLM(model=str(tmp_path), runner="pooling", task="score", threads=1)
    outputs = llm.score("w5 w6", ["w7", "w8 w9"], use_tqdm=False)
    assert all(0 < output.outputs.score < 1 for output in outputs)
    raw = llm.score("w5 w6", ["w7"], pooling_params=PoolingParams(use_activation=False))
    score = outputs[0].outputs.score
    assert raw[0].outputs.score == pytest.approx(math.log(score / (1 - score)), abs=1e-3)


# ---------------------------------------------------------------------- streaming


def test_async_streaming(smollm2_path: Path) -> None:
    async def main() -> tuple[str, str]:
        args = AsyncEngineArgs(model=str(smollm2_path), enforce_eager=True, max_model_len=128)
        engine = AsyncLLM.from_engine_args(args)
        settings = SamplingParams(temperature=0, max_tokens=10, output_kind=RequestOutputKind.DELTA)
        pieces = []
        async for output in engine.generate(
            request_id="stream", prompt=PARIS, sampling_params=settings
        ):
            pieces += [completion.text for completion in output.outputs]
            if output.finished:
                break
        settings.output_kind = RequestOutputKind.FINAL_ONLY
        whole = ""
        async for output in engine.generate(PARIS, settings, "whole"):
            whole = output.outputs[0].text
        tokenizer = await engine.get_tokenizer()
        assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
        engine.shutdown()
        assert len(pieces) > 3
        return "".join(pieces), whole

    streamed, whole = asyncio.run(asyncio.wait_for(main(), 120))
    assert streamed == whole
    assert "Paris" in whole
