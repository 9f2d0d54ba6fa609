"""Any other decoder of transformers: its own module, over octavo's paged attention and cache.

The module's attention is replaced through transformers' AttentionInterface: a step's tokens, of
however many requests, come as one row; each attention call stores its keys and values in a layer of
the paged cache and attends over it. What a module does beyond that (a state of its own, a bias on
the scores, a mask of another form) would be lost: such models are refused when they are loaded,
because each one is compared with itself first (``_check``).

Nothing else imports transformers; this module is imported only for an architecture of no family.

Longer than other files: a module is taken over, driven and checked by the same few tables.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoints.safetensors import open_safetensors, safetensors_files
from octavo.errors import ModelLoadError
from octavo.kernels.opset import OpSet
from octavo.layers.context import StepContext
from octavo.layers.rope import RopeConfig, identity_table
from octavo.models.config import ModelConfig, token_ids
from octavo.models.foreign_speed import replace_norms, wait_of
from octavo.models.hf_config import architecture_of

PAGED, SHAPES = "octavo", "octavo_shapes"
# Layers whose memory is keys and values; hybrids name theirs "attention".
_KV_LAYERS = {"full_attention", "sliding_attention", "attention"}
# Arguments of an attention call that are refused unless they are None.
_UNKNOWN_ARGUMENTS = ("position_bias", "head_mask", "cu_seqlens", "alibi", "indices")
# How far a module may be from itself, relative, when it runs over the paged cache.
_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1


class _Active(threading.local):
    """The handler of attention calls on this thread."""

    handler: Any = None


_active = _Active()


class _Mask:
    """A stand-in for a mask: its window, 0 for everything, or None if it has another form."""

    __slots__ = ("window",)

    def __init__(self, window: int | None) -> None:
        self.window = window


class _CapturedError(Exception):
    """Carries the hidden states out of a forward pass before the output head."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    """transformers' attention function: [1, H, T, Dh] each -> ([1, T, H, Dv], None)."""
    return _active.handler.attend(module, query, key, value, attention_mask, **kwargs), None


def _make_mask(*_args: Any, mask_function: Any, local_size: int | None = None, **_: Any) -> _Mask:
    """transformers' mask function; on the first pass it looks at the mask's form.

    Some modules make masks that no layer uses: only those that meet attention are refused.
    """
    window = int(local_size or 0)
    if getattr(_active.handler, "checks_masks", False):
        first, far = torch.tensor(0), torch.tensor(2 * window + 5)
        expected = {-1: False, 0: True, 1: window != 1, 2 * window + 5: not window}
        if window:
            expected |= {window - 1: True, window: False}
        for back, seen in expected.items():
            if bool(mask_function(first, first, far, far - back)) != seen:
                return _Mask(None)
    return _Mask(window)


def _transformers() -> Any:
    transformers: Any = importlib.import_module("transformers")
    masks: Any = importlib.import_module("transformers.masking_utils")
    transformers.AttentionInterface.register(PAGED, _attend)
    transformers.AttentionInterface.register(SHAPES, _attend)
    masks.AttentionMaskInterface.register(PAGED, _make_mask)
    return transformers


def _class_of(raw: Mapping[str, Any]) -> Any:
    architecture = architecture_of(raw)
    cls = getattr(_transformers(), architecture, None)
    if cls is None or not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelLoadError(f"architecture {architecture!r} is not supported")
    return cls


def _first_position(module: Any) -> int:
    """The row of the first token's learned position: RoBERTa's begin after the padding id."""
    for child in module.modules():
        if hasattr(child, "create_position_ids_from_input_ids"):
            return int(child.padding_idx) + 1
    return 0


def _positions_of(module: Any) -> dict[str, Any]:
    """Embeddings of positions that a hook gives these; none where the forward pass takes them.

    Raises:
        ModelLoadError: it takes none, and has no such embedding either.
    """
    if "position_ids" in inspect.signature(module.forward).parameters:
        return {}
    inner = {
        name: child
        for name, child in module.named_modules()
        if type(child).__name__.endswith("PositionalEmbedding")
        and "position_ids" in inspect.signature(child.forward).parameters
    }
    if not inner:
        raise ModelLoadError("it takes no positions")
    return inner


def _refusal(architecture: str, reason: str) -> ModelLoadError:
    return ModelLoadError(f"architecture {architecture!r} is not supported: {reason}")


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyError) and error.args and error.args[0] in (PAGED, SHAPES):
        return "its attention cannot be replaced"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)


class _ShapeRecorder:
    """Notes the heads of every attention call; computes nothing (on the meta device)."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int, int]] = []

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
    ) -> Tensor:
        self.shapes.append((query.shape[1], key.shape[1], max(key.shape[3], value.shape[3])))
        return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape of a transformers decoder's cache, found by running it on the meta device.

    Raises:
        ModelLoadError: transformers has no such decoder, or it cannot run here; the reason.
    """
    architecture = architecture_of(raw)
    cls = _class_of(raw)
    try:
        hf = cls.config_class.from_dict(dict(raw))
    except Exception as error:  # transformers validates configs with many kinds of errors
        raise ModelLoadError(f"config.json: {_one_line(error)}") from error
    if getattr(hf, "is_encoder_decoder", False):
        raise _refusal(architecture, "it has an encoder")
    others = sorted(set(getattr(hf, "layer_types", None) or ()) - _KV_LAYERS)
    if others:
        raise _refusal(architecture, f"its {others[0]} layers need more than a KV cache")
    recorder = _ShapeRecorder()
    num_layers = int(hf.num_hidden_layers)
    first = 0
    try:
        _active.handler = recorder
        with torch.device("meta"), torch.no_grad():
            module = cls._from_config(hf, attn_implementation=SHAPES).eval()
            first = _first_position(module)
            ids = torch.zeros((1, 4), dtype=torch.long)
            module(input_ids=ids, use_cache=False)
    except Exception as error:
        # Experts are chosen by values, which nothing has: the first layer's attention is enough,
        # and for what does not even get there, what configs usually say. ``_check`` has the word.
        shapes = recorder.shapes or _usual_shapes(hf)
        if not shapes:
            raise _refusal(architecture, _one_line(error)) from error
        recorder.shapes = [shapes[0]] * num_layers
    finally:
        _active.handler = None
    if not recorder.shapes:
        raise _refusal(architecture, "its attention cannot be replaced")
    if len(set(recorder.shapes)) != 1:
        raise _refusal(architecture, "its layers need caches of different shapes")
    limit = _context_len(hf) - first
    try:
        return _config_of(architecture, hf, recorder.shapes, limit, raw)
    except ModelLoadError as error:
        raise _refusal(architecture, str(error)) from error


def _config_of(
    architecture: str,
    hf: Any,
    shapes: list[tuple[int, int, int]],
    limit: int,
    raw: Mapping[str, Any],
) -> ModelConfig:
    """A config.json's values, with the caches that its attention calls need."""
    num_heads, num_kv_heads, head_dim = shapes[0]
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(hf.vocab_size),
        hidden_size=int(hf.hidden_size),
        intermediate_size=int(getattr(hf, "intermediate_size", None) or 4 * hf.hidden_size),
        num_layers=len(shapes),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=0.0,
        # The module turns queries and keys itself.
        rope=RopeConfig(theta=1.0, rot_dim=2),
        max_position_embeddings=limit,
        max_context_len=limit,
        eos_token_ids=token_ids(raw.get("eos_token_id")),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        raw=dict(raw),
    )


def _usual_shapes(hf: Any) -> list[tuple[int, int, int]]:
    heads = getattr(hf, "num_attention_heads", None)
    if not heads:
        return []
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    return [(heads, getattr(hf, "num_key_value_heads", None) or heads, head_dim)]


def _context_len(hf: Any) -> int:
    limit = int(getattr(hf, "max_position_embeddings", None) or 2048)
    rope = getattr(hf, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original:
        # Beyond it the module would turn all positions otherwise, cached keys excepted.
        limit = min(limit, int(original))
    return limit


class _PagedStep:
    """Answers one forward pass's attention calls: call i belongs to cache i."""

    checks_masks = False

    def __init__(self, model: TransformersModel, ctx: StepContext) -> None:
        self.model, self.ctx, self.layer = model, ctx, 0

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        for name in _UNKNOWN_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise ModelLoadError(f"its attention needs {name}")
        window = mask.window if isinstance(mask, _Mask) else int(sliding_window or 0)
        if is_causal is False or isinstance(mask, Tensor) or window is None:
            raise ModelLoadError("its attention mask is neither causal nor a window")
        model, ctx, config = self.model, self.ctx, self.model.config
        if self.layer >= len(model.caches):
            raise ModelLoadError(f"it attends more than {len(model.caches)} times")
        k_cache, v_cache = model.caches[self.layer]
        self.layer += 1
        _, num_heads, tokens, qk_dim = query.shape
        value_dim, dim = value.shape[3], config.head_dim

        def rows(x: Tensor) -> Tensor:
            x = x[0].transpose(0, 1)
            if x.shape[2] < dim:
                x = torch.nn.functional.pad(x, (0, dim - x.shape[2]))
            return x.reshape(tokens, -1)

        q = model.ops.qk_norm_rope_store_kv(
            torch.cat((rows(query), rows(key), rows(value)), dim=1),
            ctx.positions,
            model.no_rope,
            ctx.slot_mapping,
            k_cache,
            v_cache,
            num_heads=num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=dim,
        )
        out = model.ops.paged_attention(
            q,
            k_cache,
            v_cache,
            ctx.block_table,
            ctx.slots,
            ctx.seq_lens,
            ctx.query_start_loc,
            scale=qk_dim**-0.5 if scaling is None else float(scaling),
            num_decodes=ctx.num_decodes,
            max_query_len=ctx.max_query_len,
            max_seq_len=ctx.max_seq_len,
            sliding_window=window,
            softcap=float(softcap or 0.0),
            sinks=None if s_aux is None else s_aux.detach().float(),
        )
        return out.view(1, tokens, num_heads, dim)[..., :value_dim]


class _CheckingStep(_PagedStep):
    checks_masks = True


class TransformersModel:
    """A transformers module behind the interface of octavo's own families.

    Weights and arithmetic are in the type of activations: float32 on a CPU.

    ``wait``: the reason why no CUDA graph can hold its steps; None if one can.

    Raises:
        ModelLoadError: the files do not fit the module, or the module cannot run here; the reason.
    """

    def __init__(
        self,
        config: ModelConfig,
        folder: Path | None,
        ops: OpSet,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.ops = ops
        self.caches: list[tuple[Tensor, Tensor]] = []
        # True if the module returns its head's output, whatever scales the config names.
        self._head_is_last = False
        self.wait: str | None = None
        self.no_rope = identity_table(max(max_model_len, 32), device)
        if ops.threads is not None:
            # The module's matrix products are torch's, not the kernels'.
            torch.set_num_threads(ops.threads.size())
        self.module = _load_module(config, folder, dtype, device).to(device)
        self.num_weights = sum(parameter.numel() for parameter in self.module.parameters())
        self.head = self.module.get_output_embeddings()
        if self.head is None:
            raise _refusal(config.architecture, "it has no output head")
        try:
            inner = _positions_of(self.module)
        except ModelLoadError as error:
            raise _refusal(config.architecture, str(error)) from error
        # Positions of the step that runs, for embeddings that the module's own forward gives none.
        self._inner_positions: Tensor | None = None
        self._takes_positions = not inner
        self._first_position = _first_position(self.module)
        for child in inner.values():
            child.register_forward_pre_hook(self._give_positions, with_kwargs=True)
        self._check(dtype, device)

    def _give_positions(
        self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._inner_positions is None:
            return None
        signature = inspect.signature(_module.forward)
        given = signature.bind(*args, **kwargs).arguments
        return (), {**given, "position_ids": self._inner_positions}

    def bind_kv_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take each layer's keys and values."""
        self.caches = list(caches)

    def __call__(self, inputs: Tensor, ctx: StepContext) -> Tensor:
        """Token ids int32 [T] -> hidden states [T, D], as the output head takes them."""
        return self._hidden(inputs, ctx.positions, _PagedStep(self, ctx))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] -> float32 [S, V]."""
        logits: Tensor = self.head(hidden).float()
        if self._head_is_last:
            return logits
        hf = self.module.config
        if (scale := getattr(hf, "logit_scale", None)) is not None:
            logits = logits * scale
        if (divisor := getattr(hf, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(hf, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _hidden(self, input_ids: Tensor, positions: Tensor, step: _PagedStep) -> Tensor:
        def capture(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            raise _CapturedError(inputs[0])

        hook = self.head.register_forward_pre_hook(capture)
        _active.handler = step
        where = positions.long()[None] + self._first_position
        named = {"position_ids": where} if self._takes_positions else {}
        self._inner_positions = None if self._takes_positions else where
        try:
            self.module(input_ids=input_ids.long()[None], use_cache=False, **named)
        except _CapturedError as captured:
            return captured.hidden[0]
        finally:
            _active.handler = self._inner_positions = None
            hook.remove()
        raise ModelLoadError("its output head is never called")

    def _check(self, dtype: torch.dtype, device: torch.device) -> None:
        """Two prompts side by side, in two chunks each, against the module's own attention."""
        architecture, vocab = self.config.architecture, self.config.vocab_size
        lengths, chunks = (9, 6), ((5, 4), (4, 2))
        prompts = [[(31 * i + 17 * r + 5) % vocab for i in range(n)] for r, n in enumerate(lengths)]
        shape = (2, self.config.num_kv_heads, 16, self.config.head_dim)
        self.caches = [
            (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(self.config.num_layers)
        ]

        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        try:
            whole = self._context(ints, [(0, 0, lengths[0])])
            self._hidden(ints(prompts[0]), whole.positions, _CheckingStep(self, whole))
            own = self._own_logits([ints(prompt) for prompt in prompts])
            replace_norms(self.module, self.ops)
            found: list[list[Tensor]] = [[], []]
            for part in range(2):
                spans = [(r, sum(chunks[r][:part]), sum(chunks[r][: part + 1])) for r in range(2)]
                ctx = self._context(ints, spans)
                ids = [token for r, start, end in spans for token in prompts[r][start:end]]
                logits = self.compute_logits(self(ints(ids), ctx))
                for r, piece in enumerate(logits.split_with_sizes([e - s for _, s, e in spans])):
                    found[r].append(piece)
            for pieces, expected in zip(found, own, strict=True):
                error = float((torch.cat(pieces) - expected).norm() / expected.norm())
                if not error < _TOLERANCE.get(dtype, _HALF_TOLERANCE):
                    reason = f"over a paged cache it computes something else (by {error:.1g})"
                    raise ModelLoadError(reason)
            first = ints(prompts[0])
            self.wait = wait_of(lambda: self.compute_logits(self(first, whole)), device)
        except Exception as error:  # whatever a foreign module raises is why it cannot run
            raise _refusal(architecture, _one_line(error)) from error
        finally:
            self.caches = []

    def _own_logits(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """float32 [T, V] of each prompt, by the module's own attention."""
        outputs: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Tensor) -> None:
            outputs.append(output)

        self.module.set_attn_implementation("eager")
        hook = self.head.register_forward_hook(keep)
        try:
            own = [self.module(input_ids=p.long()[None], use_cache=False).logits for p in prompts]
        finally:
            hook.remove()
            self.module.set_attn_implementation(PAGED)
        self._head_is_last = all(map(torch.equal, outputs, own))
        return [logits[0].float() for logits in own]

    def _context(self, ints: Any, spans: Sequence[tuple[int, int, int]]) -> StepContext:
        """(request, start, end) of each request's chunk; request r lives in block 1 - r."""
        sizes = [end - start for _, start, end in spans]
        starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        return StepContext(
            positions=ints([p for _, start, end in spans for p in range(start, end)]),
            slot_mapping=ints([(1 - r) * 16 + p for r, s, e in spans for p in range(s, e)]),
            slots=ints([r for r, _, _ in spans]),
            seq_lens=ints([end for _, _, end in spans]),
            query_start_loc=ints(starts),
            block_table=ints([[1], [0]]),
            num_reqs=len(spans),
            num_decodes=0,
            max_query_len=max(sizes),
            max_seq_len=max(end for _, _, end in spans),
        )


def _load_module(
    config: ModelConfig, folder: Path | None, dtype: torch.dtype, device: torch.device
) -> Any:
    cls = _class_of(config.raw)
    hf = cls.config_class.from_dict(dict(config.raw))
    if folder is None:
        torch.manual_seed(0)
        with device:
            return cls._from_config(hf, attn_implementation=PAGED).to(dtype).eval()
    files = safetensors_files(folder)
    where = {
        name: file
        for file in files
        for name in open_safetensors(file, torch.device("cpu")).keys()  # noqa: SIM118 (not a dict)
    }
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.disable_progress_bar()
    try:
        module, info = cls.from_pretrained(
            str(folder),
            config=hf,
            dtype=dtype,
            attn_implementation=PAGED,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            # They are refused below, by name.
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise _refusal(config.architecture, f"{folder}: {_one_line(error)}") from error
    for kind, what in (
        ("missing_keys", "is missing"),
        ("mismatched_keys", "has shape {}, the config says {}"),
        ("unexpected_keys", "is not part of this model"),
    ):
        for key in sorted(info.get(kind) or (), key=str):
            name, *shapes = (key,) if isinstance(key, str) else key
            file = where.get(name) or (files[0] if len(files) == 1 else folder)
            fault = what.format(*map(list, shapes)) if shapes else what
            raise ModelLoadError(f"{file}: tensor {name} {fault}")
    return module.eval()
