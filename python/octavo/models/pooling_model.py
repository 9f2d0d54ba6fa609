"""PoolingModel: an encoder or a decoder whose states are pooled to one vector or score a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoints.gguf import GgufWeights
from octavo.checkpoints.safetensors import SafetensorsWeights, safetensors_files
from octavo.checkpoints.weights import RenamedSizedWeights
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.kernels.weights import dense
from octavo.layers.context import StepContext
from octavo.models.bert import ENCODERS, BertEncoder, make_class_head
from octavo.models.colbert import is_colbert, read_forms
from octavo.models.config import ModelConfig
from octavo.models.foreign_encoder import FOREIGN_ENCODERS, ForeignEncoder
from octavo.models.gguf_encoder import GGUF_ENCODERS, foreign_tensors, pooling_mode
from octavo.models.hf_config import architecture_of
from octavo.models.llama import LlamaForCausalLM
from octavo.models.pooler import Pooler, first_rows, is_splade
from octavo.models.prompts_file import read_prompts
from octavo.models.registry import (
    ARCHITECTURES,
    CLASSIFIERS,
    TRUNKS,
    CausalLM,
    decoder_of,
    model_class,
)
from octavo.models.source import ModelSource
from octavo.models.static_embedding import STATIC_ARCHITECTURE, StaticEmbedding
from octavo.models.token_classifier import load_token_classifier
from octavo.pooler_config import PoolerConfig
from octavo.pooling import Activation, PoolingInfo, PoolingTask
from octavo.text_form import TextForm

# Tensors of an encoder's checkpoint that vectors do not need.
_UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
# And the heads of masked language models.
_MASKED_LM_HEADS = (
    "cls.predictions.bias",
    "lm_head.bias",
    *(
        f"{layer}.{kind}"
        for layer in (
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.seq_relationship",
            "lm_head.dense",
            "lm_head.layer_norm",
            "lm_head.decoder",
        )
        for kind in ("weight", "bias")
    ),
)
# Letters of every script that a lower-casing tokenizer may leave as they are.
_CAPITALS = "A Word, É Ž Σ Ж"


def is_pooling_model(source: ModelSource) -> bool:
    """True for an encoder, and for a decoder saved without its output head, with a classifier's or
    with sentence-transformers' modules.json."""
    if source.gguf is not None:
        return source.gguf.metadata().get("general.architecture") in GGUF_ENCODERS
    if source.kind != "safetensors":
        return False
    if is_colbert(source.hf_config):
        return True
    architecture = architecture_of(source.hf_config)
    if architecture in ARCHITECTURES:
        return (source.module_folder / "modules.json").is_file()
    return architecture == STATIC_ARCHITECTURE or any(
        architecture in names for names in (ENCODERS, TRUNKS, CLASSIFIERS, FOREIGN_ENCODERS)
    )


class PoolingModel:
    """A model that computes one vector or score a text, or a vector for each of its tokens.

    ``max_len``: the most tokens of a text, special ones included.

    Args:
        dtype: of matrices; None leaves each in its file's form.
        act_dtype: of everything that flows.
        rounded: an encoder on a CPU may round the factors of products to 14 bits, twice as fast.
            Embeddings are compared with stored ones; all-MiniLM-L6-v2's keep a cosine of 0.999996
            with float32's, where one bfloat16 part of each factor would leave 0.99993 and 8 bits
            0.998.
        max_model_len: tokens of the longest text, where that is less than the model's own limit.

    Raises:
        ModelLoadError: the files cannot be read or do not fit together; one line.
    """

    def __init__(
        self,
        source: ModelSource,
        ops: OpSet,
        device: torch.device,
        *,
        dtype: torch.dtype | None,
        act_dtype: torch.dtype,
        rounded: bool,
        max_model_len: int | None,
    ) -> None:
        shape = source.model_config
        self.config: ModelConfig = shape
        self._rounded = rounded
        self.act_dtype = act_dtype
        self.max_len = shape.max_context_len
        self._run: Callable[..., Tensor]
        self._bind: Callable[[Tensor, Tensor], None]
        self._pool: Callable[[Tensor, Tensor], Tensor]
        self.info: PoolingInfo
        predicts = source.gguf is None and is_splade(source.module_folder)
        self._pooler: Pooler | None = None
        self._wanted = PoolerConfig.of(source.config.pooler_config or {})
        # Whether logits are of single tokens.
        self._labels_tokens = self._wanted.is_per_token or shape.architecture.endswith(
            "ForTokenClassification"
        )
        # Vectors of a ColBERT model, one a token: the forms of its texts.
        self._forms = self._read_forms(source, device) if source.gguf is None else {}
        hides = any(form.filler is not None and not form.attends for form in self._forms.values())
        is_foreign = shape.architecture in FOREIGN_ENCODERS or predicts
        if hides and not is_foreign:
            # Attention of the op sets has no tokens that attend and are not attended to.
            if shape.architecture not in ENCODERS:
                raise ModelLoadError(
                    f"{source.path}: do_query_expansion of a decoder needs "
                    "attend_to_expansion_tokens"
                )
            is_foreign = True
        if is_foreign:
            if ops.threads is not None:
                # The module's matrix products are torch's, not the kernels'.
                torch.set_num_threads(ops.threads.size())
            self._load_foreign(source, device, predicts=predicts, hides_second=hides)
        elif source.is_static:
            self._load_static(source, device)
        else:
            self._load_own(source, ops, device, dtype)
        self._check_task(source)
        # Steps whose shapes depend on the texts cannot be captured.
        self.is_capturable = not is_foreign and not self.info.is_per_token
        if max_model_len is not None:
            self.max_len = min(self.max_len, max_model_len)

    def _check_task(self, source: ModelSource) -> None:
        """Raises ModelLoadError where the pooler's settings are not for this model."""
        wanted, task = self._wanted, self.info.task
        tasks = ("score", "classify") if task == "score" else (task,)
        if wanted.task is not None and wanted.task not in tasks:
            raise ModelLoadError(
                f"{source.path}: pooler_config.task is {wanted.task}, but this model's is {task}"
            )
        kind = wanted.pooling_type or wanted.seq_pooling_type
        if kind not in (None, "ALL") and not self.info.embeds:
            raise ModelLoadError(
                f"{source.path}: pooling {kind} is for models that embed, not to {task}"
            )

    def _load_own(
        self, source: ModelSource, ops: OpSet, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        weights: SafetensorsWeights | GgufWeights
        weights = self._gguf_weights(source, device, dtype) or SafetensorsWeights(
            safetensors_files(source.path),
            device=device,
            dtype=dtype,
            act_dtype=self.act_dtype,
            scheme=source.scheme,
            ignored=[
                *_UNUSED,
                *(f"bert.{name}" for name in _UNUSED),
                *_MASKED_LM_HEADS,
                "lm_head.weight",
                *([_PROJECTION] if is_colbert(source.hf_config) else []),
            ],
        )
        with torch.inference_mode():
            if self.config.architecture in ENCODERS:
                self._load_encoder(source, weights, ops, device)
            else:
                assert isinstance(weights, SafetensorsWeights)
                self._load_decoder(source, weights, ops, device)
            weights.finish()

    def _gguf_weights(
        self, source: ModelSource, device: torch.device, dtype: torch.dtype | None
    ) -> GgufWeights | None:
        """A GGUF file's tensors, dequantized; None for a folder."""
        if source.gguf is None:
            return None
        return GgufWeights(
            source.gguf,
            heads=(self.config.num_heads, self.config.num_kv_heads),
            device=device,
            dtype=dtype or self.act_dtype,
            act_dtype=self.act_dtype,
            packed=False,
        )

    def _load_foreign(
        self, source: ModelSource, device: torch.device, *, predicts: bool, hides_second: bool
    ) -> None:
        if predicts and not self.config.architecture.endswith("ForMaskedLM"):
            raise ModelLoadError(
                f"{source.path}: {self.config.architecture} has no head that predicts words"
            )
        weights = self._gguf_weights(source, device, self.act_dtype)
        encoder = ForeignEncoder(
            self.config,
            source.path,
            self.act_dtype,
            device,
            tensors=None if weights is None else partial(foreign_tensors, weights),
            predicts=predicts,
            hides_second=hides_second,
        )
        self._run = encoder
        self._bind = lambda k, v: None
        if not encoder.num_labels:
            self._make_pooler(source, "mean", device)
            if predicts:
                self.info = dataclasses.replace(self.info, size=self.config.vocab_size)
            return
        if self._labels_tokens and not self.config.architecture.endswith("ForTokenClassification"):
            raise ModelLoadError(f"{source.path}: this model's classes are of whole texts")
        self._pool = lambda logits, starts: logits
        self._set_classes(source, encoder.num_labels)

    def _load_static(self, source: ModelSource, device: torch.device) -> None:
        self._run = StaticEmbedding(self.config, source.path, device)
        self._bind = lambda k, v: None
        self._make_pooler(source, "mean", device)

    def bind_kv_cache(self, k_cache: Tensor, v_cache: Tensor) -> None:
        """Take the cache [num_blocks, num_kv_heads, block_size, head_dim], shared by all layers.

        A text is computed whole, so that no layer needs its keys once the next one runs.
        """
        self._bind(k_cache, v_cache)

    def __call__(
        self,
        input_ids: Tensor,
        ctx: StepContext,
        is_second: Tensor | None = None,
    ) -> Tensor:
        """input_ids int32 [T]: whole texts, end to end -> float32 [R, D], or [T, D] for each token.

        ``is_second``: bool or 0 and 1 [T], the tokens of pairs' second texts, or a query's fillers.
        """
        return self._pool(self._run(input_ids, ctx, is_second), ctx.query_start_loc)

    def _load_encoder(
        self,
        source: ModelSource,
        weights: SafetensorsWeights | GgufWeights,
        ops: OpSet,
        device: torch.device,
    ) -> None:
        shape = self.config
        family = ENCODERS[shape.architecture]
        prefix = family.prefix
        if f"{prefix}embeddings.word_embeddings.weight" not in weights:
            prefix = ""

        def rename(name: str) -> str:
            return name if name.split(".")[0] == "classifier" else prefix + name

        named = RenamedSizedWeights(weights, rename)
        encoder = BertEncoder(shape, named, ops, device, rounded=self._rounded)
        self._run = encoder
        self._bind = encoder.bind_kv_cache
        if not family.classifies:
            self._make_pooler(source, "mean", device)
            return
        classify, num_labels = make_class_head(shape.architecture, shape.hidden_size, named)

        def pool(hidden: Tensor, starts: Tensor) -> Tensor:
            is_whole = self._labels_tokens
            return classify(hidden if is_whole else hidden[first_rows(starts, hidden.shape[0])])

        self._pool = pool
        self._set_classes(source, num_labels)

    def _set_classes(self, source: ModelSource, num_labels: int) -> None:
        raw = self.config.raw
        task: PoolingTask = "score" if num_labels == 1 else "classify"
        if self._labels_tokens:
            task = "token_classify"
        self.info = PoolingInfo(
            task,
            num_labels,
            squashes=task == "score" and _squashes(source.path, raw),
            activation=_activation(raw, num_labels),
            labels=_labels(raw, num_labels),
        )

    def _load_decoder(
        self, source: ModelSource, weights: SafetensorsWeights, ops: OpSet, device: torch.device
    ) -> None:
        # There is no output head to be read: any weight will do in its place.
        shape = self.config.replace(tie_word_embeddings=True)
        is_bare = "model.embed_tokens.weight" not in weights
        named = RenamedSizedWeights(
            weights, lambda name: name.removeprefix("model.") if is_bare else name
        )
        build = model_class(decoder_of(shape.architecture))
        classifies = shape.architecture in CLASSIFIERS
        if not classifies:
            self._make_pooler(source, "last", device)
        if shape.kv_shapes or shape.kv_sources:
            # The layers of a step, which holds whole texts, take turns with one cache.
            raise ModelLoadError(
                f"{source.path}: {shape.architecture} does not embed: its layers have caches of "
                "several shapes, or share them"
            )
        decoder: CausalLM = build(shape, named, ops, max_model_len=self.max_len, device=device)
        if shape.raw.get("use_bidirectional_attention") or shape.raw.get("is_causal") is False:
            if not isinstance(decoder, LlamaForCausalLM):
                raise ModelLoadError(f"{source.path}: {shape.architecture} in both directions")
            decoder.attend_in_both_directions()
        self._run = lambda ids, ctx, is_second: decoder(ids, ctx)
        self._bind = lambda k, v: decoder.bind_kv_cache([(k, v)] * shape.num_layers)
        if classifies:
            self._pool, num_labels = load_token_classifier(
                shape,
                named,
                source.tokenizer,
                has_own_head="lm_head.weight" in weights,
                has_bias="score.bias" in weights,
                per_token=self._labels_tokens,
            )
            self._set_classes(source, num_labels)
            # No token of a decoder's stands between two texts.
            self.info = dataclasses.replace(self.info, joins=True)

    def _make_pooler(self, source: ModelSource, default_mode: str, device: torch.device) -> None:
        if source.gguf is not None:
            default_mode = pooling_mode(source.gguf)
        mode = self._wanted.mode
        if self._pooler is not None and mode not in (None, "token"):
            raise ModelLoadError(f"{source.path}: this model has a vector for each token")
        pool = self._pooler or Pooler(
            source.module_folder, self.config.hidden_size, device, default_mode, mode
        )
        has_modules = (source.module_folder / "modules.json").is_file()
        # model2vec's own key, where there is nothing of sentence-transformers.
        asks = source.is_static and not has_modules and self.config.raw.get("normalize")
        if source.gguf is not None or asks:
            pool.normalize()
        # Where the tokenizer does that itself, as BGE's does, nothing is left to do.
        encode = source.tokenizer.encode
        if pool.lowercases and encode(_CAPITALS, False) != encode(_CAPITALS.lower(), False):
            raise ModelLoadError(
                f"{source.path}: do_lower_case is not supported where the tokenizer minds capitals"
            )
        self._pool = pool
        self.max_len = min(self.max_len, pool.max_len or self.max_len)
        self.info = PoolingInfo(
            "token_embed" if pool.modes == ("token",) else "embed",
            pool.size,
            normalizes=pool.normalizes,
            prompts=read_prompts(source.module_folder, pools_them=pool.pools_prompts),
            forms=self._forms,
        )

    def _read_forms(self, source: ModelSource, device: torch.device) -> dict[str, TextForm]:
        """The forms of a late-interaction model's texts, and its pooler; {} for any other."""
        shape, is_own = self.config, is_colbert(source.hf_config)
        has_modules = (source.module_folder / "modules.json").is_file()
        classifies = shape.architecture.endswith("ForSequenceClassification")
        if not is_own and (not has_modules or classifies):
            return {}
        pool = Pooler(
            source.module_folder, shape.hidden_size, device, "token" if is_own else "mean"
        )
        if pool.modes != ("token",):
            return {}
        if has_modules:
            pool.normalize()
        else:
            pool.project(_projection(source, shape.hidden_size, device))
        self._pooler = pool
        mask_token = source.special_tokens.get("mask_token")
        return read_forms(source.module_folder, source.tokenizer, mask_token, self.max_len)


# The layer that colbert-ai puts beside an encoder's tensors.
_PROJECTION = "linear.weight"


def _projection(source: ModelSource, hidden_size: int, device: torch.device) -> Tensor:
    """colbert-ai's layer, float32 [N, hidden_size]."""
    weights = SafetensorsWeights(
        safetensors_files(source.path),
        device=device,
        dtype=torch.float32,
        act_dtype=torch.float32,
    )
    return dense(weights.linear("linear", (weights.num_rows(_PROJECTION), hidden_size)))


def _activation(raw: Any, num_labels: int) -> Activation:
    """The activation that transformers' loss for this config.json trains a classifier with."""
    match raw.get("problem_type"):
        case "regression":
            return "identity"
        case "multi_label_classification":
            return "sigmoid"
        case _:
            return "sigmoid" if num_labels == 1 else "softmax"


def _labels(raw: Any, num_labels: int) -> tuple[str, ...]:
    """The labels' names, as transformers calls those that its config.json does not name."""
    names = raw.get("id2label")
    names = names if isinstance(names, dict) else {}
    return tuple(str(names.get(str(index), f"LABEL_{index}")) for index in range(num_labels))


def _squashes(folder: Path, raw: Any) -> bool:
    """True if sentence-transformers would put a sigmoid after a cross-encoder of this config.json.

    Raises:
        ModelLoadError: another function than that or none.
    """
    named = raw.get("sbert_ce_default_activation_function")
    if isinstance(newer := raw.get("sentence_transformers"), dict):
        named = newer.get("activation_fn", named)
    function = "Sigmoid" if named is None else str(named).rpartition(".")[2]
    if function not in ("Sigmoid", "Identity"):
        raise ModelLoadError(f"{folder}: activation {function!r} of scores is not supported")
    return function == "Sigmoid"
