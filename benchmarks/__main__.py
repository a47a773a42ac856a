"""`python -m benchmarks NAME ...` runs one benchmark with the options that follow; without a name it lists them all.

A benchmark is a file in a folder of its subject with a function `main`, and NAME is its path: `training/matcher`.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from pathlib import Path

from benchmarks import report

HERE = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Name of every benchmark -> the first sentence of its docstring. Imports none of them."""
    found = {}
    for path in sorted(HERE.glob("*/*.py")):
        module = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            about = " ".join((ast.get_docstring(module) or "").split())
            found[path.relative_to(HERE).with_suffix("").as_posix()] = about.split(". ")[0].rstrip(".")
    return found


def main() -> None:
    found = benchmarks()
    listed = "\n".join(f"  {name:24} {about}" for name, about in found.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"{__doc__}\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=report.folder, help="folder of the results (%(default)s)")
    parser.add_argument("name", nargs="?", help="one of the list above; NAME --help tells its own options")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of that benchmark")
    given = parser.parse_args()
    if given.name is None:
        parser.print_help()
        return
    if given.name not in found:
        parser.error(f"there is no benchmark {given.name}; there are {', '.join(found)}")
    report.folder = given.out
    sys.argv = [f"python -m benchmarks {given.name}", *given.options]
    importlib.import_module(f"benchmarks.{given.name.replace('/', '.')}").main()


if __name__ == "__main__":
    main()
