"""Every experiment composes and builds; the README says what the files say."""

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from codetr.types import Frames, Targets
from toy_model import SIZES

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))

# The auxiliary heads and the query sources.
EXPECTED = {
    "compare": (["atss", "faster_rcnn"], {"main", "atss", "faster_rcnn"}),
    "compare_groups": ([], {"main"}),
    "compare_mixtures": (["atss", "faster_rcnn"], {"main", "atss", "faster_rcnn"}),
    "conditional_detr_r50": ([], {"main"}),
    "dab_deformable_detr_r50": ([], {"main"}),
    "dab_detr_r50": ([], {"main"}),
    "deformable_detr_r50": ([], {"main"}),
    "dino_r50_12e": ([], {"main", "denoising"}),
    "dn_deformable_detr_r50": ([], {"main", "denoising"}),
    "dn_detr_r50": ([], {"main", "denoising"}),
    "h_deformable_r50_12e": ([], {"main", "hybrid"}),
    "co_deformable_r50_12e": (["atss", "faster_rcnn"], {"main", "atss", "faster_rcnn"}),
    "deformable_pp_r50_12e": ([], {"main"}),
    "demo": (["atss", "faster_rcnn"], {"main", "atss", "faster_rcnn", "denoising"}),
    "mask2former_r50": ([], {"main"}),
    "trees": (["atss", "faster_rcnn"], {"main", "atss", "faster_rcnn", "denoising"}),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_builds_at_full_size(experiment: str) -> None:
    overrides = [f"experiment={experiment}", "model.num_classes=80", "model.detector.backbone.pretrained=false"]
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", overrides)
    with torch.device("meta"):
        detector = instantiate(config.model.detector, _convert_="all")
        instantiate(config.criterion)
    heads, sources = EXPECTED[experiment]
    assert sorted(detector.heads) == heads
    assert set(detector.queries) == sources


def test_co_deformable_r50_has_the_official_number_of_parameters() -> None:
    """Counted in the official model of the same name, by its modules; BatchNorm's are buffers here."""
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose(
            "train",
            ["experiment=co_deformable_r50_12e", "model.num_classes=80", "model.detector.backbone.pretrained=false"],
        )
    with torch.device("meta"):
        detector = instantiate(config.model.detector, _convert_="all")
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in detector.named_children()}
    heads = {name: sum(p.numel() for p in head.parameters()) for name, head in detector.heads.items()}
    assert count["neck"] == 5638144
    assert heads == {"atss": 1376602, "faster_rcnn": 601645 + 14306705}
    assert sum(count[n] for n in ("encoder", "adapter", "queries", "decoder")) == 19698766


def test_the_worked_example_of_contributing_trains(tmp_path: Path) -> None:
    """Its file, in a folder of one's own, is a detector: at full size, and for one step in small."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"<!-- example: h_dino -->\n```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "h_dino.yaml").write_text(example)
    overrides = ["experiment=dino_r50_12e", "model=h_dino", "model.num_classes=3", f"hydra.searchpath=[{tmp_path}]"]
    small = [*SIZES, "model/backbone=resnet10_small"]
    for extra in (["model.detector.backbone.pretrained=false"], small):
        with initialize_config_module("codetr.conf", version_base="1.3"):
            config = compose("train", [*overrides, *extra])
        with torch.device("meta" if extra is not small else "cpu"):
            detector = instantiate(config.model.detector, _convert_="all")
        assert list(detector.queries) == ["main", "group_2", "denoising", "hybrid"]
    images, padding = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 64, 64, dtype=torch.bool)
    one = torch.ones(1, 1, dtype=torch.long)
    targets = Targets(torch.full((1, 1, 4), 0.5), one, one.bool(), Frames.unscaled(torch.full((1, 2), 64)))
    losses = instantiate(config.criterion)(detector(images, padding, targets), targets)
    torch.stack(list(losses.values())).sum().backward()
    assert {name.split("/")[0] for name in losses} == set(detector.queries)
    assert all(p.grad is not None for p in detector.parameters())


def test_two_heads_of_one_kind() -> None:
    """As docs/detectors.md adds them: each with weights and queries of its own."""
    overrides = ["model=co_deformable_tiny", "model/auxiliary_head=[atss]", "model.num_classes=3"]
    overrides += ["+model/auxiliary_head@model.detector.heads.second=atss", "model.detector.heads.second.num_convs=2"]
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", overrides)
    detector = instantiate(config.model.detector, _convert_="all")
    one = torch.zeros(1, 1, dtype=torch.long)
    targets = Targets(torch.full((1, 1, 4), 0.5), one, one == 0, Frames.unscaled(torch.full((1, 2), 64)))
    output = detector(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 64, 64).bool(), targets)
    assert list(output.groups) == ["main", "atss", "second"]
    assert output.head_losses["atss"]["class"] != output.head_losses["second"]["class"]


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["model.detector.collaborative.weight=0.5"], {"faster_rcnn": 0.5, "atss": 0.5}),
        (["model.detector.collaborative=null"], {}),
        (["+model.detector.queries.atss=null"], {"faster_rcnn": 1.0}),
        (
            ["+model/query@model.detector.queries.atss=collaborative", "model.detector.queries.atss.weight=0.5"],
            {"faster_rcnn": 1.0, "atss": 0.5},
        ),
    ],
)
def test_the_groups_of_the_heads(overrides: list[str], weights: dict[str, float]) -> None:
    """One for each, from one place; none; or a head's own."""
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", ["model=co_deformable_tiny", "model.num_classes=3", *overrides])
    with torch.device("meta"):
        detector = instantiate(config.model.detector, _convert_="all")
    assert list(detector.heads) == ["faster_rcnn", "atss"]
    assert {name: source.weight for name, source in detector.queries.items() if name != "main"} == weights
    assert all(detector.queries[name].head == name for name in weights)
