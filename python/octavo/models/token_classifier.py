"""load_token_classifier: classes, or one score, from a decoder's state of the last token, or each.

A checkpoint holds a classifier's layer, ``score``. A reranker that is a plain language model
answers with one of a few tokens (Qwen3-Reranker: "no", "yes"); its output head's rows of these are
the layer then, as vLLM's ``classifier_from_token`` has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from octavo._core import Tokenizer
from octavo.checkpoints.weights import RenamedSizedWeights
from octavo.errors import ModelLoadError
from octavo.kernels.weights import Rows, dense
from octavo.models.config import ModelConfig

# Of two tokens one score: the second's logit less the first's. Its sigmoid is the softmax of both.
_TWO_WAY: Final = "from_2_way_softmax"
_EACH: Final = "no_post_processing"


def load_token_classifier(
    config: ModelConfig,
    weights: RenamedSizedWeights,
    tokenizer: Tokenizer,
    *,
    has_own_head: bool,
    has_bias: bool = False,
    per_token: bool = False,
) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """A function (hidden [T, D], starts int32 [R + 1]) -> float32 logits [R, labels], and the
    number of labels.

    ``has_own_head``: the checkpoint's output head is not the embedding. ``has_bias``: its
    classifier's layer has one. ``per_token``: the logits
    are of each token, [T, labels].

    Raises:
        ModelLoadError: a weight is missing, or the config's tokens are none of the tokenizer's.
    """
    tokens = config.raw.get("classifier_from_token")
    bias: Tensor | None = None
    if tokens is None:
        num_labels = weights.num_rows("score.weight")
        layer = dense(weights.linear("score", (num_labels, config.hidden_size))).float()
        if has_bias:
            bias = weights.vector("score.bias", num_labels).float()
    else:
        ids = _token_ids(tokens, tokenizer)
        head = "lm_head" if has_own_head else "model.embed_tokens"
        rows = Rows(tuple((token_id, token_id + 1) for token_id in ids))
        shape = (config.vocab_size, config.hidden_size)
        layer = dense(weights.embedding(head, shape, rows)).float()
        if _method(config, len(ids)) == _TWO_WAY:
            layer = layer[1:] - layer[:1]

    def classify(hidden: Tensor, starts: Tensor) -> Tensor:
        rows = hidden if per_token else hidden[(starts[1:] - 1).clamp_min(0)]
        return torch.nn.functional.linear(rows.float(), layer, bias)

    return classify, layer.shape[0]


def _token_ids(tokens: object, tokenizer: Tokenizer) -> list[int]:
    if not isinstance(tokens, list) or not tokens:
        raise ModelLoadError("config.json: classifier_from_token must be a list of tokens")
    ids = []
    for token in tokens:
        token_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise ModelLoadError(
                f"config.json: classifier_from_token names {token!r}, not a token of the tokenizer"
            )
        ids.append(token_id)
    return ids


def _method(config: ModelConfig, num_tokens: int) -> str:
    raw = config.raw
    is_qwen3 = raw.get("is_original_qwen3_reranker") is True
    method = _TWO_WAY if is_qwen3 else raw.get("method", _EACH)
    if method not in (_TWO_WAY, _EACH):
        raise ModelLoadError(f"config.json: method {method!r} of scores is not supported")
    if method == _TWO_WAY and num_tokens != 2:
        raise ModelLoadError(
            f"config.json: classifier_from_token must name two tokens, the one for no first, "
            f"not {num_tokens}"
        )
    return str(method)
