"""PoolingLLM: LLM's methods for vectors, scores and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from octavo.engine.prompts import Prompt, checked_ids, prompt_parts, refuse_adapter, tokenization
from octavo.errors import InvalidParameterError
from octavo.late_interaction import encode_form, form_of, max_sim, scored_pairs, scored_texts
from octavo.offline import Offline, UseTqdm, as_batch
from octavo.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from octavo.pair_template import PairTemplate
from octavo.pooling import (
    NO_TOKENS,
    EncodedText,
    PoolingInfo,
    check_params,
    cosine,
    encode_pair,
    encode_text,
    max_text_len,
    pooled_values,
    squash,
)
from octavo.pooling_params import PoolingParams

if TYPE_CHECKING:
    from octavo._core import Delta
    from octavo.pooling import Pooled


# ``encode``'s tasks -> the models' own that satisfy them.
_TASKS: Final[dict[str, tuple[str, ...]]] = {
    "": ("embed", "token_embed", "classify", "score", "token_classify"),
    "embed": ("embed",),
    "token_embed": ("token_embed",),
    "classify": ("classify", "score"),
    "token_classify": ("token_classify",),
}


class _Pooled(NamedTuple):
    """One prompt's output, and the settings that it came with."""

    request_id: str
    text: str | None
    token_ids: list[int]
    vector: Pooled
    params: PoolingParams

    def values(self, info: PoolingInfo) -> Any:
        """The numbers of the answer; of vectors of tokens a list each."""
        return pooled_values(self.vector, info, self.params)


class PoolingLLM(Offline):
    """The methods of LLM for pooling models.

    All methods take vLLM's ``pooling_params`` (one for all or one per prompt; of ``score`` one for
    all), ``tokenization_kwargs`` (of which ``add_special_tokens`` and ``truncate_prompt_tokens``
    have a use) and ``lora_request``, which is refused. ``use_tqdm`` may be a class of progress
    bars.
    """

    # In place of the model's own.
    _chat_template: str | None = None

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per text, in the prompts' order.

        Args:
            prompts: one prompt or several: text, token ids, or ``{"prompt_token_ids": [...]}``.
            truncate_prompt_tokens: cut texts to so many tokens, special ones included; -1 is the
                model's limit. None refuses what is longer than that. Token ids are cut at the end.
            prompt_name: of a prompt of the model's (sentence-transformers' ``prompts``), whose text
                comes before each of these; None is the model's default, where it has one.
            prompt: such a text itself, in place of a name's.

        Raises:
            ValueError: the model gives no vectors.
            RequestTooLongError, InvalidParameterError: before anything has run.
        """
        refuse_adapter(lora_request)
        info = self._pooling_info("embed")
        pooled = self._pool_each(
            prompts,
            pooling_params,
            info,
            truncate_prompt_tokens,
            tokenization_kwargs,
            use_tqdm,
            prompt_name,
            prompt,
        )
        return [
            EmbeddingRequestOutput(
                one.request_id, one.text, one.token_ids, EmbeddingOutput(one.values(info))
            )
            for one in pooled
        ]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """The probability of each label, of every text, in the prompts' order.

        They are a softmax of the model's logits; sigmoids where it has one label or its config.json
        says that several may hold (``multi_label_classification``); for ``regression``, or with
        ``PoolingParams(use_activation=False)``, the logits.

        Args:
            prompts, truncate_prompt_tokens: as for ``embed``.

        Raises:
            ValueError: the model is no classifier.
            RequestTooLongError, InvalidParameterError: before anything has run.
        """
        refuse_adapter(lora_request)
        info = self._pooling_info("classify", "score")
        pooled = self._pool_each(
            prompts, pooling_params, info, truncate_prompt_tokens, tokenization_kwargs, use_tqdm
        )
        return [
            ClassificationRequestOutput(
                one.request_id, one.token_ids, ClassificationOutput(one.values(info))
            )
            for one in pooled
        ]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        pooling_task: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> list[PoolingRequestOutput]:
        """The output of ``embed`` or ``classify``, as one tensor per text, or a vector per token.

        Args:
            prompts, truncate_prompt_tokens, prompt_name, prompt: as for ``embed``.
            pooling_task: "embed", "token_embed", "classify" or "token_classify"; None is the
                model's own. An LLM with the ``pooler_config`` ``{"task": "token_embed"}``, or
                ``"token_classify"``, has an output for each token.

        Raises:
            ValueError: another task, or not the model's.
            RequestTooLongError, InvalidParameterError: before anything has run.
        """
        refuse_adapter(lora_request)
        wanted = _TASKS.get(pooling_task or "")
        if wanted is None:
            raise ValueError(
                "pooling_task must be embed, token_embed, classify or token_classify, not "
                f"{pooling_task!r}"
            )
        info = self._pooling_info(*wanted)
        outputs = []
        for one in self._pool_each(
            prompts,
            pooling_params,
            info,
            truncate_prompt_tokens,
            tokenization_kwargs,
            use_tqdm,
            prompt_name,
            prompt,
        ):
            is_whole = info.embeds and one.params.dimensions is None
            data = torch.from_numpy(one.vector) if is_whole else torch.tensor(one.values(info))
            outputs.append(PoolingRequestOutput(one.request_id, one.token_ids, PoolingOutput(data)))
        return outputs

    def _params(
        self, given: PoolingParams | None, info: PoolingInfo, truncate_prompt_tokens: int | None
    ) -> PoolingParams:
        """Settings of a call, or of one prompt, checked."""
        params = (given or PoolingParams()).clone()
        if truncate_prompt_tokens is not None:
            params.truncate_prompt_tokens = truncate_prompt_tokens
        check_params(params, info)
        return params

    def _pool_each(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None,
        info: PoolingInfo,
        truncate_prompt_tokens: int | None,
        tokenization_kwargs: Mapping[str, Any] | None,
        use_tqdm: UseTqdm,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> list[_Pooled]:
        """Each prompt's output, with its settings."""
        parts = [prompt_parts(one) for one in as_batch(prompts)]
        before = info.prompts.find(prompt_name, prompt)
        for name, value in (("prompt_name", prompt_name), ("prompt", prompt)):
            if value is not None and any(ids is not None for _, ids in parts):
                raise InvalidParameterError(f"{name} needs prompts of text", name)
        given = (
            list(pooling_params)
            if isinstance(pooling_params, Sequence)
            else [pooling_params] * len(parts)
        )
        if len(given) != len(parts):
            raise ValueError(f"{len(given)} pooling params for {len(parts)} prompts")
        params = [self._params(one, info, truncate_prompt_tokens) for one in given]
        limit = self._engine.limits.max_model_len
        add_special_tokens, _ = tokenization(tokenization_kwargs, PoolingParams())
        room = [max_text_len(tokenization(tokenization_kwargs, one)[1], limit) for one in params]
        tokenizer = self._engine.tokenizer
        # In one call: it uses several cores.
        forms = [form_of(info, one.embedding_mode) for one in params]
        encoded = iter(
            tokenizer.encode_batch(
                [
                    before + (text or "")
                    for (text, ids), form in zip(parts, forms, strict=True)
                    if ids is None and form is None
                ],
                add_special_tokens,
            )
        )
        texts = []
        for (text, token_ids), form, most in zip(parts, forms, room, strict=True):
            if form is not None:
                if text is None:
                    raise InvalidParameterError(
                        "embedding_mode needs prompts of text", "embedding_mode"
                    )
                texts.append(encode_form(tokenizer, before + text, form, most))
                continue
            if token_ids is None:
                assert text is not None
                token_ids = next(encoded)
                if most is not None and len(token_ids) > most:
                    token_ids = encode_text(tokenizer, before + text, most, add_special_tokens)
            elif most is not None:
                token_ids = token_ids[:most]
            texts.append(EncodedText(token_ids))
        results = self._pool(texts, use_tqdm)
        rows = zip(results, parts, texts, params, strict=True)
        return [
            _Pooled(str(request_id), text, list(one.token_ids), vector, settings)
            for (request_id, vector), (text, _), one, settings in rows
        ]

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        use_activation: bool = True,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | None = None,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ScoringRequestOutput]:
        """The scores of pairs: each text of ``text_2`` with its partner in ``text_1``.

        A single text in ``text_1`` is the partner of all.

        A cross-encoder reads both at once; its score passes through the function it was trained
        with unless ``use_activation`` is off. Other models' scores are cosines of their vectors or,
        where these are of tokens, the sum over the first text's of their best products with the
        second's.

        Args:
            truncate_prompt_tokens: as for ``embed``; a cross-encoder's pair is cut as a whole.
            chat_template: makes one text of a cross-encoder's pair, whose messages have the roles
                "query" and "document"; None is the one given to LLM, if any. The model's own is for
                conversations, and no use here.
            chat_template_kwargs: further variables of the template, such as ``instruction``.

        Raises:
            ValueError: the model gives no vectors, the texts do not pair up, or the template is
                none.
            RequestTooLongError, InvalidParameterError: before anything has run.
        """
        refuse_adapter(lora_request)
        info = self._pooling_info("embed", "score", "token_embed")
        template = self._pair_template(info, chat_template)
        if template is None and chat_template_kwargs:
            raise ValueError("chat_template_kwargs needs a chat_template")
        params = self._params(pooling_params, info, truncate_prompt_tokens)
        use_activation = use_activation and params.use_activation is not False
        add_special_tokens, most = tokenization(tokenization_kwargs, params)
        if not add_special_tokens:
            raise ValueError("a pair of texts needs its special tokens: add_special_tokens=True")
        firsts = [text_1] if isinstance(text_1, str) else list(text_1)
        seconds = [text_2] if isinstance(text_2, str) else list(text_2)
        if len(firsts) == 1:
            firsts *= len(seconds)
        if len(firsts) != len(seconds):
            raise ValueError(f"{len(firsts)} texts for {len(seconds)}: give one, or as many")
        most = max_text_len(most, self._engine.limits.max_model_len)
        tokenizer = self._engine.tokenizer
        if info.task == "score":
            variables = chat_template_kwargs or {}
            pairs = [
                encode_pair(tokenizer, *pair, most, joins=info.joins)
                if template is None
                else template.encode(tokenizer, *pair, most, variables)
                for pair in zip(firsts, seconds, strict=True)
            ]
            results = self._pool(pairs, use_tqdm)
            ids = [request_id for request_id, _ in results]
            scores = [squash(logits, info.squashes and use_activation) for _, logits in results]
            token_ids = [list(pair.token_ids) for pair in pairs]
        else:
            # A text that is paired several times is computed once.
            sides = scored_texts(tokenizer, info, firsts, seconds, most)
            done = dict(zip(sides, self._pool(list(sides.values()), use_tqdm), strict=True))
            couples = scored_pairs(info, firsts, seconds)
            compare = cosine if info.task == "embed" else max_sim
            ids = [done[second][0] for _, second in couples]
            scores = [compare(done[a][1], done[b][1]) for a, b in couples]
            token_ids = [[*sides[a].token_ids, *sides[b].token_ids] for a, b in couples]
        return [
            ScoringRequestOutput(str(request_id), tokens, ScoringOutput(value))
            for request_id, tokens, value in zip(ids, token_ids, scores, strict=True)
        ]

    def _pair_template(self, info: PoolingInfo, source: str | None) -> PairTemplate | None:
        if info.task != "score":
            if source is not None:
                raise ValueError("chat_template needs a cross-encoder: other texts are read alone")
            return None
        source = source or self._chat_template
        return None if source is None else PairTemplate(source, self._engine.source.special_tokens)

    def _pooling_info(self, *tasks: str) -> PoolingInfo:
        info = self._engine.runner.pooling
        if info is None:
            raise ValueError(f"this model generates text: {tasks[0]} needs one that gives vectors")
        if info.task not in tasks:
            raise ValueError(f"this model does not {tasks[0]}: use {info.task}")
        return info

    def _pool(self, texts: Sequence[EncodedText], use_tqdm: UseTqdm) -> list[tuple[int, Pooled]]:
        """Check all, then run all; each one's request id and vector."""
        return self._alone(lambda: self._pool_alone(texts, use_tqdm))

    def _pool_alone(
        self, texts: Sequence[EncodedText], use_tqdm: UseTqdm
    ) -> list[tuple[int, Pooled]]:
        prepare = self._engine.prepare
        requests = [
            prepare(checked_ids(text.token_ids), NO_TOKENS, num_first=text.num_first)
            for text in texts
        ]
        vectors: dict[int, Pooled] = {}

        def take(delta: Delta) -> bool:
            vectors[delta.request_id] = delta.extra
            return True

        self._run_to_end(requests, take, use_tqdm)
        ids = [samples[0].request_id for samples in requests]
        return [
            (request_id, text.kept_of(vectors[request_id]))
            for request_id, text in zip(ids, texts, strict=True)
        ]
