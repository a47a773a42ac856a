"""Documents without running anything: links and anchors lead somewhere, tables are the measured ones, paths exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/*.md", "kernels/*/README.md", "examples/*/README.md", "benchmarks/results/*.md")
    for path in sorted(ROOT.glob(pattern))
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
TABLE = re.compile(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)


def prose(text: str) -> str:
    """Without blocks of code and code within lines."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub names them."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(document: Path) -> list[str]:
    """Links of a document that lead nowhere; those to other places of the net are not asked."""
    found = []
    for link in LINK.findall(prose(document.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    assert broken(document) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Two words, and `code`\n```\n# no heading\n```\n")
    document = tmp_path / "a.md"
    links = ["b.md", "b.md#two-words-and-code", "https://nowhere.example", "c.md", "b.md#no-heading", "#here"]
    document.write_text(" ".join(f"[x]({link})" for link in links) + "\n`[x](d.md)`\n")
    assert broken(document) == links[3:]


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, open_ = set(), [ROOT / "README.md"]
    while open_:
        document = open_.pop()
        if document in reached or document.suffix != ".md":
            continue
        reached.add(document)
        links = (link.partition("#")[0] for link in LINK.findall(prose(document.read_text())))
        open_ += [(document.parent / link).resolve() for link in links if link and not re.match(r"\w+:", link)]
    assert {path for path in DOCUMENTS if "results" not in path.parts} <= reached


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_tables_are_those_that_were_measured() -> None:
    seen = set()
    for document in DOCUMENTS:
        for name, table in TABLE.findall(document.read_text()):
            seen.add(name)
            measured = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text()
            assert table.strip() == measured.strip(), f"{document.name}, {name}: run `make readme`"
    assert seen >= {"demo", "compare_heads", "msda_cpu", "evaluation", "loader", "table"}


def test_files_that_the_documents_name_exist() -> None:
    for document in DOCUMENTS:
        named = re.findall(r"`((?:src|conf|kernels|tests|examples)/[\w/.]+\.\w+)`", document.read_text())
        given = [path for path in named if not re.search(r"\b(test_)?(heads_)?x\.", path)]  # x: of a recipe
        missing = [path for path in given if not (ROOT / path).exists()]
        assert missing == [], f"{document.name} names files that are not there"


def test_python_of_the_documents_is_python() -> None:
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        ast.parse(block)


def test_every_benchmark_is_listed_with_what_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.__main__ import benchmarks

    listed = benchmarks()
    named = set(re.findall(r'NAME="?([a-z_]+/[a-z_]+)', "".join(d.read_text() for d in DOCUMENTS)))
    named |= set(re.findall(r"-m benchmarks ([a-z_]+/[a-z_]+)", (ROOT / "Makefile").read_text()))
    assert len(named) >= 8
    assert named <= listed.keys()
    assert all(listed.values())
