"""Whether the parts of a detector fit together: asked when it is built, before any data is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from codetr.errors import UserError
from codetr.models.pixel_decoder import PixelDecoder
from codetr.queries.collaborative import CollaborativeQueries
from codetr.queries.denoising import DenoisingQueries
from codetr.queries.hybrid import HybridQueries
from codetr.queries.two_stage import TwoStageQueries
from codetr.types import MAIN, AuxiliaryHead, Encoder, MaskHead, QuerySource

_RULE = "model.detector.decoder.query_position"


def check_names(heads: Mapping[str, AuxiliaryHead], queries: Mapping[str, Any]) -> None:
    """queries: makers of query sources. Raises UserError for collaborative queries of no head."""
    for name, make in queries.items():
        if getattr(make, "func", None) is CollaborativeQueries and name not in heads:
            raise UserError(
                f"model.detector.queries.{name}: collaborative queries bear the name of their head, and "
                f"model.detector.heads has {', '.join(heads) or 'none'}"
            )


def check_agreement(
    strides: tuple[int, ...],
    encoder: Encoder,
    queries: Mapping[str, QuerySource],
    decoder: Any,
    mask_head: MaskHead | None,
) -> None:
    """strides: of the levels that the neck makes. Raises UserError for parts of which one wants what the others do not
    bring, or brings what nothing takes: parameters without a gradient."""
    if len(strides) != encoder.num_levels:
        takes = f"model.detector.encoder ({type(encoder).__name__}) takes {encoder.num_levels}"
        raise UserError(
            f"model.num_levels={len(strides)}: {takes}; set model.num_levels, or choose "
            "encoder@model.detector.encoder: dense (one level) or deformable"
        )
    _check_masks(strides, encoder, queries, decoder, mask_head)
    if not decoder.predicts_masks:
        _check_references(queries, decoder)
    _check_locations(decoder)
    _check_sources(queries)


def _check_masks(
    strides: tuple[int, ...],
    encoder: Encoder,
    queries: Mapping[str, QuerySource],
    decoder: Any,
    mask_head: MaskHead | None,
) -> None:
    masks = {
        "decoder": decoder.predicts_masks,
        "encoder": isinstance(encoder, PixelDecoder),
        "decoder.layer.cross_attention": decoder.layers[0].cross_attention.wants_masks,
    }
    if len(set(masks.values())) > 1:
        of_masks = ", ".join(f"model.detector.{part}" for part, own in masks.items() if own)
        others = ", ".join(f"model.detector.{part}" for part, own in masks.items() if not own)
        raise UserError(f"{of_masks}: for masks of queries, and {others}: for boxes; see conf/model/mask2former.yaml")
    if not isinstance(encoder, PixelDecoder):
        return
    if encoder.stride != strides[0] or encoder.mask_width != decoder.mask_width:
        raise UserError(
            f"model.detector.encoder has stride={encoder.stride} and mask_width={encoder.mask_width}; the finest level "
            f"of the neck has stride {strides[0]}, and model.detector.decoder has mask_width={decoder.mask_width}: set "
            "them alike"
        )
    if mask_head is not None:
        raise UserError("model/mask_head: finds the masks of boxes, and model.detector.decoder predicts masks itself")
    if staged := [name for name, source in queries.items() if isinstance(source, (TwoStageQueries, HybridQueries))]:
        raise UserError(
            f"the query sources {', '.join(staged)} take boxes from a first stage, and model.detector.decoder predicts "
            "masks: choose model/query=learned for them"
        )


def _check_references(queries: Mapping[str, QuerySource], decoder: Any) -> None:
    points = [name for name, source in queries.items() if not source.brings_reference]
    if decoder.reference_head is None and points:
        raise UserError(
            f"model.detector.decoder.reference_head=null: the query sources {', '.join(points)} bring positions only, "
            "from which it must predict points; configure one (as conf/model/deformable_detr.yaml does), or choose "
            f"main queries that are boxes: two_stage, or learned ones with model/position@{_RULE}=reference"
        )
    if decoder.reference_head is not None and not points:
        raise UserError(
            f"model.detector.decoder.reference_head: all query sources ({', '.join(queries)}) bring references, "
            "nothing is left for it to predict; set it to null"
        )


def _check_locations(decoder: Any) -> None:
    rule, cross_attention = decoder.query_position, decoder.layers[0].cross_attention
    if cross_attention.wants_location != rule.gives_location:
        wants = "needs" if cross_attention.wants_location else "has no use for"
        fitting = "conditional or modulated" if cross_attention.wants_location else "given or reference"
        raise UserError(
            f"model.detector.decoder.layer.cross_attention ({type(cross_attention).__name__}) {wants} the locations "
            f"of conditional and modulated positions, and {_RULE} is {type(rule).__name__}: choose "
            f"model/position@{_RULE}={fitting}"
        )


def _check_sources(queries: Mapping[str, QuerySource]) -> None:
    main = queries[MAIN]
    for name, source in queries.items():
        key = f"model.detector.queries.{name}"
        if isinstance(source, HybridQueries) and not (isinstance(main, TwoStageQueries) and main.class_agnostic):
            raise UserError(
                f"{key}: hybrid queries are the next proposals of a first stage over all tokens; choose "
                "model/query@model.detector.main=two_stage with model.detector.main.class_agnostic=true"
            )
        if isinstance(source, DenoisingQueries) and source.indicator != getattr(main, "indicator", False):
            raise UserError(
                f"{key}.indicator={source.indicator}: denoising queries have the last channel as indicator where the "
                "main ones have, which learned ones can; set model.indicator alone"
            )
