"""The compiled core: scheduling, text, checkpoint files, CPU kernels. Values in, one plan out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Self, TypeAlias, final, overload

from typing_extensions import Buffer

__all__ = [
    "ChannelFormat",
    "ChannelParser",
    "Channels",
    "CpuDecoder",
    "CpuEncoder",
    "CpuLinear",
    "Delta",
    "Detokenizer",
    "EngineCore",
    "GgufFile",
    "Grammar",
    "Grammars",
    "Matcher",
    "Metrics",
    "Outbox",
    "Piece",
    "ScheduledBatch",
    "SseTemplate",
    "SseWriter",
    "Staging",
    "TokenIds",
    "Tokenizer",
    "__version__",
    "cpu_activation",
    "cpu_argmax",
    "cpu_attention",
    "cpu_causal_conv",
    "cpu_gated_delta_rule",
    "cpu_layer_norm",
    "cpu_level",
    "cpu_levels",
    "cpu_mask_logits",
    "cpu_num_threads",
    "cpu_rms_norm",
    "cpu_rope",
    "cpu_rounds_fast",
    "cpu_selected_logprobs",
    "cpu_selective_scan",
    "cpu_set_num_threads",
    "json_size",
    "reasoning_aliases",
    "reasoning_formats",
    "tool_call_aliases",
    "tool_call_formats",
]

__version__: str

# ---------------------------------------------------------------------------------------- engine

@final
class Staging:
    """One step's plan as flat int32 arrays inside a buffer that Python owns.

    ``buffer`` is a writable, C-contiguous 1-D int32 buffer (a numpy array; on a GPU engine the
    pinned tensor's view) of at least ``Staging.required_len(...)`` elements. Rust fills it in place
    each step. Sections follow one another without gaps; their offsets, in elements, are on the
    ScheduledBatch, so that one H2D copy of ``packed_len`` elements carries the whole step:

        input_ids       [num_tokens]    -1: the last token sampled in this request's slot
        positions       [num_tokens]
        slot_mapping    [num_tokens]    block_id * block_size + offset
        slots           [num_reqs]      the request's slot
        seq_lens        [num_reqs]      tokens in the cache after this step
        query_start_loc [num_reqs + 1]
        sample_rows     [num_reqs]      num_samples token rows whose logits are sampled, in request
                                        order; then 0
        sample_slots    [num_reqs]      their slots; then max_num_seqs, a spare row
        block_updates   [2, num_block_updates]  flat index into
                                        block_table[max_num_seqs, max_blocks_per_seq], then ids
        shared_groups   [max groups, 3] of requests that begin with the same blocks, in a step of
                                        decodes alone with num_shared_groups: the first of a group's
                                        members, their number, the tokens shared; then zeros
        shared_members  [num_reqs]      rows, group by group; then 0
        shared_tokens   [num_reqs]      tokens that a row's group shares; 0: it is in none
        state_restores  [2, num_state_restores]  rows of states to copy before the step: from, then
                                        to; a slot's row is its own number, checkpoints follow at
                                        max_num_seqs + 1
        state_saves     [2, num_state_saves]    the same after the step
    """

    def __new__(cls, buffer: Any) -> Self: ...
    @staticmethod
    def required_len(
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        has_state: bool = False,
        max_shared_groups: int = 0,
    ) -> int: ...

@final
class ScheduledBatch:
    """The counts of one step; its arrays are in the Staging that schedule() was given.

    Requests are ordered decodes first (one query token each), then prefill chunks.
    """

    step_id: int
    # The newest step that samples an input of this one, while that is on its way.
    awaited_step: int | None
    num_tokens: int
    num_reqs: int
    num_decodes: int
    num_samples: int
    # Samples that may not be chosen before EngineCore.masks() has been called for the step.
    num_constrained: int
    num_block_updates: int
    num_shared_groups: int
    num_state_restores: int
    num_state_saves: int
    max_query_len: int
    max_seq_len: int
    packed_len: int
    input_ids_offset: int
    positions_offset: int
    slot_mapping_offset: int
    slots_offset: int
    seq_lens_offset: int
    query_start_loc_offset: int
    sample_rows_offset: int
    sample_slots_offset: int
    block_updates_offset: int
    shared_groups_offset: int
    shared_members_offset: int
    shared_tokens_offset: int
    state_restores_offset: int
    state_saves_offset: int
    # (slot, request_id, number of output tokens) of requests admitted in this step, and of those
    # whose device has sampled what was given up: the runner loads their sampling state. Empty in
    # steady decode.
    new_slots: list[tuple[int, int, int]]
    # One id per request, in batch order. Built on access; for tests and traces.
    request_ids: list[int]

@final
class SseTemplate:
    """The fixed bytes around a stream's text: ``before + json_escaped(text) + after`` per piece.

    ``first`` precedes a sample's first frame. The text that a sample ends with has no frame: the
    last Delta holds it, for the frame of the end. ``reasoning``: the same of a piece of reasoning,
    which stands between each two of the parts; None leaves reasoning out.
    """

    def __new__(
        cls,
        before: bytes,
        after: bytes,
        first: bytes = b"",
        reasoning: Sequence[bytes] | None = None,
    ) -> Self: ...

@final
class Delta:
    """What happened to one sample since it was last drained. Getters build on access."""

    request_id: int
    # The ready frames of an ``sse`` sample; None for the other deliveries.
    sse: bytes | None
    # All of this delta's text; of a request with channels, its pieces of text joined.
    text: str
    # In order; None unless the request has channels. Of an ``sse`` sample those that have no ready
    # frame: what comes from a delta's first piece of a call on, and all that a sample ends with.
    pieces: list[Piece] | None
    token_ids: list[int]
    # Per token: [(token_id, logprob, rank), ...], the chosen token first, then the best ones in
    # order; None unless the request asked for logprobs.
    logprobs: list[list[tuple[int, float, int]]] | None
    # None while running; "stop", "length", "abort" or "error" at the end.
    finish_reason: Literal["stop", "length", "abort", "error"] | None
    # The stop string or the stop token that ended it; None on EOS. Of an "error" that the request
    # itself has brought about, the reason.
    stop_reason: str | int | None
    cumulative_logprob: float | None
    num_prompt_tokens: int
    num_cached_tokens: int
    # All output tokens so far, not only this delta's.
    num_output_tokens: int
    # Those of them that were reasoning, markers aside; 0 without channels.
    num_reasoning_tokens: int
    # Seconds, None until known: arrival->first scheduled, first scheduled->first token,
    # first token->last token.
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    # What update() was given for this sample since its last Delta; None if nothing.
    extra: Any

@final
class SseWriter:
    """Takes the middle of a request's streams from the outbox to a connection, without Deltas.

    It takes chunks while it is armed and not paused. Touched on the event loop only.
    """

    # Whether the request waits for news: nothing that came before is still to be written.
    is_armed: bool
    # Whether the connection's buffers are full, or the connection is gone.
    is_paused: bool

    def __new__(
        cls,
        write: Callable[[bytes], object],
        num_buffered: Callable[[], int] | None = None,
        fd: int | None = None,
    ) -> Self:
        """Chunks come in the framing of HTTP/1.1's chunked coding.

        Args:
            write: the connection's, which must not block. If it raises, the writer is paused.
            num_buffered: how many bytes ``write`` has taken and not sent yet.
            fd: the connection's non-blocking socket, open until the writer is paused for good:
                chunks go there without the GIL while nothing is buffered.
        """

    @property
    def last_write_s(self) -> float:
        """The ``now_s`` of the drain that wrote last; 0 before."""

@final
class Outbox:
    """Deltas between the engine thread and the event loop. Thread-safe."""

    def drain(self, writers: dict[int, SseWriter] | None = None, now_s: float = 0.0) -> list[Delta]:
        """Take everything since the last drain, one Delta per sample, oldest change first.

        Args:
            writers: sample id -> writer. What such a writer takes, which is never a sample's last
                Delta, is written at once and not in the list.
            now_s: the time of it, by whatever clock.
        """

@final
class Metrics:
    """Counters, gauges and histograms, updated once per step. Thread-safe."""

    def snapshot(self) -> dict[str, Any]:
        """A consistent copy.

        Counters and gauges: name -> number (labelled ones: name -> {label: number}).
        Histograms: name -> {"buckets": [(upper_bound_s, cumulative_count), ...], "sum": float,
        "count": int}. Names are API.md's without the ``vllm:`` prefix and without ``_total``.
        """
    def settled(self) -> tuple[int, int]:
        """The samples that are over, and the prompt tokens of those that have an output token or
        are over. Both only grow."""

@final
class EngineCore:
    """Requests, blocks and the scheduler. Owned by one thread; outbox and metrics may be shared.

    Every verb's cost is in the Rust module docs. A broken invariant fails the request it concerns.
    """

    def __new__(
        cls,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        long_prefill_token_threshold: int = 0,
        long_prefill_token_threshold_adaptive: bool = False,
        max_step_ms: float = 0.0,
        padded_prompts: Sequence[int] = ...,
        policy: Literal["fcfs", "priority"] = "fcfs",
        num_stages: int = 1,
        stream_interval: int = 1,
        tokenizer: Tokenizer | None = None,
        num_state_checkpoints: int | None = None,
        state_checkpoint_interval: int = 512,
        prefix_sharing: tuple[int, int, int] | None = None,
    ) -> Self: ...
    @property
    def outbox(self) -> Outbox: ...
    @property
    def metrics(self) -> Metrics: ...
    def add_request(
        self,
        request_ids: Sequence[int],
        prompt_token_ids: Sequence[int] | Any,
        *,
        max_tokens: int,
        min_tokens: int = 0,
        eos_token_ids: Sequence[int] = (),
        stop_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        num_logprobs: int | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_s: float | None = None,
        stream_interval: int | None = None,
        delivery: Literal["sse", "delta", "final"] = "final",
        sse: Sequence[SseTemplate] | None = None,
        channels: Channels | None = None,
        grammar: Grammar | None = None,
        trigger: tuple[Sequence[str], bool, Sequence[str]] | None = None,
        may_force: bool = False,
        reasoning: tuple[int | None, int, bool, int | None] | None = None,
        bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        """Queue one request; one id per sample (n = len(request_ids)), sharing the prompt's blocks.

        ``eos_token_ids`` empty: EOS is ignored. max_tokens is clipped to max_model_len - prompt.
        ``arrival_s``: time.monotonic() at arrival, now if None. ``stream_interval``: tokens per
        delta, the constructor's if None. ``channels``: each sample's text is told apart by a parser
        of its own; stop strings are looked for in pieces of text alone. ``grammar``: what each
        sample follows, to its end; with a ``trigger`` (texts, is_repeated, texts where the answer
        begins) from the token on in which one of the texts begins, as soon as it is there, if it
        fits; if ``is_repeated`` to where the grammar may end, and again from the next. With
        ``may_force`` several tokens of it may come at once, where it leaves no choice.
        ``reasoning``: (token that opens it, token that closes it, whether the prompt has opened it,
        most tokens of it): while it is open no grammar holds. ``bad_words``: sequences of tokens
        that must not come; those of one token are the sampler's to ban.

        Raises:
            ValueError: empty prompt, prompt that can never fit (max_model_len or the whole pool),
                a token id that is negative, a request id in use.
        """
    def abort(self, request_id: int) -> bool:
        """End one sample with finish_reason "abort"; False if it is unknown or already over."""
    def schedule(self, staging: Staging) -> ScheduledBatch | None:
        """Plan one step into ``staging``; None when nothing can run.

        May be called again before update(): the plan then runs ahead, with input_ids of -1 where a
        token is still on the device.
        """
    def masks(self, step_id: int, rows: Any, masks: Any, token_ids: Any | None = None) -> int:
        """Fill a step's masks, on several threads and without the GIL.

        It is the oldest step in flight, or with the ``token_ids`` that the oldest has sampled
        (int32 [num_samples]) the one behind it; ``update`` has to follow.

        Args:
            rows: writable int32 buffer [at least num_constrained]: the row, among the step's
                samples, that each mask is of; -1: any token may come there.
            masks: writable uint32 buffer [at least num_constrained, ceil(V / 32)], not in the same
                memory; bit i % 32 of word i // 32 is set where token i may come.

        Returns:
            The number of masks.

        Raises:
            ValueError: another step, a buffer that is too small, or as many token ids as the oldest
                step has no samples.
        """
    def update(
        self,
        step_id: int,
        token_ids: Any,
        logprob_ids: Any | None = None,
        logprobs: Any | None = None,
        ranks: Any | None = None,
        extras: Sequence[tuple[int, object]] | None = None,
    ) -> bool:
        """Take the results of one step, in order of step_id.

        token_ids: int32 buffer [num_samples]. With logprobs: logprob_ids int32 [num_samples, 1+k]
        (chosen token first), logprobs float32 of that shape, ranks int32 [num_samples] of the
        chosen token (1 = best). ``extras``: by request id, each for that sample's next Delta.
        Samples of requests that ended meanwhile are dropped.

        Returns:
            Whether the outbox went from empty to non-empty: the event loop needs a wake-up.
        """
    def fail_step(self, step_id: int) -> bool:
        """The step's computation failed: end its requests with "error", free what they held.

        Returns:
            As update().
        """
    def refuse(self, request_ids: Sequence[int], num_prompt_tokens: int) -> bool:
        """End samples of one prompt that add_request() did not take with "error".

        Returns:
            As update().
        """
    def take_ended(self) -> list[int]:
        """The samples that ended since the last call."""
    def abandon(self) -> bool:
        """Abort every request and give up every step in flight, for a caller that lost track of
        them. Returns as update()."""
    def token_ids(self, request_id: int) -> list[int]:
        """Prompt and output tokens so far (for penalties, when a request is admitted again)."""
    def num_unfinished(self) -> int: ...
    def has_work(self) -> bool:
        """Whether a schedule() or an update() is owed."""
    def reset_prefix_cache(self) -> None: ...
    def check_integrity(self) -> None:
        """Raises RuntimeError naming the broken invariant."""
    def block_ids(self, request_id: int) -> list[int]: ...
    def stats(self) -> dict[str, int]:
        """num_running num_waiting num_free_blocks num_cached_blocks num_blocks num_preemptions
        num_in_flight."""

# ------------------------------------------------------------------------------------------ text

@final
class TokenIds(Sequence[int]):
    """Token ids that do not change: a sequence of ints, and a read-only buffer of int32.

    Takes an int32 buffer or integers. A prompt goes from the tokenizer to the scheduler as one of
    these, without becoming Python objects.

    Raises:
        TypeError: something else than integers; a bool is none.
        ValueError: an id that is negative or no int32.
    """

    def __new__(cls, ids: Iterable[int] | Buffer, /) -> Self: ...
    def max(self) -> int:
        """Raises ValueError if there are none."""
    def tolist(self) -> list[int]: ...
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int, /) -> int: ...
    @overload
    def __getitem__(self, index: slice, /) -> TokenIds: ...
    def __iter__(self) -> Iterator[int]: ...

_GrammarKind: TypeAlias = Literal[
    "json", "json_object", "regex", "choice", "grammar", "structural_tag"
]

# content, special, normalized, lstrip, rstrip, single_word
_AddedToken = tuple[str, bool, bool, bool, bool, bool]

@final
class Tokenizer:
    """Text to ids and back, with the crate ``tokenizers``. Long work detaches from the GIL."""

    @staticmethod
    def from_file(path: str) -> Tokenizer: ...
    @staticmethod
    def from_gguf(file: GgufFile) -> Tokenizer:
        """From GGUF metadata; honours tokenizer.ggml.pre, add_bos_token, token types.

        Raises:
            ValueError: a tokenizer model or pre-tokenizer that is not known, naming it.
        """
    def changed(
        self,
        added: Sequence[_AddedToken],
        prefix_space: tuple[Literal["ByteLevel", "Metaspace"], bool] | None,
    ) -> Tokenizer:
        """A copy with these added tokens, each under the id it has or else the next one.

        ``prefix_space``: the splitting, where it is of that kind, lets a text begin as if a space
        stood in front, or not.

        Raises:
            ValueError: the normalizer refuses a token.
        """
    def added_tokens(self) -> list[tuple[int, _AddedToken]]:
        """The added tokens with their ids, in the ids' order."""
    @property
    def vocab_size(self) -> int: ...
    @property
    def spaces_tokens(self) -> bool:
        """Whether a token's text depends on its neighbours, as where words are joined by spaces."""
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def encode_ids(self, text: str, add_special_tokens: bool = True) -> TokenIds: ...
    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[TokenIds]: ...
    def encode_pair(
        self, first: str, second: str, most: int | None = None
    ) -> tuple[list[int], int]:
        """Two texts as one input, and how many of its tokens are of the first text.

        With ``most`` the longer text loses tokens at its end until the input holds no more.
        """
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def to_json(self) -> str:
        """The text of a tokenizer.json."""
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token adds to a text (for logprobs' ``bytes``).

        Empty for ids that are not in the vocabulary.
        """

@final
class Grammars:
    """Grammars of one vocabulary: compiled on threads of their own, kept by use. For any thread.

    ``vocab_size``: the width of the model's logits. The vocabulary's tables are made with the first
    grammar. ``max_bytes``: of memory for grammars; ``deadline_s``: for compiling one.
    """

    def __new__(
        cls,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        max_bytes: int | None = None,
        deadline_s: float | None = None,
    ) -> Self: ...
    def find(
        self,
        kind: _GrammarKind,
        text: str,
        *,
        disable_any_whitespace: bool = False,
        disable_additional_properties: bool = False,
        whitespace_pattern: str | None = None,
    ) -> Grammar | None:
        """One that has been compiled and is kept."""
    def compile(
        self,
        kind: _GrammarKind,
        text: str,
        *,
        disable_any_whitespace: bool = False,
        disable_additional_properties: bool = False,
        whitespace_pattern: str | None = None,
    ) -> Grammar:
        """Compile a grammar, or find it. Blocks without the GIL.

        ``text``: a JSON schema, nothing, a regular expression, a JSON list of texts, Lark or GBNF,
        a structural tag's JSON. The options are about JSON: no whitespace between its parts; no
        properties beyond those that a schema names; a pattern of the whitespace.

        Raises:
            ValueError: it is no grammar of its kind, uses what is not supported (naming the keyword
                and its place), is beyond the limits, or takes longer than the deadline.
        """
    @property
    def num_cached(self) -> int: ...

@final
class Grammar:
    """A compiled grammar, for any number of samples."""

    @property
    def num_bytes(self) -> int:
        """Memory it takes, roughly."""

@final
class Matcher:
    """One text's place in a grammar; the engine has one per constrained sample."""

    def __new__(cls, grammar: Grammar, vocab_size: int) -> Self: ...
    def mask(self) -> bytes:
        """uint32 words [ceil(vocab_size / 32)], little-endian: bits of the tokens that may come.

        Raises:
            ValueError: none may, or the grammar has failed before.
        """
    def accept(self, token_id: int) -> bool:
        """Take a token. Returns True if the text is complete: nothing may follow.

        Raises:
            ValueError: it may not come here.
        """
    def is_accepting(self) -> bool:
        """True if the text may end here."""

def json_size(text: bytes) -> tuple[int, int]:
    """(objects, arrays and members of objects; commas) of a JSON text, strings left out.

    Releases the GIL. What is no JSON is counted all the same.
    """

@final
class Detokenizer:
    """Incremental text of one sequence. Only whole UTF-8 leaves; the same class the engine uses."""

    def __new__(
        cls,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
    ) -> Self: ...
    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """New text, and the stop string that ended the sequence.

        Of several stop strings the one that is complete first wins, then the longest. Empty ones
        are ignored. After the end nothing comes.
        """
    def finish(self) -> str:
        """What was held back (a possible stop string's beginning, incomplete UTF-8)."""

# -------------------------------------------------------------------------------------- channels

# kind, call, text. "text" and "reasoning" (call is 0); of call number ``call``, from 0: "name" (it
# begins; the function's name), "id" (the model's own, where the envelope has one; as late as before
# "end"), "arguments" (a part of one JSON value), "end" (complete; no text).
Piece: TypeAlias = tuple[Literal["text", "reasoning", "name", "id", "arguments", "end"], int, str]

def tool_call_formats() -> list[str]:
    """The canonical names of tool-call envelopes."""

def tool_call_aliases() -> list[tuple[str, str]]:
    """Other names, such as vLLM's: (alias, canonical name)."""

def reasoning_formats() -> list[str]:
    """The canonical names of reasoning forms."""

def reasoning_aliases() -> list[tuple[str, str]]:
    """Other names, such as vLLM's: (alias, canonical name)."""

@final
class ChannelFormat:
    """A model's forms of tool calls and reasoning. Immutable; made once a model.

    Raises:
        ValueError: from construction: a name that is not known, or what is wrong with overrides.
    """

    def __new__(
        cls,
        tool_calls: str | None = None,
        reasoning: str | None = None,
        *,
        overrides: str | None = None,
    ) -> Self:
        """By canonical names or aliases; None: the model has no such thing.

        Args:
            overrides: a JSON object of markers in place of the table's, each with the white space
                that is written around it: ``section`` and ``call`` ([open, close]; null is no
                section), ``separator`` between calls, ``name_end`` ([end]), ``keys`` of a call
                object ([name, arguments, id]), ``parameter`` ([open, end of its name, close]),
                ``reasoning`` ([open, close]), ``frames`` (markers around text). Without
                ``tool_calls``, ``style`` names the form: object, array, value (a name, then JSON),
                tags, python.
        """
    @property
    def tool_calls(self) -> str | None:
        """The canonical name."""
    @property
    def reasoning(self) -> str | None:
        """The canonical name."""
    @property
    def markers(self) -> list[str]:
        """Texts of the markers and of the tokens they consist of.

        Those that are special tokens reach the parser even where special tokens leave no text.
        """
    @property
    def reasoning_markers(self) -> tuple[str, str] | None:
        """The texts that open and close reasoning."""
    @property
    def is_bare(self) -> bool:
        """Whether a call may begin without a marker of its own."""
    def triggers(self, tools: Sequence[str]) -> tuple[list[str], list[str]]:
        """The texts that begin calls of tools: within other text, and where an answer begins.

        Without markers they go up to a tool's name. None without a format of calls.
        """
    def grammar(
        self,
        tools: Sequence[tuple[str, str]],
        *,
        at_least_one: bool = False,
        at_most_one: bool = False,
        calls_only: bool = False,
        strict: Sequence[str] | None = None,
        special_tokens: Sequence[tuple[str, int]] = (),
    ) -> str:
        """The grammar of calls, in llguidance's dialect of Lark.

        Args:
            tools: names, and JSON schemas of the parameters.
            at_least_one: the text is nothing but calls; else calls may stand anywhere in it.
            at_most_one: no second call.
            calls_only: of calls from one of the triggers on, whatever text is before it, and not of
                a whole answer.
            strict: names of the tools whose arguments follow their schemas, all if None. Those of
                the others are any JSON object.
            special_tokens: markers that are one special token each, with their ids.

        Raises:
            ValueError: the format has no tool calls, there are no tools, or a schema is no JSON.
        """

@final
class Channels:
    """What the answers to one request are parsed by. Immutable; each sample has its own parser."""

    def __new__(
        cls,
        format: ChannelFormat,
        *,
        in_reasoning: bool = False,
        parse_tool_calls: bool = True,
        parse_reasoning: bool = True,
        tools: Sequence[tuple[str, str]] = (),
    ) -> Self:
        """
        Args:
            in_reasoning: the prompt has opened the reasoning.
            parse_tool_calls, parse_reasoning: without, what belongs to them stays text.
            tools: names, and JSON schemas of the parameters, by which bare text gets its type.
        """

@final
class ChannelParser:
    """One answer's text in, pieces out. Any split of the text gives the same pieces, joined.

    Of a call, "name" comes once its first argument is seen; joined, its "arguments" are the
    beginning of a JSON value, and a whole one once "end" came. A call that the text's end cuts off
    has no "end". What looks like a call and is none is text.
    """

    def __new__(cls, channels: Channels) -> Self: ...
    def push(self, text: str) -> list[Piece]: ...
    def finish(self) -> list[Piece]:
        """What was held back."""

# ------------------------------------------------------------------------------ checkpoint files

@final
class GgufFile:
    """A GGUF file, mapped, parsed with bounds checks; or the files of a split one, in order.

    Raises:
        ValueError: from construction, one line that names what is wrong and where.
    """

    def __new__(cls, path: str, *more: str) -> Self: ...
    @property
    def path(self) -> str: ...
    def end_token_ids(self) -> list[int]:
        """The tokens that end an answer, by the file's keys and by their spelling."""
    def metadata(self) -> dict[str, Any]:
        """Scalars and strings, and arrays of up to 256 items; longer arrays stay inside."""
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str, int, int]]:
        """name -> (shape with the row first as in torch, kind such as "Q4_1", offset, nbytes)."""
    def data(self, name: str) -> memoryview:
        """The tensor's bytes in the map, read-only, no copy."""
    def release_pages(self) -> None:
        """Let go of the map's pages in memory; what is read again comes from the file again."""
    def dequantize(self, name: str, out: Any) -> None:
        """Write the tensor as float32 into a writable buffer of its element count.

        Kinds: F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K. Uses the thread pool.
        """

# ------------------------------------------------------------------------------------ CPU kernels
# For kernels/cpu/ only, which validates. A contiguous tensor is one tuple of its address, the name
# of its element type (F32 BF16 F16 I32 I64 U8) and its shape. Each call raises TypeError or
# ValueError on element types, sizes or indices that do not fit, and lets go of the GIL where it
# takes long.

# address, element type, elements
_Vector: TypeAlias = tuple[int, str, int]
# address, element type, rows, columns
_Matrix: TypeAlias = tuple[int, str, int, int]
# keys' and values' addresses, element type, (blocks, heads, block_size, head_dim, elements from
# block to block)
_KvCache: TypeAlias = tuple[int, int, str, tuple[int, int, int, int, int]]

@final
class CpuLinear:
    """A weight [n, k] packed for this machine; immutable, for any thread."""

    def __new__(
        cls,
        n: int,
        k: int,
        parts: Sequence[tuple[_Vector, int, str, _Vector | None]],
        level_name: str | None = None,
        columns: _Vector | None = None,
    ) -> CpuLinear:
        """parts, stacked along n: (bytes of the file's rows, number of rows, kind, int64
        permutation of the rows). Kinds: those of ``GgufFile.dequantize`` that are not found in
        tables, and those of ``kernels/cpu/blocks.py``. columns: int64 [k], the weight's column for
        each of the rows'; None: in order."""
    @property
    def nbytes(self) -> int: ...
    def forward(
        self, x: _Matrix, bias: _Vector | None, activation_bits: int, out: _Matrix
    ) -> None: ...
    def embedding(self, ids: _Vector, scale: float, out: _Matrix) -> None: ...

@final
class CpuDecoder:
    """All layers of a model, for any thread; the caches and cos_sin must outlive it.

    layers: objects with the attributes input_norm, post_norm, q_norm, k_norm (vectors, the last two
    or None), qkv, o, gate_up, down (CpuLinear, bias or None, activation_bits), cache, kv_scales
    (float32 [2, heads] or None) and sliding_window."""

    def __new__(
        cls,
        layers: Sequence[object],
        final_norm: _Vector,
        *,
        num_heads: int,
        cos_sin: _Matrix,
        eps: float,
        weight_offset: float,
        scale: float,
        softcap: float,
        kind: str,
    ) -> CpuDecoder: ...
    def forward(
        self,
        hidden: _Matrix,
        *,
        positions: _Vector,
        slot_mapping: _Vector,
        block_table: _Matrix,
        slots: _Vector,
        seq_lens: _Vector,
        query_start_loc: _Vector,
        ends_only: bool,
        out: _Matrix,
    ) -> None: ...

@final
class CpuEncoder:
    """All layers of an encoder, for any thread.

    layers: objects with the attributes qkv, o, up, down (CpuLinear, bias or None) and o_norm,
    mlp_norm (weight, bias or None). rounded: factors of products are rounded to int16."""

    def __new__(
        cls,
        layers: Sequence[object],
        hidden_size: int,
        *,
        num_heads: int,
        eps: float,
        scale: float,
        kind: str,
        rounded: bool,
    ) -> CpuEncoder: ...
    @property
    def nbytes(self) -> int: ...
    def forward(self, hidden: _Matrix, starts: _Vector) -> None: ...

def cpu_rms_norm(
    x: _Matrix,
    residual: _Matrix | None,
    weight: _Vector,
    *,
    eps: float,
    weight_offset: float,
    out: _Matrix,
) -> None: ...
def cpu_layer_norm(
    x: _Matrix,
    residual: _Matrix | None,
    weight: _Vector,
    bias: _Vector | None,
    eps: float,
    out: _Matrix,
) -> None: ...
def cpu_activation(kind: str, gated: bool, x: _Matrix, out: _Matrix) -> None: ...
def cpu_rope(
    qkv: _Matrix,
    cache: _KvCache,
    *,
    positions: _Vector,
    cos_sin: _Matrix,
    slot_mapping: _Vector,
    kv_scales: _Matrix | None,
    num_heads: int,
    q_norm: _Vector | None,
    k_norm: _Vector | None,
    eps: float,
    weight_offset: float,
    interleaved: bool,
    q: _Matrix,
) -> None: ...
def cpu_attention(
    q: _Matrix,
    cache: _KvCache,
    *,
    block_table: _Matrix,
    slots: _Vector,
    seq_lens: _Vector,
    query_start_loc: _Vector,
    scale: float,
    sliding_window: int,
    softcap: float,
    causal: bool,
    sinks: _Vector | None,
    slopes: _Vector | None,
    max_seq_len: int,
    out: _Matrix,
) -> None: ...
def cpu_causal_conv(
    x: _Matrix,
    taps: _Matrix,
    bias: _Vector | None,
    *,
    state: _Matrix,
    step: tuple[_Vector, _Vector, _Vector],
    out: _Matrix,
) -> None: ...
def cpu_gated_delta_rule(
    qkv: _Matrix,
    *,
    a: _Matrix,
    b: _Matrix,
    decay: _Vector,
    dt_bias: _Vector,
    state: _Matrix,
    step: tuple[_Vector, _Vector, _Vector],
    num_key_heads: int,
    key_dim: int,
    value_dim: int,
    beta_scale: float,
    out: _Matrix,
) -> None: ...
def cpu_selective_scan(
    xbc: _Matrix,
    *,
    dt: _Matrix,
    decay: _Vector,
    dt_bias: _Vector,
    skip: _Vector,
    state: _Matrix,
    step: tuple[_Vector, _Vector, _Vector],
    num_groups: int,
    head_dim: int,
    state_size: int,
    dt_limits: tuple[float, float],
    out: _Matrix,
) -> None: ...
def cpu_argmax(x: _Matrix, out: _Vector) -> None: ...
def cpu_mask_logits(x: _Matrix, rows: _Vector, masks: _Matrix, has_any: _Vector) -> None: ...
def cpu_selected_logprobs(x: _Matrix, ids: _Matrix, out: _Matrix, ranks: _Vector) -> None: ...
def cpu_set_num_threads(n: int) -> None:
    """Threads of the kernels, the caller included; 0: every core this process may use."""

def cpu_num_threads() -> int: ...
def cpu_level() -> str:
    """The instruction set in use. Raises ValueError if OCTAVO_CPU_LEVEL asks for another."""

def cpu_rounds_fast() -> bool:
    """Whether products of factors rounded to int16 are faster than exact ones here."""

def cpu_levels() -> list[str]:
    """All of this machine's, the fastest last."""
