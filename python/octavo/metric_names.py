"""Names and meanings of the engine's metrics, as the core counts them and vLLM publishes them."""

from __future__ import annotations

from typing import Final, NamedTuple


class Row(NamedTuple):
    """One metric: its key in the snapshot, its help text, and the label of a labelled one."""

    key: str
    help: str
    label: str | None = None
    # Further names it is published under, for dashboards made for older versions.
    aliases: tuple[str, ...] = ()
    prefix: str = "vllm:"
    # Its published name where that is not the key.
    name: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name it is published under."""
        return tuple(self.prefix + name for name in (self.name or self.key, *self.aliases))


GAUGES: Final = (
    Row("num_requests_running", "Requests in the running batch."),
    Row("num_requests_waiting", "Requests waiting to be scheduled."),
    Row(
        "num_requests_waiting_by_reason",
        "The same by reason: for room on the device, or deferred, which nothing is here.",
        label="reason",
    ),
    Row(
        "kv_cache_usage_perc",
        "Part of the KV cache in use; 1 is all of it.",
        aliases=("gpu_cache_usage_perc",),
    ),
)
COUNTERS: Final = (
    Row("prompt_tokens", "Prompt tokens processed."),
    Row("generation_tokens", "Tokens generated."),
    Row("prefix_cache_queries", "Tokens looked up in the prefix cache."),
    Row("prefix_cache_hits", "Tokens found in the prefix cache."),
    Row("num_preemptions", "Requests preempted."),
    Row("request_success", "Requests that ended, by reason.", label="finished_reason"),
)
HISTOGRAMS: Final = (
    Row("time_to_first_token_seconds", "From arrival to the first token."),
    Row(
        "inter_token_latency_seconds",
        "Between two tokens of a request.",
        aliases=("time_per_output_token_seconds",),
    ),
    Row(
        "request_time_per_output_token_seconds", "A request's mean time per token after the first."
    ),
    Row("e2e_request_latency_seconds", "From arrival to the last token."),
    Row("request_queue_time_seconds", "From arrival to the first step."),
    Row("request_prefill_time_seconds", "From the first step to the first token."),
    Row("request_decode_time_seconds", "From the first token to the last."),
    Row("request_inference_time_seconds", "From the first step to the last token."),
    Row("request_prompt_tokens", "Prompt tokens of a request."),
    Row("request_generation_tokens", "Tokens generated for a request."),
    Row("request_params_n", "The n of a request."),
    Row("request_params_max_tokens", "The max_tokens of a request."),
    Row("request_max_num_generation_tokens", "The longest sample of a request, in tokens."),
    Row("request_num_preemptions", "Times that a request was preempted."),
    # A histogram whose name ends like a counter's, as dashboards have it.
    Row("iteration_tokens", "Tokens in one step.", name="iteration_tokens_total"),
    Row("step_seconds", "One step of the engine, by phase.", label="phase", prefix="octavo:"),
)
