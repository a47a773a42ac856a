"""Masks of queries on their way to the file: Mask2Former's instance inference, written out."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn.functional import interpolate

from codetr.instances import of_queries
from codetr.postprocess import MaskPostProcess
from codetr.types import Frames, Pixels, Prediction, QueryMasks

QUERIES, CLASSES, MASK_WIDTH = 5, 3, 6
CELLS, STRIDE = (12, 16), 4


def prediction(batch: int) -> Prediction:
    """Of smooth masks, one of them empty."""
    torch.manual_seed(0)
    maps = interpolate(torch.randn(batch, MASK_WIDTH, 3, 4), CELLS, mode="bilinear", align_corners=False)
    maps[:, 0] = maps[:, 0].abs() + 0.1
    embeddings = torch.randn(batch, QUERIES, MASK_WIDTH)
    embeddings[:, 2] = torch.tensor([-1.0, *[0.0] * (MASK_WIDTH - 1)])
    logits = torch.randn(batch, QUERIES, CLASSES + 1) * 2
    masks = QueryMasks(embeddings, Pixels(maps, STRIDE, torch.zeros(0)))
    return Prediction(logits, logits.new_empty(batch, QUERIES, 0), masks)


def written_out(logits: Tensor, masks: Tensor, size: tuple[int, int], file_size: tuple[int, int], most: int) -> list:
    """[(score, label, mask of the file)], best first. logits: [N, K + 1]. masks: [N, h, w]."""
    canvas = [side * STRIDE for side in CELLS]
    whole = interpolate(masks[None], canvas, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    in_file = interpolate(whole, file_size, mode="bilinear", align_corners=False)[0]
    scores = logits.softmax(-1)[:, :-1]
    pairs = sorted(((float(scores[q, k]), q, k) for q in range(QUERIES) for k in range(CLASSES)), reverse=True)[:most]
    found = []
    for score, query, label in pairs:
        inside = in_file[query] > 0
        sure = float((in_file[query].sigmoid() * inside).sum() / (inside.sum() + 1e-6))
        found.append((score * sure, label, inside.numpy()))
    return sorted(found, key=lambda one: -one[0])


FRAMES = {
    "resized": Frames(torch.tensor([[48, 60], [40, 64]]), torch.ones(2, 2) * 0.5, torch.tensor([[96, 120], [80, 128]])),
    "on a canvas": Frames(torch.tensor([[48, 64]] * 2), torch.ones(2, 2) * 2, torch.tensor([[20, 32], [24, 11]])),
}


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
def test_instances_in_the_file(frames: Frames) -> None:
    p, most = prediction(2), 9
    found = of_queries(MaskPostProcess(most)(p, frames.sizes), frames)
    masks = torch.einsum("bnc,bchw->bnhw", p.masks.embeddings, p.masks.pixels.maps)
    for image, own in enumerate(found):
        file_size = tuple(frames.file_sizes[image].tolist())
        size = tuple((frames.file_sizes[image] * frames.scale[image]).round().int().tolist())
        expected = written_out(p.logits[image], masks[image], size, file_size, most)
        assert own.scores.tolist() == pytest.approx([score for score, _, _ in expected], abs=1e-5)
        assert torch.equal(own.scores, own.mask_scores)
        for place, (score, label, inside) in enumerate(expected):
            assert own.labels[place] == label or score == 0
            mask = coco_mask.decode(own.rle[place])
            if score > 0:
                assert np.array_equal(mask, inside)
            rows, columns = mask.nonzero()
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0] * 4
            assert own.boxes_xyxy[place].tolist() == box


def test_boxes_in_the_network_enclose_the_cells() -> None:
    """Cut off at the image; thresholds take their masks along."""
    p = prediction(1)
    (found,) = MaskPostProcess(QUERIES * CLASSES)(p, torch.tensor([[41, 50]]))
    for box, logits in zip(found.boxes_xyxy, found.cells.logits, strict=True):
        rows, columns = (logits > 0).nonzero(as_tuple=True)
        if len(rows):
            sides = [columns.min() * 4, rows.min() * 4, columns.max() * 4 + 4, rows.max() * 4 + 4]
            limits = [50, 41, 50, 41]
            assert box.tolist() == [min(int(side), limit) for side, limit in zip(sides, limits, strict=True)]
    best = found.above(float(found.scores[3]))
    assert len(best.cells.logits) == len(best.scores) == 4


def test_nothing_found() -> None:
    frames = FRAMES["resized"]
    nothing = [one.above(2.0) for one in MaskPostProcess(4)(prediction(2), frames.sizes)]
    (first, _) = of_queries(nothing, frames)
    assert (len(first.scores), first.rle, tuple(first.boxes_xyxy.shape)) == (0, [], (0, 4))
