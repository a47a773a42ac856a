"""Random subsets: always subsets, always as many as possible, uniformly drawn, reproducible."""

import torch

from codetr.assign.sampling import pack, sample, sample_both
from fixed_draws import fixed_draws


def test_as_many_as_possible_and_no_more() -> None:
    mask = torch.rand(6, 50) < torch.tensor([0, 0.05, 0.3, 0.6, 0.9, 1])[:, None]
    members = mask.sum(1)
    for count in (0, 7, 50, 80, torch.tensor([3, 0, 50, 7, 100, 1])):
        chosen = sample(mask, count)
        assert not (chosen & ~mask).any()
        assert torch.equal(chosen.sum(1), members.clamp(max=count))


def test_keys_decide_as_a_permutation_of_the_members_would() -> None:
    mask = torch.rand(4, 200) < 0.5
    with fixed_draws(lambda rank: rank * 7919 % 104729):
        chosen = sample(mask, 20)
        assert torch.equal(chosen, sample(mask, torch.full((4,), 20)))
    for row, members in zip(chosen, mask, strict=True):
        places = members.nonzero()[:, 0]
        permutation = (torch.arange(len(places)) * 7919 % 104729).argsort()
        assert torch.equal(row.nonzero()[:, 0], places[permutation[:20]].sort().values)


def test_every_member_is_drawn_equally_often() -> None:
    mask = torch.tensor([True, False] * 10).expand(4000, -1)
    share = sample(mask, 3).float().mean(0)
    deviation = (0.3 * 0.7 / 4000) ** 0.5
    assert (share[::2] - 0.3).abs().max() < 5 * deviation
    assert share[1::2].sum() == 0


def test_follows_the_global_seed() -> None:
    mask = torch.ones(2, 100).bool()
    torch.manual_seed(7)
    first = sample(mask, 10)
    second = sample(mask, 10)
    torch.manual_seed(7)
    assert torch.equal(first, sample(mask, 10))
    assert not torch.equal(first, second)


def test_negatives_fill_up_and_packing_keeps_order() -> None:
    kind = torch.randint(0, 3, (8, 60))
    kind[0] = 0
    kind[1, 2:] = 0
    positive, negative = sample_both(kind == 1, kind == 2, 5, 20)
    expected = (kind == 1).sum(1).clamp(max=5)
    assert torch.equal(positive.sum(1), expected)
    assert torch.equal(negative.sum(1), (kind == 2).sum(1).minimum(20 - expected))
    index, valid = pack(positive, negative, 20)
    for row in range(8):
        members = positive[row].nonzero()[:, 0].tolist() + negative[row].nonzero()[:, 0].tolist()
        assert index[row, valid[row]].tolist() == members
        assert valid[row].sum() == len(members)
