"""Flags of vLLM's ``serve`` that set nothing in octavo: accepted with a note, or refused.

A guide's command line should start where nothing that it asks for is lost. A row of the table is a
flag, the values that ask for nothing octavo does otherwise, and one reason: why any other value is
refused or, where every value passes, why the flag has no effect. The same rows judge the arguments
of ``LLM`` and ``EngineArgs``, and ``docs/flags.md`` is written from them.

Longer than other files: most of it is the table of flags.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from octavo.flag_words import Line, Option

# ``switch``: no value, or true and false; ``values``: one or several; ``object``: JSON, whose keys
# may stand behind dots.
Kind = Literal["switch", "value", "values", "object"]

# What an absent value looks like, written out.
_NOTHING: Final = frozenset({"", "none", "null", "{}", "[]", "()"})


class Row(NamedTuple):
    """One flag.

    ``passes``: the values that are accepted, in lower case; None is all of them. A switch that is
    off always passes.
    """

    name: str
    kind: Kind
    reason: str
    passes: tuple[str, ...] | None
    shorts: tuple[str, ...] = ()

    @property
    def option(self) -> str:
        """``--swap-space``."""
        return "--" + self.name.replace("_", "-")

    def accepts(self, value: Any) -> bool:
        """True where a value, as text or as Python's own, asks for nothing that is not done."""
        if self.passes is None or value is None or value is False:
            return True
        text = str(value).strip().lower()
        if self.kind == "switch":
            return text == "false"
        return text in self.passes or text in _NOTHING or _number(text) in self.passes


def _number(text: str) -> str | None:
    """A whole number in its shortest form: 0 of 0.0."""
    try:
        return f"{float(text):g}"
    except ValueError:
        return None


def _rows(
    reason: str, names: str, kind: Kind = "value", passes: tuple[str, ...] | None = None
) -> list[Row]:
    """Rows of one reason; a name may be followed by short spellings: ``data_parallel_size/-dp``."""
    rows = []
    for word in names.split():
        name, *shorts = word.split("/")
        rows.append(Row(name, kind, reason, passes, tuple(shorts)))
    return rows


def _refused(reason: str, names: str, kind: Kind = "value", *passes: str) -> list[Row]:
    return _rows(reason, names, kind, passes)


_COMPILES = "octavo compiles nothing at start: its kernels are written by hand"
_MEDIA = "octavo takes text alone, no images, sound or video"
_STATE_KERNELS = "octavo has its own kernels of recurrent layers"
_STATES = "octavo saves states at blocks' ends: --state-checkpoint-interval"
_LORA = "octavo has no LoRA yet"
_SPECULATIVE = "octavo has no speculative decoding yet"
_REASONING = "octavo finds how a model reasons; --reasoning-parser names another way"
_DATA_PARALLEL = "a server holds one copy of a model: run several, or replicas on Ray"
_ONE_PROCESS = "octavo is one process on one machine"
_EXPERTS = "octavo splits a model's experts with its layers"
_CONTEXT_PARALLEL = "octavo has no context parallelism"
_OWN_CODE = "octavo runs no code but its own"
_OFFLOAD = "octavo keeps weights on the device"
_TRANSFER = "octavo exchanges no caches or weights with other processes"
_ACCESS_LOG = "octavo logs requests only with --enable-log-requests"
_HTTP_LIMITS = "octavo's limits are fixed: a request's head of 16 KiB"
_OWN_METRICS = "octavo has no such metrics"

_ALL: Final[list[Row]] = [
    # ------------------------------------------------------------------------ the model
    *_refused(
        "octavo reads a tokenizer.json or a GGUF file's tokenizer",
        "tokenizer_mode",
        "value",
        # A repository of Mistral's holds Hugging Face's files, too.
        *("auto", "hf", "slow", "mistral"),
    ),
    # The one that guides name for a GGUF file, which has its own.
    *_rows("octavo reads the config beside the weights or among them", "hf_config_path"),
    *_rows("octavo never runs a checkpoint's code", "code_revision"),
    # On nearly every guide's command line; a model that cannot do without is refused at its load.
    *_rows("octavo never runs a checkpoint's code", "trust_remote_code", "switch"),
    *_refused(
        "octavo quantizes by --quantization (w4, fp8, ...), and takes what a checkpoint holds",
        "quantization_config",
        "object",
    ),
    *_rows("octavo has no deprecated formats", "allow_deprecated_quantization", "switch"),
    *_refused("octavo does not return routed experts", "enable_return_routed_experts", "switch"),
    *_refused("octavo does not return sampling masks", "return_sampling_mask", "switch"),
    *_rows("octavo has one way to draw a token", "use_fp64_gumbel", "switch"),
    *_refused("octavo replays no traces", "enable_trace_replay", "switch"),
    *_refused("octavo keeps a model's sliding window", "disable_sliding_window", "switch"),
    *_rows("octavo reads a model's tokenizer in any case", "skip_tokenizer_init", "switch"),
    *_refused("octavo takes no tensors in requests", "enable_prompt_embeds", "switch"),
    *_refused(
        "octavo reads config.json or GGUF", "config_format", "value", *("auto", "hf", "mistral")
    ),
    *_refused(_OWN_CODE, "model_class_overrides", "object"),
    *_refused(_OWN_CODE, "logits_processors logits_processor_pattern", "values"),
    *_refused(_OWN_CODE, "io_processor_plugin"),
    *_refused("octavo has no sleep mode", "enable_sleep_mode", "switch"),
    *_rows("octavo has no sleep mode", "sleep_mode_backend"),
    *_rows("octavo has no sleep mode", "sleep_mode_offload_cudagraph", "switch"),
    *_rows("octavo has no sleep mode", "sleep_preserve_parameter_names", "values"),
    *_rows("octavo uses torch's allocator", "enable_cumem_allocator", "switch"),
    *_rows("octavo has no sleep mode", "enable_nccl_comm_suspend", "switch"),
    *_refused(
        "octavo chooses the implementation by itself (docs/models.md)",
        "model_impl",
        "value",
        *("auto", "vllm"),
    ),
    *_rows("octavo renders templates on threads of its own choice", "renderer_num_workers"),
    *_refused("octavo runs on CUDA and on CPUs", "override_neuron_config", "object"),
    # ------------------------------------------------------------------------ loading
    *_rows(
        "octavo maps the files and reads them ahead",
        "safetensors_load_strategy safetensors_prefetch_num_threads "
        "safetensors_prefetch_block_size max_parallel_loading_workers",
    ),
    *_rows("octavo has one loader a format", "model_loader_extra_config", "object"),
    *_rows("octavo reads safetensors and GGUF alone", "ignore_patterns", "values"),
    *_rows("octavo shows progress on a terminal alone", "use_tqdm_on_load", "switch"),
    *_rows("octavo loads no pickles", "pt_load_map_location"),
    # ------------------------------------------------------------------- kernels, graphs
    *_rows(_COMPILES, "compilation_config/-cc", "object"),
    *_rows(_COMPILES, "optimization_level/-O"),
    *_rows("octavo has one mode, for latency and throughput alike", "performance_mode"),
    *_rows(
        "octavo's graphs reach --max-num-seqs",
        "max_cudagraph_capture_size max_seq_len_to_capture",
    ),
    *_rows("octavo's graphs hold the whole step", "full_cuda_graph", "switch"),
    *_rows("octavo has its own kernels", "attention_config/-ac kernel_config", "object"),
    *_rows(
        "octavo has its own kernels",
        "ir_op_priority moe_backend linear_backend sparse_indexer_topk_backend",
    ),
    *_rows(
        "octavo has its own kernels",
        "enable_flashinfer_autotune disable_flashinfer_autotune enable_bf16x3_router_gemm "
        "monokernel",
        "switch",
    ),
    *_rows(
        _STATE_KERNELS,
        "mamba_backend mamba_ssu_algorithm gdn_prefill_backend kda_prefill_backend "
        "kda_decode_backend",
    ),
    *_rows(_STATE_KERNELS, "mamba_config", "object"),
    *_rows(
        "octavo keeps recurrent states in float32",
        "mamba_cache_dtype mamba_ssm_cache_dtype mamba_cache_philox_rounds",
    ),
    *_rows(
        "octavo keeps recurrent states in float32",
        "enable_mamba_cache_stochastic_rounding",
        "switch",
    ),
    *_rows(_STATES, "mamba_block_size mamba_cache_mode replayssm_buffer_len"),
    *_rows(_STATES, "enable_mamba_shared_prefix_checkpoint use_replayssm", "switch"),
    # --------------------------------------------------------------------- memory, cache
    *_rows("octavo computes preempted requests again", "swap_space"),
    *_rows("octavo preempts by computing again", "preemption_mode"),
    *_rows("octavo finds prefixes by a keyed hash of its own", "prefix_caching_hash_algo"),
    *_rows(
        "octavo keeps every full block until its memory is needed",
        "prefix_cache_retention_interval prefix_match_unit",
    ),
    *_refused("octavo's cache has one type in every layer", "kv_cache_dtype_skip_layers", "values"),
    *_rows(
        "octavo's cache of a byte has a scale a token and head", "calculate_kv_scales", "switch"
    ),
    *_rows(
        "octavo computes every layer of a prompt",
        "kv_sharing_fast_prefill swa_bounded_replay",
        "switch",
    ),
    *_refused("octavo has no KV offloading", "kv_offloading_size", "value", "0"),
    *_rows("octavo has no KV offloading", "kv_offloading_backend"),
    *_refused(_OFFLOAD, "cpu_offload_gb offload_group_size", "value", "0"),
    *_refused(_OFFLOAD, "offload_backend", "value", "auto"),
    *_rows(_OFFLOAD, "cpu_offload_params offload_params", "values"),
    *_rows(_OFFLOAD, "offload_num_in_group offload_prefetch_step"),
    *_rows("octavo's cache has one kind of block", "disable_hybrid_kv_cache_manager", "switch"),
    *_rows("octavo's cache has one kind of block", "use_v2_block_manager", "switch"),
    # ----------------------------------------------------------------------- scheduler
    *_refused("--max-num-batched-tokens is octavo's limit of a step", "max_num_scheduled_tokens"),
    *_refused("--max-num-seqs is octavo's limit of a step", "max_num_active_seqs"),
    *_refused(
        "octavo shares every step among decodes and prompts: --max-num-batched-tokens",
        "scheduler_delay_factor",
        "value",
        "0",
    ),
    *_rows(
        "octavo shares every step among decodes and prompts",
        "max_num_partial_prefills max_long_partial_prefills prefill_schedule_interval "
        "num_scheduler_steps num_lookahead_slots",
    ),
    *_refused(_OWN_CODE, "scheduler_cls"),
    *_rows("octavo preempts where blocks run out", "scheduler_reserve_full_isl", "switch"),
    *_rows("octavo preempts where blocks run out", "watermark"),
    *_rows(
        "octavo launches the next step ahead wherever a device gains by it",
        "async_scheduling disable_async_output_proc multi_step_stream_outputs",
        "switch",
    ),
    # ------------------------------------------------------------------------ parallel
    *_refused(
        _DATA_PARALLEL, "data_parallel_size/-dp data_parallel_size_local/-dpl", "value", "1"
    ),
    *_refused(
        _DATA_PARALLEL, "data_parallel_rank/-dpn data_parallel_start_rank/-dpr", "value", "0"
    ),
    *_rows(
        _DATA_PARALLEL,
        "data_parallel_backend/-dpb data_parallel_address/-dpa data_parallel_rpc_port/-dpp "
        "data_parallel_supervisor_port dp_supervisor_probe_interval_s "
        "dp_supervisor_probe_timeout_s "
        "dp_supervisor_probe_failure_threshold dp_sync_interval",
    ),
    *_refused(
        _DATA_PARALLEL,
        "data_parallel_hybrid_lb/-dph data_parallel_external_lb/-dpe "
        "data_parallel_multi_port_external_lb/-dpm",
        "switch",
    ),
    *_rows(_DATA_PARALLEL, "disable_nccl_for_dp_synchronization", "switch"),
    *_refused(_ONE_PROCESS, "distributed_executor_backend", "value", "mp", "uni", "ray"),
    *_refused(_ONE_PROCESS, "nnodes/-n", "value", "1"),
    *_refused(_ONE_PROCESS, "node_rank/-r", "value", "0"),
    *_rows(
        _ONE_PROCESS,
        "master_addr master_port distributed_timeout_seconds cpu_distributed_timeout_seconds",
    ),
    *_refused(_ONE_PROCESS, "headless worker_use_ray engine_use_ray", "switch"),
    *_rows(_ONE_PROCESS, "ray_workers_use_nsight", "switch"),
    *_rows("one process serves all requests", "api_server_count/-asc"),
    *_rows("one process serves all requests", "disable_frontend_multiprocessing", "switch"),
    *_refused(_OWN_CODE, "worker_cls", "value", "auto"),
    *_refused(_OWN_CODE, "worker_extension_cls"),
    *_rows("octavo leaves placement to the system: numactl", "numa_bind", "switch"),
    *_rows(
        "octavo leaves placement to the system: numactl", "numa_bind_nodes numa_bind_cpus", "values"
    ),
    *_refused("octavo takes the first visible devices: CUDA_VISIBLE_DEVICES", "device_ids"),
    *_refused(
        _CONTEXT_PARALLEL,
        "decode_context_parallel_size/-dcp prefill_context_parallel_size/-pcp",
        "value",
        "1",
    ),
    *_rows(
        _CONTEXT_PARALLEL,
        "dcp_comm_backend dcp_kv_cache_interleave_size cp_kv_cache_interleave_size",
    ),
    *_rows(_CONTEXT_PARALLEL, "dcp_q_replicate", "switch"),
    *_rows(
        _EXPERTS,
        "enable_ep_weight_filter enable_eplb enable_dbo",
        "switch",
    ),
    *_rows(
        _EXPERTS,
        "all2all_backend ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold "
        "expert_placement_strategy",
    ),
    *_rows(_EXPERTS, "eplb_config", "object"),
    *_refused(_EXPERTS, "enable_elastic_ep", "switch"),
    *_rows(_EXPERTS, "elastic_ep_max_dp_size"),
    *_rows("octavo chooses how devices exchange", "enable_hc_sp enable_shm_tensor_arena", "switch"),
    *_rows("octavo samples on one device", "enable_batch_sharded_sampling", "switch"),
    *_rows("octavo chooses how devices exchange", "disable_custom_all_reduce", "switch"),
    *_refused("octavo has no fault tolerance among nodes", "enable_fault_tolerance", "switch"),
    *_refused("octavo has no fault tolerance among nodes", "fault_tolerance_config", "object"),
    # -------------------------------------------------------------------- multi-modal
    *_rows(
        _MEDIA,
        "language_model_only interleave_mm_strings skip_mm_profiling trust_request_mm_kwargs",
        "switch",
    ),
    *_rows(
        _MEDIA,
        "disable_chunked_mm_input mm_device_do_normalize disable_mm_preprocessor_cache "
        "enable_multimodal_encoder_data_parallel enable_mm_processor_stats",
        "switch",
    ),
    *_rows(_MEDIA, "limit_mm_per_prompt media_io_kwargs mm_processor_kwargs", "object"),
    *_rows(
        _MEDIA,
        "allowed_local_media_path mm_processor_cache_gb mm_processor_cache_type "
        "mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_tp_mode "
        "mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path "
        "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin video_pruning_rate "
        "video_pruning_method mm_tensor_ipc mm_processor_device mm_ipc_gpu_memory_gb",
    ),
    *_rows(_MEDIA, "allowed_media_domains", "values"),
    *_refused(_MEDIA, "enable_mm_embeds mm_encoder_only", "switch"),
    *_rows(_MEDIA, "ec_manager_config", "object"),
    *_refused(_MEDIA, "diffusion_config/-dc ec_transfer_config", "object"),
    # --------------------------------------------------------------------------- LoRA
    *_refused(
        _LORA,
        "enable_lora fully_sharded_loras enable_tower_connector_lora specialize_active_lora "
        "enable_mixed_moe_lora_format enable_moe_shared_loras enable_lora_bias "
        "enable_prompt_adapter",
        "switch",
    ),
    *_refused(
        _LORA,
        "lora_modules lora_target_modules long_lora_scaling_factors prompt_adapters",
        "values",
    ),
    *_refused(
        _LORA,
        "max_loras max_lora_rank max_cpu_loras lora_dtype lora_extra_vocab_size "
        "max_lora_cls_labels qlora_adapter_name_or_path max_prompt_adapters "
        "max_prompt_adapter_token",
    ),
    *_refused(_LORA, "default_mm_loras", "object"),
    # -------------------------------------------------------------------- speculation
    *_refused(_SPECULATIVE, "speculative_config/-sc", "object"),
    *_refused(
        _SPECULATIVE,
        "spec_method spec_model spec_tokens speculative_model num_speculative_tokens "
        "speculative_model_quantization speculative_draft_tensor_parallel_size "
        "speculative_max_model_len speculative_disable_by_batch_size ngram_prompt_lookup_max "
        "ngram_prompt_lookup_min spec_decoding_acceptance_method "
        "typical_acceptance_sampler_posterior_threshold "
        "typical_acceptance_sampler_posterior_alpha",
    ),
    *_rows(
        _SPECULATIVE,
        "speculative_disable_mqa_scorer disable_logprobs_during_spec_decoding",
        "switch",
    ),
    *_rows(_SPECULATIVE, "per_request_spec_decode_metrics"),
    # ----------------------------------------------- tools, reasoning, structured outputs
    *_refused(_OWN_CODE, "reasoning_parser_plugin tool_parser_plugin"),
    *_rows("octavo has one backend of structured output", "guided_decoding_backend"),
    *_refused("octavo runs no tools", "tool_server"),
    *_rows(_REASONING, "enable_reasoning", "switch"),
    *_refused(_REASONING, "reasoning_config", "object"),
    *_refused(
        "octavo binds a call's arguments where its tool is strict or tool_choice asks for one",
        "tool_strict_level",
        "value",
        "auto",
    ),
    *_refused(
        "octavo switches reasoning off where the template has a switch",
        "anthropic_disabled_thinking_effort",
        "value",
        *("auto", "none"),
    ),
    *_refused("octavo puts no watermark into its answers", "watermark_config", "object"),
    # ------------------------------------------------------------- templates and answers
    *_refused(
        "octavo asks the template which form it takes",
        "chat_template_content_format",
        "value",
        *("auto", "string", "openai"),
    ),
    *_refused("octavo answers as assistant", "response_role", "value", "assistant"),
    *_refused("a fingerprint names octavo's version", "fingerprint_mode", "value", "full", "hash"),
    *_refused("a fingerprint names octavo's version", "fingerprint_value"),
    *_rows("octavo always reports them", "enable_prompt_tokens_details", "switch"),
    *_rows("octavo's answers always hold timings", "enable_per_request_metrics", "switch"),
    *_rows("octavo always counts them: /load", "enable_server_load_tracking", "switch"),
    *_rows("octavo always sends X-Request-Id", "enable_request_id_headers", "switch"),
    *_refused("octavo serves text alone", "tokens_only enable_scale_out", "switch"),
    *_rows("octavo has no Cohere chat route", "cohere_is_reasoning_model", "switch"),
    *_rows("octavo has no Cohere chat route", "cohere_format"),
    *_rows("octavo has its own kernels", "enable_flash_late_interaction", "switch"),
    # -------------------------------------------------------------------------- the server
    *_refused(_OWN_CODE, "middleware", "values"),
    *_refused("octavo serves HTTP alone", "grpc", "switch"),
    *_refused("octavo serves HTTP alone", "grpc_port"),
    *_rows("octavo has no documentation pages", "disable_fastapi_docs", "switch"),
    *_rows("octavo has no documentation pages", "enable_offline_docs", "switch"),
    *_rows(_HTTP_LIMITS, "h11_max_incomplete_event_size h11_max_header_count"),
    *_rows("the tokenizer is octavo's own", "tokenizer_pool_size tokenizer_pool_type"),
    *_rows("the tokenizer is octavo's own", "tokenizer_pool_extra_config", "object"),
    # ------------------------------------------------------------------- logs, metrics
    *_rows(_ACCESS_LOG, "disable_uvicorn_access_log disable_log_requests", "switch"),
    *_rows(_ACCESS_LOG, "disable_access_log_for_endpoints"),
    *_rows("octavo logs at one level", "uvicorn_log_level log_level"),
    *_rows("octavo logs at one level", "logging_config", "object"),
    *_refused("octavo logs to standard error", "log_config_file"),
    *_rows("octavo never logs texts", "max_log_len"),
    *_refused("octavo never logs texts", "enable_log_outputs", "switch"),
    *_rows("octavo never logs texts", "enable_log_deltas", "switch"),
    *_rows("octavo always logs the traceback of an internal error", "log_error_stack", "switch"),
    *_rows("octavo has one engine", "aggregate_engine_logging", "switch"),
    *_rows("octavo warns of VLLM_* it does not read", "fail_on_environ_validation", "switch"),
    *_rows("octavo hides no metrics", "show_hidden_metrics_for_version"),
    *_refused("the buckets of octavo's histograms are fixed", "custom_histogram_buckets", "object"),
    *_rows("/health answers 503 where no step ends", "watchdog_config", "object"),
    *_refused("octavo's traces hold each request's phases", "collect_detailed_traces", "values"),
    *_rows(
        _OWN_METRICS,
        "kv_cache_metrics cudagraph_metrics enable_mfu_metrics enable_logging_iteration_details "
        "enable_layerwise_nvtx_tracing jit_monitor_verbose",
        "switch",
    ),
    *_rows(_OWN_METRICS, "kv_cache_metrics_sample jit_monitor_mode"),
    *_refused("octavo traces steps by LLM.trace", "profiler_config", "object"),
    # ------------------------------------------------------------------ other processes
    *_refused(
        _TRANSFER, "kv_transfer_config kv_events_config weight_transfer_config", "object"
    ),
    *_rows("octavo has no platforms of its own", "additional_config", "object"),
    *_refused("octavo keeps no table of n-grams", "engram_config", "object"),
    *_refused("octavo returns no hidden states", "aux_output_config", "object"),
]  # fmt: skip

ROWS: Final[dict[str, Row]] = {row.name: row for row in _ALL}
_BY_OPTION: Final = {option: row for row in _ALL for option in (row.option, *row.shorts)}


def note(row: Row, value: Any, spelling: str) -> str:
    """The line about a flag that is accepted; ``spelling``: as its user gave it.

    Raises:
        ValueError: the value is refused; the message is one line that names the flag.
    """
    if not row.accepts(value):
        raise ValueError(f"{spelling}: {row.reason}")
    return f"{spelling} changes nothing here: {row.reason}"


def take(
    words: Sequence[str], own: Collection[str]
) -> tuple[list[str], dict[str, bool | str | list[str]]]:
    """Take these flags out of a command line; names become argparse's.

    Args:
        words: the command line.
        own: options that the command has itself, which come first.

    Returns:
        The other words, and a value by name.

    Raises:
        ValueError: a flag has no value.
    """
    rest: list[str] = []
    found: dict[str, bool | str | list[str]] = {}
    line = Line(words)
    for word in line:
        row, value, is_negated = _find(word, own)
        if row is None:
            rest.append(word)
        elif row.kind == "switch":
            value = line.take_switched() if value is None else value
            found[row.name] = (value or "true").lower() != "false" and not is_negated
        else:
            values = [] if value is None else [value]
            takes_more = row.kind == "values" and value is None
            while not values or takes_more:
                if (value := line.take(_is_value)) is None:
                    break
                values.append(value)
            if not values:
                raise ValueError(f"{word} needs a value")
            found[row.name] = values if row.kind == "values" else values[0]
    return rest + line.rest(), found


def _find(word: str, own: Collection[str]) -> tuple[Row | None, str | None, bool]:
    """A word's row, the value behind its ``=``, and whether it begins with ``--no-``."""
    name, _, value = Option.of(word)
    if name in own:
        return None, None, False
    if (row := _BY_OPTION.get(name)) is not None:
        return row, value, False
    if name.startswith("--no-"):
        row = _BY_OPTION.get("--" + name[5:])
        if row is not None and row.kind == "switch":
            return row, value, True
    if name.startswith("-O") and name[2:].isdigit():
        return _BY_OPTION["-O"], name[2:], False
    return None, None, False


def _is_value(word: str) -> bool:
    return not word.startswith("-") or _number(word) is not None


def arguments(
    call: str, given: Mapping[str, Any], own: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Python's arguments without these, and a note on each of them that was given.

    Args:
        call: the name of what is called, for messages.
        given: its arguments; None is as good as absent.
        own: the names of those that it has itself.

    Raises:
        TypeError: an argument that neither octavo nor vLLM has.
        ValueError: one that is refused.
    """
    kept, notes = {}, []
    for name, value in given.items():
        if value is None:
            continue
        if name in own:
            kept[name] = value
        elif (row := ROWS.get(name)) is None:
            raise TypeError(f"{call}() has no argument {name!r}")
        elif value is not False:
            notes.append(note(row, value, f"{call}({name}={_short(value)})"))
    return kept, notes


def _short(value: object) -> str:
    """A value as a note quotes it."""
    return repr(value) if isinstance(value, str | int | float) else "..."
