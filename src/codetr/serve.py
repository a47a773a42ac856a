"""A detector behind HTTP, with a page for browsers: `codetr serve checkpoint=FILE`."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NoReturn

from omegaconf import DictConfig

from codetr import application
from codetr.errors import UserError

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from codetr.serving.settings import Settings


def serve(config: DictConfig) -> None:
    """Answer until a signal comes; then finish what was accepted. After SIGTERM the exit status is 143.

    Raises UserError for bad files and keys, for an address that is taken, and where the extra is not installed.
    """
    application.require(config, checkpoint="outputs/train/<date>/checkpoints/best.ckpt")
    settings = settings_of(config)
    # Imported here, so that --help and --cfg answer at once.
    try:
        from codetr.serving.app import create_app
    except ImportError as error:
        raise UserError(f"codetr serve needs more packages ({error}): pip install 'codetr[serve]'") from error
    from codetr.inference import load

    signal.signal(signal.SIGTERM, _end)
    with bound(settings.host, config.port) as listener:
        trust = application.as_names(config.trust)
        model = load(config.checkpoint, device=config.device, weights=config.weights, trust=trust)
        app = create_app(model, settings, application.named_views(config))
        host, port = settings.host, listener.getsockname()[1]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{model.path}, {len(model.class_names)} classes: {address} (Ctrl+C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server_of(app, settings).run(sockets=[listener])


def server_of(app: FastAPI, settings: Settings) -> uvicorn.Server:
    """What runs `app` until a signal comes, and then as long as answers to what was accepted may take."""
    import uvicorn

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.read_seconds + settings.answer_seconds),
    )
    return uvicorn.Server(config)


def settings_of(config: DictConfig) -> Settings:
    """Raises UserError for values that are none."""
    from codetr.serving.settings import Settings

    token = config.token if config.token is not None else os.environ.get("CODETR_TOKEN")
    return Settings(
        host=str(config.host),
        token=None if token is None else str(token),
        score_threshold=config.score_threshold,
        batch_size=config.batch_size,
        batch_wait=config.batch_wait,
        readers=config.readers,
        max_bytes=config.max_bytes,
        max_pixels=config.max_pixels,
        max_requests=config.max_requests,
        read_seconds=config.read_seconds,
        answer_seconds=config.answer_seconds,
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address, and does not listen yet. Raises UserError where it cannot be had."""
    if type(port) is not int or not 0 <= port < 2**16:  # the system would take its lowest 16 bits
        raise UserError(f"port={port}: must be a whole number from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as left:  # open where binding fails
            listener = left.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            left.pop_all()
    except OSError as error:
        raise UserError(
            f"host={host} port={port}: {error.strerror or error}; take another, port=0 finds one"
        ) from error
    return listener


def _end(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def main() -> None:
    application.run(serve, config_name="serve")


if __name__ == "__main__":
    main()
