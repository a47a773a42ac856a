"""The detector of toy size that tests share, composed from conf/ as the entry points do."""

from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig

from codetr.models.detector import Detector

SIZES = (  # of any model
    "model.width=32",
    "model.num_heads=2",
    "model.ffn_width=32",
    "model.norm_groups=4",
    "model.detector.encoder.num_layers=1",
    "model.detector.decoder.num_layers=2",
    "model.detector.main.num_queries=10",
)
TOY = ("model=co_deformable_tiny", *SIZES, "model.detector.backbone.pretrained=false")
NARROW = "model.detector.backbone.arguments.channels=[8,16,32,32]"  # a ResNet's stages


def compose(*overrides: str) -> DictConfig:
    with initialize_config_module("codetr.conf", version_base="1.3"):
        return hydra_compose("train", [*TOY, *overrides])


def detector(class_names: Sequence[str], *overrides: str) -> Detector:
    config = compose(f"model.num_classes={len(class_names)}", *overrides)
    return instantiate(config.model.detector, _convert_="all")
