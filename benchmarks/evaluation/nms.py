"""What duplicates cost a checkpoint: its validation mAP with class-wise NMS at several thresholds, and without."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate
from rich.progress import track

import codetr
from benchmarks import report
from codetr.checkpoint import load_weights
from codetr.evaluation.inputs import inputs
from codetr.evaluation.mean_ap import detection_metric
from codetr.postprocess import NMS, PostProcess


@torch.no_grad()
def evaluate(checkpoint: Path, thresholds: Sequence[float | None], root: str | None = None) -> dict:
    """threshold -> metrics on the validation images; None is without suppression."""
    config = load_weights(checkpoint).config["data"]
    if root:
        config |= {"root": root, "prepare": None}
    data, detector = instantiate(config), codetr.load(checkpoint, device="cpu").detector
    data.prepare_data()
    data.setup("validate")
    found = [(b, detector.detect(b.images, b.padding)) for b in track(data.val_dataloader(), "Predicting")]
    results = {}
    for iou in thresholds:
        postprocess = PostProcess(100, None if iou is None else NMS(iou))
        metric = detection_metric(data.class_names)
        for batch, prediction in found:
            own = batch.frames.to_files(postprocess(prediction, batch.frames.sizes))
            metric.update(*inputs(batch.image_ids, own, batch.truth))
        metric.compute()
        results[iou] = metric.evaluations["bbox"].numbers
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="of codetr.train, e.g. outputs/demo/<date>/checkpoints/best.ckpt")
    parser.add_argument("--root", help="folder of the data set, if it has moved since")
    options = parser.parse_args()
    rows = [
        [str(iou or "none"), *(f"{numbers[name]:.3f}" for name in ("map", "map_50", "map_75"))]
        for iou, numbers in evaluate(options.checkpoint, (None, 0.8, 0.7, 0.6, 0.5), options.root).items()
    ]
    report.write("nms", report.table(["NMS above IoU", "map", "map_50", "map_75"], rows))
