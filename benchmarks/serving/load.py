"""A server under load: batches against one image at a time, and a mixture of good, broken, huge and slow requests.

The demo's detector (or --checkpoint) behind `codetr serve`, in a process of its own; photographs of trees, cut into
pieces. Every answer is compared with what `predict` finds in the same file; the benchmark fails where one differs, is
missing, or is one too many. Clients, server and whatever else runs share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.serving.asking import Photos, Tally, ask, mixed_up, photographs
from benchmarks.serving.server import Server, started

NEWEST = "outputs/trees/*/checkpoints/best.ckpt"
BATCHES = (1, 8)  # the largest that are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help=f"of trees; the newest of {NEWEST}")
    parser.add_argument("--overrides", nargs="*", default=[], help="of codetr serve")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--size", type=int, default=256, help="height and width of the pieces of a photograph")
    parser.add_argument("--seconds", type=float, default=15, help="of each number of clients")
    parser.add_argument("--mixed", type=float, default=60, help="seconds of 64 clients with all kinds of requests")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; others are kept")
    options = parser.parse_args()
    checkpoint = options.checkpoint or max(Path().glob(NEWEST), key=lambda path: path.stat().st_mtime, default=None)
    if checkpoint is None:
        parser.error(f"there is no {NEWEST}: make demo leaves one, or give --checkpoint")
    kept = report.folder / "serving.json"
    record = json.loads(kept.read_text()) if kept.exists() and set(options.only) < set(PARTS) else {}
    with tempfile.TemporaryDirectory() as folder:
        whole = without_tiles(checkpoint, Path(folder))
        photos = photographs(Path(folder), whole, options.size)
        for name in options.only:
            with Console(stderr=True).status(f"{name} ..."):
                record[name] = PARTS[name](whole, photos, options)
    report.write("serving", markdown(record, options), record)
    if wrong := [problem for part in record.values() for one in part for problem in one["wrong"]]:
        raise SystemExit(f"{len(wrong)} requests were not answered as they should be: {wrong[:5]}")


def without_tiles(checkpoint: Path, folder: Path) -> Path:
    """The same detector, which looks at images as a whole: the pieces are no larger than a tile."""
    content = torch.load(checkpoint, weights_only=True)
    for name in ("tiles", "views"):
        content["codetr"]["config"].pop(name, None)
    torch.save(content, folder / "whole.ckpt")
    return folder / "whole.ckpt"


def throughput(checkpoint: Path, photos: Photos, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each largest batch and number of clients, which send good images, one after the other."""
    rows = []
    for batch in BATCHES:
        with started(checkpoint, f"batch_size={batch}", *options.overrides) as server:
            asyncio.run(clients(server, photos, 2, 2.0, ("good",)))  # what comes first is slower
            for count in options.clients:
                before = server.numbers()
                tally = asyncio.run(clients(server, photos, count, options.seconds, ("good",)))
                after = server.numbers()
                grown = {name: after[name] - before.get(name, 0) for name in after}
                own = {
                    "clients": count,
                    "batch": batch,
                    "images per batch": grown["codetr_batch_images_sum"] / grown["codetr_batch_images_count"],
                    "share of the model": grown["codetr_batch_seconds_sum"] / tally.seconds,
                }
                rows.append(own | tally.numbers())
    return rows


async def clients(server: Server, photos: Photos, count: int, seconds: float, kinds: tuple[str, ...]) -> Tally:
    """So many at a time, each asking again as soon as it is answered."""
    tally, loop = Tally(), asyncio.get_running_loop()
    start = loop.time()

    async def one(number: int) -> None:
        turn = number
        async with server.client() as client:
            while loop.time() < start + seconds:
                kind = kinds[turn % len(kinds)]
                await ask(client, server, photos, kind, turn, tally)
                turn += 1

    await asyncio.gather(*(one(number) for number in range(count)))
    tally.seconds = loop.time() - start
    return tally


def mixture(checkpoint: Path, photos: Photos, options: argparse.Namespace) -> list[dict[str, Any]]:
    """64 clients with all kinds of requests, of which the server takes 48 at a time; its memory once a second."""
    memory: list[float] = []

    async def watched(server: Server) -> Tally:
        async def watch() -> None:
            while True:
                memory.append(server.memory())
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        try:
            return await clients(server, photos, 64, options.mixed, mixed_up())
        finally:
            watching.cancel()

    limits = ("max_requests=48", "read_seconds=3", "max_bytes=2_000_000", "max_pixels=4_000_000")
    with started(checkpoint, *limits, *options.overrides) as server:
        tally = asyncio.run(watched(server))
        told = server.numbers()
    answered = sum(value for name, value in told.items() if name.startswith("codetr_requests_total"))
    if answered != sum(tally.counts.values()):
        tally.wrong.append(f"{sum(tally.counts.values())} requests, {answered:.0f} answers")
    quarter = max(1, len(memory) // 4)
    used = {"second quarter": mean(memory[quarter : 2 * quarter]), "last quarter": mean(memory[-quarter:])}
    about = {"seconds": options.mixed, "memory": used | {"peak": max(memory)}}
    return [{"counts": dict(sorted(tally.counts.items())), **about, **tally.numbers()}]


def ends(checkpoint: Path, photos: Photos, options: argparse.Namespace) -> list[dict[str, Any]]:
    """16 clients on connections of their own, and a signal while all are being served."""
    return [_ended_by(number, checkpoint, photos, options) for number in (signal.SIGTERM, signal.SIGKILL)]


def _ended_by(number: signal.Signals, checkpoint: Path, photos: Photos, options: argparse.Namespace) -> dict[str, Any]:
    with started(checkpoint, *options.overrides) as server:
        tally = asyncio.run(_ended(server, photos, number))
        status = server.process.wait(60)
    if number == signal.SIGTERM and (tally.counts["good, 200"] != 16 or status != 128 + number):
        tally.wrong.append(f"SIGTERM: {dict(tally.counts)}, status {status}")
    return {"signal": number.name, "counts": dict(tally.counts), "status": status, "wrong": tally.wrong}


async def _ended(server: Server, photos: Photos, number: signal.Signals) -> Tally:
    tally = Tally(may_break=number == signal.SIGKILL)

    async def one(turn: int) -> None:
        async with server.client() as client:
            await ask(client, server, photos, "good", turn, tally)

    asking = [asyncio.create_task(one(turn)) for turn in range(16)]
    while server.numbers()["codetr_requests_served"] + sum(tally.counts.values()) < 16:
        await asyncio.sleep(0.01)
    server.process.send_signal(number)
    await asyncio.gather(*asking)
    return tally


PARTS = {"throughput": throughput, "mixture": mixture, "ends": ends}


def markdown(record: dict[str, Any], options: argparse.Namespace) -> str:
    parts = {"throughput": _rates, "mixture": _mixture, "ends": _ends}
    made = (
        f"Pieces of {options.size} x {options.size} pixels; the clients share the machine, on which more may have run; "
        f"`make bench NAME=serving/load`, {date.today()}, {report.machine()}."
    )
    return "\n\n".join([*(parts[name](record[name]) for name in parts if name in record), made])


def _rates(rows: list[dict[str, Any]]) -> str:
    alone = {row["clients"]: row["per second"] for row in rows if row["batch"] == 1}
    head = [
        "clients",
        "largest batch",
        "images/s",
        "against one at a time",
        "p50",
        "p95",
        "per batch",
        "model busy",
    ]
    cells = [
        [
            str(row["clients"]),
            str(row["batch"]),
            f"{row['per second']:.1f}",
            f"{row['per second'] / alone[row['clients']]:.2f}",
            f"{row['p50'] * 1000:.0f} ms",
            f"{row['p95'] * 1000:.0f} ms",
            f"{row['images per batch']:.1f}",
            f"{100 * row['share of the model']:.0f} %",
        ]
        for row in sorted(rows, key=lambda row: row["clients"])
    ]
    return report.table(head, cells)


def _mixture(rows: list[dict[str, Any]]) -> str:
    (row,) = rows
    counts = row["counts"]
    kinds = sorted({name.partition(", ")[0] for name in counts})
    statuses = sorted({name.partition(", ")[2] for name in counts})
    cells = [[kind, *(str(counts.get(f"{kind}, {status}", 0)) for status in statuses)] for kind in kinds]
    memory = row["memory"]
    about = (
        f"64 clients for {row['seconds']:g} s, 48 served at a time: {sum(counts.values())} requests, by the status of "
        f"their answers; {len(row['wrong'])} wrong. Memory of the server: {memory['second quarter']:.0f} MiB in the "
        f"second quarter, {memory['last quarter']:.0f} MiB in the last, at most {memory['peak']:.0f} MiB."
    )
    return f"{report.table(['requests', *statuses], cells)}\n\n{about}"


def _ends(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{row['signal']} while 16 are served: {row['counts'].get('good, 200', 0)} whole and right answers, "
        f"{row['counts'].get('good, broken off', 0)} connections broken off, {len(row['wrong'])} wrong, "
        f"status {row['status']}."
        for row in rows
    ]
    return " ".join(lines)


if __name__ == "__main__":
    main()
