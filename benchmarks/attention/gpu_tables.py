"""What attention/gpu found, as tables."""

from collections.abc import Callable

from benchmarks import report

OURS = "codetr"  # what the others are compared with
MODES = ("forward", "forward_backward")
Lines = list[list[str]]


def by_case(record: dict, head: str, key: str, cell: Callable[[dict, str], str]) -> Lines:
    """A line per case, a column per implementation that stands under `key` in any of them."""
    cases = record["cases"]
    names = list(dict.fromkeys(name for case in cases.values() for name in case[key]))
    return [[head, *names], *([title, *(cell(case, name) for name in names)] for title, case in cases.items())]


def milliseconds(case: dict, name: str) -> str:
    return " / ".join(f"{case[mode][name]['ms']:.3f}" if name in case[mode] else "-" for mode in MODES)


def ratio(case: dict, name: str) -> str:
    pairs = ((case[mode].get(name), case[mode][OURS]) for mode in MODES)
    return " / ".join(f"{one['ms'] / ours['ms']:.2f}" if one else "-" for one, ours in pairs)


def memory(case: dict, name: str) -> str:
    return f"{case['peak_mb'][name]:.0f}" if name in case["peak_mb"] else "-"


def limits(record: dict) -> Lines:
    kinds = ("memory", "L2", "L1", "atomics")
    lines = [["our kernel", "ms", *(f"{kind}: ms (of the time)" for kind in kinds)]]
    for title, case in record["cases"].items():
        for kernel, taken in case["kernels"].items():
            floor, ms = case["floors_ms"][kernel], taken["ms"]
            cells = [f"{floor[kind]:.3f} ({floor[kind] / ms:.0%})" if kind in floor else "-" for kind in kinds]
            lines.append([f"{title}, {kernel}", f"{ms:.3f}", *cells])
    return lines


def tables(record: dict) -> list[Lines]:
    return [
        by_case(record, "forward / forward + backward, ms", "forward_backward", milliseconds),
        by_case(record, "times our time", "forward_backward", ratio),
        by_case(record, "peak memory, forward + backward, MB", "peak_mb", memory),
        limits(record),
    ]


def write(record: dict) -> None:
    """The record as JSON, and beside it the tables and how they came about in Markdown."""
    parts = [report.table(lines[0], lines[1:]) for lines in tables(record)]
    rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in record["rates"].items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts.append(
        f"Images of 800 x 1333, batch 2, 8 heads x 32, 4 points. Medians of {record['repeats']} on the device, the "
        f"implementations alternating, L2 overwritten before each. In bfloat16 the classic kernel casts to float32 and "
        f"back, which is timed. Of the time of each of our kernels: device memory, every tensor once; the gather, four"
        f" rows a sample, from L2 alone (more than 100% where L1 helps) and from L1 alone; the atomics. Limits, "
        f"measured, in TB/s: {rates}. {record['card']}, driver {record['driver']}, {versions}; `{record['command']}`, "
        f"{record['date']}."
    )
    reasons = {(name, why) for case in record["cases"].values() for name, why in case["refused"].items()}
    parts += [f"- {name}: {why}" for name, why in sorted(reasons | set(record["missing"].items()))]
    report.write("msda_gpu", "\n\n".join(parts), record)
