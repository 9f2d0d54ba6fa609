"""EngineLoop: the one thread that steps.

It owns the EngineCore and the Runner. Others reach it only through ``submit`` and ``abort``,
which queue a command and wake it. With no work it blocks: an idle engine costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from octavo._core import EngineCore
from octavo.engine.request import RequestLimits
from octavo.engine.step_times import StepTimes
from octavo.errors import EngineDeadError
from octavo.models.source import load_tokenizer, resolve_model
from octavo.runner.create import make_runner
from octavo.runner.request_state import RequestState, encode_bad_words

if TYPE_CHECKING:
    from octavo._core import ScheduledBatch
    from octavo.config import EngineConfig
    from octavo.engine.request import EngineRequest
    from octavo.models.source import ModelSource
    from octavo.runner.runner import InFlight, Runner

logger = logging.getLogger("octavo.engine")

# A step that fails may be one request's fault; this many in a row are the engine's own.
MAX_FAILED_STEPS = 3

# The longest step that is still progress: a CPU prefill of max_num_batched_tokens of an 8B model
# takes about 20 s on two cores.
STALL_S = 60.0

# The shortest pause that is used for the runner's idle work: the next request of a client follows
# its last within milliseconds, and each would wait for the piece of work in hand.
QUIET_S = 0.1

# The least time between two looks at all of the core's accounts.
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
        self.core = EngineCore(
            num_blocks=self.runner.num_blocks,
            block_size=self.runner.block_size,
            max_num_seqs=self.runner.max_num_seqs,
            max_num_batched_tokens=self.runner.max_num_batched_tokens,
            max_model_len=self.runner.max_model_len,
            # What keeps no keys and values computes a prompt whole, in one step.
            enable_prefix_caching=config.enable_prefix_caching and self.runner.keeps_kv,
            enable_chunked_prefill=config.enable_chunked_prefill and self.runner.keeps_kv,
            policy=config.scheduling_policy,
            stream_interval=config.stream_interval,
            tokenizer=self.tokenizer,
        )
        self.limits = RequestLimits(
            max_model_len=self.runner.max_model_len,
            vocab_size=self.source.model_config.vocab_size,
            max_logprobs=config.max_logprobs,
            tokenizer=self.tokenizer,
        )
        self.eos_token_ids = self.source.eos_token_ids
        self.step_times = StepTimes()
        # The runner reads it when a request gets a slot; the consumer pops it at the last delta.
        # Dict operations are atomic under the GIL.
        self.requests: dict[int, RequestState] = {}
        self.fatal_error: BaseException | None = None
        self.last_progress_s = time.monotonic()
        self._notify = notify
        # Putting one wakes the thread, if it waits: 7 us less than an Event, which is Python.
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stopping = False
        # Whether the thread waits for a command, which is as good as progress.
        self._resting = True
        self._has_idle_work = True
        self._in_flight: deque[tuple[ScheduledBatch, InFlight]] = deque()
        self._failed_steps = 0
        self._checked_s = 0.0
        self._thread: threading.Thread | None = None
        self.runner.warm_up()

    # ------------------------------------------------------------------ any thread

    def submit(self, request: EngineRequest) -> None:
        """Queue a checked request.

        Raises:
            EngineDeadError: the engine thread has ended.
        """
        if self.fatal_error is not None:
            raise EngineDeadError
        self._commands.put(lambda: self._add(request))

    def abort(self, request_ids: Iterable[int]) -> None:
        """End samples; each still gets its last delta. Unknown ids are ignored."""
        ids = tuple(request_ids)
        self._commands.put(lambda: self._abort(ids))

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
            self._thread.join()

    def finish_warm_up(self) -> None:
        """Do at once what ``start`` leaves to moments with nothing to do: for a caller that steps
        by itself, and has none."""
        while self.runner.idle_work():
            pass

    # -------------------------------------------------------------- the engine thread

    def step(self) -> bool:
        """One step: plan, launch, then account for the oldest step whose tokens are due.

        A device that runs ahead launches step n+1 before step n's tokens are read; on a CPU
        (``max_in_flight`` 1) the step just launched is read at once.

        Returns:
            Whether there was anything to do.
        """
        self._take_commands()
        staging = self.runner.next_staging()
        began_s = time.perf_counter()
        batch = self.core.schedule(staging)
        if batch is not None:
            planned_s = time.perf_counter()
            self.step_times.observe("schedule", planned_s - began_s)
            try:
                in_flight = self.runner.launch(batch, staging, self.requests)
            except Exception as error:
                self._step_failed(batch.step_id, error)
            else:
                self.step_times.observe("launch", time.perf_counter() - planned_s)
                self._in_flight.append((batch, in_flight))
        if self._in_flight and (batch is None or len(self._in_flight) == self.runner.max_in_flight):
            self._account(*self._in_flight.popleft())
            return True
        return batch is not None

    def _account(self, batch: ScheduledBatch, in_flight: InFlight) -> None:
        began_s = time.perf_counter()
        try:
            sampled = self.runner.collect(in_flight)
        except Exception as error:
            self._step_failed(batch.step_id, error)
            return
        self._failed_steps = 0
        self.last_progress_s = time.monotonic()
        collected_s = time.perf_counter()
        has_news = self.core.update(
            batch.step_id,
            sampled.token_ids,
            sampled.logprob_ids,
            sampled.logprobs,
            sampled.ranks,
        )
        self.step_times.observe("collect", collected_s - began_s)
        self.step_times.observe("update", time.perf_counter() - collected_s)
        if has_news:
            self._notify()

    def _step_failed(self, step_id: int, error: Exception) -> None:
        """End the step's requests; the others go on, unless the failure is the engine's own."""
        logger.exception("step %d failed", step_id, exc_info=error)
        # Steps are accounted for in order: those launched before this one come first.
        while self._in_flight and self._in_flight[0][0].step_id < step_id:
            self._account(*self._in_flight.popleft())
        if self.core.fail_step(step_id, str(error)):
            self._notify()
        self._failed_steps += 1
        if self._failed_steps >= MAX_FAILED_STEPS or self.runner.is_fatal(error):
            raise EngineDeadError from error

    def _take_commands(self) -> None:
        while not self._commands.empty():
            self._commands.get()()

    def _add(self, request: EngineRequest) -> None:
        params = request.params
        bad_words = encode_bad_words(self.tokenizer, params.bad_words)
        for index, request_id in enumerate(request.request_ids):
            self.requests[request_id] = RequestState(
                params=params,
                num_prompt_tokens=len(request.prompt_token_ids),
                # Samples of one seeded request differ from each other, but not from run to run.
                seed=None if params.seed is None else params.seed + index,
                eos_token_ids=() if params.ignore_eos else self.eos_token_ids,
                prompt_token_ids=request.prompt_token_ids,
                bad_words_token_ids=bad_words,
                prompt_logprobs=request.prompt_logprobs,
                pooled=request.pooled,
            )
        cache_salt = request.cache_salt
        if request.prompt_logprobs is not None:
            # Every position has to be computed: a salt of its own finds nothing in the cache but
            # what the request itself left there, and scored, before it was preempted.
            cache_salt = secrets.token_hex(16)
        self.core.add_request(
            list(request.request_ids),
            request.prompt_token_ids,
            max_tokens=request.max_tokens,
            min_tokens=params.min_tokens,
            eos_token_ids=() if params.ignore_eos else self.eos_token_ids,
            stop_token_ids=params.stop_token_ids,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            num_logprobs=params.logprobs,
            priority=request.priority,
            cache_salt=cache_salt,
            arrival_s=request.arrival_s,
            stream_interval=params.stream_interval,
            delivery=request.delivery,
            sse=request.sse,
        )

    def _abort(self, request_ids: tuple[int, ...]) -> None:
        ended = [request_id for request_id in request_ids if self.core.abort(request_id)]
        if ended:
            self._notify()

    def _use_pause(self) -> None:
        """Let the runner get ahead piece by piece, until there is a command or nothing left."""
        try:
            while self._commands.empty() and self._has_idle_work:
                self._has_idle_work = self.runner.idle_work()
        except Exception as error:
            logger.exception("no more idle work is done", exc_info=error)
            self._has_idle_work = False
            if self.runner.is_fatal(error):
                raise EngineDeadError from error

    def _rest(self) -> None:
        """Block until there is a command. How long that took says nothing of the next step: its
        time begins here."""
        self._resting = not self.core.has_work()
        command = self._next_command()
        self.last_progress_s = time.monotonic()
        self._resting = False
        command()

    def _next_command(self) -> Callable[[], None]:
        if self._has_idle_work and self._resting:
            with contextlib.suppress(Empty):
                return self._commands.get(timeout=QUIET_S)
            self._use_pause()
        return self._commands.get()

    def _check_integrity(self) -> None:
        """While there is nothing to do, but not at every pause between two requests: it looks at
        every block there is."""
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
