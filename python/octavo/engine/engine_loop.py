"""EngineLoop: the one thread that steps.

It owns the EngineCore, the Runner and the state of every request. Others reach it only through
``submit`` and ``abort``, which queue a command and wake it; its results go into the outbox. With no
work it blocks: an idle engine costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from octavo.engine.grammar_compiler import GrammarCompiler
from octavo.engine.limits import RequestLimits
from octavo.engine.make_core import keeps_prefixes, make_core
from octavo.engine.step_times import StepTimes
from octavo.errors import EngineDeadError
from octavo.models.source import load_tokenizer, resolve_model
from octavo.runner.create import make_runner
from octavo.runner.prompt_rows import PromptRows
from octavo.runner.request_state import RequestState, encode_bad_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from octavo._core import (
        Channels,
        Grammar,
        ScheduledBatch,
        SseTemplate,
        TokenIds,
    )
    from octavo.config import EngineConfig
    from octavo.models.source import ModelSource
    from octavo.runner.request_state import Delivery
    from octavo.runner.runner import InFlight, Runner
    from octavo.sampling_params import SamplingParams
    from octavo.structured_outputs import ReasoningTokens

logger = logging.getLogger("octavo.engine")

# A step that fails may be one request's fault; this many in a row are the engine's own.
MAX_FAILED_STEPS = 3

# The longest step that is still progress: a CPU prefill of max_num_batched_tokens of an 8B model
# takes about 20 s on two cores.
STALL_S = 60.0

# The shortest pause that is used for the runner's idle work: the next request of a client follows
# its last within milliseconds, and each would wait for the piece of work in hand.
QUIET_S = 0.1

# The least time between two audits of the core.
CHECK_INTERVAL_S = 1.0


class EngineLoop:
    """Loads a model and runs its steps.

    Args:
        config: what to load and how to run it.
        notify: called on the engine thread, at most once per step, when the outbox has gone from
            empty to non-empty; must not block.
        source: the model's files, where they are resolved already.

    Raises:
        ValueError, OSError: the model cannot be loaded; one line that says why.
    """

    def __init__(
        self,
        config: EngineConfig,
        notify: Callable[[], None] = lambda: None,
        source: ModelSource | None = None,
    ) -> None:
        self.config = config
        self.source = source or resolve_model(config)
        self.tokenizer = load_tokenizer(self.source, config)
        self.runner: Runner = make_runner(config, self.source)
        self.keeps_prefixes: bool = keeps_prefixes(config, self.runner)
        self.core = make_core(config, self.runner, self.tokenizer)
        self.limits = RequestLimits(
            max_model_len=self.runner.max_model_len,
            vocab_size=self.source.model_config.vocab_size,
            max_logprobs=config.max_logprobs,
            tokenizer=self.tokenizer,
        )
        self.eos_token_ids = self.source.eos_token_ids
        self.grammars = GrammarCompiler(
            self.tokenizer if self.runner.pooling is None else None,
            self.source.model_config.vocab_size,
            self.eos_token_ids,
            config.structured_outputs_config or {},
        )
        self.step_times = StepTimes()
        self.fatal_error: BaseException | None = None
        self.last_progress_s = time.monotonic()
        self._notify = notify
        # Putting one wakes the thread, if it waits; an Event would cost more, being Python code.
        self._commands: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._stopping = False
        self._is_held = False
        self._next_id = 0
        # The samples that are not over; the runner reads one when it gets a slot.
        self._requests: dict[int, RequestState] = {}
        # Whether the thread waits for a command, which is as good as progress.
        self._resting = True
        self._has_idle_work = True
        self._in_flight: deque[tuple[ScheduledBatch, InFlight]] = deque()
        self._failed_steps = 0
        self._checked_s = 0.0
        self._thread: threading.Thread | None = None
        self.runner.warm_up()

    # ------------------------------------------------------------------ the caller's thread

    def prepare(
        self,
        prompt_token_ids: TokenIds,
        params: SamplingParams,
        *,
        delivery: Delivery = "final",
        sse: Sequence[SseTemplate] | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        num_first: int | None = None,
        channels: Channels | None = None,
        grammar: Grammar | None = None,
        reasoning: ReasoningTokens | None = None,
    ) -> list[RequestState]:
        """Check a request and give its samples ids, consecutive ones. Nothing is queued yet.

        Args:
            sse: a template per sample, for delivery "sse".
            num_first: of a pair of texts for a pooling model, the tokens that belong to the first.
            channels: what tells text, reasoning and tool calls apart; None: all of it is text.
            grammar: what ``grammars.compile`` has made of the parameters; None: it is done here.
            reasoning: the tokens around reasoning, which no grammar is about.

        Raises:
            RequestTooLongError, InvalidParameterError: the request can never run.
            UnsupportedParameterError: a priority, under another policy.
            EngineDeadError: the engine has died or is stopped.
        """
        self._check_alive()
        params = self.limits.resolve(params)
        max_tokens = self.limits.check(prompt_token_ids, params)
        self.limits.check_service(priority, cache_salt)
        bad_words = encode_bad_words(self.tokenizer, params.bad_words)
        if grammar is None:
            grammar = self.grammars.compile(params)
        if (self.config.structured_outputs_config or {}).get("enable_in_reasoning"):
            reasoning = None
        ids = range(self._next_id, self._next_id + params.n)
        self._next_id = ids.stop
        rows = None
        if params.prompt_logprobs is not None:
            rows = PromptRows(ids, len(prompt_token_ids) - 1, params.prompt_logprobs)
            # Every position has to be computed. With a salt of its own, all that a request finds in
            # the cache is its own blocks from before a preemption, whose rows are scored already.
            cache_salt = secrets.token_hex(16)
        return [
            RequestState(
                request_id=request_id,
                params=params,
                prompt_token_ids=prompt_token_ids,
                max_tokens=max_tokens,
                arrival_s=time.monotonic(),
                delivery=delivery,
                sse=None if sse is None else sse[index],
                priority=priority,
                cache_salt=cache_salt,
                # Samples of one seeded request differ from each other, but not from run to run.
                seed=None if params.seed is None else params.seed + index,
                eos_token_ids=() if params.ignore_eos else self.eos_token_ids,
                bad_words_token_ids=bad_words,
                prompt_rows=rows,
                num_first=num_first,
                channels=channels,
                grammar=grammar,
                reasoning=reasoning,
            )
            for index, request_id in enumerate(ids)
        ]

    # ------------------------------------------------------------------ any thread

    def submit(self, samples: Sequence[RequestState]) -> None:
        """Queue what ``prepare`` made; it is the engine's from here on.

        Raises:
            EngineDeadError: the engine has died or is stopped.
        """
        self._check_alive()
        self._commands.put(lambda: self._add(samples))

    def abort(self, request_ids: Iterable[int]) -> None:
        """End samples; each still gets its last delta. Unknown ids are ignored."""
        ids = tuple(request_ids)
        self._commands.put(lambda: self._abort(ids))

    def call(self, work: Callable[[], object]) -> None:
        """Run something on the engine thread, between two steps."""
        self._commands.put(work)

    def hold(self, done: Callable[[], object]) -> None:
        """Begin no step until ``release``; commands are taken. ``done`` is called, on the engine
        thread, when no step is in flight."""
        self._is_held = True
        self._commands.put(lambda: self._hold(done))

    def release(self) -> None:
        """Step again."""
        self._is_held = False
        self._commands.put(lambda: None)

    def _check_alive(self) -> None:
        if self.fatal_error is not None:
            raise EngineDeadError
        if self._stopping:
            raise EngineDeadError("the engine is stopped")

    def is_healthy(self) -> bool:
        """Alive, and stepping if there is work."""
        if self.fatal_error is not None:
            return False
        return self._resting or time.monotonic() - self.last_progress_s < STALL_S

    def start(self) -> None:
        """Step on a thread of its own until ``stop``."""
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in flight; requests that still run are dropped."""
        self._stopping = True
        self._commands.put(lambda: None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(STALL_S)
            if self._thread.is_alive():
                logger.error("the engine's step does not end; its thread is left behind")

    # -------------------------------------------------- a caller that steps by itself

    def finish_warm_up(self) -> None:
        """Do at once what ``start`` leaves to idle moments, of which such a caller has none."""
        while self.runner.idle_work():
            pass

    def abandon(self) -> None:
        """Drop every request, step and delta, wherever an interrupt has left ``step``.

        An interrupt may come between any two instructions: after a step was planned and before
        anybody knew of it, say. So the core, which is never interrupted, tells what there is.
        """
        while not self._commands.empty():
            self._commands.get()
        self._in_flight.clear()
        if self.fatal_error is None:
            self.runner.abandon()
        self.core.abandon()
        self._forget_ended()
        self._requests.clear()
        self.core.outbox.drain()

    # -------------------------------------------------------------- the engine thread

    def step(self) -> bool:
        """One step: plan, launch, then account for the oldest step whose tokens are due.

        A device that runs ahead launches step n+1 before step n's tokens are read, and a pipeline
        one more for each stage; on a CPU (``max_in_flight`` 1) the step just launched is read at
        once.

        Returns:
            Whether there was anything to do.
        """
        self.take_commands()
        # Nothing may be launched behind a step whose tokens wait for masks.
        while len(self._in_flight) > 1 and self._in_flight[-1][0].num_constrained:
            self._account(*self._in_flight.popleft())
        staging = self.runner.next_staging()
        began_s = time.perf_counter()
        batch = self.core.schedule(staging)
        if batch is not None:
            planned_s = time.perf_counter()
            self.step_times.observe("schedule", planned_s - began_s)
            try:
                in_flight = self.runner.launch(batch, staging, self._requests)
            except Exception as error:
                self._step_failed(batch.step_id, error)
            else:
                self.step_times.observe("launch", time.perf_counter() - planned_s)
                self._in_flight.append((batch, in_flight))
                if len(self._in_flight) == 1 and (unchosen := self._choose()) is not None:
                    self._drop_unchosen(unchosen)
        if self._in_flight and (batch is None or len(self._in_flight) == self.runner.max_in_flight):
            self._account(*self._in_flight.popleft())
            return True
        return batch is not None

    def _choose(self, tokens_before: NDArray[np.int32] | None = None) -> Exception | None:
        """Have the tokens of the next step chosen, if it waits for masks. Returns what went wrong.

        Its masks follow from the tokens before it: those of the step that is being accounted for,
        or that has been. The model's part of the step has been launched long since.
        """
        if not self._in_flight or not self._in_flight[0][0].num_constrained:
            return None
        batch, in_flight = self._in_flight[0]
        try:
            self.runner.choose(
                in_flight,
                lambda rows, masks: self.core.masks(batch.step_id, rows, masks, tokens_before),
            )
        except Exception as error:
            return error
        return None

    def _drop_unchosen(self, error: Exception) -> None:
        batch, _ = self._in_flight.popleft()
        self._step_failed(batch.step_id, error)

    def _account(self, batch: ScheduledBatch, in_flight: InFlight) -> None:
        began_s = time.perf_counter()
        try:
            sampled = self.runner.collect(in_flight)
        except Exception as error:
            self._step_failed(batch.step_id, error)
            if (error_of_next := self._choose()) is not None:
                self._drop_unchosen(error_of_next)
            return
        self._failed_steps = 0
        self.last_progress_s = time.monotonic()
        collected_s = time.perf_counter()
        # First of all, for the device may be waiting for it.
        error_of_next = self._choose(sampled.token_ids)
        chosen_s = time.perf_counter()
        has_news = self.core.update(batch.step_id, *sampled)
        self._forget_ended()
        self.step_times.observe("collect", collected_s - began_s)
        self.step_times.observe("update", time.perf_counter() - chosen_s)
        if has_news:
            self._notify()
        if error_of_next is not None:
            self._drop_unchosen(error_of_next)

    def _step_failed(self, step_id: int, error: Exception) -> None:
        """End the step's requests; the others go on, unless the failure is the engine's own."""
        logger.exception("step %d failed", step_id, exc_info=error)
        # Steps are accounted for in order: those launched before this one come first.
        while self._in_flight and self._in_flight[0][0].step_id < step_id:
            self._account(*self._in_flight.popleft())
        if self.core.fail_step(step_id):
            self._notify()
        self._forget_ended()
        self._failed_steps += 1
        if self._failed_steps >= MAX_FAILED_STEPS or self.runner.is_fatal(error):
            self.fatal_error = error
            raise EngineDeadError from error

    def _forget_ended(self) -> None:
        for request_id in self.core.take_ended():
            self._requests.pop(request_id, None)

    def take_commands(self) -> None:
        """Do what was queued, without a step."""
        while not self._commands.empty():
            self._commands.get()()

    def _add(self, samples: Sequence[RequestState]) -> None:
        """Hand a request to the core. One that the core does not take fails alone."""
        first, params = samples[0], samples[0].params
        ids = [sample.request_id for sample in samples]
        try:
            self.core.add_request(
                ids,
                first.prompt_token_ids,
                max_tokens=first.max_tokens,
                min_tokens=params.min_tokens,
                eos_token_ids=first.eos_token_ids,
                stop_token_ids=params.stop_token_ids,
                stop=params.stop,
                include_stop_str_in_output=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                num_logprobs=params.num_logprobs,
                priority=first.priority,
                cache_salt=first.cache_salt,
                arrival_s=first.arrival_s,
                stream_interval=params.stream_interval,
                delivery=first.delivery,
                sse=[sample.sse for sample in samples if sample.sse is not None] or None,
                channels=first.channels,
                grammar=first.grammar,
                trigger=first.trigger,
                may_force=first.may_force,
                reasoning=first.reasoning,
                bad_words=first.bad_words_token_ids,
            )
        except Exception as error:
            logger.exception("request %d could not be added", ids[0], exc_info=error)
            if self.core.refuse(ids, len(first.prompt_token_ids)):
                self._notify()
            return
        self._requests.update(zip(ids, samples, strict=True))

    def _abort(self, request_ids: tuple[int, ...]) -> None:
        ended = [request_id for request_id in request_ids if self.core.abort(request_id)]
        if ended:
            self._notify()
            self._forget_ended()

    def _hold(self, done: Callable[[], object]) -> None:
        while self._in_flight:
            self._account(*self._in_flight.popleft())
        done()
        while self._is_held and not self._stopping:
            self._resting = True
            command = self._commands.get()
            self.last_progress_s = time.monotonic()
            self._resting = False
            command()

    def _use_pause(self) -> None:
        """Do idle work piece by piece, until there is a command or nothing left."""
        try:
            while self._commands.empty() and self._has_idle_work:
                self._has_idle_work = self.runner.idle_work()
        except Exception as error:
            logger.exception("no more idle work is done", exc_info=error)
            self._has_idle_work = False
            if self.runner.is_fatal(error):
                raise EngineDeadError from error

    def _rest(self) -> None:
        """Block until there is a command. The next step's progress is timed from here, not from the
        last step."""
        self._resting = not self.core.has_work()
        command = self._next_command()
        self.last_progress_s = time.monotonic()
        self._resting = False
        command()

    def _next_command(self) -> Callable[[], object]:
        if self._has_idle_work and self._resting:
            with contextlib.suppress(Empty):
                return self._commands.get(timeout=QUIET_S)
            self._use_pause()
        return self._commands.get()

    def _check_integrity(self) -> None:
        """Audit the core when idle; seldom, since every block is looked at."""
        now = time.monotonic()
        if now - self._checked_s >= CHECK_INTERVAL_S:
            self._checked_s = now
            self.core.check_integrity()

    def _run(self) -> None:
        try:
            self.runner.enter_thread()
            self.last_progress_s = time.monotonic()
            self._resting = False
            while not self._stopping:
                # The step may have taken the command that ends the wait of a thread at rest.
                if not self.step() and not self._stopping:
                    if self._commands.empty():
                        self._check_integrity()
                    self._rest()
        except BaseException as error:
            self.fatal_error = error
            logger.critical("the engine died", exc_info=error)
            self._notify()
