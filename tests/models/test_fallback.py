"""Decoders of transformers without a family here, over octavo's paged attention and cache.

One tiny random model each: logits within 1e-4 and 64 greedy tokens equal on a rough ride.
``OCTAVO_WRITE_DOCS=1`` writes what is proven into docs/models.md.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity import logits_of, make_prompt, prove_greedy
from refused_decoders import OTHER_SIZES, REFUSED, TRANSFORMERS, UNPROVEN

from octavo.errors import ModelLoadError
from octavo.models.bert import ENCODERS
from octavo.models.foreign_encoder import FOREIGN_ENCODERS, FOREIGN_FAMILIES
from octavo.models.gguf_config import GGUF_ARCHITECTURES
from octavo.models.gguf_encoder import GGUF_ENCODERS
from octavo.models.gguf_hf_config import GGUF_HF_CONFIGS
from octavo.models.registry import ARCHITECTURES, CLASSIFIERS, TRUNKS, ModelRegistry

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
PROVEN = (
    "AfmoeForCausalLM",
    "ApertusForCausalLM",
    "ArceeForCausalLM",
    "AriaTextForCausalLM",
    "BitNetForCausalLM",
    "CTRLLMHeadModel",
    "Cohere2MoeForCausalLM",
    "CohereForCausalLM",
    "CwmForCausalLM",
    "DiffLlamaForCausalLM",
    "Dots1ForCausalLM",
    "Emu3ForCausalLM",
    "Exaone4ForCausalLM",
    "ExaoneMoeForCausalLM",
    "FlexOlmoForCausalLM",
    "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM",
    "GPTNeoXForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "HeliumForCausalLM",
    "HyperCLOVAXForCausalLM",
    "Jais2ForCausalLM",
    "MiniCPM3ForCausalLM",
    "MinistralForCausalLM",
    "ModernBertDecoderForCausalLM",
    "NanoChatForCausalLM",
    "NemotronForCausalLM",
    "OPTForCausalLM",
    "OlmoForCausalLM",
    "PersimmonForCausalLM",
    "PhimoeForCausalLM",
    "SeedOssForCausalLM",
    "SolarOpenForCausalLM",
    "Starcoder2ForCausalLM",
    "VaultGemmaForCausalLM",
)
# Those that came later: a long list of its own.
PROVEN_SLOWLY = (
    "AXK1ForCausalLM",
    "Apertus1p5TextForCausalLM",
    "BeamForCausalLM",
    "BertLMHeadModel",
    "BigBirdPegasusForCausalLM",
    "BioGptForCausalLM",
    "CamembertForCausalLM",
    "CodeGenForCausalLM",
    "Data2VecTextForCausalLM",
    "ElectraForCausalLM",
    "ErnieForCausalLM",
    "FlintForCausalLM",
    "GPTJForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "GraniteSWAForCausalLM",
    "HYV3ForCausalLM",
    "Kolibri1ForCausalLM",
    "LagunaForCausalLM",
    "MellumForCausalLM",
    "MiniMaxM3VLForCausalLM",
    "MllamaForCausalLM",
    "MoshiForCausalLM",
    "PegasusForCausalLM",
    "RoCBertForCausalLM",
    "RobertaForCausalLM",
    "RobertaPreLayerNormForCausalLM",
    "XLMRobertaForCausalLM",
    "XLMRobertaXLForCausalLM",
    "YoutuForCausalLM",
)
# Every spelling of the sizes; a config takes those it knows.
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("sliding_window", "window_size", "q_lora_rank"), 24),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    # Encoders that may decode.
    "is_decoder": True,
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save(architecture: str, folder: Path) -> tuple[Path, Any]:
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    config_class = model_class.config_class
    known = {field.name for field in dataclasses.fields(config_class)}
    sizes = {name: size for name, size in TINY.items() if name in known}
    if "kv_lora_rank" in known:
        # Keys and values unfold from one latent row into every head; the config adds their sizes.
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    model = model_class(config_class(**sizes))
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1: they must matter
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize(
    "architecture",
    [*PROVEN, *(pytest.param(name, marks=pytest.mark.slow) for name in PROVEN_SLOWLY)],
)
def test_a_decoder_of_transformers(
    architecture: str, tmp_path: Path, driver: Callable[..., Any]
) -> None:
    path, model = save(architecture, tmp_path)
    token_ids = make_prompt(60)
    torch.testing.assert_close(
        driver(path).logits(token_ids), logits_of(model, token_ids), atol=1e-4, rtol=1e-4
    )
    prove_greedy(driver, path, model)


def test_at_least_a_hundred_are_proven_in_all() -> None:
    foreign = {*PROVEN, *PROVEN_SLOWLY}
    assert not foreign & set(ARCHITECTURES)
    assert len(foreign) + len(ARCHITECTURES) >= 100


QUICKLY_REFUSED = ("DogeForCausalLM", "RecurrentGemmaForCausalLM", "RwkvForCausalLM")


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[] if name in QUICKLY_REFUSED else [pytest.mark.slow])
        for name in REFUSED
        if name not in ARCHITECTURES
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(
    architecture: str, tmp_path: Path, driver: Callable[..., Any]
) -> None:
    path, _model = save(architecture, tmp_path)
    with pytest.raises(ModelLoadError) as error:
        driver(path)
    message = str(error.value)
    assert architecture in message
    assert REFUSED[architecture] in message
    assert "\n" not in message


def causal_types() -> set[str]:
    """Every decoder that this transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    names = (name for value in values for name in ([value] if isinstance(value, str) else value))
    return {name for name in names if name.endswith(("ForCausalLM", "LMHeadModel"))}


def test_every_type_of_transformers_is_in_the_table() -> None:
    import transformers

    if transformers.__version__ != TRANSFORMERS:
        pytest.skip(f"the table is of transformers {TRANSFORMERS}")
    known = {*ARCHITECTURES, *PROVEN, *PROVEN_SLOWLY, *REFUSED, *OTHER_SIZES, *UNPROVEN}
    assert causal_types() - known == set()
    assert not set(REFUSED) & {*PROVEN, *PROVEN_SLOWLY, *OTHER_SIZES, *UNPROVEN}


def test_a_missing_and_an_extra_tensor_are_named(
    tmp_path: Path, driver: Callable[..., Any]
) -> None:
    from safetensors.torch import load_file, save_file

    path, _model = save("GPTNeoXForCausalLM", tmp_path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("mlp.dense_h_to_4h.weight"))
    weight = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"mlp\.dense_h_to_4h\.weight is missing"):
        driver(path)
    save_file({**tensors, name: weight, "odd": weight.clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="tensor odd is not part of this model"):
        driver(path)


def test_only_this_path_imports_transformers(tmp_path: Path) -> None:
    path, _model = save("GPTNeoXForCausalLM", tmp_path)
    code = (
        "import sys; from octavo.config import EngineConfig;"
        "from octavo.models.source import resolve_model;"
        "import octavo.runner.eager;"
        "assert 'transformers' not in sys.modules;"
        f"resolve_model(EngineConfig(model={str(path)!r})).model_config;"
        "assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def table() -> str:
    rows = []
    for name in sorted(ARCHITECTURES):
        doc = sys.modules[ARCHITECTURES[name].__module__].__doc__ or ""
        summary = doc.split("\n")[0].partition(":")[2].strip()
        rows.append(f"| `{name}` | {summary} |")
    foreign = "\n".join(f"- `{name}`" for name in sorted((*PROVEN, *PROVEN_SLOWLY)))
    foreign_encoders = ", ".join(f"`{name}`" for name in FOREIGN_FAMILIES)
    encoders = "\n".join(f"- `{name}`" for name, kind in ENCODERS.items() if not kind.classifies)
    cross = "\n".join(f"- `{name}`" for name, kind in ENCODERS.items() if kind.classifies)
    trunks = "\n".join(f"- `{name}`, `{family}`" for name, family in TRUNKS.items())
    deciders = "\n".join(f"- `{name}`" for name in CLASSIFIERS)
    ggufs, gguf_encoders = (
        ", ".join(f"`{name}`" for name in sorted(names))
        for names in ({*GGUF_ARCHITECTURES, *GGUF_HF_CONFIGS}, GGUF_ENCODERS)
    )
    refused = "\n".join(
        f"| `{name}` | {reason} |"
        for name, reason in sorted(REFUSED.items())
        if name not in ARCHITECTURES
    )
    untried, unproven = (
        ", ".join(f"`{name}`" for name in sorted(set(names) - set(ARCHITECTURES)))
        for names in (OTHER_SIZES, UNPROVEN)
    )
    return f"""# Models

Written by `OCTAVO_WRITE_DOCS=1 pytest tests/models/test_fallback.py`; a test keeps it true.

## octavo's own families

Each is proven against transformers with tiny random models in float32 on the plain PyTorch ops and
on the CPU kernels: logits within 1e-4; on the CPU kernels also 64 greedy tokens equal, with prompts
in chunks, prefix hits, batches of mixed lengths and preemption (`tests/models/test_families.py`):
heads of 40, 80 and 96, one and three KV heads, tied and untied embeddings, every bias on and off,
windows shorter than the prompt. Gemma 3n, Gemma 4 and MiMo-V2-Flash, whose layers have caches of several
shapes or read one another's, are proven so, on meshes too, in `tests/models/test_kv_shape_families.py`.
On an H100 or H200 each one's log probabilities are transformers' in float32, within 2e-4; in bfloat16 and float16
their mean error is at most 1.2 times transformers' own, and a thousandth (`tests/models/test_gpu_families.py`).
Those whose layers keep a state (short convolutions, the gated delta rule, Kimi's delta attention, both
forms of Mamba, lightning attention) are proven so in
`tests/models/test_hybrid_families.py`, where hits, preempted requests and the next turn of a chat begin
from saved states, and on meshes in `tests/models/test_hybrid_shards.py`. On a CPU they run op by op.

| architecture | what it is |
|---|---|
{chr(10).join(rows)}

A rope of type `dynamic` is the plain one up to the trained length, and more is refused unless
`max_model_len` asks for it. Then every text turns as one of exactly that length does: keys stay in
the cache as they were, so that the base cannot grow with each text as transformers' does.

GGUF files are read whose architecture is one of
{ggufs}; Mistral's and Mixtral's say `llama`, OLMo 3's `olmo2`, DeepSeek's and
Kimi K2's `deepseek2`, with latents' keys and values apart or as one, GLM-4-9B's `chatglm`, FalconMamba's `mamba`.
Experts' gates and ups may be one tensor. The package `gguf` 0.19 has no names for GPT-Neo, LFM3, MiniMax-Text-01 and OLMo-Hybrid.
Tiny random models of each, written as llama.cpp writes them, have transformers' logits within 1e-3,
and those of the same weights in safetensors within 1e-5, or 1e-4 where the converter folds factors into
weights (`tests/models/test_gguf_families.py`). Blocks that predict further tokens are left out.
Encoders are {gguf_encoders}, with WordPiece (`bert`), Unigram (`t5`, XLM-RoBERTa's) or a byte-level tokenizer: vectors
within 1e-4 of transformers', pooled as the file says, of length 1 (`tests/models/test_gguf_encoders.py`).
Others are refused, `jina-bert-v2` (which transformers has no module for) and classifiers among them: load their safetensors.

## Decoders that run through transformers' own module

With octavo's paged attention and cache; each is proven with a tiny random model in float32 on the
CPU kernels: logits within 1e-4 and 64 greedy tokens equal, with prompts in chunks, prefix hits,
batches of mixed lengths and preemption (`tests/models/test_fallback.py`). On an H100 GPT-2, GPT-NeoX, OPT, Cohere and StarCoder2 are proven
as octavo's own families are, the others not. More are
tried: when it is loaded, a module is compared with itself, and refused with the reason if the
cache changes what it computes.

On a GPU its steps are CUDA graphs, if capturing one succeeds when it is loaded; a module that has the host
wait for a value runs kernel by kernel, and a line in the log gives the reason (`tests/runner/test_foreign_graphs.py`).
RMS norms are octavo's kernel where that computes the same. A token still takes some thirty small kernels a layer (the
rotation alone is ten), where an own family takes five: at Llama-3.2-1B's sizes 2.2 times an own family's time
(bench/results/h200.md). Fewer would need the module's source rewritten, which is what an own family is.

{foreign}

## Models that embed

For `LLM.embed`, `LLM.encode`, `LLM.score`, `/v1/embeddings`, `/v1/score` and `/v1/rerank`, with a
sentence-transformers folder's pooling (cls, max, mean, mean by the root of the length, weighted mean, last
token, or several of them side by side), dense layers, layer norms and normalization.

Encoders: each is proven with tiny random models in float32, on the plain PyTorch ops and on the CPU
kernels: vectors within 1e-4 of transformers', in folders laid out as those of E5, BGE, GTE and
all-distilroberta too; and all-MiniLM-L6-v2's within a cosine of 0.9999 with every `--dtype`, `auto`
included, which on most x86 CPUs rounds the factors of products to 14 bits
(`tests/models/test_encoders.py`). On an H100 `BertModel` alone is proven, in float32, bfloat16 and
float16 (`tests/runner/test_pooling.py`).

{encoders}

More encoders run through transformers' own module, with the same pooling; texts of a step are padded
to a batch, and steps are not captured. Proven in the same way (`tests/models/test_foreign_encoders.py`)
as `XModel` and `XForMaskedLM`; as `XForSequenceClassification` Albert, DebertaV2, DistilBert, Electra
and ModernBert are: {foreign_encoders}.

A model in a folder of its own below modules.json loads as one beside it. A table of vectors without a model
(sentence-transformers' `StaticEmbedding`, model2vec's `StaticModel`, whose tokens may share rows and have weights) gives the
mean of its tokens' (`tests/models/test_module_folders.py`). A folder or file of each kind, of decoders too, answers through
the real server (`tests/models/test_served_kinds.py`).

A vector a token, for late interaction, from folders as PyLate saves them (a modules.json without a pooling
module, dense layers, query and document prefixes, lengths, mask tokens, a skip list) and as colbert-ai does
(`HF_ColBERT`, `ColBERTModel`, `ColBERTModernBertModel`: `linear.weight`, artifact.metadata), with any of these encoders: proven with `BertModel`,
`RobertaModel` and `ModernBertModel` against transformers and PyLate's definition
(`tests/models/test_token_vectors.py`). Where no token attends to a query's mask tokens, as is PyLate's default,
the encoder runs through transformers' own module. A residual dense layer and similarity `l2` are refused.

Decoders, by their last token where no modules.json says otherwise: saved without output head, or
with it and modules.json, as Qwen3-Embedding is. Proven in the same way
(`tests/models/test_decoder_embeddings.py`); other families of octavo's own run with modules.json and
are not proven. Where `use_bidirectional_attention` or `is_causal: false` says so, attention goes in both
directions, as EmbeddingGemma's does.

{trunks}

Classifiers: with one label they are cross-encoders, for `LLM.score`, `/v1/score` and `/v1/rerank`:
logits within 1e-4 of transformers' (`tests/models/test_cross_encoders.py`). With any number of labels
they are for `LLM.classify` and `/classify`: probabilities within 1e-4
(`tests/models/test_classifiers.py`).

{cross}

Decoders classify by their last token, and with one label score pairs: both texts are joined to one, without
a token between them (`tests/models/test_decoder_classifiers.py`). A reranker that is saved as a plain
language model, as Qwen3-Reranker is, takes vLLM's overrides: with `--hf-overrides '{{"architectures":
["Qwen3ForSequenceClassification"], "classifier_from_token": ["no", "yes"], "is_original_qwen3_reranker":
true}}'` its score is the probability of "yes" against "no". Its instruction is part of the texts.

{deciders}

## What is refused

With the two lists of decoders above, these are all of transformers {TRANSFORMERS}'s causal language models: what
is neither octavo's own nor runs through its module, with the reason given at start
(`tests/models/refused_decoders.py`, of which a test compares every line).

| architecture | reason |
|---|---|
{refused}

These pass the comparison with themselves, so that they run, and are proven by no test: {unproven}.

Not tried, because a tiny model of theirs needs sizes of its own; when one is loaded, it is compared
with itself as all are: {untried}.

Of a multimodal checkpoint whose text model is one of octavo's own families the text model loads by
itself, and the rest is left out with a line in the log (`tests/models/test_text_part.py`).
"""


def test_the_docs_name_every_architecture() -> None:
    supported = ModelRegistry.get_supported_archs()
    assert set(supported) >= {*ARCHITECTURES, *ENCODERS, *TRUNKS, *CLASSIFIERS}
    text = DOCS.read_text()
    named = set(supported) - FOREIGN_ENCODERS  # the page names their families
    assert [name for name in named if f"`{name}`" not in text] == []


def test_the_docs_say_what_is_proven() -> None:
    if os.environ.get("OCTAVO_WRITE_DOCS"):
        DOCS.write_text(table())
    assert DOCS.read_text() == table(), "run this test with OCTAVO_WRITE_DOCS=1"
