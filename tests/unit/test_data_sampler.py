"""Partitions, equal lengths and the order after a resume, by brute force over small sizes."""

import numpy as np
import pytest

from codetr.data.sampler import EvalSampler, TrainSampler, mix_seed
from codetr.data.sampling import Uniform


@pytest.mark.parametrize("length", [6, 7, 12, 25])
@pytest.mark.parametrize(("world", "batch"), [(1, 1), (1, 4), (2, 3), (3, 2)])
def test_training_visits_each_image_at_most_once_in_equal_parts(length: int, world: int, batch: int) -> None:
    samplers = [TrainSampler(Uniform(range(length)), batch, seed=5, rank=r, world_size=world) for r in range(world)]
    for epoch in range(4):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = [list(s) for s in samplers]
        assert [len(b) for b in batches] == [len(s) for s in samplers] == [length // (world * batch)] * world
        keys = [key for rank in batches for b in rank for key in b]
        assert {len(b) for rank in batches for b in rank} == {batch}
        assert {epoch} == {e for e, _ in keys}
        assert len({i for _, i in keys}) == len(keys) == length - length % (world * batch)


def test_the_split_into_processes_does_not_change_a_step() -> None:
    alone = list(TrainSampler(Uniform(range(29)), 6, seed=1))
    ranks = [list(TrainSampler(Uniform(range(29)), 2, seed=1, rank=r, world_size=3)) for r in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("grouped", [False, True])
def test_accumulated_batches_are_those_of_as_many_processes(grouped: bool) -> None:
    """And, without groups, of one batch of all."""
    groups = np.arange(29) % 3 // 2 if grouped else None

    def sampler(batch: int, rank: int = 0, world: int = 1) -> list[list[tuple[int, int]]]:
        return list(TrainSampler(Uniform(range(29)), batch, seed=1, rank=rank, world_size=world, groups=groups))

    alone = sampler(2)
    steps = [[key for keys in alone[n : n + 4] for key in keys] for n in range(0, 12, 4)]  # of four batches
    ranks = [sampler(2, rank, 4) for rank in range(4)]
    assert steps == [[*a, *b, *c, *d] for a, b, c, d in zip(*ranks, strict=True)]
    assert grouped or steps == sampler(8)


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = TrainSampler(Uniform(range(50)), 1, seed)
        sampler.set_epoch(epoch)
        return tuple(i for ((_, i),) in sampler)

    orders = {(s, e): order(s, e) for s in range(5) for e in range(5)}
    assert len(set(orders.values())) == 25
    assert order(3, 4) == orders[3, 4]
    left_out = {tuple(set(range(7)) - {i for b in _epoch(7, 2, e) for _, i in b}) for e in range(200)}
    assert len(left_out) == 7


def _epoch(length: int, batch: int, epoch: int) -> list[list[tuple[int, int]]]:
    sampler = TrainSampler(Uniform(range(length)), batch, seed=0)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("batch", range(6))
def test_a_resumed_epoch_is_the_rest_and_the_next_is_whole(batch: int) -> None:
    sampler = TrainSampler(Uniform(range(23)), 2, seed=9, rank=1, world_size=2)
    sampler.resume(epoch=2, batch=batch)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        fresh = TrainSampler(Uniform(range(23)), 2, seed=9, rank=1, world_size=2)
        fresh.set_epoch(epoch)
        assert list(sampler) == list(fresh)[batch if epoch == 2 else 0 :]
        assert len(sampler) == 5


@pytest.mark.parametrize("length", [1, 2, 7, 12])
@pytest.mark.parametrize(("world", "batch"), [(1, 1), (1, 5), (3, 2), (4, 3)])
def test_evaluation_visits_every_image_in_equally_many_batches(length: int, world: int, batch: int) -> None:
    """Each exactly once, but for the first one, with which processes fill up that have too few images."""
    samplers = [EvalSampler(length, batch, rank, world) for rank in range(world)]
    expected = -(-length // (world * batch))
    seen = []
    for rank, sampler in enumerate(samplers):
        batches = [[i for _, i in keys] for keys in sampler]
        assert len(batches) == len(sampler) == expected
        assert all(0 < len(b) <= batch for b in batches)
        fillers = [b for b in batches if rank and b == [0]]
        assert batches[len(batches) - len(fillers) :] == fillers
        own = [i for b in batches[: len(batches) - len(fillers)] for i in b]
        assert own == sorted(own)
        seen += own
    assert sorted(seen) == list(range(length))


def test_mixed_seeds_differ_and_fit_the_generator() -> None:
    seeds = {mix_seed(s, e, i) for s in range(8) for e in range(8) for i in range(-1, 64)}
    assert len(seeds) == 8 * 8 * 65
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
