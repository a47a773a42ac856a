"""python -m codetr.shapes --preset demo --root data/shapes-demo --seed 0"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from codetr.errors import UserError
from codetr.shapes import PRESETS, generate


def main() -> None:
    sizes = "; ".join(
        f"{name}: {p.train} train + {p.val} val images, long side {p.long_side}" for name, p in PRESETS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m codetr.shapes",
        description="Draw a detection data set of shapes in COCO's format. The same preset and seed give the same "
        "files; nothing is done when the folder already holds them.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="demo", help=f"{sizes} (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="folder to make (default: data/shapes-PRESET)")
    parser.add_argument("--seed", type=int, default=0, help="a number from 0 on (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes to draw with (default: all cores)"
    )
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error("--seed must be 0 or above")
    root = arguments.root or Path("data") / f"shapes-{arguments.preset}"
    try:
        generate(root, PRESETS[arguments.preset], arguments.seed, arguments.workers, progress=True)
    except UserError as error:
        sys.exit(str(error))
    print(root)


if __name__ == "__main__":
    main()
