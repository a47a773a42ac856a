"""Our model against a bundle of the official code's tensors: python tests/parity/check.py BUNDLE_DIR [BUNDLE_DIR ...]

Builds the model from the bundle's config.json, loads its weights through the converter, and prints a line per stage
with the largest difference, absolute and relative. The exit status is 1 if one exceeds its tolerance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where pytest looks, too

from bundle import load
from rich.console import Console
from rich.table import Table
from stages import STAGES, lines

from codetr.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE_DIR")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this one; may be given several times")
    parser.add_argument("--failed", action="store_true", help="print only what exceeds its tolerance, or has a note")
    options = parser.parse_args()
    failures = 0
    for folder in options.bundles:
        try:
            bundle = load(folder)
        except UserError as error:
            sys.exit(f"error: {error}")
        table = Table("stage", "absolute", "relative", "tolerance", "", title=str(folder), title_justify="left")
        compared = [line for stage in options.stage or STAGES for line in lines(stage, bundle)]
        for line in compared:
            if not (options.failed and line.passes and not line.note):
                mark = f"ok {line.note}".strip() if line.passes else "[red]exceeds[/red]"
                table.add_row(
                    line.stage, f"{line.difference:.1e}", f"{line.relative:.1e}", f"{line.tolerance:.0e}", mark
                )
        exceeding = sum(not line.passes for line in compared)
        failures += exceeding
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(table)
        console.print(f"{folder.name}: {len(compared) - exceeding} of {len(compared)} within tolerance")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
