"""Requests of all kinds, what has to be answered to each, and the count of what was."""

from __future__ import annotations

import asyncio
import struct
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image

from benchmarks.serving.server import Server
from codetr.inference import Result, load
from codetr.trees import PLACES, photographs_folder

THRESHOLD = 0.1
MANY = 12  # pieces of a photograph
# Of 20 requests; the status that each kind has to get where the server has a place for it.
MIXTURE = {"good": 12, "broken": 2, "bomb": 2, "huge": 1, "slow": 2, "unending": 1}
STATUS = {"good": 200, "broken": 422, "bomb": 413, "huge": 413, "slow": 200, "unending": 408}
SLOW = 1.5  # seconds in which the body of a slow request arrives


class Photos(NamedTuple):
    """Files, and what `predict` finds in each."""

    contents: list[bytes]
    found: list[Result]


def photographs(folder: Path, checkpoint: Path, size: int) -> Photos:
    """Pieces of the photograph that the demo validates on, `size` pixels high and wide, each predicted alone."""
    with Image.open(photographs_folder() / f"{PLACES['val'][0]}.png") as whole:
        width, height = whole.size
        step = max(1, min(width, height) - size) // 3 or 1
        corners = [(x, y) for y in range(0, height - size + 1, step) for x in range(0, width - size + 1, step)][:MANY]
        paths = [folder / f"{i}.png" for i in range(len(corners))]
        for path, (x, y) in zip(paths, corners, strict=True):
            whole.convert("RGB").crop((x, y, x + size, y + size)).save(path)
    found = load(checkpoint).predict(paths, score_threshold=THRESHOLD, batch_size=1)
    return Photos([path.read_bytes() for path in paths], found)


@dataclass
class Tally:
    """counts: of "kind, status". seconds: of the whole. took: seconds of each answer to a good request. wrong: what
    should not have happened. may_break: whether the server may go away."""

    counts: Counter[str] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    may_break: bool = False

    def numbers(self) -> dict[str, Any]:
        p50, p95 = np.percentile(self.took, [50, 95]).tolist()
        return {"p50": p50, "p95": p95, "per second": len(self.took) / self.seconds, "wrong": self.wrong}


def mixed_up() -> tuple[str, ...]:
    """The kinds of `MIXTURE`, each as often as it says, in an order that is drawn once."""
    kinds = [kind for kind, count in MIXTURE.items() for _ in range(count)]
    return tuple(np.random.default_rng(0).permutation(kinds).tolist())


async def ask(client: httpx.AsyncClient, server: Server, photos: Photos, kind: str, turn: int, tally: Tally) -> None:
    """One request, and whether its answer is the right one."""
    which = turn % len(photos.contents)
    start = time.perf_counter()
    try:
        if kind == "unending":
            status = await _unending(server)
            tally.counts[f"{kind}, {status}"] += 1
            if status not in (408, 429):
                tally.wrong.append(f"{kind}: {status}")
            return
        given = _content(kind, photos.contents[which])
        answer = await client.post(f"/predict?threshold={THRESHOLD}", content=given)
    except httpx.TransportError as error:
        tally.counts[f"{kind}, broken off"] += 1
        if not tally.may_break:
            tally.wrong.append(f"{kind}: {error!r}")
        return
    tally.counts[f"{kind}, {answer.status_code}"] += 1
    if answer.status_code == 429:
        if not answer.headers.get("Retry-After", "").isdigit():
            tally.wrong.append(f"{kind}: 429 without Retry-After")
        await asyncio.sleep(0.2)
    elif answer.status_code != STATUS[kind] or (answer.status_code == 200 and not _same(answer, photos.found[which])):
        tally.wrong.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
    elif kind == "good":
        tally.took.append(time.perf_counter() - start)


def _same(answer: httpx.Response, expected: Result) -> bool:
    """Up to what the sums of a batch differ by from those of one image: objects near the threshold may be on either
    side of it."""
    found = answer.json()["objects"]
    scores = np.array([one["score"] for one in found])
    sure = expected.above(THRESHOLD + 1e-4)
    count = len(sure)
    if not count <= len(found) <= count + 2 or not np.allclose(scores[:count], sure.scores, atol=1e-4):
        return False
    # Objects whose scores differ by less than these errors may change places.
    boxes = np.array([one["box"] for one in found]).reshape(-1, 4)
    far = np.abs(boxes[:, None] - sure.boxes_xyxy.numpy()[None]).max(2)
    return bool((far.min(0) < 0.05).all()) if count else True


def _content(kind: str, good: bytes) -> bytes | AsyncIterator[bytes]:
    if kind == "broken":
        return good[: len(good) // 2]
    if kind == "bomb":
        header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1_000_000), 9)), (b"IEND", b""))
        )
    if kind == "huge":
        return bytes(3_000_000)
    return _slowly(good) if kind == "slow" else good


async def _slowly(content: bytes) -> AsyncIterator[bytes]:
    part = -(-len(content) // 10)
    for i in range(10):
        await asyncio.sleep(SLOW / 10)
        yield content[i * part : (i + 1) * part]


async def _unending(server: Server) -> int:
    """The status of a request whose body stops in its middle."""
    url = httpx.URL(server.address)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\nhalf")
    line = await reader.readline()
    writer.close()
    return int(line.split()[1]) if line else 0
