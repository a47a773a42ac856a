"""Which query a detector gives to which object, and where the queries are."""

from __future__ import annotations

from torch import Tensor

from codetr.assign.hungarian import MatchingCost, matched_objects
from codetr.errors import UserError
from codetr.models.decoder import Decoder
from codetr.models.detector import Detector
from codetr.types import Output, Prediction, Targets


def objects_of_queries(output: Output, name: str, targets: Targets, cost: MatchingCost, layer: int = -1) -> Tensor:
    """One-to-one matching of a group: the object of each query, -1 for none, [B, N].

    name: of the group, which is matched in training.
    layer: of the decoder, whose predictions are matched.
    """
    every = output.predictions[name]
    one = Prediction(every.logits[layer][None], every.boxes[layer][None])
    (problem,) = output.groups[name].targets.problems(one, class_agnostic=False)
    return matched_objects(problem, targets, cost)[0]


def places(detector: Detector, output: Output, name: str) -> Tensor:
    """Where the queries of a group start, (x, y) as shares of the image: [B, N, 2].

    The reference points of Conditional DETR, the centres of DAB-DETR's anchors and of two-stage proposals. Raises
    UserError for a decoder of masks, whose queries start nowhere.
    """
    if not isinstance(detector.decoder, Decoder):
        raise UserError("queries of masks start nowhere: this figure is for decoders of boxes")
    return detector.decoder.reference(name, output.groups[name])[..., :2]
