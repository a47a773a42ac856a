"""All numbers of a report on one evaluation of boxes or masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codetr.evaluation.columns import OUTSIDE
from codetr.evaluation.engines import Scene, confusion
from codetr.reporting.calibration import Calibration, calibration
from codetr.reporting.costs import costs
from codetr.reporting.curves import Operating, Ranking, operating, precision_at_recalls
from codetr.reporting.labels import Doubt, doubts
from codetr.reporting.matching import Matches, match
from codetr.reporting.slices import Slice, slices
from codetr.reporting.stored import Stored
from codetr.reporting.tide import Tide, tide

DOUBTS = 24


@dataclass(frozen=True)
class Analysis:
    """Everything at an IoU of 0.5, of the stored images.

    ap: [K] -1 for classes without objects. precision: [101, K] at recalls.
    confusion: [K + 1, K + 1] as that of `codetr.evaluation.summary.Evaluation`.
    score: from which on detections are shown, the best one for all classes together.
    found_costs, true_costs, image_costs, class_costs: parts of 1 - AP (see `codetr.reporting.costs`), of the rows of
        `matches`, of objects, images and classes.
    """

    stored: Stored
    scene: Scene
    matches: Matches
    ap: np.ndarray
    objects: np.ndarray
    precision: np.ndarray
    operating: Operating
    score: float
    tide: Tide
    doubts: list[Doubt]
    confusion: np.ndarray
    calibration: Calibration
    slices: list[Slice]
    found_costs: np.ndarray
    true_costs: np.ndarray
    image_costs: np.ndarray
    class_costs: np.ndarray


def analyse(stored: Stored) -> Analysis:
    classes, images = len(stored.about.class_names), len(stored.columns.ids)
    scene = stored.scene()
    matches = match(scene, OUTSIDE)
    ranking = Ranking(matches, classes)
    own, errors = costs(matches, classes), tide(scene, matches, classes)
    sizes = np.array(stored.about.sizes) if stored.about.sizes else None
    one_class = {name: np.zeros_like(getattr(matches, name)) for name in ("label", "true_label")}
    together = matches.ordered(np.argsort(-matches.score, kind="stable"))._replace(**one_class)
    return Analysis(
        stored=stored,
        scene=scene,
        matches=matches,
        ap=ranking.average_precision()[0],
        objects=ranking.objects(),
        precision=precision_at_recalls(matches, classes),
        operating=operating(matches, classes),
        score=_or_half(operating(together, 1).best[0]),
        tide=errors,
        doubts=doubts(matches, errors, DOUBTS),
        confusion=confusion(stored.columns.with_areas(stored.about.masks), classes, stored.rules),
        calibration=calibration(matches),
        slices=slices(scene, matches, classes, sizes),
        found_costs=own.found,
        true_costs=own.truth,
        image_costs=own.of_images(matches, images),
        class_costs=own.of_classes(matches, classes),
    )


def _or_half(score: float) -> float:
    """Where nothing was found at all there is no best score."""
    return 0.5 if np.isnan(score) else float(score)
