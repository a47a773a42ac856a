"""Names of the official mask head and mask IoU head and ours: `*` stands for one dotted component, no tensor
changes."""

from __future__ import annotations

_STAGE = {  # official, ours
    "fuse_conv.0.*": "fuse.*",
    **{f"fuse_conv.1.dilation_conv_{i + 1}.conv.*": f"branches.{i}.*" for i in range(3)},
    "fuse_conv.1.merge_conv.conv.*": "merge.*",
    "fuse_transform_out.*": "reduce.*",
}

RULES: tuple[tuple[str, str], ...] = (
    *(
        pair
        for official, ours in (
            ("mask_head.instance_convs", "mask_head.instance"),
            ("mask_head.semantic_convs", "mask_head.semantic"),
            ("mask_iou_head.convs", "mask_head.iou.convs"),
        )
        for pair in ((f"{official}.*.conv.*", f"{ours}.*.0.*"), (f"{official}.*.norm_layer.*", f"{ours}.*.1.*"))
    ),
    *((f"mask_head.stages.*.{official}", f"mask_head.stages.*.{ours}") for official, ours in _STAGE.items()),
    ("mask_head.stages.*.semantic_transform_in.*", "mask_head.maps.*.*"),
    ("mask_head.stage_instance_logits.*.*", "mask_head.classes.*.*"),
    ("mask_iou_head.fcs.*.*", "mask_head.iou.hidden.*.0.*"),
    ("mask_iou_head.fc_mask_iou.*", "mask_head.iou.classes.*"),
)
