"""Meshes: shards that meet at every exchange compute what one does alone, and fail together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.config import EngineConfig
from octavo.runner.eager import EagerRunner
from octavo.runner.lockstep import LockstepExchange
from octavo.runner.mesh import Exchange, Mesh, NoExchange, ranks_of
from toy_shards import assert_same, generate_with, load_toy


def test_two_shards_choose_the_tokens_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_with(EagerRunner, NoExchange(), tmp_path, monkeypatch)
    assert len({tuple(output.outputs[0].token_ids) for output in expected}) == len(expected)
    found = generate_with(EagerRunner, LockstepExchange(2), tmp_path, monkeypatch)
    assert_same(found, expected)


def test_each_shard_holds_its_heads_keys_and_values() -> None:
    config = EngineConfig(model="toy", device="cpu", attention_backend="reference", block_size=4)
    alone = EagerRunner(load_toy(config, NoExchange()))
    split = EagerRunner(load_toy(config, LockstepExchange(2)))
    assert split.num_blocks == alone.num_blocks
    assert [shard.kv_caches[0][0].shape[1] for shard in split.mesh.shards] == [1, 1]
    assert dict(split.memory()) == dict(alone.memory())
    split.warm_up()


# ------------------------------------------------------------------------------------ exchanges


def run(exchange: Exchange, program: Callable[[int], Any]) -> list[Any]:
    return Mesh(range(exchange.size), exchange).each(program)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_rank_gets_the_same_sum_and_may_change_it(size: int) -> None:
    exchange = LockstepExchange(size)

    def program(rank: int) -> list[list[float]]:
        seen = []
        for step in range(4):
            total = exchange.all_reduce(torch.tensor([rank + 1.0, float(step)]), rank)
            seen.append(total.tolist())
            total.fill_(-1e9)
        return seen

    total = size * (size + 1) / 2
    expected = [[total, float(step * size)] for step in range(4)]
    assert run(exchange, program) == [expected] * size


def test_sums_are_in_float32_and_gathers_in_the_ranks_order() -> None:
    exchange = LockstepExchange(3)
    # In bfloat16 the ones would be lost one by one.
    values = [256.0, 1.0, 1.0]

    def program(rank: int) -> tuple[float, list[list[int]]]:
        tensor = torch.tensor([values[rank]], dtype=torch.bfloat16)
        exchange.barrier(rank)
        total = exchange.all_reduce(tensor, rank)
        assert total.dtype is torch.bfloat16
        return float(total), exchange.gather(torch.tensor([[rank], [10 * rank]]), 3, rank).tolist()

    assert run(exchange, program) == [(258.0, [[0, 1, 2], [0, 10, 20]])] * 3


def test_only_one_rank_runs_at_a_time_in_turns() -> None:
    exchange = LockstepExchange(3)
    log: list[tuple[int, int]] = []

    def program(rank: int) -> None:
        for step in range(3):
            log.append((step, rank))
            exchange.barrier(rank)

    run(exchange, program)
    assert log == [(step, rank) for step in range(3) for rank in range(3)]


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_rank_that_fails_ends_the_others_and_the_mesh_goes_on(failing: int, at: int) -> None:
    exchange = LockstepExchange(3)

    def program(rank: int) -> Tensor:
        total = torch.zeros(1)
        for step in range(2):
            if (rank, step) == (failing, at):
                raise MemoryError(f"rank {rank}")
            total = exchange.all_reduce(torch.ones(1), rank)
        if at == 2 and rank == failing:
            raise MemoryError(f"rank {rank}")
        return total

    with pytest.raises(MemoryError, match=f"rank {failing}"):
        run(exchange, program)
    assert run(exchange, lambda rank: float(exchange.all_reduce(torch.ones(1), rank))) == [3.0] * 3


@pytest.mark.parametrize(
    "counts", [(1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 1, 1), (1, 2, 1), (0, 0, 1)]
)
def test_ranks_that_exchange_unequally_often_are_an_error(counts: tuple[int, ...]) -> None:
    exchange = LockstepExchange(3)

    def program(rank: int) -> None:
        for _ in range(counts[rank]):
            exchange.barrier(rank)

    with pytest.raises(RuntimeError, match="exchange"):
        run(exchange, program)


def test_one_rank_exchanges_nothing() -> None:
    [rank] = ranks_of(NoExchange())
    tensor = torch.ones(2)
    assert rank.reduce(tensor) is tensor
    assert rank.gather(tensor, 2) is tensor
    assert (rank.rank, rank.size) == (0, 1)


def test_a_mesh_has_a_shard_for_each_rank() -> None:
    with pytest.raises(ValueError, match="2 shards"):
        Mesh([1, 2], NoExchange())
    with pytest.raises(ValueError, match="two ranks or more"):
        LockstepExchange(1)
