"""What every row of the papers says and costs: its recipe, parameters, multiply-adds in training and at inference.

Multiply-adds are of the forward pass for one image with COCO's mean number of objects, counted by PyTorch's counter and
for deformable attention by the samples that it reads. Backbone and encoder are counted without memory; what depends on
the targets really runs, with random weights.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.progress import track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from codetr.derived import read_needed_masks
from codetr.models.detector import Detector
from codetr.papers import composed, load_rows
from codetr.papers.recipe import recipe
from codetr.types import Frames, Targets

HEIGHT, WIDTH, OBJECTS = 800, 1333, 7
CORNERS = 4  # cells that a bilinear sample is made of


def sampled(value: Any, *rest: Any, **_: Any) -> int:
    """Twice the multiply-adds of deformable attention, as the counter counts: every channel of every sample is a sum of
    four cells, which is weighed once more."""
    _, _, _, logits, *_ = rest
    batch, queries, heads, levels, points = logits
    return 2 * batch * queries * heads * levels * points * value[-1] * (CORNERS + 1)


class Stub(nn.Module):
    """Features of a backbone that is not asked."""

    def __init__(self, backbone: nn.Module, shapes: list[torch.Size]) -> None:
        super().__init__()
        self.strides, self.channels, self.shapes = backbone.strides, backbone.channels, shapes

    def normalize(self, images: Tensor, padding: Tensor) -> Tensor:
        return images.float()

    def forward(self, images: Tensor) -> list[Tensor]:
        return [torch.randn(shape) for shape in self.shapes]


def counted(run: Callable[[], Any]) -> int:
    """Multiply-adds."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.codetr.msda: sampled})
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops() // 2


def images(device: str) -> tuple[Tensor, Tensor]:
    pixels = torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.uint8, device=device)
    return pixels, torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool, device=device)


def targets(classes: int, masks: bool) -> Targets:
    generator = torch.Generator().manual_seed(0)
    centres, sides = torch.rand(2, 1, OBJECTS, 2, generator=generator)
    return Targets(
        boxes=torch.cat([0.2 + 0.6 * centres, 0.05 + 0.3 * sides], -1),
        labels=torch.randint(classes, (1, OBJECTS), generator=generator),
        valid=torch.ones(1, OBJECTS, dtype=torch.bool),
        frames=Frames.unscaled(torch.tensor([[HEIGHT, WIDTH]])),
        masks=torch.ones(1, OBJECTS, HEIGHT, WIDTH, dtype=torch.bool) if masks else None,
    )


def costs(config: DictConfig) -> dict[str, dict[str, float]]:
    """In millions of parameters, and in billions of multiply-adds."""
    with torch.device("meta"):
        whole: Detector = instantiate(config.model.detector, _convert_="all")
    training = {name: p.numel() for name, p in whole.named_parameters()}
    inference = [n for name, n in training.items() if not name.startswith(whole.training_only_prefixes())]
    backbone = sum(p.numel() for p in whole.backbone.parameters())
    shapes: list[torch.Size] = []
    whole.backbone.register_forward_hook(lambda _, __, features: shapes.extend(f.shape for f in features))
    whole.eval()
    encoding = counted(lambda: whole.encode(*images("meta")))
    rest = {mode: _after_the_encoder(config, shapes, mode) for mode in ("training", "inference")}
    return {
        "parameters": {
            "training": sum(training.values()) / 1e6,
            "inference": sum(inference) / 1e6,
            "backbone": backbone / 1e6,
        },
        "multiply_adds": {mode: (encoding + number) / 1e9 for mode, number in rest.items()},
    }


def _after_the_encoder(config: DictConfig, shapes: list[torch.Size], mode: str) -> int:
    torch.manual_seed(0)
    small = config.copy()
    with open_dict(small):
        small.model.detector.backbone.pretrained = False
    detector: Detector = instantiate(small.model.detector, _convert_="all")
    detector.backbone = Stub(detector.backbone, shapes)  # type: ignore[assignment]
    detector.encoder.layers = nn.ModuleList()
    detector.train(mode == "training")
    given = targets(config.model.num_classes, config.data.masks) if mode == "training" else None
    return counted(lambda: detector(*images("cpu"), given)) - counted(lambda: detector.encode(*images("cpu")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows to count anew, the others stay as they were; none: all")
    names = parser.parse_args().names
    every = {name: row for name, row in load_rows().items() if row.experiment}
    rows = {name: row for name, row in every.items() if not names or name in names}
    models: dict[str, Any] = {}
    before = report.folder / "rows.json"
    record = json.loads(before.read_text()) if names and before.is_file() else {}
    for name, row in track(rows.items(), "rows"):
        config = composed(row, "model.detector.backbone.pretrained=false")
        with open_dict(config):
            config.model.num_classes = 1203 if "lvis" in config.data.train_annotations else 80
        read_needed_masks(config)
        key = OmegaConf.to_yaml(config.model, resolve=True)
        if key not in models:
            models[key] = costs(config)
        values = {value.subject: value.value for value in recipe(row, config)}
        record[name] = {"recipe": values, **models[key]}
    known = {name: record[name] for name in every if name in record}
    report.write("rows", f"{len(known)} rows counted; {report.machine()}.", known)


if __name__ == "__main__":
    main()
