"""ServerConfig: the flags of the HTTP front end, frozen, each default with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from octavo.config import _flag as flag

# What a request may ask of reasoning: OpenAI's words, and those of other interfaces.
EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Listening, access, templates, logs and the end of the server.

    Raises:
        ValueError: from ``__post_init__``, naming the field.
    """

    # --- listening ---
    # Loopback: a server that others can reach is a decision, not a default.
    host: str = flag("127.0.0.1", "front end", "address to listen on; 0.0.0.0 for all", common=True)
    port: int = flag(8000, "front end", "port to listen on; 0 takes a free one", common=True)
    uds: str | None = flag(None, "front end", "listen on this Unix socket instead of a port")
    root_path: str = flag(
        "", "front end", "path prefix of a proxy in front, which may strip it or not"
    )
    # On: the first thing that a newcomer opens.
    web_ui: bool = flag(True, "front end", "serve a page at / to chat and to watch the server")
    ssl_keyfile: str | None = flag(None, "front end", "TLS private key (PEM)")
    ssl_certfile: str | None = flag(None, "front end", "TLS certificate chain (PEM)")
    ssl_ca_certs: str | None = flag(None, "front end", "authorities of clients' certificates (PEM)")
    # As in vLLM: a client needs no certificate unless the operator asks for one.
    ssl_cert_reqs: int = flag(
        0, "front end", "clients' certificates: 0 none, 1 checked if there is one, 2 required"
    )
    ssl_ciphers: str | None = flag(None, "front end", "ciphers of TLS 1.2 and below")

    # Off, as in vLLM: SIGHUP is the operator's word that both files are whole.
    enable_ssl_refresh: bool = flag(
        False, "front end", "load the certificate again when its files change"
    )

    # --- access ---
    api_key: tuple[str, ...] = flag(
        (),
        "access",
        "keys, one of which a request must bring; none: open",
        many=True,
        vllm_env="VLLM_API_KEY",
        common=True,
        secret=True,
    )
    # Keys of a command line are seen by everyone on the machine, and stay until a restart.
    api_key_file: str | None = flag(
        None, "access", "a file of further keys, one a line; SIGHUP reads it again"
    )
    # Scrapers seldom carry keys, but the counts show the use of a server.
    metrics_need_key: bool = flag(True, "access", "whether /metrics asks for the key too")
    # Empty: no browser page of another origin may call the server.
    allowed_origins: tuple[str, ...] = flag(
        (), "access", "origins whose web pages may call (CORS); '*' for all", many=True, common=True
    )
    allowed_methods: tuple[str, ...] = flag(
        ("GET", "POST", "DELETE"),
        "access",
        "methods that such pages may use; '*' for all",
        many=True,
    )
    # Keys travel in headers of the page's own making, clients add some of their own.
    allowed_headers: tuple[str, ...] = flag(
        ("*",), "access", "headers that such pages may send; '*' for all", many=True
    )
    # Off: octavo sets no cookies, and keys need none.
    allow_credentials: bool = flag(False, "access", "such pages may send cookies")
    allowed_hosts: tuple[str, ...] = flag(
        (), "access", "further Host names accepted on loopback without a key", many=True
    )

    # --- templates ---
    chat_template: str | None = flag(
        None,
        "templates",
        "a Jinja file, or the template itself, in place of the model's",
        common=True,
    )
    # Off: a template is a program, and its author should be the operator.
    trust_request_chat_template: bool = flag(
        False, "templates", "accept a chat_template inside a request"
    )

    default_chat_template_kwargs: dict[str, Any] | None = flag(
        None, "templates", "JSON of template variables, for requests that do not set them"
    )

    # --- answers ---
    # Off: OpenAI's clients get usage in a stream where they ask for it.
    enable_force_include_usage: bool = flag(
        False, "answers", "usage in every chunk of every stream, asked for or not"
    )
    return_tokens_as_token_ids: bool = flag(
        False, "answers", "logprobs name tokens token_id:17 unless a request says otherwise"
    )
    # Proxies close connections that are silent for 30 or 60 seconds.
    sse_keep_alive_interval: float = flag(
        15.0, "answers", "seconds of silence after which a stream gets a comment; 0: never"
    )

    enable_tokenizer_info_endpoint: bool = flag(
        False, "answers", "serve /tokenizer_info: the chat template and the special tokens"
    )
    # Empty: routes that nobody asked for are only more to guard.
    compat: tuple[Literal["ollama", "tgi"], ...] = flag(
        (), "answers", "further APIs to serve", many=True, choices=("ollama", "tgi")
    )

    # --- tools and reasoning ---
    # None: found from the checkpoint, which knows better than a command line.
    tool_call_parser: str | None = flag(
        None, "tools", "how the model calls tools: a name, auto or none; default: found"
    )
    reasoning_parser: str | None = flag(
        None, "tools", "how the model reasons: a name, auto or none; default: found"
    )
    # On: a client that brings tools wants calls.
    enable_auto_tool_choice: bool = flag(
        True, "tools", "read calls where tool_choice is auto; off: they stay text"
    )
    # Off, as in vLLM: a prompt that is the same for every tool_choice is found in the cache.
    exclude_tools_when_tool_choice_none: bool = flag(
        False, "tools", "describe no tools to the model where tool_choice is none"
    )
    # None: a template that knows other efforts than its clients send is the exception.
    reasoning_effort_map: dict[str, str] | None = flag(
        None, "tools", "JSON: the template's word for each reasoning effort of a request"
    )

    # --- agents ---
    # On: a counter at the head of a prompt keeps all of it out of the cache.
    normalize_agent_markers: bool = flag(
        True, "agents", "move or drop agents' counters and clocks, so that prompts are found cached"
    )
    # On: Claude Code asks for several of Anthropic's models, whatever is served.
    messages_any_model: bool = flag(
        True, "agents", "/v1/messages answers for any model name with the model there is"
    )
    # On: clients that go on from a response by its id cannot without.
    response_store: bool = flag(
        True, "agents", "keep responses of /v1/responses for an hour, up to 64 MB of them"
    )

    # On: agents have to be told a model's context, and a few things more.
    print_clients: bool = flag(
        True, "agents", "print settings of agents at the start, as 'octavo clients' does"
    )

    # --- log and life cycle ---
    enable_log_requests: bool = flag(
        False, "logging", "one line per request, without its text", common=True
    )
    # None: nothing is made for spans, and OpenTelemetry is not imported.
    otlp_traces_endpoint: str | None = flag(
        None, "logging", "send a span of each request to this OpenTelemetry collector"
    )
    # Text: most logs are read by people. JSON: an object a line, the start's figures among them.
    log_format: Literal["text", "json"] = flag(
        "text", "logging", "lines for people or JSON for collectors", choices=("text", "json")
    )
    disable_log_stats: bool = flag(False, "logging", "no throughput line while there is work")
    # Long enough for a typical answer, shorter than the 30 s after which orchestrators kill.
    shutdown_timeout: float = flag(
        25.0, "front end", "seconds that running requests get to finish on SIGTERM"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be in [0, 65535], not {self.port}")
        if self.shutdown_timeout < 0:
            raise ValueError(f"shutdown_timeout must be at least 0, not {self.shutdown_timeout}")
        if self.root_path and not self.root_path.startswith("/"):
            raise ValueError(f"root_path must begin with '/', not {self.root_path!r}")
        if any(not key for key in self.api_key):
            raise ValueError("api_key must not be empty")
        for effort, word in (self.reasoning_effort_map or {}).items():
            if effort not in EFFORTS or not isinstance(word, str):
                raise ValueError(
                    f"reasoning_effort_map must give a word for some of {', '.join(EFFORTS)}"
                )
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_ciphers"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                raise ValueError(f"{name} needs ssl_certfile")
        if self.enable_ssl_refresh and not self.has_tls:
            raise ValueError("enable_ssl_refresh needs ssl_certfile")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ValueError(f"ssl_cert_reqs must be 0, 1 or 2, not {self.ssl_cert_reqs}")
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            raise ValueError("ssl_cert_reqs needs ssl_ca_certs")
        if not 0 <= self.sse_keep_alive_interval < float("inf"):
            raise ValueError(
                f"sse_keep_alive_interval must be at least 0, not {self.sse_keep_alive_interval}"
            )
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ValueError(
                "allow_credentials needs allowed_origins by name: every page could act for a user"
            )

    @property
    def has_keys(self) -> bool:
        """True where requests must bring a key."""
        return bool(self.api_key) or self.api_key_file is not None

    @property
    def has_tls(self) -> bool:
        """True where connections are encrypted."""
        return self.ssl_certfile is not None
