"""Every combination of a detector's parts takes a training step, in which every parameter has a gradient, or is
refused with a sentence when it is built."""

import itertools
import random
import re
from collections.abc import Iterator

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from codetr import failure
from codetr.types import Frames, Targets
from toy_model import SIZES

SMALL = ("model/backbone=resnet10_small", "model.num_classes=3", *SIZES, "model.detector.main.num_queries=6")
POSITION = "model/position@model.detector.decoder.query_position="
MAIN_QUERIES = "model/query@model.detector.main="
ATTENTION = "model/cross_attention@model.detector.decoder.layer.cross_attention="
SOURCE = "+model/query@model.detector.queries"
# Each choice is a list of options, each a list of overrides; an empty one keeps what the model has.
Choices = list[list[list[str]]]
MODELS = [
    [f"model={name}"]
    for name in (
        "conditional_detr_tiny",
        "dab_detr",
        "dn_detr",
        "deformable_detr",
        "deformable_detr_refine",
        "deformable_detr_two_stage",
        "dab_deformable_detr",
        "dn_deformable_detr",
        "deformable_pp",
        "h_deformable",
        "dino",
        "co_deformable_tiny",
    )
]
PARTS: Choices = [
    MODELS,
    [
        [],
        *([MAIN_QUERIES + kind] for kind in ("learned", "two_stage")),
        *([MAIN_QUERIES + "learned", f"model.detector.main.content={content}"] for content in ("zeros", "shared")),
        [MAIN_QUERIES + "two_stage", "model.detector.main.class_agnostic=false"],
        [MAIN_QUERIES + "two_stage", "model.detector.main.mixed_selection=false"],
    ],
    [[], *([POSITION + rule] for rule in ("given", "reference", "conditional", "modulated"))],
    [[], ["model.indicator=true"], ["model.detector.collaborative=null"], ["model/auxiliary_head=[atss]"]],
    [[], [ATTENTION + "conditional"], [ATTENTION + "deformable"]],
    [[], ["model/encoder@model.detector.encoder=dense"], ["model/encoder@model.detector.encoder=deformable"]],
]
TRAINING: Choices = [
    MODELS,
    [
        [],
        [SOURCE + ".extra=denoising"],
        [SOURCE + ".extra=dn"],
        [SOURCE + ".extra=hybrid", "model.detector.queries.extra.num_queries=5"],
    ],
    [
        ["model/auxiliary_head=[]"],
        *([f"model/auxiliary_head=[{head}]"] for head in ("faster_rcnn_small", "mask_rcnn_small", "faster_rcnn")),
        *([f"model/auxiliary_head=[{head}]"] for head in ("faster_rcnn_convfc", "mask_rcnn", "atss", "retinanet")),
        *([f"model/auxiliary_head=[{head}]"] for head in ("fcos", "paa", "gfl")),
    ],
    [[f"criterion={name}"] for name in ("focal", "quality_focal", "varifocal")],
    [[], *([f"model.detector.decoder.update={name}"] for name in ("keep", "refine", "look_forward_twice"))],
    [["model.query_groups=1"], ["model.query_groups=2"]],
]


def pairwise(choices: Choices) -> Iterator[list[str]]:
    """Overrides of combinations in which any two options of two choices meet at least once, drawn greedily."""
    rng = random.Random(0)
    sizes = [len(options) for options in choices]
    pairs = list(itertools.combinations(range(len(sizes)), 2))
    missing = {(i, a, j, b) for i, j in pairs for a in range(sizes[i]) for b in range(sizes[j])}
    while missing:
        i, a, j, b = rng.choice(sorted(missing))
        drawn = [[rng.randrange(size) for size in sizes] for _ in range(30)]
        for one in drawn:
            one[i], one[j] = a, b
        best = max(drawn, key=lambda one: sum(one[p] == x and one[q] == y for p, x, q, y in missing))
        missing -= {(p, best[p], q, best[q]) for p, q in pairs}
        yield [o for options, chosen in zip(choices, best, strict=True) for o in options[chosen]]


def outcome(overrides: list[str]) -> str:
    """'' after a step with a gradient for every parameter, or the sentence of the refusal. All else is raised."""
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", [*overrides, *SMALL])
    if config.model.num_levels == 1:
        config.model.detector.backbone.out_indices = [4]
    try:
        detector = instantiate(config.model.detector, _convert_="all")
        criterion = instantiate(config.criterion, _convert_="all")
    except InstantiationException as error:
        refusal = failure.refusal(error)
        if refusal is None:
            raise
        return str(refusal)
    step(detector, criterion)
    return ""


def step(detector: torch.nn.Module, criterion: torch.nn.Module) -> None:
    size = 64
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    box, one = torch.tensor([[[0.5, 0.5, 0.4, 0.4]]]), torch.ones(1, 1, dtype=torch.long)
    targets = Targets(box, one, one.bool(), Frames.unscaled(torch.full((1, 2), float(size))))
    targets.masks = torch.ones(1, 1, size, size, dtype=torch.bool)
    losses = criterion(detector(images, torch.zeros(1, size, size, dtype=torch.bool), targets), targets)
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    total.backward()
    silent = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent, f"no gradient: {silent}"


@pytest.mark.parametrize("choices", [PARTS, TRAINING], ids=["parts", "training"])
@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_combination_trains_or_is_refused(choices: Choices, part: int) -> None:
    """The first dozen, or the rest."""
    every = list(pairwise(choices))
    for overrides in every[:12] if part == 0 else every[12:]:
        try:
            refused = outcome(overrides)
        except Exception as error:
            raise AssertionError(f"{' '.join(overrides)}: neither a step nor a refusal") from error
        assert refused == "" or "model." in refused


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model=deformable_pp", SOURCE + ".extra=denoising"], "denoising queries bring boxes alone"),
        (["model=dn_detr", "model.detector.queries.denoising.indicator=false"], r"set model\.indicator alone"),
        (["model=dino", "model.indicator=true"], r"denoising\.indicator=True: .* which learned ones can"),
        (["model=deformable_detr", SOURCE + ".extra=collaborative"], r"queries\.extra: .*heads has none"),
        (["model=deformable_pp", MAIN_QUERIES + "learned"], "reference_head=null: the query sources main"),
        (["model=deformable_detr", POSITION + "reference"], "nothing is left for it to predict"),
    ],
)
def test_a_refusal_says_what_does_not_fit(overrides: list[str], sentence: str) -> None:
    assert re.search(sentence, outcome(overrides))
