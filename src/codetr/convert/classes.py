"""Names of the classes of a converted checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codetr.data.checks import select_classes
from codetr.data.readers import coco
from codetr.errors import UserError

COCO = tuple(
    """person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|
bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|
snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|
knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|
dining table|toilet|tv|laptop|mouse|remote|keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|
vase|scissors|teddy bear|hair drier|toothbrush""".replace("\n", "").split("|")
)

# COCO numbers its 80 classes from 1 to 90, with gaps.
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
LVIS = 1203  # classes, numbered from 1


def class_names(given: str | Sequence[str] | None, about: dict[str, Any], number: int) -> tuple[str, ...]:
    """What the user gives, the checkpoint's own account `about` itself says, or COCO's for 80 classes.

    given: names, or a COCO annotation file, whose categories count in the order of the file. Raises UserError where
    nothing is known or the number is not `number`.
    """
    names = _given(given) if given is not None else _told(about)
    if names is None and number == len(COCO):
        names = COCO
    if names is None:
        raise UserError(
            f"this checkpoint has {number} classes and does not name them: add class_names=ANNOTATIONS.json, a COCO "
            "file with these categories in the order of training, or class_names=[...]"
        )
    if len(names) != number:
        raise UserError(f"class_names has {len(names)} names, and the checkpoint {number} classes")
    return names


def category_ids(
    given: str | Sequence[str] | None, about: dict[str, Any], names: Sequence[str]
) -> tuple[int, ...] | None:
    """The ids of `names` in the data set, as the annotation file `given` or the account `about` says; COCO's; LVIS'.

    None where nothing tells them.
    """
    if isinstance(given, str):
        return tuple(_categories(Path(given)))
    if given is None and "CATEGORY_IDS" in about:
        return tuple(about["CATEGORY_IDS"])
    if tuple(names) == COCO:
        return COCO_IDS
    return tuple(range(1, LVIS + 1)) if len(names) == LVIS else None


def _given(given: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(given, str):
        return tuple(given)
    return tuple(_categories(Path(given)).values())


def _categories(file: Path) -> dict[int, str]:
    return select_classes(list(coco.read(file)["categories"]), None, file)


def _told(about: dict[str, Any]) -> tuple[str, ...] | None:
    """mmdet 2.x writes `CLASSES` into its account, 3.x `dataset_meta`."""
    names = about.get("CLASSES") or about.get("dataset_meta", {}).get("classes")
    return tuple(names) if names else None
