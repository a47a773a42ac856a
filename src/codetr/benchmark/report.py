"""What was measured, as tables in Markdown."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from codetr.benchmark.parts import Part
from codetr.benchmark.tables import table
from codetr.files import atomically

TOP = 15  # operators in the table


def surroundings(device: torch.device) -> str:
    """Device and versions, for the line below a table."""
    where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return ", ".join([where, *(f"{name} {_version(name)}" for name in ("torch", "triton", "numba"))])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def times(measured: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """measured: what was done ("training step", "inference") -> who did it, ours first -> seconds."""
    head, rows = ["", *(f"{what}, s" for what in measured)], []
    names = list(next(iter(measured.values())))
    if len(names) > 1:
        head = ["", *(cell for what in measured for cell in (f"{what}, s", "ours is faster by"))]
    for name in names:
        cells = []
        for own in measured.values():
            cells.append(f"{own[name]['seconds']:.3f} ({own[name]['least']:.3f})")
            if len(names) > 1:
                cells.append(f"{own[name]['seconds'] / own[names[0]]['seconds']:.2f}")
        rows.append([name, *cells])
    return table(head, rows)


def parts(found: Mapping[str, Part], seconds: float, arithmetic: float) -> str:
    """seconds: of a step that nobody profiles, to which the profiled times are scaled. arithmetic: operations a second
    that the device reaches."""
    whole = sum(part.forward + part.backward for part in found.values())
    scale = seconds / whole
    rows = []
    ordered = sorted(found.items(), key=lambda item: -item[1].forward - item[1].backward)
    total = Part(*(sum(column) for column in zip(*(vars(part).values() for part in found.values()), strict=True)))
    for name, part in [*ordered, ("**all**", total)]:
        own = (part.forward + part.backward) * scale
        rows.append(
            [
                name,
                f"{part.forward * scale * 1e3:.1f}",
                f"{part.backward * scale * 1e3:.1f}",
                f"{own / seconds:.1%}",
                f"{part.calls:.0f}",
                f"{part.flops / 1e9:.2f}",
                f"{part.flops / arithmetic / own:.0%}" if own > 0 and part.flops else "",
                f"{part.saved / 2**20:.1f}",
            ]
        )
    limit = "share of the arithmetic limit"
    head = ["part", "forward, ms", "backward, ms", "share", "operator calls", "GFLOP", limit, "kept for backward, MiB"]
    return table(head, rows)


def operators(found: Sequence[tuple[str, float, float]], seconds: float) -> str:
    """The longest. found: (name, seconds, calls) of a profiled step. seconds: of a step that nobody profiles."""
    scale = seconds / sum(own for _, own, _ in found)
    rows = [
        [f"`{name[:70]}`", f"{own * scale * 1e3:.1f}", f"{own * scale / seconds:.1%}", f"{calls:.0f}"]
        for name, own, calls in found[:TOP]
    ]
    return table([f"the {len(rows)} longest operators", "ms", "share", "calls"], rows)


def waits(found: Sequence[tuple[int, str]]) -> str:
    return table(["the host waits in", "times a step"], [[place, str(count)] for count, place in found])


def page(result: dict[str, Any]) -> str:
    """result: as the command makes it."""
    tables = [times(result["times"])]
    if result["parts"]:
        seconds = result["times"]["training step"]["ours"]["seconds"]
        found = {name: Part(**numbers) for name, numbers in result["parts"].items()}
        tables.append(parts(found, seconds, result["arithmetic"]))
        tables.append(operators(result["operators"], seconds))
    if result["waits"]:
        tables.append(waits(result["waits"]))
    height, width = result["size"]
    about = (
        f"Medians (in brackets the least) of {result['repeats']} steps in turns; {result['batch']} x {height} x {width}"
    )
    if result["parts"]:
        about += f"; products of matrices reach {result['arithmetic'] / 1e9:.0f} GFLOP/s here"
    if result["peak"]:
        about += f"; peak memory {result['peak'] / 2**30:.2f} GiB"
    return "\n\n".join([*tables, f"{about}. {result['date']}, {result['surroundings']}. `{result['command']}`"])


def show(text: str, result: dict[str, Any], stem: Path | None) -> None:
    """Print the page `text`, and write it and `result` into stem.md and stem.json, where a stem is given."""
    console = Console()
    console.print(Markdown(text) if console.is_terminal else text, soft_wrap=True, markup=False, highlight=False)
    if stem is None:
        return
    for suffix, content in ((".md", text), (".json", json.dumps(result, indent=1))):
        with atomically(stem.with_name(stem.name + suffix), advice="choose another out=NAME") as part:
            part.write_text(f"{content}\n", encoding="utf-8")
    print(f"written to {stem}.md and {stem}.json", file=sys.stderr)
