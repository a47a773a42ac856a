"""Whether the parts of a detector fit together: asked when it is built, before any data is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from codetr.errors import UserError
from codetr.queries.collaborative import CollaborativeQueries
from codetr.queries.hybrid import HybridQueries
from codetr.queries.two_stage import TwoStageQueries
from codetr.types import MAIN, AuxiliaryHead, Encoder, QuerySource

_RULE = "model.detector.decoder.query_position"


def check_agreement(
    levels: int,
    encoder: Encoder,
    heads: Mapping[str, AuxiliaryHead],
    queries: Mapping[str, QuerySource],
    decoder: Any,
) -> None:
    """levels: that the neck makes. Raises UserError for parts of which one wants what the others do not bring, or
    brings what nothing takes: parameters without a gradient."""
    if levels != encoder.num_levels:
        raise UserError(
            f"model.num_levels={levels}: model.detector.encoder ({type(encoder).__name__}) takes {encoder.num_levels}; "
            "set model.num_levels, or choose encoder@model.detector.encoder: dense (one level) or deformable"
        )
    _check_positions(queries, decoder)
    _check_references(queries, decoder)
    _check_locations(decoder)
    _check_sources(heads, queries)


def _check_positions(queries: Mapping[str, QuerySource], decoder: Any) -> None:
    rule = decoder.query_position
    wrong = [name for name, source in queries.items() if source.brings_position != rule.wants_position]
    if not wrong:
        return
    if rule.wants_position:
        raise UserError(
            f"{_RULE} ({type(rule).__name__}) takes the positions of the query sources, but {', '.join(wrong)} bring "
            "none: leave them out, or let the decoder derive all positions: model.embed_position=false, "
            f"model/position@{_RULE}=reference, and main queries that are boxes (anchors, two_stage)"
        )
    raise UserError(
        f"{_RULE} ({type(rule).__name__}) derives positions from the references, but the query sources "
        f"{', '.join(wrong)} bring some: set model.embed_position=false (two_stage), or choose main queries that are "
        f"boxes (anchors), or model/position@{_RULE}=given"
    )


def _check_references(queries: Mapping[str, QuerySource], decoder: Any) -> None:
    rule = decoder.query_position
    points = [name for name, source in queries.items() if not source.brings_reference]
    if decoder.reference_head is None and points:
        raise UserError(
            f"model.detector.decoder.reference_head=null: the query sources {', '.join(points)} bring positions only, "
            "from which it must predict points; configure one (as conf/model/deformable_detr.yaml does), or choose "
            "main queries that are boxes (anchors, two_stage)"
        )
    if decoder.reference_head is not None and not points:
        raise UserError(
            f"model.detector.decoder.reference_head: all query sources ({', '.join(queries)}) bring references, "
            "nothing is left for it to predict; set it to null"
        )
    if rule.wants_boxes and points:
        raise UserError(
            f"{_RULE} ({type(rule).__name__}) needs boxes, but the query sources {', '.join(points)} bring points: "
            "choose main queries that are boxes (anchors, two_stage)"
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


def _check_sources(heads: Mapping[str, AuxiliaryHead], queries: Mapping[str, QuerySource]) -> None:
    main = queries[MAIN]
    for name, source in queries.items():
        key = f"model.detector.queries.{name}"
        if isinstance(source, HybridQueries) and not (isinstance(main, TwoStageQueries) and main.class_agnostic):
            raise UserError(
                f"{key}: hybrid queries are the next proposals of a first stage over all tokens; choose "
                "model/query@model.detector.main=two_stage with model.detector.main.class_agnostic=true"
            )
        if isinstance(source, CollaborativeQueries) and source.head not in heads:
            raise UserError(f"{key}.head={source.head}: model.detector.heads has {', '.join(heads) or 'none'}")
