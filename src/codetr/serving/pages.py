"""The page at `/`, of one file, and what a browser may do with it."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse


def page(token_needed: bool) -> HTMLResponse:
    """Its own script and style, and requests to the server that it came from, are all that its policy allows."""
    folder = files("codetr.serving") / "page"
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    environment = Environment(
        loader=PackageLoader("codetr.serving", "page"), autoescape=True, undefined=StrictUndefined
    )
    text = environment.get_template("page.html").render(
        needed="yes" if token_needed else "no", **{name: Markup(part) for name, part in parts.items()}
    )
    policy = (
        f"default-src 'none'; script-src {_known(parts['js'])}; style-src {_known(parts['css'])}; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})


def _known(text: str) -> str:
    """As a policy names a script or a style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
