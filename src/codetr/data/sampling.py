"""How often an epoch shows which image: `Uniform`, `RepeatFactor`, `ClassBalanced`; and batches of one orientation.

Each order is built from the data set once, in numpy, and draws an epoch's list of image indices from a generator.
Wherever a fraction must become a number of images it is rounded by `rounded`, which makes two promises at once: the
expected number of visits of every image is the exact fraction, and all epochs are equally long.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from codetr.errors import UserError

_ONE = 2**32  # fixed point: fractions are sums of integers, the same on every machine
_CHUNK = 4096  # images


class Objects(NamedTuple):
    """Object j of image i has label labels[offsets[i] + j]. offsets: [images + 1]; labels: [objects]."""

    offsets: np.ndarray
    labels: np.ndarray


class Labelled(Sized, Protocol):
    """A data set that knows the labels of its images without reading them."""

    def objects(self) -> Objects: ...


class Order(Protocol):
    """The images of an epoch.

    length: of every epoch.
    key: name and numbers of the rule.
    draw: at least `length` indices in random order, images may repeat; what exceeds `length` is a random choice.
    """

    length: int

    @property
    def key(self) -> dict[str, Any]: ...

    def draw(self, generator: torch.Generator) -> np.ndarray: ...


class Uniform:
    """Every image once."""

    def __init__(self, dataset: Sized) -> None:
        self.length = len(dataset)

    @property
    def key(self) -> dict[str, Any]:
        return {"sampling": "uniform"}

    def draw(self, generator: torch.Generator) -> np.ndarray:
        return permutation(self.length, generator)


class RepeatFactor:
    """Image i r_i times: r_i = max over its classes c of max(1, sqrt(threshold / f_c)).

    f_c is the fraction of images that contain class c. The whole part of r_i is kept, its fraction is drawn anew for
    every epoch; an epoch has floor(sum r_i) images. Images without objects: r_i = 1. round_up: ceil(r_i) times in
    every epoch, as mmdetection's `ClassBalancedDataset`. Source: Gupta et al. 2019 (LVIS), appendix B.2.
    """

    def __init__(self, dataset: Labelled, *, threshold: float, round_up: bool) -> None:
        if not 0 <= threshold <= 1:
            raise UserError(f"data.sampling.threshold is a fraction of the images, from 0 to 1, but it is {threshold}")
        self.threshold, self.round_up = threshold, round_up
        self.factors = repeat_factors(dataset, threshold)
        factors = np.ceil(self.factors) if round_up else self.factors
        self._whole = factors.astype(np.int64)
        self._fraction = np.rint((factors - self._whole) * _ONE).astype(np.int64)
        self.length = int(self._whole.sum() + self._fraction.sum() // _ONE)

    @property
    def key(self) -> dict[str, Any]:
        return {"sampling": "repeat_factor", "threshold": self.threshold, "round_up": self.round_up}

    def draw(self, generator: torch.Generator) -> np.ndarray:
        # `rounded` couples neighbours: in a random order, they are others in every epoch.
        images = permutation(len(self._whole), generator)
        repeats = self._whole[images] + rounded(self._fraction[images], _ONE, generator)
        order = images.repeat(repeats)
        return order[permutation(len(order), generator)]


class ClassBalanced:
    """Every class that occurs equally often: a class uniformly, then an image that contains it uniformly.

    An image comes again for a class only after all others that contain it. Images without objects never come. An
    epoch has as many images as the data set. Source: class-aware sampling of Shen et al. 2016, section 3.2;
    "class-balanced" of Kang et al. 2020, section 3. (`ClassBalancedDataset` of mmdetection is `RepeatFactor`.)
    """

    def __init__(self, dataset: Labelled) -> None:
        self.length = len(dataset)
        self._images, self._classes = classes_of_images(*dataset.objects())
        self._present = np.bincount(self._classes) > 0
        if not self._present.any():
            raise UserError("data/sampling=class_balanced needs objects, and the training set has none")

    @property
    def key(self) -> dict[str, Any]:
        return {"sampling": "class_balanced"}

    def draw(self, generator: torch.Generator) -> np.ndarray:
        pairs = permutation(len(self._images), generator)
        # A random order, so that no two classes get their rounded share together in every epoch.
        share = np.zeros(len(self._present), np.int64)
        present = np.flatnonzero(self._present)
        present = present[permutation(len(present), generator)]
        share[present] = rounded(np.full(len(present), self.length), len(present), generator)
        order = self._images[pairs[cycled(self._classes[pairs], share)]]
        return order[permutation(len(order), generator)]


def repeat_factors(dataset: Labelled, threshold: float) -> np.ndarray:
    """r_i of every image, [images] float64 (see `RepeatFactor`)."""
    images, classes = classes_of_images(*dataset.objects())
    frequency = np.bincount(classes) / len(dataset)
    with np.errstate(divide="ignore", invalid="ignore"):  # classes without images, which no image asks for
        of_class = np.maximum(1, np.sqrt(threshold / frequency))
    factors = np.ones(len(dataset))
    np.maximum.at(factors, images, of_class[classes])
    return factors


def classes_of_images(offsets: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (image, class), each once, in ascending order: two arrays of int32.

    By a table of some thousand images at a time: sorting the objects takes twenty times as long, and several times
    the memory of the labels.
    """
    num_classes = int(labels.max(initial=-1)) + 1
    images, classes = [], []
    for first in range(0, len(offsets) - 1, _CHUNK):
        bounds = np.asarray(offsets[first : first + _CHUNK + 1])
        rows = np.arange(len(bounds) - 1).repeat(np.diff(bounds))
        present = np.zeros((len(bounds) - 1) * num_classes, bool)
        present[rows * num_classes + labels[bounds[0] : bounds[-1]]] = True
        image, label = np.divmod(np.flatnonzero(present), max(num_classes, 1))
        images.append((image + first).astype(np.int32))
        classes.append(label.astype(np.int32))
    empty = np.zeros(0, np.int32)
    return np.concatenate([empty, *images]), np.concatenate([empty, *classes])


def orientations(sizes: np.ndarray) -> np.ndarray:
    """1 for images that are wider than high, else 0. sizes: [images, 2], height and width. Returns [images]."""
    return (sizes[:, 1] > sizes[:, 0]).astype(np.int64)


def batches_of_one_group(
    order: np.ndarray, groups: np.ndarray, batch_size: int, generator: torch.Generator
) -> np.ndarray:
    """`order` rearranged into len(order) // batch_size batches, one after another, each of one group.

    groups: of each entry of `order`. Every group gets the number of batches that is its share, rounded so that every
    image is as likely to come as without groups: rounded down, some of the group's images are left out this time;
    rounded up, the last batch is completed with images of the group that came already. A group with fewer images than
    a batch has fills one now and then, on its own.
    """
    count = len(order) // batch_size
    batches = rounded(np.bincount(groups) * count, len(order), generator)
    order = order[cycled(groups, batches * batch_size)].reshape(count, batch_size)
    return order[permutation(count, generator)].reshape(-1)


def rounded(parts: np.ndarray, whole: int, generator: torch.Generator) -> np.ndarray:
    """parts / whole, each rounded up with the probability of its fraction, else down; their sum is rounded as well.

    One random number for all (systematic sampling): the running sums are rounded, and their differences taken.
    parts: [n] int64, not negative.
    """
    offset = int(torch.randint(whole, (), generator=generator))
    return np.diff((np.cumsum(parts) + offset) // whole, prepend=0)


def cycled(groups: np.ndarray, takes: np.ndarray) -> np.ndarray:
    """Positions in `groups`: of each group g the first takes[g] that hold it, from the start again where these end."""
    counts = np.bincount(groups, minlength=len(takes))
    positions = np.argsort(groups.astype(np.min_scalar_type(len(takes))), kind="stable")  # small numbers sort faster
    nth = np.arange(takes.sum()) - (np.cumsum(takes) - takes).repeat(takes)
    return positions[(np.cumsum(counts) - counts).repeat(takes) + nth % counts.repeat(takes)]


def nth_visit(order: np.ndarray) -> np.ndarray:
    """How many times each entry of `order` came before: all 0 where nothing repeats."""
    positions = np.argsort(order, kind="stable")
    counts = np.bincount(order)
    nth = np.empty_like(positions)
    nth[positions] = np.arange(len(order)) - (np.cumsum(counts) - counts).repeat(counts)
    return nth


def permutation(length: int, generator: torch.Generator) -> np.ndarray:
    return torch.randperm(length, generator=generator).numpy()
