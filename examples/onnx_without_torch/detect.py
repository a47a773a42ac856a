"""Objects in images with an ONNX file of `codetr export`, by NumPy, ONNX Runtime and Pillow alone.

python detect.py model.onnx photo.jpg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Model:
    """session, about: of the file. resize: its validation transform, torchvision's Resize, with `size` for the short
    and `max_size` for the long side; raises ValueError for another one."""

    def __init__(self, path: str) -> None:
        self.session = onnxruntime.InferenceSession(path)
        self.about = json.loads(self.session.get_modelmeta().custom_metadata_map["codetr"])
        self.resize = self.about["config"]["data"]["val_transform"]
        if not self.resize["_target_"].endswith(".v2.Resize"):
            raise ValueError(f"{path}: images go through {self.resize['_target_']}; only Resize is written here")

    def __call__(self, path: str, score_threshold: float | None = None) -> list[dict]:
        """What is found in an image, best first; boxes are (left, top, right, bottom) in its pixels."""
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        size = resized(image.size, self.resize["size"], self.resize["max_size"])
        small = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        height, width = small.shape[:2]
        canvas = np.zeros((1, 3, *self.canvas(height, width)), np.uint8)
        canvas[0, :, :height, :width] = small.transpose(2, 0, 1)
        sizes = np.array([[height, width]], np.int64)
        (boxes,), (scores,), (labels,) = self.session.run(
            ["boxes", "scores", "labels"], {"images": canvas, "sizes": sizes}
        )
        boxes = boxes * np.tile(np.array(image.size) / size, 2)
        least = self.about["score_threshold"] if score_threshold is None else score_threshold
        found = zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
        names = self.about["class_names"]
        return [{"box": box, "score": score, "name": names[k]} for box, score, k in found if score >= least]

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which such an image is padded."""
        if self.about["size"]:
            return tuple(self.about["size"])
        divisor, least = self.about["size_divisor"], self.about["least_side"]
        return tuple(max(least, -(-side // divisor) * divisor) for side in (height, width))


def resized(size: tuple[int, int], short: int | None, long: int | None) -> tuple[int, int]:
    """(width, height) of an image of `size` whose short side becomes `short`, unless the long one would pass `long`."""
    low, high = sorted(size)
    new = (int(long * low / high), long) if short is None else (short, int(short * high / low))
    if long is not None and new[1] > long:
        new = int(long * new[0] / new[1]), long
    return new if size[0] <= size[1] else new[::-1]


if __name__ == "__main__":
    model = Model(sys.argv[1])
    for path in sys.argv[2:]:
        print(json.dumps({"file": Path(path).name, "found": model(path)}))
