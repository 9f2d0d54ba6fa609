"""Encoders and what is behind them, against transformers and against the layout's definition."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo import LLM
from octavo.errors import InvalidParameterError, ModelLoadError, RequestTooLongError
from tiny_encoders import minilm_folder, write_modules
from tiny_encoders import save_encoder as save

FAMILIES = ("Bert", "Roberta", "XLMRoberta")
LENGTHS = (5, 1, 40, 16, 17, 33)


def prompts() -> list[list[int]]:
    return [random.Random(n).choices(range(4, 300), k=n) for n in LENGTHS]


@pytest.fixture
def save_encoder(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """A tiny random encoder on disk, and transformers' own."""

    def save_family(family: str, **config: Any) -> tuple[Path, Any]:
        return tmp_path, save(tmp_path, f"{family}Model", **config)

    return save_family


def hidden_of(model: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(torch.tensor([ids])).last_hidden_state[0] for ids in prompts()]


def embed(path: Path, texts: Any = None, **config: Any) -> torch.Tensor:
    llm = LLM(str(path), **{"threads": 1, "dtype": "float32", **config})
    outputs = llm.embed(prompts() if texts is None else texts, use_tqdm=False)
    return torch.tensor([output.outputs.embedding for output in outputs])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(3, 40), (1, 80), (2, 96)])
def test_a_family_is_what_transformers_computes(
    family: str, backend: Any, num_heads: int, head_dim: int, save_encoder: Callable[..., Any]
) -> None:
    sizes = {"hidden_size": num_heads * head_dim, "num_attention_heads": num_heads}
    path, model = save_encoder(family, **sizes)
    expected = torch.stack([hidden.mean(0) for hidden in hidden_of(model)])
    # Steps of 64 tokens: several texts in one, and several steps.
    found = embed(path, attention_backend=backend, max_num_batched_tokens=64)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# What lies in the folders of the models that people run: the class, how it is pooled, the settings'
# file and its contents. Everything else in them is the same.
LAYOUTS = {
    "e5-base-v2": ("BertModel", "mean_tokens", "bert", {"do_lower_case": False}),
    "multilingual-e5-base": ("XLMRobertaModel", "mean_tokens", "bert", {"do_lower_case": False}),
    "bge-small-en-v1.5": ("BertModel", "cls_token", "bert", {"do_lower_case": True}),
    "bge-m3": ("XLMRobertaModel", "cls_token", "xlm-roberta", {"do_lower_case": False}),
    "gte-base": ("BertModel", "mean_tokens", "bert", {"do_lower_case": False}),
    "all-distilroberta-v1": ("RobertaModel", "mean_tokens", "roberta", {"do_lower_case": False}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layouts_of_published_models(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """From the text; some weights are float16, and computed with in float32."""
    from tokenizers import Tokenizer, normalizers

    architecture, mode, kind, settings = LAYOUTS[name]
    model = save(tmp_path, architecture)
    model.to(dtype).save_pretrained(tmp_path)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    pooling = {f"pooling_mode_{one}": one == mode for one in modes}
    pooling = {"word_embedding_dimension": 120, **pooling, "include_prompt": True}
    write_modules(tmp_path, pooling, ("Normalize", "2_Normalize"))
    file = tmp_path / f"sentence_{kind}_config.json"
    file.write_text(json.dumps({"max_seq_length": 48, **settings}))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {}}))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["w5 W6 w7", "", "w8 " * 30]
    llm = LLM(str(tmp_path), threads=1, dtype="float32")
    for text, output in zip(texts, llm.embed(texts, use_tqdm=False), strict=True):
        ids = tokenizer.encode(text).ids
        assert output.prompt_token_ids == ids
        with torch.inference_mode():
            hidden = model.float()(torch.tensor([ids])).last_hidden_state[0]
        pooled = hidden[0] if mode == "cls_token" else hidden.mean(0)
        expected = torch.nn.functional.normalize(pooled, dim=0)
        found = torch.tensor(output.outputs.embedding)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(RequestTooLongError):
        llm.embed("w5 " * 47)


def weighted(hidden: torch.Tensor) -> torch.Tensor:
    places = torch.arange(1.0, len(hidden) + 1)
    return (hidden * places[:, None]).sum(0) / places.sum()


POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls_token": lambda hidden: hidden[0],
    "max_tokens": lambda hidden: hidden.amax(0),
    "mean_tokens": lambda hidden: hidden.mean(0),
    "mean_sqrt_len_tokens": lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
    "weightedmean_tokens": weighted,
    "lasttoken": lambda hidden: hidden[-1],
}


@pytest.mark.parametrize("modes", [*([mode] for mode in POOLINGS), ["mean_tokens", "cls_token"]])
def test_every_pooling_of_sentence_transformers(
    modes: list[str], save_encoder: Callable[..., Any]
) -> None:
    path, model = save_encoder("Bert")
    pooling = {f"pooling_mode_{mode}": mode in modes for mode in POOLINGS}
    write_modules(path, pooling, ("Dropout", "2_Dropout"), ("LayerNorm", "3_LayerNorm"))
    (path / "3_LayerNorm").mkdir()
    size = 120 * len(modes)
    weight, bias = torch.randn(size), torch.randn(size)
    save_file({"norm.weight": weight, "norm.bias": bias}, path / "3_LayerNorm/model.safetensors")
    chosen = [pool for mode, pool in POOLINGS.items() if mode in modes]
    rows = torch.stack(
        [torch.cat([pool(hidden) for pool in chosen]) for hidden in hidden_of(model)]
    )
    expected = torch.nn.functional.layer_norm(rows, (size,), weight, bias)
    torch.testing.assert_close(embed(path), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "row"), [("pooling_mode_cls_token", 0), ("pooling_mode_lasttoken", -1)]
)
def test_pooling_dense_and_normalize(mode: str, row: int, save_encoder: Callable[..., Any]) -> None:
    path, model = save_encoder("Bert")
    write_modules(path, {mode: True}, ("Dense", "2_Dense"), ("Normalize", "3_Normalize"))
    (path / "2_Dense").mkdir()
    (path / "2_Dense" / "config.json").write_text(
        json.dumps({"in_features": 120, "out_features": 7, "activation_function": "torch.nn.Tanh"})
    )
    weight, bias = torch.randn(7, 120) * 0.1, torch.randn(7)
    save_file({"linear.weight": weight, "linear.bias": bias}, path / "2_Dense/model.safetensors")
    rows = torch.stack([hidden[row] for hidden in hidden_of(model)])
    expected = torch.nn.functional.normalize((rows @ weight.T + bias).tanh(), dim=-1)
    torch.testing.assert_close(embed(path), expected, atol=1e-4, rtol=1e-4)


def test_a_layer_before_pooling_is_of_every_token(save_encoder: Callable[..., Any]) -> None:
    path, model = save_encoder("Bert")
    write_modules(path, {"pooling_mode_mean_tokens": True})
    modules = json.loads((path / "modules.json").read_text())
    modules.insert(1, {"path": "1_Dense", "type": "sentence_transformers.models.Dense"})
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Dense").mkdir()
    config = {"in_features": 120, "out_features": 8, "module_input_name": "token_embeddings"}
    (path / "1_Dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="1_Dense: no safetensors file, and no other kind"):
        embed(path)
    weight, bias = torch.randn(8, 120), torch.randn(8)
    save_file({"linear.weight": weight, "linear.bias": bias}, path / "1_Dense/model.safetensors")
    layer = torch.nn.functional.linear
    expected = [layer(hidden, weight, bias).tanh().mean(0) for hidden in hidden_of(model)]
    torch.testing.assert_close(embed(path), torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Router", "Asym"])
def test_modules_that_are_not_known_are_named(kind: str, save_encoder: Callable[..., Any]) -> None:
    path, _model = save_encoder("Bert")
    write_modules(path, {"pooling_mode_mean_tokens": True}, (kind, f"2_{kind}"))
    with pytest.raises(ModelLoadError, match=f"module '{kind}' is not supported"):
        embed(path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_bare", [False, True])
def test_encoders_named_after_their_training(family: str, is_bare: bool, tmp_path: Path) -> None:
    """XForMaskedLM: with its head, as trained, or without, as sentence-transformers saves it."""
    masked = save(tmp_path, f"{family}ForMaskedLM")
    if is_bare:
        raw = (tmp_path / "config.json").read_text()
        masked.base_model.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(raw)
    expected = torch.stack([hidden.mean(0) for hidden in hidden_of(masked.base_model)])
    torch.testing.assert_close(embed(tmp_path), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "xlm-roberta"])
def test_the_settings_of_the_transformer(name: str, save_encoder: Callable[..., Any]) -> None:
    """BGE's ask for texts in lower case, which its tokenizer makes of them anyway."""
    from tokenizers import Tokenizer, normalizers

    path, _model = save_encoder("Bert")
    write_modules(path, {"pooling_mode_cls_token": True}, ("Normalize", "2_Normalize"))
    settings = {"max_seq_length": 9, "do_lower_case": True}
    (path / f"sentence_{name}_config.json").write_text(json.dumps(settings))
    file = path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens(["A", "a"])
    tokenizer.save(str(file))
    with pytest.raises(ModelLoadError, match="do_lower_case is not supported") as error:
        LLM(str(path))
    assert "\n" not in str(error.value)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(file))
    llm = LLM(str(path), threads=1)
    capitals, small = llm.embed(["W5 W6 w7", "w5 w6 w7"], use_tqdm=False)
    assert capitals.prompt_token_ids == [2, 9, 10, 11, 3]
    assert capitals.outputs == small.outputs
    with pytest.raises(RequestTooLongError):
        llm.embed("w5 " * 8)


def test_what_does_not_fit_is_named(save_encoder: Callable[..., Any]) -> None:
    path, _model = save_encoder("Bert")
    other = minilm_folder()
    with pytest.raises(ModelLoadError, match="tokenizer has 30522 tokens, the model 300") as error:
        LLM(str(path), tokenizer=str(other))
    assert str(other) in str(error.value)
    write_modules(path, {"pooling_mode_min_tokens": True})
    with pytest.raises(ModelLoadError, match=r"1_Pooling.config\.json: pooling .*min_tokens"):
        LLM(str(path))
    write_modules(path, {"pooling_mode_mean_tokens": True}, ("WeightedLayerPooling", "2"))
    with pytest.raises(ModelLoadError, match="module 'WeightedLayerPooling' is not supported"):
        LLM(str(path))
    (path / "modules.json").unlink()
    tensors = load_file(path / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    weight = tensors.pop(name)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=f"tensor {name} is missing"):
        LLM(str(path))
    save_file({**tensors, name: weight, "odd": weight.clone()}, path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="tensor odd is not part of this model"):
        LLM(str(path))


def test_bad_prompts_are_refused(save_encoder: Callable[..., Any]) -> None:
    path, _model = save_encoder("Roberta")
    llm = LLM(str(path), threads=1)
    longest = [5] * 62  # 64 positions, of which RoBERTa's padding takes two
    assert len(llm.embed([longest], use_tqdm=False)) == 1
    assert llm.embed([], use_tqdm=False) == []
    with pytest.raises(RequestTooLongError):
        llm.embed([[5], [*longest, 5]])
    [cut] = llm.embed([[*longest, 6]], truncate_prompt_tokens=-1, use_tqdm=False)
    assert cut.prompt_token_ids == longest
    for bad in ([[300]], [[-1]], [[]]):
        with pytest.raises(InvalidParameterError):
            llm.embed(bad)
    with pytest.raises(InvalidParameterError, match="truncate_prompt_tokens"):
        llm.embed([[5]], truncate_prompt_tokens=63)
    with pytest.raises(ValueError, match="generates no text: use embed"):
        llm.generate([[5]])


TEXTS = [
    "A block is the unit of the cache.",
    "",
    "Größe, naïve café, 東京 and emoji 🙂 in one line.",
    "word " * 300,
    "The unit of the cache is the block.",
]


# auto rounds to 14 bits, the 16-bit types their weights before that; measured on more texts: 0.999996
# with auto, 0.99997 with bfloat16.
@pytest.mark.parametrize(
    ("dtype", "least"),
    [("auto", 0.99999), ("float32", 0.999999), ("bfloat16", 0.9999), ("float16", 0.99999)],
)
def test_all_minilm_l6_v2_is_what_transformers_computes(dtype: Any, least: float) -> None:
    import transformers

    minilm_path = minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    model = transformers.AutoModel.from_pretrained(minilm_path).eval()
    llm = LLM(str(minilm_path), threads=1, dtype=dtype)
    outputs = llm.embed(TEXTS, truncate_prompt_tokens=-1, use_tqdm=False)
    for text, output in zip(TEXTS, outputs, strict=True):
        ids = tokenizer(text, truncation=True, max_length=256)["input_ids"]
        assert output.prompt_token_ids == ids
        with torch.inference_mode():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        found = torch.tensor(output.outputs.embedding)
        assert float(found.norm()) == pytest.approx(1, abs=1e-5)
        cosine = torch.cosine_similarity(found.double(), mean.double(), dim=0)
        assert float(cosine) >= least
    with pytest.raises(RequestTooLongError):
        llm.embed(TEXTS)
