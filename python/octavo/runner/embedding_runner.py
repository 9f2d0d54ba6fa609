"""EmbeddingRunner: an encoder in memory, and batches of texts through it. It has no KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from octavo.config import EngineConfig
from octavo.layers.ops import get_ops
from octavo.models.bert import ENCODERS, BertEncoder, read_encoder_config
from octavo.models.errors import ModelLoadError
from octavo.models.hf_config import architecture_of
from octavo.models.loader import DTYPES
from octavo.models.pooling import Pooler
from octavo.models.source import ModelSource
from octavo.models.weights import SafetensorsWeights, safetensors_files
from octavo.runner.model_runner import resolve_device, set_num_threads

# Activations of more tokens leave the processor's caches.
_MAX_TOKENS = 2048
# Tensors of a checkpoint that embeddings do not need.
_UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")


def is_encoder(source: ModelSource) -> bool:
    """Whether a model is one that this runner runs."""
    return source.kind == "safetensors" and architecture_of(source.hf_config) in ENCODERS


class EmbeddingRunner:
    """Texts' token ids -> vectors. float32 unless another dtype is asked for.

    ``max_len``: the most tokens of a text. ``vocab_size``: ids are below it.

    Raises:
        ModelLoadError: the model cannot be read, or a setting that encoders do not have.
    """

    def __init__(self, config: EngineConfig, source: ModelSource) -> None:
        if config.quantization is not None:
            raise ModelLoadError(f"{source.path}: an encoder cannot be quantized")
        device = resolve_device(config)
        ops = get_ops(device, config.attention_backend)
        if device.type == "cpu":
            set_num_threads(ops, config.threads)
        try:
            encoder = read_encoder_config(source.hf_config)
        except ModelLoadError as error:
            raise ModelLoadError(f"{source.path}: {error}") from error
        # Rounding weights is asked for by name only: embeddings are compared with stored ones.
        dtype = DTYPES.get(config.dtype, torch.float32)
        weights = SafetensorsWeights(
            safetensors_files(source.path),
            device=device,
            dtype=dtype,
            act_dtype=torch.float32 if device.type == "cpu" else dtype,
            ignored=_UNUSED,
        )
        with torch.inference_mode():
            self._model = BertEncoder(encoder, weights, ops, device)
            weights.finish()
            self._pool = Pooler(source.path, encoder.hidden_size, device)
        self.vocab_size = encoder.vocab_size
        self.max_len = min(encoder.max_len, self._pool.max_len or encoder.max_len)
        if config.max_model_len not in (None, -1):
            assert config.max_model_len is not None
            self.max_len = min(self.max_len, config.max_model_len)
        self._max_tokens = max(config.max_num_batched_tokens or _MAX_TOKENS, self.max_len)

    def embed(
        self, texts: Sequence[Sequence[int]], progress: Callable[[int], object] = lambda _: None
    ) -> Tensor:
        """float32 [len(texts), D] on the CPU, in the texts' order.

        ``progress`` is told how many more are done. Each text must hold 1 to ``max_len`` ids.
        """
        rows: list[Tensor] = []
        with torch.inference_mode():
            for batch in self._batches(texts):
                hidden = self._model(batch)
                rows.append(self._pool(hidden, [len(text) for text in batch]).cpu())
                progress(len(batch))
        return torch.cat(rows)

    def _batches(self, texts: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
        """Neighbours, as many as fit the token budget; nothing is padded, so order is no matter."""
        first, tokens = 0, 0
        for index, text in enumerate(texts):
            if index > first and tokens + len(text) > self._max_tokens:
                yield texts[first:index]
                first, tokens = index, 0
            tokens += len(text)
        yield texts[first:]
