"""Pages that stand alone, out of the templates beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from codetr.evaluation.engines import ABSENT
from codetr.files import atomically
from codetr.names import shown

NOTHING = "–"


def write(path: Path, template: str, values: Mapping[str, Any], advice: str = "") -> None:
    """One file that needs nothing beside it.

    values: of the template's names. advice: what else to do where the file system refuses `path`.

    Raises UserError where it does.
    """
    text = _environment().get_template(template).render(values)
    with atomically(path, advice=advice) as part:
        part.write_text(text, encoding="utf-8", errors="replace")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("codetr.reporting"), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"shown": shown, "decimals": decimals, "signed": signed}
    environment.globals["plotly"] = plotly
    environment.policies["json.dumps_kwargs"] = {}  # keys stay in their order
    return environment


@cache
def plotly() -> Markup:
    """The library that draws the charts, 5 MB of JavaScript."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def decimals(value: float | None, digits: int = 3) -> str:
    """NOTHING for what there is not: None, NaN, and COCO's -1."""
    return NOTHING if value is None or value != value or value == ABSENT else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """With its sign; a change of nothing is 0."""
    return "" if value is None or value != value else f"{value:+.{digits}f}"
