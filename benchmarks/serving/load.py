"""A server under load: batches against one image at a time, and a mixture of good, broken, huge and slow requests.

The demo's detector (or --checkpoint) behind `codetr serve`, in a process of its own; photographs of trees, cut into
pieces. Every answer is compared with what `predict` finds in the same file; the benchmark fails where one differs, is
missing, or is one too many. Clients, server and whatever else runs share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import report
from benchmarks.serving.asking import Photos, Tally, ask, mixed_up, photographs
from benchmarks.serving.server import Server, started

NEWEST = "outputs/trees/*/checkpoints/best.ckpt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help=f"of trees; the newest of {NEWEST}")
    parser.add_argument("--overrides", nargs="*", default=[], help="of codetr serve")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="largest batches that are compared")
    parser.add_argument("--size", type=int, default=400, help="height and width of the pieces of a photograph")
    parser.add_argument("--seconds", type=float, default=15, help="of each number of clients")
    parser.add_argument("--mixed", type=float, default=60, help="seconds of 64 clients with all kinds of requests")
    options = parser.parse_args()
    checkpoint = options.checkpoint or max(Path().glob(NEWEST), key=lambda path: path.stat().st_mtime, default=None)
    if checkpoint is None:
        parser.error(f"there is no {NEWEST}: make demo leaves one, or give --checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        photos = photographs(Path(folder), checkpoint, options.size)
    rows = [row for batch in options.batches for row in throughput(checkpoint, photos, batch, options)]
    mixture = mixed(checkpoint, photos, options)
    ends = {number.name: ended(checkpoint, photos, number, options) for number in (signal.SIGTERM, signal.SIGKILL)}
    record = {"rows": rows, "mixture": mixture, "ends": ends}
    report.write("serving", markdown(record, options), record)
    if wrong := [problem for part in (*rows, mixture, *ends.values()) for problem in part["wrong"]]:
        raise SystemExit(f"{len(wrong)} requests were not answered as they should be: {wrong[:5]}")


def throughput(checkpoint: Path, photos: Photos, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of clients, which send good images, one after the other."""
    rows = []
    with started(checkpoint, f"batch_size={batch}", *options.overrides) as server:
        asyncio.run(clients(server, photos, 2, 2.0, ("good",)))  # what comes first is slower
        for count in options.clients:
            before = server.numbers()
            tally = asyncio.run(clients(server, photos, count, options.seconds, ("good",)))
            after = server.numbers()
            grown = {name: after[name] - before.get(name, 0) for name in after}
            rows.append(
                {
                    "clients": count,
                    "batch": batch,
                    "images per batch": grown["codetr_batch_images_sum"] / grown["codetr_batch_images_count"],
                    "share of the model": grown["codetr_batch_seconds_sum"] / tally.seconds,
                    **tally.numbers(),
                }
            )
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


def mixed(checkpoint: Path, photos: Photos, options: argparse.Namespace) -> dict[str, Any]:
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
    return {"counts": dict(sorted(tally.counts.items())), "memory": used | {"peak": max(memory)}, **tally.numbers()}


def ended(checkpoint: Path, photos: Photos, number: signal.Signals, options: argparse.Namespace) -> dict[str, Any]:
    """16 clients on connections of their own, and a signal while all are being served."""
    with started(checkpoint, *options.overrides) as server:
        tally = asyncio.run(_ended(server, photos, number))
        status = server.process.wait(60)
    if number == signal.SIGTERM and (tally.counts["good, 200"] != 16 or status != 128 + number):
        tally.wrong.append(f"SIGTERM: {dict(tally.counts)}, status {status}")
    return {"counts": dict(tally.counts), "status": status, "wrong": tally.wrong}


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


def markdown(record: dict[str, Any], options: argparse.Namespace) -> str:
    rows = record["rows"]
    alone = {row["clients"]: row["per second"] for row in rows if row["batch"] == min(options.batches)}
    head = [
        "clients",
        "largest batch",
        "images/s",
        "against one at a time",
        "p50",
        "p95",
        "images per batch",
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
        for row in rows
    ]
    mixture, ends = record["mixture"], record["ends"]
    statuses = Counter[str]()
    for name, count in mixture["counts"].items():
        statuses[name.rpartition(", ")[2]] += count
    counted = ", ".join(f"{count} with {status}" for status, count in sorted(statuses.items()))
    memory = mixture["memory"]
    whole, lost = (ends["SIGKILL"]["counts"].get(name, 0) for name in ("good, 200", "good, broken off"))
    about = (
        f"Mixed: 64 clients for {options.mixed:g} s, good, broken, huge, slow and unending requests, 48 served at a "
        f"time: {sum(statuses.values())} requests, {counted}; {len(mixture['wrong'])} wrong. Memory of the server: "
        f"{memory['second quarter']:.0f} MiB in the second quarter, {memory['last quarter']:.0f} MiB in the last, at "
        f"most {memory['peak']:.0f} MiB. SIGTERM with 16 accepted: "
        f"{ends['SIGTERM']['counts'].get('good, 200', 0)} answered. SIGKILL with 16 accepted: {whole} whole answers, "
        f"{lost} connections broken off, no half answer taken for one."
    )
    made = (
        f"Pieces of {options.size} x {options.size} pixels, {options.seconds:g} s each; clients share the machine, on "
        f"which more may have run; `make bench NAME=serving/load`, {date.today()}, {report.machine()}."
    )
    return "\n\n".join([report.table(head, cells), about, made])


if __name__ == "__main__":
    main()
