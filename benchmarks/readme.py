"""Put the measured tables of benchmarks/results/*.md into the README, between their markers, and write the docs."""

import re
import sys
from pathlib import Path

from codetr.papers import load_rows, markdown

ROOT = Path(__file__).resolve().parents[1]


def filled(text: str) -> str:
    """The README with every `<!-- table: name -->` section replaced by benchmarks/results/name.md."""

    def section(match: re.Match) -> str:
        table = (ROOT / "benchmarks" / "results" / f"{match[1]}.md").read_text().strip()
        return f"<!-- table: {match[1]} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", section, text, flags=re.DOTALL)


def generated() -> dict[Path, str]:
    """Every generated page, as it should be."""
    readme = ROOT / "README.md"
    rows = markdown(load_rows(), ROOT / "benchmarks" / "results" / "rows")
    return {readme: filled(readme.read_text()), ROOT / "docs" / "reproduction.md": rows}


if __name__ == "__main__":
    for path, text in generated().items():
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or text != path.read_text():
            sys.exit(f"{path.name} is not up to date: run `make readme`")
