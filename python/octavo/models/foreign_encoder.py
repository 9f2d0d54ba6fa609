"""ForeignEncoder: any other encoder of transformers, by its own module.

An encoder keeps nothing from step to step, so that its module needs no cache: a step's texts, which
come end to end, are padded to a batch, and their states taken out of it again.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from octavo.errors import ModelLoadError
from octavo.layers.context import StepContext
from octavo.layers.rope import RopeConfig
from octavo.models.config import ModelConfig
from octavo.models.hf_config import architecture_of

# Families whose encoders are proven; their checkpoints are named X + one of _KINDS.
FOREIGN_FAMILIES: Final = (
    "Albert",
    "Camembert",
    "Data2VecText",
    "Deberta",
    "DebertaV2",
    "DistilBert",
    "Electra",
    "Ernie",
    "EuroBert",
    "JinaEmbeddingsV3",
    "MPNet",
    "MegatronBert",
    "MobileBert",
    "ModernBert",
    "NomicBert",
    "RemBert",
    "RoCBert",
    "RobertaPreLayerNorm",
    "XLMRobertaXL",
)
_MASKED, _CLASSIFIER = "ForMaskedLM", "ForSequenceClassification"
_TOKEN_CLASSIFIER = "ForTokenClassification"
_KINDS: Final = ("Model", _MASKED, _CLASSIFIER, _TOKEN_CLASSIFIER)
FOREIGN_ENCODERS: Final = frozenset(f"{name}{kind}" for name in FOREIGN_FAMILIES for kind in _KINDS)


def read_foreign_encoder(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape of one of FOREIGN_ENCODERS.

    Raises:
        ModelLoadError: a value is missing or impossible.
    """
    hf = _config_of(raw)
    limit = int(getattr(hf, "max_position_embeddings", None) or 512)
    # RoBERTa's positions begin after the padding id.
    if type(hf).__name__.startswith(("Camembert", "Data2Vec", "MPNet", "Roberta", "XLMRobertaXL")):
        limit -= int(hf.pad_token_id or 0) + 1
    return ModelConfig(
        architecture=architecture_of(raw),
        vocab_size=int(hf.vocab_size),
        hidden_size=int(hf.hidden_size),
        intermediate_size=int(getattr(hf, "intermediate_size", None) or 4 * hf.hidden_size),
        num_layers=int(hf.num_hidden_layers),
        # Its module keeps keys and values to itself: the cache is as small as one can be.
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        rms_norm_eps=0.0,
        rope=RopeConfig(theta=1.0, rot_dim=2),
        max_position_embeddings=limit,
        max_context_len=limit,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        raw=dict(raw),
    )


class ForeignEncoder:
    """A transformers encoder, with its classification head where the checkpoint has one.

    ``num_labels``: of that head; 0: there is none. ``predicts``: with the head of a masked language
    model, whose logits are then the states. ``hides_second``: second parts of texts are fillers, to
    which no token attends. ``tensors``: gives those of the shapes that it is called with, from a
    file that transformers does not read; None: the folder's.

    Raises:
        ModelLoadError: the files do not fit the module.
    """

    def __init__(
        self,
        config: ModelConfig,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tensors: Callable[[Mapping[str, torch.Size]], Mapping[str, Tensor]] | None = None,
        predicts: bool = False,
        hides_second: bool = False,
    ) -> None:
        self._hides_second = hides_second
        self._is_per_token = config.architecture.endswith(_TOKEN_CLASSIFIER)
        classifies = self._is_per_token or config.architecture.endswith(_CLASSIFIER)
        hf = _config_of(config.raw)
        self.num_labels = int(hf.num_labels) if classifies else 0
        cls = _class_of(config, classifies or predicts)
        if tensors is None:
            self._module = _load(cls, hf, folder, dtype).to(device)
        else:
            self._module = _filled(cls, hf, tensors, dtype).to(device)
        self._pad = int(hf.pad_token_id or 0)
        self._names = inspect.signature(self._module.forward).parameters

    def __call__(self, ids: Tensor, ctx: StepContext, is_second: Tensor | None) -> Tensor:
        """Token ids int32 [T] of whole texts -> states [T, D] or, classified, logits [R, labels] or
        of each token [T, labels].

        ``is_second``: [T], the tokens of pairs' second texts, or the fillers.
        """
        starts = ctx.query_start_loc.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        shape = (len(lengths), max(lengths, default=0))
        padded = torch.full(shape, self._pad, dtype=torch.long, device=ids.device)
        mask = torch.zeros(shape, dtype=torch.long, device=ids.device)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
        used = mask.bool()
        padded[used] = ids.long()
        given = {"input_ids": padded, "attention_mask": mask}
        if is_second is not None and self._hides_second:
            mask[used] = 1 - is_second.long()
        elif is_second is not None and "token_type_ids" in self._names:
            types = torch.zeros_like(padded)
            types[used] = is_second.long()
            given["token_type_ids"] = types
        found = self._module(**given)
        if self.num_labels:
            logits: Tensor = found.logits.float()
            return logits[used] if self._is_per_token else logits
        states: Tensor = found[0][used]
        return states


def _config_of(raw: Mapping[str, Any]) -> Any:
    transformers: Any = importlib.import_module("transformers")
    architecture = architecture_of(raw)
    try:
        return getattr(transformers, architecture).config_class.from_dict(dict(raw))
    except Exception as error:  # transformers validates configs with many kinds of errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelLoadError(f"config.json: {reason}") from error


def _class_of(config: ModelConfig, with_head: bool) -> Any:
    transformers: Any = importlib.import_module("transformers")
    family = config.architecture
    if not with_head:
        family = family.removesuffix("Model").removesuffix(_MASKED) + "Model"
    return getattr(transformers, family)


def _filled(
    cls: Any,
    hf: Any,
    tensors: Callable[[Mapping[str, torch.Size]], Mapping[str, Tensor]],
    dtype: torch.dtype,
) -> Any:
    """A module of these tensors; what else it has, a pooler, stays random."""
    module = cls(hf).to(dtype)
    state = module.state_dict()
    module.load_state_dict(dict(tensors({k: v.shape for k, v in state.items()})), strict=False)
    return module.eval()


def _load(cls: Any, hf: Any, folder: Path, dtype: torch.dtype) -> Any:
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.disable_progress_bar()
    try:
        module, info = cls.from_pretrained(
            str(folder),
            config=hf,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelLoadError(f"{folder}: {reason}") from error
    # A pooler that no vector needs may be missing; a masked language model's head is left out.
    missing = sorted(key for key in info.get("missing_keys") or () if "pooler." not in key)
    if missing:
        raise ModelLoadError(f"{folder}: tensor {missing[0]} is missing")
    return module.eval()
