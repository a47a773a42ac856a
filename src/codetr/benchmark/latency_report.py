"""Latencies as tables in Markdown."""

from __future__ import annotations

from typing import Any

from codetr.benchmark.latency import STAGES
from codetr.benchmark.tables import table

TOP = 6  # operators of a graph


def page(result: dict[str, Any]) -> str:
    """result: as the command makes it."""
    height, width = result["size"]
    about = (
        f"Milliseconds of {result['repeats']} runs in turns, medians of the stages; {height} x {width}, float32. "
        f"{result['date']}, {result['surroundings']}. `{result['command']}`"
    )
    tables = [latencies(result["rows"])]
    if result["operators"]:
        tables.append(operators(result["operators"]))
    return "\n\n".join([*tables, about])


def latencies(rows: list[dict[str, Any]]) -> str:
    head = ["", "runtime", "batch", "p50", "p95", "p99", "images a second", *STAGES, "memory, MiB"]
    return table(
        head,
        [
            [row["detector"], row["runtime"], str(row["batch"])]
            + [f"{row[name] * 1e3:.0f}" for name in ("p50", "p95", "p99")]
            + [f"{row['images a second']:.2f}"]
            + [f"{row[stage] * 1e3:.1f}" for stage in STAGES]
            + ["" if row["memory"] is None else f"{row['memory'] / 2**20:.0f}"]
            for row in rows
        ],
    )


def operators(found: dict[str, dict[str, float]]) -> str:
    """Shares of the time of a graph in ONNX Runtime."""
    rows = [
        [name, ", ".join(f"{operator} {share:.1%}" for operator, share in list(own.items())[:TOP])]
        for name, own in found.items()
    ]
    return table(["graph in ONNX Runtime", "share of its operators"], rows)
