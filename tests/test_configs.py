"""Every experiment composes and builds; the README says what the files say."""

import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))

# The auxiliary heads and the query sources.
EXPECTED = {
    "compare": (["atss", "faster_rcnn"], {"main", "atss", "faster_rcnn"}),
    "co_deformable_r50_12e": (["atss", "faster_rcnn"], {"main", "atss", "faster_rcnn"}),
    "deformable_pp_r50_12e": ([], {"main"}),
    "demo": (["atss", "faster_rcnn"], {"main", "atss", "faster_rcnn", "denoising"}),
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
    # The official head embedding is one number per head, ours one per channel.
    assert sum(count[n] for n in ("encoder", "adapter", "queries", "decoder")) == 19698766 + 2 * (256 - 1)


def test_the_readme_shows_the_measured_tables() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from readme import filled
    finally:
        sys.path.pop(0)
    text = (ROOT / "README.md").read_text()
    assert filled(text) == text, "run `make readme`"
