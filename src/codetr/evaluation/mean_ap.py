"""COCO's and LVIS' evaluation as a torchmetrics `Metric`: that of a validation, and of other programs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from codetr.errors import UserError
from codetr.evaluation.columns import STATES, Columns, columns_of, numbered
from codetr.evaluation.engines import ABSENT, IOU_THRESHOLDS, RECALL_THRESHOLDS, Backend, Rules, in_coco_format
from codetr.evaluation.inputs import SHAPES, Inputs, read_coco, validate
from codetr.evaluation.summary import Evaluation, Wishes, evaluate
from codetr.files import atomically
from codetr.ops.distributed import cpu_group

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
IouType = Literal["bbox", "segm"]


class MeanAveragePrecision(Metric):
    """Takes the place of `torchmetrics.detection.MeanAveragePrecision`, with the same input and keys, at a fiftieth of
    its time.

    `compute` gives torchmetrics' tensors of 32 bits. `evaluations` (IoU type -> `Evaluation`) then has the numbers in
    64 bits, which are pycocotools' own, AP per class, curves and confusions. Images stay on the CPU as arrays. They
    come together on process 0, which evaluates them for all, so every process must call `compute` equally often.

    box_format: of the boxes that `update` gets.
    iou_type: what is evaluated: boxes, masks, or both at once.
    iou_thresholds, rec_thresholds: where precision and recall are taken; COCO's, in 64 bits, where None.
    max_detection_thresholds: three numbers of detections of an image that count; 1, 10, 100 where None.
    class_metrics: whether `compute` also gives AP and AR of every class.
    extended_summary: whether it also gives the IoUs of every image and the curves.
    average: "macro", the mean over the classes, or "micro", of all objects as if they were of one class.
    backend: the engine, of which pycocotools is the slowest and the judge.
    class_names: names of the labels 0, 1, ...; then all of these classes are evaluated, whether they occur or not, an
        `area` holds even where it is 0, and confusions are counted.
    federated: LVIS' rules (see `Rules`) and numbers.
    kwargs: the options of every torchmetrics metric, such as `process_group`.
    Raises ValueError for values that are none of these, and UserError for LVIS with another engine than hotcoco.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(
        self,
        box_format: BoxFormat = "xyxy",
        iou_type: IouType | Sequence[IouType] = "bbox",
        iou_thresholds: list[float] | None = None,
        rec_thresholds: list[float] | None = None,
        max_detection_thresholds: list[int] | None = None,
        class_metrics: bool = False,
        extended_summary: bool = False,
        average: Literal["macro", "micro"] = "macro",
        backend: Backend = "hotcoco",
        class_names: Sequence[str] | None = None,
        federated: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.iou_types = (iou_type,) if isinstance(iou_type, str) else tuple(iou_type)
        for own in self.iou_types:
            _require_one_of("iou_type", own, tuple(SHAPES))
        _require_one_of("box_format", box_format, get_args(BoxFormat))
        _require_one_of("average", average, ("macro", "micro"))
        _require_one_of("backend", backend, get_args(Backend))
        for name, flag in (("class_metrics", class_metrics), ("extended_summary", extended_summary)):
            if not isinstance(flag, bool):
                raise ValueError(f"Expected argument `{name}` to be a boolean but got {flag}")
        if federated and backend != "hotcoco":
            raise UserError(f"metrics.federated=true (LVIS) needs metrics.backend=hotcoco, not {backend}")
        limits = sorted(_list_of(int, "max_detection_thresholds", max_detection_thresholds, (1, 10, 100)))
        if len(limits) != 3:
            raise ValueError(
                f"When providing a list of max detection thresholds it should have length 3. Got value {len(limits)}"
            )
        self.rules = Rules(
            limits=tuple(limits[-1:] if federated else dict.fromkeys(limits)),
            federated=federated,
            iou_thresholds=_list_of(float, "iou_thresholds", iou_thresholds, IOU_THRESHOLDS),
            recall_thresholds=_list_of(float, "rec_thresholds", rec_thresholds, RECALL_THRESHOLDS),
        )
        self.box_format, self.backend, self.average = box_format, backend, average
        self.class_metrics, self.extended_summary = class_metrics, extended_summary
        self.class_names = None if class_names is None else list(class_names)
        self.frequency: Sequence[str] | None = None  # of each class, r(are), c(ommon) or f(requent): LVIS
        self.warn_on_many_detections = True
        self.evaluations: dict[str, Evaluation] = {}  # of the last `compute`
        self.keeps_columns = False
        self.columns: Columns | None = None  # what process 0 evaluated last, where `keeps_columns`
        for name in STATES:
            self.add_state(name, default=[], dist_reduce_fx=None)

    def update(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
        """Add images. preds: per image `boxes` [n, 4] or `masks` [n, H, W], or both, `scores` and `labels` [n].

        target: per image `boxes` or `masks`, `labels`, and perhaps `iscrowd` and `area` [n] (0: that of the box or
        mask). Beyond torchmetrics: `masks` may be lists of COCO's run lengths {size, counts}; `ignore` [n] bool marks
        objects that count neither as found nor as missed; of images with the same `image_id` the last one counts, or
        the first process'; `neg_labels`, `not_exhaustive_labels` say what an image was searched for (LVIS).
        Raises ValueError for other input, and UserError where LVIS' rules miss what an image was searched for.
        """
        validate(preds, target, self.iou_types)
        if self.warn_on_many_detections and any(len(image["labels"]) > self.rules.limits[-1] for image in preds):
            warnings.warn(
                f"Encountered more than {self.rules.limits[-1]} detections in a single image. Those with the lowest "
                "scores do not count; `max_detection_thresholds` says how many do. `warn_on_many_detections = False` "
                "on the metric switches this warning off.",
                stacklevel=3,
            )
        if preds:
            given = self.class_names is not None
            new = columns_of(preds, target, self.box_format, self.iou_types, given, self.rules.federated)
            for name, rows in new.items():
                getattr(self, name).append(rows)

    def compute(self) -> dict[str, Any]:
        """torchmetrics' keys: `map`, `map_50`, ..., `mar_large`, `map_per_class`, `mar_100_per_class`, `classes`; with
        several IoU types, all but `classes` behind `bbox_` and `segm_`."""
        found = [None if self._is_synced and dist.get_rank(self._group()) else self._evaluate()]
        if self._is_synced:
            dist.broadcast_object_list(found, group_src=0, group=self._group(), device=torch.device("cpu"))
        assert found[0] is not None
        classes, self.evaluations = found[0]
        result: dict[str, Any] = {}
        for iou_type, evaluation in self.evaluations.items():
            prefix = f"{iou_type}_" if len(self.evaluations) > 1 else ""
            result |= {prefix + name: value for name, value in self._tensors(evaluation, classes).items()}
        return result | {"classes": torch.tensor(classes, dtype=torch.int32)}

    def tm_to_coco(self, name: str = "tm_map_input") -> None:
        """Write the images of this process to `{name}_target.json` and `{name}_preds.json` in COCO's format."""
        dataset, found = in_coco_format(self._columns(), "bbox" in self.iou_types, "segm" in self.iou_types)
        for part, content in (("target", dataset), ("preds", found)):
            with atomically(Path(f"{name}_{part}.json")) as file:
                file.write_text(json.dumps(content))

    @staticmethod
    def coco_to_tm(
        coco_preds: str,
        coco_target: str,
        iou_type: IouType | Sequence[IouType] = "bbox",
        backend: str = "pycocotools",
    ) -> Inputs:
        """What `update` takes, with boxes as xywh, from files in COCO's format; pycocotools reads them in any case."""
        return read_coco(coco_preds, coco_target, (iou_type,) if isinstance(iou_type, str) else iou_type)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """A figure and its axes, of results of `compute` or `forward`, or of those of now."""
        return self._plot(val, ax)

    def _evaluate(self) -> tuple[list[int], dict[str, Evaluation]]:
        """The classes, and what was found out."""
        columns = self._columns()
        self.columns = columns if self.keeps_columns else None
        found, truth = columns.found.rows[:, 5], columns.truth.rows[:, 4]
        if self.class_names is None:
            classes, dense = np.unique(np.concatenate([found, truth]).astype(np.int64), return_inverse=True)
            columns = columns.labelled(*np.split(dense, [len(found)]))
            names = [str(label) for label in classes.tolist()]
        else:
            classes, names = np.arange(len(self.class_names)), self.class_names
        wishes = Wishes(self.average == "micro", self.extended_summary, self.class_names is not None, self.frequency)
        return classes.tolist(), {
            own: evaluate(columns, names, replace(self.rules, masks=own == "segm"), self.backend, wishes)
            for own in self.iou_types
        }

    def _tensors(self, evaluation: Evaluation, classes: list[int]) -> dict[str, Any]:
        result: dict[str, Any] = {name: torch.tensor(value) for name, value in evaluation.numbers.items()}
        for name, values in (
            ("map", evaluation.map_per_class),
            (f"mar_{self.rules.limits[-1]}", evaluation.mar_per_class),
        ):
            result[f"{name}_per_class"] = torch.tensor(list(values.values()) if self.class_metrics else ABSENT)
        if self.extended_summary:
            extended = dict(evaluation.extended)
            labels = classes if self.average == "macro" else [0]
            ious = extended.pop("ious").items()
            result |= {name: torch.from_numpy(values) for name, values in extended.items()}
            result["ious"] = {(image, labels[k]): torch.from_numpy(own).float() for (image, k), own in ious}
        return result

    def _columns(self) -> Columns:
        return Columns.from_states(*self._whole())

    def _whole(self) -> list[Tensor]:
        """The states, each in one piece from now on."""
        for name, none in STATES.items():
            setattr(self, name, [torch.cat([none, *getattr(self, name)])])
        return [getattr(self, name)[0] for name in STATES]

    def _group(self) -> dist.ProcessGroup:
        """The group of processes that evaluate together; it exchanges CPU tensors, because the images live there."""
        return self.process_group or cpu_group()

    def _sync_dist(self, dist_sync_fn: Callable | None = None, process_group: Any = None) -> None:
        """Gather all images on process 0; torchmetrics calls it before `compute` and undoes it afterwards."""
        group = process_group or self._group()
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        images, *rows = self._whole()
        every: list[Any] | None = None if rank else [None] * world
        dist.gather_object([numbered(images, rank, world), *rows], every, group_dst=0, group=group)
        for i, name in enumerate(STATES):  # the first process last: of an image that comes again, that one counts
            setattr(self, name, [own[i] for own in reversed(every or [])])

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> Any:
        """Images stay on the CPU where the metric is moved."""
        return super()._apply(fn, exclude_state=tuple(STATES))


def detection_metric(
    class_names: Sequence[str],
    max_detections: int = 100,
    backend: Backend = "hotcoco",
    federated: bool = False,
    iou_type: IouType = "bbox",
) -> MeanAveragePrecision:
    """That of a validation, for a data set's classes.

    max_detections: the most detections of an image that count; COCO's own numbers take 100, LVIS' 300.
    """
    metric = MeanAveragePrecision(
        iou_type=iou_type,
        max_detection_thresholds=[1, min(10, max_detections), max_detections],
        backend=backend,
        class_names=class_names,
        federated=federated,
    )
    metric.warn_on_many_detections = False
    return metric


def _require_one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"Expected argument `{name}` to be one of {allowed} but got {value}")


def _list_of(kind: type, name: str, values: Any, otherwise: tuple) -> tuple:
    if values is None:
        return otherwise
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, kind) for value in values):
        raise ValueError(
            f"Expected argument `{name}` to either be `None` or a list of {kind.__name__}s but got {values}"
        )
    return tuple(values)
