"""Put the measured tables of benchmarks/results/*.md into the README, between their markers."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def filled(text: str) -> str:
    """The README with every `<!-- table: name -->` section replaced by benchmarks/results/name.md."""

    def section(match: re.Match) -> str:
        table = (ROOT / "benchmarks" / "results" / f"{match[1]}.md").read_text().strip()
        return f"<!-- table: {match[1]} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", section, text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = filled(readme.read_text())
    if "--check" in sys.argv:
        sys.exit(None if text == readme.read_text() else "README.md is not up to date: run `make readme`")
    readme.write_text(text)
