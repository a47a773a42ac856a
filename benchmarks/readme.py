"""`make readme`: put the measured tables into README and docs, and write docs/reproduction.md.

A document says where a table goes: everything from `<!-- table: NAME -->` to `<!-- end -->` becomes results/NAME.md.
"""

import re
from pathlib import Path

from benchmarks.report import folder
from codetr.papers import load_rows, markdown

ROOT = Path(__file__).resolve().parents[1]


def filled(text: str) -> str:
    """A document with its tables as they were measured last."""

    def section(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{(folder / f'{match[1]}.md').read_text().strip()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", section, text, flags=re.DOTALL)


def main() -> None:
    (ROOT / "docs" / "reproduction.md").write_text(markdown(load_rows(), folder))
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*/README.md")):
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
