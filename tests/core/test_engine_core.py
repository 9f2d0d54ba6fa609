"""The scheduling half of octavo._core through its binding: buffers, deliveries, errors, metrics.

What the scheduler decides is tested in rust_core/core/tests; here that Python sees it right.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

import numpy as np
import pytest

from octavo._core import (
    Delta,
    EngineCore,
    ScheduledBatch,
    SseTemplate,
    SseWriter,
    Staging,
    Tokenizer,
)

BLOCK_SIZE = 4
LIMITS = {
    "max_num_batched_tokens": 32,
    "max_num_seqs": 4,
    "max_model_len": 64,
    "block_size": BLOCK_SIZE,
}


def make_core(**changes: Any) -> EngineCore:
    return EngineCore(**{"num_blocks": 64, **LIMITS, **changes})


class Driver:
    """Runs an EngineCore with a model whose next token is the position of the last one plus 100."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.array = np.zeros(Staging.required_len(**LIMITS), np.int32)
        self.staging = Staging(self.array)
        self.deltas: dict[int, list[Delta]] = {}

    def schedule(self) -> ScheduledBatch:
        batch = self.core.schedule(self.staging)
        assert batch is not None
        return batch

    def section(self, offset: int, length: int) -> list[int]:
        return self.array[offset : offset + length].tolist()

    def sample(self, batch: ScheduledBatch) -> np.ndarray:
        rows = self.section(batch.sample_rows_offset, batch.num_samples)
        positions = self.array[batch.positions_offset :]
        return np.array([positions[row] + 100 for row in rows], np.int32)

    def step(self) -> bool:
        batch = self.schedule()
        wake_up = self.core.update(batch.step_id, self.sample(batch))
        self.core.check_integrity()
        return wake_up

    def drain(self) -> list[Delta]:
        deltas = self.core.outbox.drain()
        for delta in deltas:
            self.deltas.setdefault(delta.request_id, []).append(delta)
        return deltas

    def run(self) -> dict[int, list[Delta]]:
        for _ in range(1000):
            if not self.core.has_work():
                break
            self.step()
            self.drain()
        assert not self.core.has_work()
        return self.deltas


def test_staging_layout_of_a_prefill_and_a_decode() -> None:
    driver = Driver(make_core())
    driver.core.add_request([7], [11, 12, 13, 14, 15], max_tokens=4)
    batch = driver.schedule()
    assert (batch.num_tokens, batch.num_reqs, batch.num_decodes, batch.num_samples) == (5, 1, 0, 1)
    assert (batch.max_query_len, batch.max_seq_len) == (5, 5)
    [(slot, request_id, num_outputs)] = batch.new_slots
    assert (request_id, num_outputs) == (7, 0)
    assert batch.request_ids == [7]
    assert driver.section(batch.input_ids_offset, 5) == [11, 12, 13, 14, 15]
    assert driver.section(batch.positions_offset, 5) == [0, 1, 2, 3, 4]
    blocks = driver.core.block_ids(7)
    expected = [blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(5)]
    assert driver.section(batch.slot_mapping_offset, 5) == expected
    assert driver.section(batch.slots_offset, 1) == [slot]
    assert driver.section(batch.seq_lens_offset, 1) == [5]
    assert driver.section(batch.query_start_loc_offset, 2) == [0, 5]
    assert driver.section(batch.sample_rows_offset, 1) == [4]
    assert driver.section(batch.sample_slots_offset, 1) == [slot]
    assert batch.num_block_updates == 2
    columns = LIMITS["max_model_len"] // BLOCK_SIZE
    rows = driver.section(batch.block_updates_offset, 2)
    assert rows == [slot * columns, slot * columns + 1]
    assert driver.section(batch.block_updates_offset + 2, 2) == blocks
    assert batch.packed_len == batch.block_updates_offset + 4

    driver.core.update(batch.step_id, np.array([42], np.int32))
    batch = driver.schedule()
    assert (batch.num_tokens, batch.num_decodes, batch.new_slots) == (1, 1, [])
    assert driver.section(batch.input_ids_offset, 1) == [42]
    assert driver.section(batch.positions_offset, 1) == [5]
    assert driver.core.token_ids(7) == [11, 12, 13, 14, 15, 42]


def test_run_ahead_leaves_ids_on_the_device() -> None:
    driver = Driver(make_core())
    for request_id in range(3):
        driver.core.add_request([request_id], [1, 2, 3], max_tokens=10)
    prefill = driver.schedule()
    assert prefill.num_tokens == 9
    decode = driver.schedule()
    assert (decode.num_reqs, decode.num_tokens, decode.num_samples) == (3, 3, 3)
    assert driver.section(decode.input_ids_offset, 3) == [-1, -1, -1]
    assert driver.section(decode.seq_lens_offset, 3) == [4, 4, 4]
    assert driver.section(decode.query_start_loc_offset, 4) == [0, 1, 2, 3]
    tokens = np.array([5, 6, 7], np.int32)
    with pytest.raises(ValueError, match="oldest"):
        driver.core.update(decode.step_id, tokens)
    assert driver.core.update(prefill.step_id, tokens) is False
    driver.core.update(decode.step_id, tokens)
    driver.core.check_integrity()
    assert driver.core.stats()["num_in_flight"] == 0


def test_final_delivery_is_one_delta_with_everything() -> None:
    driver = Driver(make_core())
    driver.core.add_request([1], np.arange(1, 6, dtype=np.int32), max_tokens=3)
    [delta] = driver.run()[1]
    assert delta.token_ids == [104, 105, 106]
    assert (delta.finish_reason, delta.stop_reason, delta.sse) == ("length", None, None)
    assert (delta.num_prompt_tokens, delta.num_output_tokens) == (5, 3)
    assert (delta.logprobs, delta.cumulative_logprob) == (None, None)
    assert delta.queue_s is not None
    assert delta.prefill_s is not None
    assert delta.decode_s is not None
    assert delta.queue_s >= 0
    assert delta.prefill_s > 0
    assert delta.decode_s > 0


def test_delta_delivery_wakes_once_until_drained() -> None:
    driver = Driver(make_core())
    driver.core.add_request([1], [1, 2], max_tokens=4, delivery="delta")
    assert driver.step() is True
    assert driver.step() is False
    [delta] = driver.drain()
    assert (delta.token_ids, delta.finish_reason, delta.num_output_tokens) == ([101, 102], None, 2)
    assert driver.step() is True
    assert driver.step() is False
    [delta] = driver.drain()
    assert (delta.token_ids, delta.finish_reason) == ([103, 104], "length")


def test_a_writer_takes_the_middle_of_a_stream(smollm2: Tokenizer) -> None:
    driver = Driver(make_core(tokenizer=smollm2))
    template = SseTemplate(b"<", b">", first=b"first")
    driver.core.add_request([1], [1, 2], max_tokens=8, delivery="sse", sse=[template])
    written: list[bytes] = []
    writer = SseWriter(written.append)

    def drain(now_s: float = 0.0) -> list[bytes | None]:
        driver.step()
        return [delta.sse for delta in driver.core.outbox.drain({1: writer}, now_s)]

    assert len(drain()) == 1, "it is not armed"
    writer.is_armed = True
    assert (drain(5.0), writer.last_write_s) == ([], 5.0)
    # HTTP's chunk, and inside it the event.
    assert written == [b"3\r\n<v>\r\n"]
    writer.is_paused = True
    assert (drain(6.0), writer.last_write_s) == ([b"<w>"], 5.0)
    assert driver.step() is True
    assert len(driver.core.outbox.drain({2: writer})) == len(written) == 1


def test_a_writer_sends_to_an_idle_socket_and_the_rest_to_its_transport(
    smollm2: Tokenizer,
) -> None:
    driver = Driver(make_core(tokenizer=smollm2))
    # Long chunks: a socket's buffers are full after a few.
    template = SseTemplate(b"<" * 50_000, b">")
    driver.core.add_request([1], [1, 2], max_tokens=40, delivery="sse", sse=[template])
    near, far = socket.socketpair()
    written: list[bytes] = []
    buffered = [0]
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        writer = SseWriter(written.append, lambda: buffered[0], near.fileno())
        writer.is_armed = True

        def drain() -> None:
            driver.step()
            assert driver.core.outbox.drain({1: writer}) == []

        drain()
        assert written == []
        received = far.recv(1 << 20)
        assert received.startswith(b"c352\r\n<<<")
        assert received.endswith(b">\r\n")
        buffered[0] = 1
        drain()
        assert [len(chunk) for chunk in written] == [len(received)], "behind what is buffered"
        with pytest.raises(BlockingIOError):
            far.recv(1)
        buffered[0] = 0
        del written[:]
        for _ in range(30):
            drain()
        assert written, "the socket never filled up"
        stream = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                stream += far.recv(1 << 20)
        stream += b"".join(written)
        num_chunks = 0
        while stream:
            size, _, rest = stream.partition(b"\r\n")
            chunk, end, stream = (
                rest[: int(size, 16)],
                rest[int(size, 16) :][:2],
                rest[int(size, 16) + 2 :],
            )
            assert (chunk[:1], chunk[-1:], end) == (b"<", b">", b"\r\n")
            num_chunks += 1
        assert num_chunks == 30


def test_a_writer_whose_socket_is_gone_uses_its_transport(smollm2: Tokenizer) -> None:
    driver = Driver(make_core(tokenizer=smollm2))
    template = SseTemplate(b"<", b">")
    driver.core.add_request([1], [1, 2], max_tokens=8, delivery="sse", sse=[template])
    written: list[bytes] = []
    near, far = socket.socketpair()
    with near:
        near.setblocking(False)
        far.close()
        writer = SseWriter(written.append, lambda: 0, near.fileno())
        writer.is_armed = True
        driver.step()
        assert driver.core.outbox.drain({1: writer}) == []
        assert len(written) == 1


def test_a_writer_that_fails_gives_back_the_delta(smollm2: Tokenizer) -> None:
    driver = Driver(make_core(tokenizer=smollm2))
    template = SseTemplate(b"<", b">")
    driver.core.add_request([1], [1, 2], max_tokens=3, delivery="sse", sse=[template])

    def fail(data: bytes) -> None:
        raise RuntimeError("closed")

    writer = SseWriter(fail)
    writer.is_armed = True
    for finish_reason in (None, None, "length"):
        driver.step()
        [delta] = driver.core.outbox.drain({1: writer})
        assert delta.finish_reason == finish_reason
        assert delta.sse is not None
        assert writer.is_paused


def test_sse_delivery_is_bytes_per_sample() -> None:
    driver = Driver(make_core())
    templates = [SseTemplate(b"%d<" % i, b">", first=b"[first %d]" % i) for i in range(2)]
    driver.core.add_request(
        [1, 2], [1, 2], max_tokens=5, stop_token_ids=[103], delivery="sse", sse=templates
    )
    deltas = driver.run()
    for i in range(2):
        sse = b"".join(delta.sse or b"" for delta in deltas[i + 1])
        # Without a tokenizer there is no text, and a sample's end is not the core's to write.
        assert sse == b"[first %d]" % i
        assert (deltas[i + 1][-1].finish_reason, deltas[i + 1][-1].stop_reason) == ("stop", 103)


def test_stream_interval() -> None:
    driver = Driver(make_core(stream_interval=3))
    driver.core.add_request([1], [1, 2], max_tokens=6, delivery="delta")
    driver.core.add_request([2], [1, 2], max_tokens=6, delivery="delta", stream_interval=2)
    driver.core.add_request([3], [1, 2], max_tokens=6, delivery="delta", stream_interval=1)
    with pytest.raises(ValueError, match="stream_interval"):
        driver.core.add_request([4], [1, 2], max_tokens=6, delivery="delta", stream_interval=0)
    sizes = {
        request_id: [len(delta.token_ids) for delta in deltas]
        for request_id, deltas in driver.run().items()
    }
    assert sizes == {1: [1, 3, 2], 2: [1, 2, 2, 1], 3: [1] * 6}


@pytest.mark.parametrize("min_tokens", [0, 3, 5])
def test_eos_and_stop_tokens(min_tokens: int) -> None:
    driver = Driver(make_core())
    options: dict[str, Any] = {"max_tokens": 9, "min_tokens": min_tokens}
    driver.core.add_request([1], [1, 2], eos_token_ids=[103, 105], **options)
    driver.core.add_request([2], [1, 2], stop_token_ids=[103, 105], **options)
    driver.core.add_request([3], [1, 2], **options)
    deltas = {request_id: last for request_id, [last] in driver.run().items()}
    end = 103 if min_tokens <= 3 else 105
    expected = list(range(101, end + 1))
    assert (deltas[1].token_ids, deltas[1].stop_reason) == (expected, None)
    assert (deltas[2].token_ids, deltas[2].stop_reason) == (expected, end)
    assert deltas[1].finish_reason == deltas[2].finish_reason == "stop"
    assert (len(deltas[3].token_ids), deltas[3].finish_reason) == (9, "length")


def test_lengths_are_clipped_and_zero_tokens_compute_the_prompt() -> None:
    driver = Driver(make_core())
    driver.core.add_request([1], [1] * 60, max_tokens=1000)
    driver.core.add_request([2], [1] * 64, max_tokens=0)
    deltas = driver.run()
    assert deltas[1][0].num_output_tokens == 4
    assert (deltas[2][0].num_output_tokens, deltas[2][0].finish_reason) == (0, "length")
    assert deltas[2][0].prefill_s is not None


def test_logprobs_are_cut_to_what_was_asked_for() -> None:
    driver = Driver(make_core())
    driver.core.add_request([1], [1, 2], max_tokens=1, num_logprobs=1)
    driver.core.add_request([2], [1, 2], max_tokens=1, num_logprobs=2)
    driver.core.add_request([3], [1, 2], max_tokens=1)
    batch = driver.schedule()
    driver.core.update(
        batch.step_id,
        np.array([5, 6, 7], np.int32),
        np.array([[5, 9, 5], [6, 6, 9], [7, 0, 0]], np.int32),
        np.array([[-1.5, -0.5, -1.5], [-0.25, -0.25, -3], [0, 0, 0]], np.float32),
        np.array([2, 1, 1], np.int32),
    )
    deltas = {delta.request_id: delta for delta in driver.core.outbox.drain()}
    assert deltas[1].logprobs == [[(5, -1.5, 2), (9, -0.5, 1)]]
    assert deltas[2].logprobs == [[(6, -0.25, 1), (6, -0.25, 1), (9, -3.0, 2)]]
    assert deltas[1].cumulative_logprob == -1.5
    assert deltas[3].logprobs is None


def test_abort_and_fail_step() -> None:
    driver = Driver(make_core())
    for request_id in (1, 2, 3):
        driver.core.add_request([request_id], [request_id] * 9, max_tokens=9, delivery="delta")
    driver.step()
    driver.drain()
    batch = driver.schedule()
    assert driver.core.abort(1) is True
    assert driver.core.abort(1) is False
    assert driver.core.abort(99) is False
    [delta] = driver.drain()
    assert (delta.request_id, delta.finish_reason) == (1, "abort")
    assert driver.core.fail_step(batch.step_id) is True
    assert {delta.finish_reason for delta in driver.drain()} == {"error"}
    stats = driver.core.stats()
    assert stats["num_running"] == stats["num_waiting"] == stats["num_in_flight"] == 0
    assert stats["num_free_blocks"] == stats["num_blocks"]
    metrics = driver.core.metrics.snapshot()
    assert metrics["request_success"] == {"stop": 0, "length": 0, "abort": 1, "error": 2}
    assert metrics["num_requests_running"] == metrics["kv_cache_usage_perc"] == 0


def test_extras_leave_with_the_samples_next_delta() -> None:
    driver = Driver(make_core())

    def update(*extras: tuple[int, object]) -> dict[int, object]:
        batch = driver.schedule()
        driver.core.update(batch.step_id, driver.sample(batch), extras=extras)
        return {delta.request_id: delta.extra for delta in driver.core.outbox.drain()}

    for request_id, delivery in ((1, "delta"), (2, "delta"), (3, "final"), (4, "delta")):
        driver.core.add_request([request_id], [1, 2, 3], max_tokens=3, delivery=delivery)
    value = [1.5]
    found = update((1, value), (2, "first"), (2, "last"), (3, value), (9, "of nobody"))
    assert found == {1: value, 2: "last", 4: None}
    assert found[1] is value
    assert update() == {1: None, 2: None, 4: None}
    assert update((4, "end")) == {1: None, 2: None, 3: value, 4: "end"}
    assert driver.core.take_ended() == [1, 2, 3, 4]
    assert driver.core.take_ended() == []


def test_an_extra_ends_where_no_lock_is_held() -> None:
    """The end of an object may run Python code, which may ask for the outbox."""
    driver = Driver(make_core())
    outbox = driver.core.outbox
    drained: list[Delta] = []
    ended: list[str] = []

    class Result:
        def __init__(self, name: str) -> None:
            self.name = name

        def __del__(self) -> None:
            ended.append(self.name)
            drained.extend(outbox.drain())

    def update(request_id: int, *names: str) -> None:
        batch = driver.schedule()
        tokens = driver.sample(batch)
        extras = [(request_id, Result(name)) for name in names]
        driver.core.update(batch.step_id, tokens, extras=extras)

    driver.core.add_request([1], [1, 2, 3], max_tokens=9, delivery="delta")
    update(2, "of nobody")
    assert ended == ["of nobody"]
    update(1, "replaced", "aborted")
    assert ended == ["of nobody", "replaced"]
    driver.core.abort(1)
    drained += outbox.drain()
    drained.clear()
    assert ended == ["of nobody", "replaced", "aborted"]
    driver.core.add_request([3], [1, 2, 3], max_tokens=9)
    update(3, "abandoned")
    driver.core.abandon()
    drained += outbox.drain()
    drained.clear()
    assert ended[3:] == ["abandoned"]


def test_a_writer_leaves_extras_to_the_sink(smollm2: Tokenizer) -> None:
    driver = Driver(make_core(tokenizer=smollm2))
    template = SseTemplate(b"<", b">")
    prompt = smollm2.encode("hello")
    driver.core.add_request([1], prompt, max_tokens=4, delivery="sse", sse=[template])
    chunks: list[bytes] = []
    writer = SseWriter(chunks.append)
    writer.is_armed = True
    seen = []
    for extra in (None, "kept", None):
        batch = driver.schedule()
        extras = None if extra is None else [(1, extra)]
        driver.core.update(batch.step_id, driver.sample(batch), extras=extras)
        seen += [delta.extra for delta in driver.core.outbox.drain({1: writer})]
    assert seen == ["kept"]
    assert len(chunks) == 2


def test_what_the_core_does_not_take_is_delivered_as_an_error() -> None:
    core = make_core()
    with pytest.raises(ValueError, match="max_model_len"):
        core.add_request([4, 5], [1] * 100, max_tokens=1)
    assert core.refuse([4, 5], 3) is True
    deltas = core.outbox.drain()
    assert [(delta.request_id, delta.finish_reason) for delta in deltas] == [
        (4, "error"),
        (5, "error"),
    ]
    assert core.metrics.snapshot()["request_success"]["error"] == 2
    assert core.metrics.settled() == (2, 6)
    assert not core.has_work()


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_abandon_leaves_nothing_and_the_core_goes_on(num_steps: int) -> None:
    driver = Driver(make_core())
    core = driver.core
    for request_id in range(6):
        core.add_request([request_id], [request_id] * 9, max_tokens=9, delivery="delta")
    driver.step()
    for _ in range(num_steps):
        driver.schedule()
    core.abandon()
    core.check_integrity()
    assert not core.has_work()
    stats = core.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"]
    assert sorted(core.take_ended()) == list(range(6))
    assert core.metrics.snapshot()["request_success"]["abort"] == 6
    core.outbox.drain()
    core.add_request([7], [1, 2, 3], max_tokens=2)
    assert [delta.finish_reason for delta in driver.run()[7]] == ["length"]


def test_prefix_cache_hits_salts_and_reset() -> None:
    driver = Driver(make_core())
    prompt = list(range(12))

    def cached(request_id: int, salt: str | None = None) -> int:
        driver.core.add_request([request_id], prompt, max_tokens=1, cache_salt=salt)
        return driver.run()[request_id][0].num_cached_tokens

    assert cached(1) == 0
    # The last token is computed even where all three blocks are known.
    assert cached(2) == 8
    assert cached(3, salt="tenant") == 0
    assert cached(4, salt="tenant") == 8
    driver.core.reset_prefix_cache()
    assert cached(5) == 0
    metrics = driver.core.metrics.snapshot()
    assert (metrics["prefix_cache_queries"], metrics["prefix_cache_hits"]) == (60, 16)


def test_samples_share_the_prompts_blocks_without_a_prefix_cache() -> None:
    driver = Driver(make_core(enable_prefix_caching=False))
    driver.core.add_request([1, 2, 3, 4], list(range(10)), max_tokens=8)
    driver.step()
    driver.step()
    tables = [driver.core.block_ids(request_id) for request_id in (1, 2, 3, 4)]
    assert {tuple(table[:2]) for table in tables} == {tuple(tables[0][:2])}
    assert len({table[2] for table in tables}) == 4
    deltas = driver.run()
    assert [deltas[i][0].token_ids for i in (1, 2, 3, 4)] == [list(range(109, 117))] * 4


def test_metrics_are_exact() -> None:
    driver = Driver(make_core())
    start_s = time.monotonic()
    driver.core.add_request([1, 2], [1] * 6, max_tokens=5, arrival_s=start_s)
    driver.core.add_request([3], [2] * 6, max_tokens=1, arrival_s=start_s)
    driver.run()
    metrics = driver.core.metrics.snapshot()
    counts = {name: value["count"] for name, value in metrics.items() if "_seconds" in name}
    assert counts["time_to_first_token_seconds"] == 3
    assert counts["inter_token_latency_seconds"] == 8
    assert counts["request_time_per_output_token_seconds"] == 2
    assert counts["e2e_request_latency_seconds"] == 3
    assert (metrics["prompt_tokens"], metrics["generation_tokens"]) == (18, 11)
    assert metrics["request_params_n"]["sum"] == 3
    assert metrics["request_params_n"]["count"] == 2
    assert metrics["request_max_num_generation_tokens"]["sum"] == 6
    assert metrics["request_generation_tokens"]["sum"] == 11
    ttft = metrics["time_to_first_token_seconds"]
    assert ttft["buckets"][0][0] == 0.0005
    assert ttft["buckets"][-1] == (float("inf"), 3)
    assert 0 < ttft["sum"] < 3 * (time.monotonic() - start_s)


def test_wrong_arguments_are_value_errors_and_change_nothing() -> None:
    core = make_core()
    add = core.add_request
    with pytest.raises(ValueError, match="empty"):
        add([1], [], max_tokens=1)
    with pytest.raises(ValueError, match="max_model_len is 64"):
        add([1], [1] * 64, max_tokens=1)
    with pytest.raises(ValueError, match="whole KV cache holds 8"):
        make_core(num_blocks=2).add_request([1], [1] * 9, max_tokens=1)
    with pytest.raises(ValueError, match="-5"):
        add([1], [1, -5], max_tokens=1)
    with pytest.raises(ValueError, match="in use"):
        add([1, 1], [1], max_tokens=1)
    with pytest.raises(ValueError, match="tokenizer"):
        add([1], [1], max_tokens=1, stop=["x"])
    with pytest.raises(ValueError, match="delivery"):
        add([1], [1], max_tokens=1, delivery="letter")  # type: ignore[arg-type]
    template = SseTemplate(b"", b"")
    with pytest.raises(ValueError, match="1 samples"):
        add([1], [1], max_tokens=1, delivery="sse", sse=[template, template])
    with pytest.raises(ValueError, match="policy"):
        make_core(policy="random")
    with pytest.raises(ValueError, match="block_size"):
        make_core(block_size=0)
    assert core.num_unfinished() == 0
    add([1], [1], max_tokens=1)
    with pytest.raises(ValueError, match="in use"):
        add([1], [1], max_tokens=1)
    small = np.zeros(Staging.required_len(**LIMITS) - 1, np.int32)
    with pytest.raises(ValueError, match="elements"):
        core.schedule(Staging(small))
    with pytest.raises(TypeError, match="int32"):
        Staging(small.astype(np.float32))
    with pytest.raises(ValueError, match="unknown"):
        core.token_ids(5)
    batch = core.schedule(Staging(np.zeros(small.size + 1, np.int32)))
    assert batch is not None
    with pytest.raises(ValueError, match="2 token ids for 1"):
        core.update(batch.step_id, np.zeros(2, np.int32))
    with pytest.raises(TypeError, match="int32"):
        core.update(batch.step_id, np.zeros(1, np.int64))
    assert core.update(batch.step_id, np.zeros(1, np.int32)) is True
    core.check_integrity()
