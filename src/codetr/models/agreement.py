"""Whether the parts of a detector fit together: asked when it is built, before any data is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from codetr.errors import UserError
from codetr.queries.collaborative import CollaborativeQueries
from codetr.queries.denoising import DenoisingQueries
from codetr.queries.hybrid import HybridQueries
from codetr.queries.two_stage import TwoStageQueries
from codetr.types import MAIN, AuxiliaryHead, Encoder, QuerySource

_RULE = "model.detector.decoder.query_position"


def check_names(heads: Mapping[str, AuxiliaryHead], queries: Mapping[str, Any]) -> None:
    """queries: makers of query sources. Raises UserError for collaborative queries of no head."""
    for name, make in queries.items():
        if getattr(make, "func", None) is CollaborativeQueries and name not in heads:
            raise UserError(
                f"model.detector.queries.{name}: collaborative queries bear the name of their head, and "
                f"model.detector.heads has {', '.join(heads) or 'none'}"
            )


def check_agreement(levels: int, encoder: Encoder, queries: Mapping[str, QuerySource], decoder: Any) -> None:
    """levels: that the neck makes. Raises UserError for parts of which one wants what the others do not bring, or
    brings what nothing takes: parameters without a gradient."""
    if levels != encoder.num_levels:
        raise UserError(
            f"model.num_levels={levels}: model.detector.encoder ({type(encoder).__name__}) takes {encoder.num_levels}; "
            "set model.num_levels, or choose encoder@model.detector.encoder: dense (one level) or deformable"
        )
    _check_references(queries, decoder)
    _check_locations(decoder)
    _check_sources(queries)


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
