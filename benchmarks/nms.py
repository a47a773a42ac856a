"""What duplicates cost a checkpoint: its validation mAP with class-wise NMS at several thresholds, and without."""

import argparse
from pathlib import Path

import torch
from hydra.utils import instantiate
from rich.progress import track

import codetr
from codetr.checkpoint import load_weights
from codetr.evaluation.metrics import DetectionMetrics
from codetr.postprocess import PostProcess

RESULT = Path(__file__).parent / "results" / "nms.md"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="of codetr.train, e.g. outputs/demo/checkpoints/best.ckpt")
    parser.add_argument("--root", help="folder of the data set, if it has moved since")
    options = parser.parse_args()
    config = load_weights(options.checkpoint).config["data"]
    if options.root:
        config |= {"root": options.root, "prepare": None}
    data, detector = instantiate(config), codetr.load(options.checkpoint)
    data.prepare_data()
    data.setup("validate")
    found = [(b, detector.detect(b.images, b.padding)) for b in track(data.val_dataloader(), "Predicting")]
    lines = ["| NMS above IoU | map | map_50 | map_75 |", "|---|---|---|---|"]
    for iou in (None, 0.8, 0.7, 0.6, 0.5):
        postprocess, metrics = PostProcess(100, iou), DetectionMetrics(data.class_names)
        for batch, prediction in found:
            metrics.update(batch.image_ids, postprocess(prediction, batch.original_sizes), batch.truth)
        numbers = metrics.compute()
        cells = [f"{numbers[name]:.3f}" for name in ("map", "map_50", "map_75")]
        lines.append(f"| {iou or 'none'} | " + " | ".join(cells) + " |")
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
