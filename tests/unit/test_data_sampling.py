"""Which images an epoch shows how often: by hand, by brute force, and over many epochs."""

from collections import Counter
from collections.abc import Callable
from math import ceil, floor, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import document, write
from torch.utils.data import DataLoader

from codetr.data import sampling
from codetr.data.dataset import DetectionDataset
from codetr.data.loader import TrainLoader
from codetr.data.sampler import TrainSampler, mix_seed
from codetr.data.sampling import (
    ClassBalanced,
    Objects,
    Order,
    RepeatFactor,
    Uniform,
    batches_of_one_group,
    classes_of_images,
    cycled,
    nth_visit,
    orientations,
    repeat_factors,
    rounded,
)
from codetr.errors import UserError


class Labels:
    """A data set that has labels only: one list per image."""

    def __init__(self, *images: list[int]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key

    def objects(self) -> Objects:
        counts = [len(labels) for labels in self.images]
        return Objects(np.cumsum([0, *counts]), np.array([k for labels in self.images for k in labels], np.int64))


def long_tail(images: int, seed: int = 0, classes: int = 12) -> Labels:
    """Class k is about half as frequent as class k - 1; some images have none, some the same class several times."""
    rng = np.random.default_rng(seed)
    draw = np.minimum(rng.geometric(0.5, (images, 4)) - 1, classes - 1)
    return Labels(*(row[: rng.integers(0, 5)].tolist() for row in draw))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix_seed(1, seed))


ORDERS: dict[str, Callable[[Labels], Order]] = {
    "uniform": Uniform,
    "repeat_factor": lambda d: RepeatFactor(d, threshold=0.4, round_up=False),
    "rounded_up": lambda d: RepeatFactor(d, threshold=0.4, round_up=True),
    "class_balanced": ClassBalanced,
}


def factors_by_the_paper(data: Labels, threshold: float) -> list[float]:
    """The three steps of LVIS' appendix, one image and one class after the other."""
    sets = [set(labels) for labels in data.images]
    share = {c: sum(c in s for s in sets) / len(sets) for c in set().union(*sets)}
    of_class = {c: max(1.0, sqrt(threshold / f)) for c, f in share.items()}
    return [max((of_class[c] for c in s), default=1.0) for s in sets]


def test_repeat_factors_by_hand() -> None:
    """Of 100 images, class 0 is in 99, class 1 in 4, class 2 in 1; 0.04 / 0.01 is 4."""
    data = Labels(*[[0]] * 94, [0, 1], [0, 0, 1], [1, 0], [0, 1, 2], [0], [])
    assert repeat_factors(data, 0.04).tolist() == [1.0] * 97 + [2.0, 1.0, 1.0]
    assert repeat_factors(data, 0.16).tolist() == [1.0] * 94 + [2.0] * 3 + [4.0, 1.0, 1.0]
    assert repeat_factors(data, 0.0).tolist() == [1.0] * 100


@pytest.mark.parametrize("threshold", [0.001, 0.05, 0.4, 1.0])
def test_repeat_factors_by_brute_force(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data = long_tail(300)
    for chunk in (7, 4096):
        monkeypatch.setattr(sampling, "_CHUNK", chunk)
        assert repeat_factors(data, threshold).tolist() == pytest.approx(factors_by_the_paper(data, threshold))


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 4096])
def test_classes_of_images(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_CHUNK", chunk)
    data = long_tail(17)
    expected = [(i, c) for i, labels in enumerate(data.images) for c in sorted(set(labels))]
    assert list(zip(*(a.tolist() for a in classes_of_images(*data.objects())), strict=True)) == expected
    assert [len(a) for a in classes_of_images(*Labels([], []).objects())] == [0, 0]


def test_the_objects_of_a_coco_file_are_those_to_train_on(tmp_path: Any) -> None:
    doc = document(12)
    data = DetectionDataset(*write(tmp_path, doc))
    assert any(a["iscrowd"] for a in doc["annotations"])
    offsets, labels = data.objects()
    assert len(offsets) == 13
    for index in range(12):
        assert labels[offsets[index] : offsets[index + 1]].tolist() == data[index].labels.tolist()


@pytest.mark.parametrize("parts", [[3, 0, 9, 7, 1], [7, 7, 14], [1] * 10, [0, 0]])
def test_rounding_is_exact_on_average(parts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """All the random numbers there are, once each."""
    whole, total = 7, np.zeros(len(parts), np.int64)
    for number in range(whole):
        monkeypatch.setattr(torch, "randint", lambda *_, number=number, **__: torch.tensor(number))
        result = rounded(np.array(parts), whole, torch.Generator())
        assert all(floor(p / whole) <= r <= ceil(p / whole) for p, r in zip(parts, result, strict=True))
        assert floor(sum(parts) / whole) <= result.sum() <= ceil(sum(parts) / whole)
        total += result
    assert total.tolist() == parts


def test_cycles_and_visits_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        groups = rng.integers(0, 4, 20)
        takes = np.where(np.bincount(groups, minlength=5) > 0, rng.integers(0, 30, 5), 0)
        where = [np.flatnonzero(groups == g) for g in range(5)]
        expected = [int(where[g][n % len(where[g])]) for g in range(5) for n in range(takes[g])]
        assert cycled(groups, takes).tolist() == expected
        assert nth_visit(groups).tolist() == [groups[:n].tolist().count(g) for n, g in enumerate(groups)]


def counts(order: Order, images: int, epochs: int) -> np.ndarray:
    """How often an epoch draws each image, [epochs, images]."""
    draws = [order.draw(generator(e)) for e in range(epochs)]
    assert all(order.length <= len(d) <= order.length + 1 for d in draws)
    return np.stack([np.bincount(d, minlength=images) for d in draws])


def test_an_image_comes_r_times_on_average() -> None:
    data, epochs = long_tail(40), 3000
    order = RepeatFactor(data, threshold=0.4, round_up=False)
    expected = np.array(factors_by_the_paper(data, 0.4))
    assert order.length == floor(expected.sum())
    drawn = counts(order, 40, epochs)
    assert (drawn >= np.floor(expected)).all()
    assert (drawn <= np.ceil(expected)).all()
    part = expected % 1
    deviation = np.sqrt(part * (1 - part) / epochs)
    assert (np.abs(drawn.mean(0) - expected) <= 5 * deviation).all()
    assert deviation.max() > 0
    # Images of the same fraction are not drawn together, nor instead of one another.
    correlation = np.corrcoef((drawn - expected)[:, part > 0].T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.2


def test_rounded_up_every_epoch_is_the_same_set() -> None:
    data = long_tail(40)
    drawn = counts(RepeatFactor(data, threshold=0.4, round_up=True), 40, 5)
    assert (drawn == np.ceil(factors_by_the_paper(data, 0.4)).astype(int)).all()
    assert len({tuple(RepeatFactor(data, threshold=0.4, round_up=True).draw(generator(e))) for e in range(5)}) == 5


def test_a_threshold_is_a_fraction() -> None:
    with pytest.raises(UserError, match=r"data\.sampling\.threshold is a fraction of the images.* it is 1\.5"):
        RepeatFactor(long_tail(5), threshold=1.5, round_up=False)


def test_every_class_comes_equally_often() -> None:
    """One class per image, 30 + 7 + 2 + 1 of them and 5 without: 45 images per epoch, 45 / 4 of each class."""
    sizes = [30, 7, 2, 1]
    label = np.repeat([0, 1, 3, 4], sizes)
    drawn = counts(ClassBalanced(Labels(*[[k] for k in label], *[[]] * 5)), 45, 400)
    assert (drawn.sum(1) == 45).all()
    assert (drawn[:, 40:] == 0).all()
    for k in (0, 1, 3, 4):
        of_class = drawn[:, :40][:, label == k]
        assert set(of_class.sum(1)) == {11, 12}
        assert of_class.sum(1).mean() == pytest.approx(45 / 4, abs=0.09)  # 4 deviations of a mean of 400 draws
        assert (of_class.max(1) - of_class.min(1) <= 1).all()


def test_class_balanced_by_its_definition() -> None:
    """A class of K, then one of its n_c images: N / K times the sum of 1 / n_c, for images of several classes."""
    data, epochs = long_tail(40), 3000
    sets = [set(labels) for labels in data.images]
    images_of = Counter(c for s in sets for c in s)
    expected = np.array([40 / len(images_of) * sum(1 / images_of[c] for c in s) for s in sets])
    drawn = counts(ClassBalanced(data), 40, epochs)
    error = drawn.std(0) / sqrt(epochs)
    assert (np.abs(drawn.mean(0) - expected) <= 5 * error).all()
    assert expected.max() > 5 * expected[expected > 0].min()
    with pytest.raises(UserError, match="class_balanced needs objects"):
        ClassBalanced(Labels([], []))


def test_orientations() -> None:
    assert orientations(np.array([[480, 640], [640, 480], [500, 500], [1, 2]])).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("high", [0, 1, 3, 8, 20, 37, 40])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_of_one_group_are_fair(high: int, batch_size: int) -> None:
    """Also to a group that is smaller than a batch: every image comes as often as without groups, on average."""
    groups, epochs = (np.arange(40) >= high).astype(np.int64), 600
    visits = np.zeros((epochs, 40))
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(40)
        batches = batches_of_one_group(order, groups[order], batch_size, generator(epoch)).reshape(-1, batch_size)
        assert len(batches) == 40 // batch_size
        assert (groups[batches] == groups[batches[:, :1]]).all()
        visits[epoch] = np.bincount(batches.ravel(), minlength=40)
        for g in (0, 1):
            share = (groups == g).sum() / 40 * len(batches)
            assert floor(share) <= (groups[batches[:, 0]] == g).sum() <= ceil(share)
            mine = visits[epoch, groups == g]
            assert mine.size == 0 or mine.max() - mine.min() <= 1
    error = visits.std(0) / sqrt(epochs)
    assert (np.abs(visits.mean(0) - len(batches) * batch_size / 40) <= 5 * error + 1e-12).all()


def epoch_of(sampler: TrainSampler, epoch: int) -> list[list[tuple[int, int]]]:
    sampler.set_epoch(epoch)
    return list(sampler)


IMAGES = 53
DATA = long_tail(IMAGES)
GROUPS = np.random.default_rng(3).integers(0, 3, IMAGES).clip(max=1)


@pytest.fixture(params=[False, True], ids=["mixed", "grouped"])
def groups(request: pytest.FixtureRequest) -> np.ndarray | None:
    return GROUPS if request.param else None


@pytest.mark.parametrize("rule", ORDERS)
@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 2), (2, 4), (3, 4), (3, 1)])
def test_processes_share_an_epoch(rule: str, groups: np.ndarray | None, world: int, batch: int) -> None:
    """Equal numbers of full batches, in every epoch; groups never mix; no visit of an image is like another."""
    order = ORDERS[rule](DATA)
    samplers = [TrainSampler(order, batch, 7, rank, world, groups) for rank in range(world)]
    visits = set()
    for epoch in range(6):
        parts = [epoch_of(s, epoch) for s in samplers]
        assert {len(p) for p in parts} == {len(samplers[0])} == {order.length // (batch * world)}
        assert {len(b) for p in parts for b in p} == {batch}
        if groups is not None:
            assert {len({groups[i] for _, i in b}) for p in parts for b in p} == {1}
        keys = [key for p in parts for b in p for key in b]
        assert all(0 <= i < IMAGES for _, i in keys)
        assert len(set(keys)) == len(keys)
        assert visits.isdisjoint(keys)
        visits.update(keys)
        assert {i for v, i in keys if v == epoch} == {i for _, i in keys}
    assert len({mix_seed(7, v, i) for v, i in visits}) == len(visits)


@pytest.mark.parametrize("rule", ORDERS)
@pytest.mark.parametrize("world", [2, 3])
def test_the_split_into_processes_does_not_change_a_step(rule: str, groups: np.ndarray | None, world: int) -> None:
    """Nor, with groups, the sequence of batches: for a given number of images per process."""
    order = ORDERS[rule](DATA)
    parts = [epoch_of(TrainSampler(order, 2, 7, rank, world, groups), 1) for rank in range(world)]
    together = [batch for step in zip(*parts, strict=True) for batch in step]
    alone = epoch_of(TrainSampler(order, 2, 7, groups=groups), 1)
    indices = [[i for _, i in b] for b in together]
    assert indices == [[i for _, i in b] for b in alone][: len(together)]
    assert together == alone[: len(together)]
    if groups is None:
        whole = epoch_of(TrainSampler(order, 2 * world, 7), 1)
        assert [[key for batch in step for key in batch] for step in zip(*parts, strict=True)] == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.filterwarnings("ignore:.*os.fork")
@pytest.mark.parametrize("rule", ORDERS)
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resume_at_every_batch_with_any_number_of_workers(rule: str, groups: np.ndarray | None, workers: int) -> None:
    whole = epoch_of(TrainSampler(ORDERS[rule](DATA), 4, 7, 1, 2, groups), 2)
    for batch in range(len(whole) + 1) if workers == 0 else (0, len(whole) // 2):
        sampler = TrainSampler(ORDERS[rule](DATA), 4, 7, 1, 2, groups)
        sampler.resume(2, batch)
        sampler.set_epoch(2)
        loader = DataLoader(DATA, batch_sampler=sampler, num_workers=workers, collate_fn=list)
        assert list(loader) == whole[batch:]
        assert len(loader) == len(whole)
        assert len(epoch_of(sampler, 3)) == len(whole)


def test_orders_differ_between_seeds_epochs_and_rules() -> None:
    orders = [
        tuple(key for batch in epoch_of(TrainSampler(build(DATA), 4, seed, groups=g), epoch) for key in batch)
        for build in ORDERS.values()
        for g in (None, GROUPS)
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == len(orders)


def loader(order: Order, groups: np.ndarray | None = None) -> TrainLoader:
    sampler = TrainSampler(order, 4, 7, groups=groups)
    return TrainLoader(DATA, sampler, size_divisor=1, num_workers=0, pin_memory=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ((Uniform(DATA), None), (ClassBalanced(DATA), None), "sampling uniform -> class_balanced"),
        ((ORDERS["repeat_factor"](DATA), None), (Uniform(DATA), None), "sampling repeat_factor -> uniform"),
        ((ORDERS["repeat_factor"](DATA), None), (ORDERS["rounded_up"](DATA), None), "round_up False -> True"),
        (
            (ORDERS["repeat_factor"](DATA), None),
            (RepeatFactor(DATA, threshold=0.41, round_up=False), None),
            r"threshold 0\.4 -> 0\.41",
        ),
        ((Uniform(DATA), None), (Uniform(DATA), GROUPS), "batches_of_one_group None -> 4"),
    ],
)
def test_another_order_in_mid_epoch_is_refused(before: Any, after: Any, message: str) -> None:
    state = {**loader(*before).state_dict(), "images": 12}
    loader(*before).load_state_dict(state)
    with pytest.raises(UserError, match=f"in the middle of epoch 0.*{message}"):
        loader(*after).load_state_dict(state)
    loader(*after).load_state_dict({**state, "images": 10**6})


@pytest.mark.parametrize("rule", ORDERS)
@pytest.mark.parametrize("grouped", [False, True])
def test_other_processes_and_batches_see_the_rest_in_the_same_order(rule: str, grouped: bool) -> None:
    """Twelve images seen by 3 processes with batches of 2; every other split of the steps goes on with the 13th."""
    groups = GROUPS if grouped else None

    def loaders(batch_size: int, world: int) -> list[TrainLoader]:
        samplers = [TrainSampler(ORDERS[rule](DATA), batch_size, 7, rank, world, groups) for rank in range(world)]
        return [TrainLoader(DATA, s, size_divisor=1, num_workers=0, pin_memory=False) for s in samplers]  # type: ignore

    state = {**loaders(2, 3)[0].state_dict(), "images": 12}
    whole = [
        key for keys in epoch_of(TrainSampler(ORDERS[rule](DATA), 1 + grouped, 7, groups=groups), 0) for key in keys
    ]
    for batch_size, world in [(2, 1), (2, 2), (2, 6), *([] if grouped else [(1, 1), (4, 1), (1, 4), (6, 2), (3, 4)])]:
        parts = loaders(batch_size, world)
        for part in parts:
            part.load_state_dict(state)
        steps = zip(*(list(part.batch_sampler) for part in parts), strict=True)
        rest = [key for step in steps for keys in step for key in keys]
        assert rest == whole[12 : 12 + len(rest)]
        assert 12 + len(rest) == len(parts[0].batch_sampler) * batch_size * world
    if grouped:
        with pytest.raises(UserError, match="batches_of_one_group 2 -> 4"):
            loaders(4, 1)[0].load_state_dict(state)
