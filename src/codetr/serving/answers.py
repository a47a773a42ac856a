"""What a server says: its documents, and a result as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
from pydantic import BaseModel, Field

from codetr.inference import Exported, Model, Result
from codetr.serving.settings import Settings
from codetr.visualize import class_color


class Mask(BaseModel):
    """Run lengths, as pycocotools reads them."""

    size: tuple[int, int] = Field(description="height and width of the image")
    counts: str


class Object(BaseModel):
    name: str = Field(description="of its class")
    category_id: int = Field(description="of its class in the data set that the model learned from")
    score: float
    box: tuple[float, float, float, float] = Field(
        description="left, top, right, bottom in pixels, as a viewer shows it"
    )
    mask: Mask | None = Field(None, description="of a model that finds masks")
    mask_score: float | None = Field(None, description="how well the mask fits, times the score")


class Answer(BaseModel):
    """The objects of an image, best first."""

    width: int = Field(description="of the image, in pixels, as a viewer shows it")
    height: int
    objects: list[Object]


class Class(BaseModel):
    name: str
    category_id: int
    color: str = Field(description="in which pictures show it, #rrggbb")


class About(BaseModel):
    """The model that answers, and what a request may cost."""

    file: str
    classes: list[Class]
    finds_masks: bool
    views: list[str] = Field(description="from which requests choose")
    score_threshold: float = Field(description="of requests that name none")
    max_bytes: int
    max_pixels: int


class Problem(BaseModel):
    detail: str


def about(model: Model | Exported, settings: Settings, views: Iterable[str]) -> About:
    ids = model.category_ids or range(len(model.class_names))
    known = enumerate(zip(model.class_names, ids, strict=True))
    return About(
        file=model.path.name,
        classes=[
            Class(name=n, category_id=i, color="#{:02x}{:02x}{:02x}".format(*class_color(k))) for k, (n, i) in known
        ],
        finds_masks=model.finds_masks,
        views=list(views),
        score_threshold=settings.score_threshold,
        max_bytes=settings.max_bytes,
        max_pixels=settings.max_pixels,
    )


def answer(result: Result, classes: list[str]) -> bytes:
    """An `Answer` in JSON, with the digits of float32. classes: names of those that are wanted; none: all."""
    found = result.detections
    records: list[dict[str, Any]] = [
        {"name": name, "category_id": result.category_ids[label], "score": score, "box": box}
        for name, label, score, box in zip(
            result.names,
            found.labels.tolist(),
            found.scores.numpy(),
            found.boxes_xyxy.contiguous().numpy(),
            strict=True,
        )
    ]
    if found.rle is not None and found.mask_scores is not None:
        masks = zip(records, found.rle, found.mask_scores.numpy(), strict=True)
        records = [record | {"mask": rle, "mask_score": score} for record, rle, score in masks]
    wanted = [record for record in records if not classes or record["name"] in classes]
    height, width = result.size
    content = {"width": width, "height": height, "objects": wanted}
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
