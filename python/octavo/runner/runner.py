"""Runner: what the engine asks of whatever computes its steps. Read this one first.

One step goes through a runner in a few calls, all on the engine's thread::

    staging = runner.next_staging()                      # memory for the plan
    batch = core.schedule(staging)                       # the core writes the plan there
    in_flight = runner.launch(batch, staging, requests)  # the device, or this thread, computes
    runner.choose(in_flight, fill_masks)                 # only where batch.num_constrained
    sampled = runner.collect(in_flight)                  # its tokens, and what else it produced

A runner is given a LoadedModel (loading.py) and adds what steps need: a KV cache, staging memory,
sampling state, CUDA graphs. There are three: EagerRunner (eager.py) runs op by op and samples on
the host; GraphRunner (graphs.py) launches whole steps as CUDA graphs, one ahead of the host;
PoolingRunner (pooling.py) computes vectors in place of tokens. create.py chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from octavo.pooling import PoolingInfo
from octavo.runner.masks import FillMasks
from octavo.runner.request_state import RequestState
from octavo.runner.sampler import SampledTokens

if TYPE_CHECKING:
    from octavo._core import ScheduledBatch, Staging

# Called with a name ("wait") and when it began and ended, in time.perf_counter_ns().
Observer: TypeAlias = Callable[[str, int, int], None]


@dataclass(slots=True, eq=False)
class InFlight:
    """A launched step, for ``collect``."""

    step_id: int


@dataclass(slots=True, eq=False)
class ComputedStep(InFlight):
    """A step whose results are known already."""

    sampled: SampledTokens


class StreamClock(Protocol):
    """Times at which a device comes past marks that are queued between its work."""

    def mark(self) -> int:
        """Queue a mark: its number, from 0."""

    def times_ns(self) -> list[int]:
        """Times of the device at each mark, from the clock's start. Waits for the last."""


class Runner(Protocol):
    """Computes planned steps, one after another.

    Steps are collected in the order in which they were launched, and at most ``max_in_flight`` of
    them are launched and not collected. What a request carries from step to step (its keys and
    values, its last token, its sampling state) the runner keeps by the plan's block ids and slots;
    a slot's state is written anew whenever ``batch.new_slots`` names it.

    After construction the sizes do not change. All methods belong to one thread at a time.
    """

    num_blocks: int  # of the KV cache
    block_size: int  # tokens a block
    max_num_seqs: int  # requests a step
    max_num_batched_tokens: int  # tokens a step
    max_model_len: int  # tokens a request, prompt and output
    max_in_flight: int
    # Stages that work at different steps: a step rather has tokens of one so many steps before it.
    num_stages: int
    # False: keys and values are gone when a step is over, so a prompt must be computed in one.
    keeps_kv: bool
    # Tokens that a step's prompts are padded to, ascending; more than the last are not padded.
    padded_prompts: Sequence[int]
    # Rows for checkpoints of states; None of a model whose layers have none.
    num_state_checkpoints: int | None
    # Of requests that begin with the same blocks: most groups that a plan names, and the least
    # tokens that one shares, and saves. None: each request reads its own.
    prefix_sharing: tuple[int, int, int] | None
    # Of a model that computes vectors; None of one that generates text.
    pooling: PoolingInfo | None

    def warm_up(self) -> None:
        """Do what must not happen while a request waits: compile kernels, start threads."""

    def enter_thread(self) -> None:
        """Prepare the calling thread, which does nothing but step from now on. Optional."""

    def next_staging(self) -> Staging:
        """Memory for the next step's plan. Its last step has been collected by then."""

    def launch(
        self, batch: ScheduledBatch, staging: Staging, requests: Mapping[int, RequestState]
    ) -> InFlight:
        """Start a planned step. ``requests``: by id, at least those that this step admits.

        With ``batch.num_constrained`` only the model computes: the tokens are left to ``choose``.
        """

    def choose(self, in_flight: InFlight, fill: FillMasks) -> None:
        """Have the tokens of a launched step chosen that waits for its masks.

        Once, when the tokens of all steps before it have been collected. ``fill`` is called once.
        """

    def collect(self, in_flight: InFlight) -> SampledTokens:
        """A launched step's results: tokens in the order of its samples, and extras by request id.

        An extra is a prompt's PromptLogprobs, for each of its samples when the last row has come,
        or a pooling model's vector. Blocks until the results exist.
        """

    def abandon(self) -> None:
        """Wait for the device, and forget the steps that are launched and not collected.

        A launch may have been interrupted anywhere; its requests, and all others, are gone.
        """

    def idle_work(self) -> bool:
        """Do one piece of work, some 50 ms, that makes later steps faster; False if none is left.

        Only while nothing is in flight.
        """

    def is_fatal(self, error: BaseException) -> bool:
        """True if no step can succeed after this error, as when a device's context is broken."""

    def memory(self) -> list[tuple[str, str]]:
        """Sizes and memory use by purpose, to print: (name, value) pairs."""

    def observe(self, observer: Observer | None) -> StreamClock | None:
        """Report to ``observer`` each wait for the device, until called with None.

        Only while nothing is in flight.

        Returns:
            A clock of the device's stream, starting now; None without one, or without an observer.
        """


class ShardLostError(RuntimeError):
    """A shard has waited in vain for another: the step's results are wrong, and all later ones."""


def is_device_error(error: BaseException) -> bool:
    """True if torch reports that the device's context is broken."""
    broken = getattr(torch, "AcceleratorError", None)
    return broken is not None and isinstance(error, broken)
