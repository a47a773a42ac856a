"""What follows from the model: which masks the data set reads."""

import pytest

from codetr.application import compose
from codetr.derived import read_needed_masks

TINY = "model=co_deformable_tiny"


@pytest.mark.parametrize(
    ("overrides", "masks"),
    [
        ([TINY], (False, False)),
        ([TINY, "model/auxiliary_head=[]"], (False, False)),
        ([TINY, "model/auxiliary_head=[mask_rcnn_small,atss]"], (True, False)),
        ([TINY, "+model/auxiliary_head@model.detector.heads.second=mask_rcnn"], (True, False)),
        ([TINY, "model/mask_head=refine_mask"], (True, True)),
        (["experiment=official/co_deformable_detr_mask_r50_1x_coco"], (True, False)),
        (["experiment=mask2former_r50"], (True, True)),
        (["experiment=official/co_dino_5scale_vit_large_coco_instance"], (True, True)),
        ([TINY, "model/mask_head=refine_mask", "data.val_masks=false"], (True, False)),
        ([TINY, "data.masks=true", "data.val_masks=true"], (True, True)),
    ],
)
def test_masks_are_read_where_the_model_has_a_use_for_them(overrides: list[str], masks: tuple[bool, bool]) -> None:
    config = compose("train", overrides)
    read_needed_masks(config)
    assert (config.data.masks, config.data.val_masks) == masks
