"""Pooler: one vector a text from hidden states, as a sentence-transformers folder defines it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoints.safetensors import SafetensorsWeights, safetensors_files
from octavo.errors import ModelLoadError
from octavo.kernels.weights import dense

# In the order in which sentence-transformers puts several side by side.
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "GELU": torch.nn.functional.gelu,
    "Identity": lambda x: x,
    "ReLU": torch.relu,
    "SiLU": torch.nn.functional.silu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}
# Each release of sentence-transformers called the transformer's own settings after the encoder.
_SETTINGS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
Step = Callable[[Tensor], Tensor]


class Pooler:
    """The modules after the encoder: pooling, dense layers, normalization.

    ``default_mode``: for a GGUF file, and for a folder without modules.json; the mean is
    sentence-transformers' own. ``mode``: in place of all that the files have. "token" pools
    nothing: it is the mode of a modules.json without a pooling module.
    ``max_len``: the most tokens of a text, None where only the model limits it. ``size``: of the
    vectors. ``normalizes``: whether the last step makes their length 1. ``lowercases``: texts are
    to be in lower case. ``pools_prompts``: the tokens of a prompt count as those of its text do.

    Raises:
        ModelLoadError: a module that is not known, or files that do not fit; one line.
    """

    def __init__(
        self,
        folder: Path,
        hidden_size: int,
        device: torch.device,
        default_mode: str = "mean",
        mode: str | None = None,
    ) -> None:
        self.modes: tuple[str, ...] = (mode or default_mode,)
        self._mode = mode
        self.normalizes = False
        self.max_len: int | None = None
        self.lowercases = False
        self.pools_prompts = True
        self.size, self._device = hidden_size, device
        # Of every token, before they are pooled; and of what comes of that.
        self._token_steps: list[Step] = []
        self._steps: list[Step] = []
        file = folder / "modules.json"
        modules = _read(file, list) if file.is_file() else []
        pooling = next((i for i, module in enumerate(modules) if _is_pooling(module)), None)
        is_static = bool(modules) and str(modules[0].get("type")).endswith(".StaticEmbedding")
        if mode is None and modules and pooling is None and not is_static:
            self.modes = ("token",)
        for place, module in enumerate(modules):
            try:
                kind = str(module["type"]).rpartition(".")[2]
                path = folder / str(module["path"])
            except (KeyError, TypeError) as error:
                raise ModelLoadError(f"{file}: not a list of modules: {error!r}") from error
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ModelLoadError(f"{file}: module {module['path']!r} is outside the folder")
            steps = self._token_steps if place < (pooling or 0) else self._steps
            self._add(kind, path, file, steps)
            self.normalizes = kind == "Normalize"

    def _add(self, kind: str, path: Path, file: Path, steps: list[Step]) -> None:
        match kind:
            case "Transformer" | "MLMTransformer":
                found = (path / f"sentence_{name}_config.json" for name in _SETTINGS)
                settings = next((file for file in found if file.is_file()), None)
                values = _read(settings, dict) if settings is not None else {}
                self.lowercases = bool(values.get("do_lower_case"))
                self.max_len = values.get("max_seq_length")
            case "Pooling":
                if self._mode is None:
                    self.modes = _modes(path / "config.json")
                self.size *= len(self.modes)
                self.pools_prompts = (
                    _read(path / "config.json", dict).get("include_prompt") is not False
                )
            case "SpladePooling" if self._mode is None:
                self.modes = (_splade_mode(path / "config.json"),)
            case "Dropout" | "StaticEmbedding":
                pass
            case "LayerNorm":
                steps.append(self._layer_norm(path))
            case "Dense":
                steps.append(self._dense(path))
            case "Normalize":
                steps.append(lambda x: torch.nn.functional.normalize(x, dim=-1))
            case _:
                raise ModelLoadError(f"{file}: module {kind!r} is not supported")

    def __call__(self, hidden: Tensor, starts: Tensor) -> Tensor:
        """hidden [T, D] of texts end to end, starts int32 [R + 1] from 0 -> float32 [R, D'].

        A vector a token, where none are pooled, is [T, D'].

        Rows after the last text belong to none, and an empty text's result is meaningless.
        Everything can be captured into a CUDA graph.
        """
        for step in self._token_steps:
            hidden = step(hidden.float())
        parts = [_pooled(mode, hidden, starts) for mode in self.modes]
        x = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        for step in self._steps:
            x = step(x)
        return x

    def project(self, weight: Tensor) -> None:
        """Add a layer without a bias, [N, size], and leave every vector with length 1."""
        self._steps.append(lambda x: torch.nn.functional.linear(x, weight))
        self.size = weight.shape[0]
        self.normalize()

    def normalize(self) -> None:
        """Leave every vector with length 1."""
        self._steps.append(lambda x: torch.nn.functional.normalize(x, dim=-1))
        self.normalizes = True

    def _dense(self, path: Path) -> Step:
        file = path / "config.json"
        values = _read(file, dict)
        activation = str(values.get("activation_function", "Tanh")).rpartition(".")[2]
        if values.get("use_residual"):
            raise ModelLoadError(f"{file}: use_residual is not supported")
        if activation not in _ACTIVATIONS:
            raise ModelLoadError(f"{file}: activation {activation!r} is not supported")
        try:
            n, k = int(values["out_features"]), int(values["in_features"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelLoadError(f"{file}: no sizes of a layer: {error!r}") from error
        if k != self.size:
            raise ModelLoadError(f"{file}: in_features is {k}, its input has {self.size}")
        weights = self._open(path)
        weight = dense(weights.linear("linear", (n, k)))
        bias = weights.vector("linear.bias", n) if values.get("bias", True) else None
        weights.finish()
        self.size = n

        def apply(x: Tensor) -> Tensor:
            return _ACTIVATIONS[activation](torch.nn.functional.linear(x, weight, bias))

        return apply

    def _layer_norm(self, path: Path) -> Step:
        weights = self._open(path)
        sizes = (self.size,)
        weight, bias = (weights.vector(f"norm.{name}", self.size) for name in ("weight", "bias"))
        weights.finish()
        return lambda x: torch.nn.functional.layer_norm(x, sizes, weight, bias)

    def _open(self, path: Path) -> SafetensorsWeights:
        """A module's tensors."""
        files = safetensors_files(path)
        if not files:
            raise ModelLoadError(f"{path}: no safetensors file, and no other kind is read")
        return SafetensorsWeights(
            files, device=self._device, dtype=torch.float32, act_dtype=torch.float32
        )


def _pooled(mode: str, hidden: Tensor, starts: Tensor) -> Tensor:
    """A vector of each text, or a token, float32."""
    match mode:
        case "token":
            return hidden.float()
        case "cls":
            return hidden[first_rows(starts, hidden.shape[0])].float()
        case "last" | "lasttoken":
            return hidden[(starts[1:] - 1).clamp_min(0)].float()
    owner, none = _owners(hidden, starts)
    lengths = starts.diff()[:, None]
    match mode:
        case "max":
            none.fill_(-torch.inf)
            return none.index_reduce_(0, owner, hidden.float(), "amax")[:-1]
        case "splade max":
            return none.index_reduce_(0, owner, _splade(hidden), "amax")[:-1]
        case "splade sum":
            return none.index_add_(0, owner, _splade(hidden))[:-1]
        case "weightedmean":
            # A token counts as much as its place, from 1: half of n (n + 1) in all.
            rows = torch.arange(1, hidden.shape[0] + 1, device=hidden.device)
            places = rows - starts.clamp_max(hidden.shape[0])[owner]
            weighted = none.index_add_(0, owner, hidden.float() * places[:, None])[:-1]
            return weighted / (lengths * (lengths + 1) / 2)
    sums = none.index_add_(0, owner, hidden.float())[:-1]
    return sums / (lengths.sqrt() if mode == "mean_sqrt_len_tokens" else lengths)


def first_rows(starts: Tensor, num_rows: int) -> Tensor:
    """Each text's first row [R]; an empty text after all others gets an existing row."""
    return starts[:-1].clamp_max(num_rows - 1)


def _owners(hidden: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The text of each row, and zeros for each text; one more, for rows of none."""
    rows = torch.arange(hidden.shape[0], dtype=torch.int32, device=hidden.device)
    owner = torch.bucketize(rows, starts[1:], right=True)
    return owner, hidden.new_zeros((starts.shape[0], hidden.shape[1]), dtype=torch.float32)


def _splade(logits: Tensor) -> Tensor:
    """The weight of each word of the vocabulary (arXiv 2107.05720)."""
    return logits.float().relu().log1p()


def _is_pooling(module: object) -> bool:
    return isinstance(module, dict) and str(module.get("type")).endswith("Pooling")


def is_splade(folder: Path) -> bool:
    """True where a folder's vectors have a number for each word of the vocabulary."""
    file = folder / "modules.json"
    modules = _read(file, list) if file.is_file() else []
    return any(str(module.get("type")).endswith("SpladePooling") for module in modules)


def _splade_mode(file: Path) -> str:
    values = _read(file, dict)
    strategy = values.get("pooling_strategy", "max")
    if strategy not in ("max", "sum") or values.get("activation_function", "relu") != "relu":
        raise ModelLoadError(f"{file}: pooling {strategy!r} of this activation is not supported")
    return f"splade {strategy}"


def _modes(file: Path) -> tuple[str, ...]:
    values = _read(file, dict)
    chosen = [k for k, v in values.items() if k.startswith("pooling_mode_") and v is True]
    if (named := values.get("pooling_mode")) is not None:  # newer files name them
        modes = [named] if isinstance(named, str) else list(named)
        chosen = [
            next((k for k, v in _MODES.items() if mode in (v, k[13:])), mode) for mode in modes
        ]
    if not chosen or not set(chosen) <= set(_MODES):
        raise ModelLoadError(
            f"{file}: pooling {', '.join(map(str, chosen)) or 'of no kind'} is not supported"
        )
    return tuple(mode for name, mode in _MODES.items() if name in chosen)


def _read(file: Path, kind: type) -> Any:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file}: {error}") from error
    if not isinstance(value, kind):
        raise ModelLoadError(f"{file}: not a JSON {kind.__name__}")
    return value
