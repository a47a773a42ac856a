"""The ids of the classes of converted checkpoints, against torchvision's list of COCO's 91 numbers."""

import json
from pathlib import Path

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from codetr.convert.classes import COCO, category_ids, class_names


def test_coco_classes_have_its_ids() -> None:
    numbered = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    ids = category_ids(None, {}, COCO)
    assert ids is not None
    assert tuple(numbered[i] for i in ids) == COCO


def test_ids_of_a_file_of_lvis_and_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "truth.json"
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    file.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    assert class_names(str(file), {}, 2) == ("cat", "dog")
    assert category_ids(str(file), {}, ("cat", "dog")) == (7, 3)
    assert category_ids(None, {}, [str(i) for i in range(1203)]) == tuple(range(1, 1204))
    assert category_ids(None, {"CATEGORY_IDS": [2, 4]}, ("cat", "dog")) == (2, 4)
    assert category_ids(["cat", "dog"], {}, ("cat", "dog")) is None
