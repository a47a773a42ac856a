"""The routes of a server."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from difflib import get_close_matches
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.middleware.trustedhost import TrustedHostMiddleware

from codetr.errors import UserError
from codetr.inference import Exported, Model
from codetr.serving.answers import About, Answer, Problem, about, answer
from codetr.serving.limits import Refused
from codetr.serving.metrics import KIND
from codetr.serving.pages import page
from codetr.serving.service import Service
from codetr.serving.settings import Settings
from codetr.views import Views

_log = logging.getLogger(__name__)

Threshold = Annotated[float, Query(ge=0, le=1, description="objects of a lower score are left out")]
Classes = Annotated[list[str], Query(description="names of the classes that are wanted; none: all")]
Chosen = Annotated[
    list[str], Query(description="names of views of the image, each through the next; none: as the model itself looks")
]
Given = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]

_BINARY = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "required": ["image"], "properties": {"image": _BINARY}}
_BODY = {
    "required": True,
    "description": "an image: as a file of a form, or as the whole body",
    "content": {"multipart/form-data": {"schema": _FORM}, "image/*": {"schema": _BINARY}},
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Answer},
    **{
        status: {"model": Problem, "description": text}
        for status, text in {
            400: "no image in it",
            401: "the token is missing or another one",
            403: "asked by a page of another site",
            408: "it took too long to arrive",
            413: "too many bytes or pixels",
            422: "the image cannot be read, or a value is none",
            429: "too many at a time; see Retry-After",
            503: "no answer in time; see Retry-After",
        }.items()
    },
}


def create_app(model: Model | Exported, settings: Settings, views: Mapping[str, Views]) -> FastAPI:
    """What a server of ASGI runs. It is ready when its lifespan has begun; whoever ends that, waits for the answers.

    views: from which requests choose, by their names.
    """
    service = Service(model, settings, views)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.warm_up()
        async with service.running():
            yield

    app = FastAPIOffline(redoc_url=None, title="codetr", version=version("codetr"), lifespan=lifespan)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=settings.names, www_redirect=False)
    _say_why(app)
    _public(app, service)
    token = [] if settings.token is None else [Depends(_checked(settings.token))]
    _private(app, service, [Depends(_refuse_other_sites), *token])
    return app


def _public(app: FastAPI, service: Service) -> None:
    whole = page(token_needed=service.settings.token is not None)

    @app.get("/", include_in_schema=False)
    async def show() -> Response:
        return whole

    @app.get("/health", responses={503: {"model": Problem}})
    async def health() -> dict[str, str]:
        """Whether requests are answered."""
        if not service.works:
            raise Refused(503, "the model has stopped; start the server again")
        return {"status": "ok"}


def _private(app: FastAPI, service: Service, dependencies: list[Any]) -> None:
    """Routes for programs and for our own page, with a token where there is one."""
    model, settings, metrics = service.model, service.settings, service.metrics

    @app.get("/model", dependencies=dependencies)
    async def describe() -> About:
        """The model that answers, and what a request may cost."""
        return about(model, settings, service.views)

    @app.get("/metrics", dependencies=dependencies, response_class=Response)
    async def measure() -> Response:
        """What the server counts, for Prometheus."""
        return Response(metrics.text(), headers={"Content-Type": KIND})

    @app.post(
        "/predict",
        dependencies=dependencies,
        responses=_RESPONSES,
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(
        request: Request,
        threshold: Threshold = settings.score_threshold,
        classes: Classes = [],  # noqa: B006
        views: Chosen = [],  # noqa: B006
    ) -> Response:
        """The objects in an image."""
        start, status = time.perf_counter(), 500
        try:
            _check_names("classes", classes, model.class_names)
            _check_names("views", views, service.views)
            content = answer(await service.answer(request, threshold, tuple(views)), classes)
            status = 200
            metrics.seconds.observe(time.perf_counter() - start)
        except (Refused, UserError) as error:
            status = error.status if isinstance(error, Refused) else 422
            raise
        except Exception as error:
            _log.exception("POST /predict failed")
            raise Refused(status, "the server failed; its log says why") from error
        finally:
            metrics.requests.labels(status).inc()
        return Response(content, media_type="application/json")


def _check_names(of: str, wanted: list[str], known: Collection[str]) -> None:
    for name in wanted:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            meant = f"did you mean {' or '.join(near)}?" if near else "GET /model lists them"
            raise Refused(422, f"{of}: there is no {name!a} here: {meant}")


def _checked(token: str) -> Callable[[HTTPAuthorizationCredentials | None], None]:
    def check(given: Given) -> None:
        if given is None or not secrets.compare_digest(given.credentials.encode(), token.encode()):
            raise Refused(401, "give the token of this server, Authorization: Bearer TOKEN")

    return check


def _refuse_other_sites(request: Request) -> None:
    """A page of the web cannot read an answer, but it could keep the model busy from any browser on this machine."""
    if request.headers.get("sec-fetch-site") == "cross-site":
        raise Refused(403, "pages of other sites are not answered")


def _say_why(app: FastAPI) -> None:
    """Every refusal in one form, `Problem`."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"detail": str(error)}, error.status, headers)

    @app.exception_handler(UserError)
    async def unusable(request: Request, error: UserError) -> Response:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        reasons = [f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()]
        return JSONResponse({"detail": "; ".join(reasons)}, 422)
