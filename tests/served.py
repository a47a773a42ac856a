"""Servers for tests: in a thread of this process, with the model that a test hands over, or in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from codetr import application
from codetr.inference import Exported, Model
from codetr.serve import bound, server_of, settings_of
from codetr.serving.app import create_app
from toy import environment


@contextmanager
def served(model: Model | Exported, *overrides: str) -> Iterator[httpx.Client]:
    """A client of the server that `codetr serve` would start with these overrides."""
    config = application.compose("serve", ["checkpoint=unread", *overrides])
    settings, views = settings_of(config), application.named_views(config)
    with bound(settings.host, 0) as listener:
        server = server_of(create_app(model, settings, views), settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.start()
        try:
            end = time.monotonic() + 30
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < end
                time.sleep(0.01)
            with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(30)


@contextmanager
def process(checkpoint: Path, *overrides: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`codetr serve` on a port of its own, ready, and its address."""
    command = [sys.executable, "-m", "codetr.serve", f"checkpoint={checkpoint}", "port=0", "device=cpu", *overrides]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            address = re.search(r"http://\S+", line)
            assert address, line
            end = time.monotonic() + 60
            while not _answers(address[0]):
                assert server.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
            yield server, address[0]
        finally:
            server.kill()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
