"""`codetr serve` in a process of its own, and what it tells of itself."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families


@dataclass
class Server:
    """address: where it listens."""

    process: subprocess.Popen[str]
    address: str

    def client(self) -> httpx.AsyncClient:
        """For one of many that ask; its connection is its own."""
        return httpx.AsyncClient(base_url=self.address, timeout=120, trust_env=False)

    def numbers(self) -> dict[str, float]:
        """Of /metrics, by name and status."""
        text = httpx.get(f"{self.address}/metrics", timeout=60, trust_env=False).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {
            sample.name + sample.labels.get("status", ""): sample.value
            for sample in samples
            if "le" not in sample.labels and not sample.name.endswith("_created")
        }

    def memory(self) -> float:
        """MiB of it that are in use now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@contextmanager
def started(checkpoint: Path, *overrides: str) -> Iterator[Server]:
    """A server on a port of its own, which answers. What is left of it at the end is killed."""
    command = [sys.executable, "-m", "codetr.serve", f"checkpoint={checkpoint}", "port=0", *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = re.search(r"http://\S+", line)
            if address is None:
                raise SystemExit(f"the server did not start: {line}")
            yield Server(process, _ready(process, address[0]))
        finally:
            process.kill()


def _ready(process: subprocess.Popen[str], address: str) -> str:
    while process.poll() is None:
        try:
            if httpx.get(f"{address}/health", trust_env=False).status_code == 200:
                return address
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the server ended before it answered")
