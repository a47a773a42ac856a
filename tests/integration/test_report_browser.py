"""Pages of reports in a real browser: nothing is complained about, sorting and switching work."""

import time
from pathlib import Path
from typing import Any

import pytest

from codetr.reporting import comparison, page
from made_run import make

WIDE, PHONE = (1280, 900), (390, 844)


def opened(browser: Any, path: Path, size: tuple[int, int] = WIDE) -> float:
    """Seconds until it is there. Nothing may be complained about, and nothing stand out at the side."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    start = time.perf_counter()
    browser.get(path.as_uri())
    lasted = time.perf_counter() - start
    through(browser)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    return lasted


def through(browser: Any) -> None:
    """Scroll to every chart that is shown, and wait until it is drawn."""
    shown = "const boxes=[...document.querySelectorAll('.chart')].filter(b=>b.offsetParent);"
    for i in range(browser.execute_script(f"{shown}return boxes.length")):
        browser.execute_script(f"{shown}boxes[arguments[0]].scrollIntoView()", i)
        end = time.perf_counter() + 10
        while not browser.execute_script(f"{shown}return boxes[arguments[0]].dataset.drawn", i):
            assert time.perf_counter() < end
            time.sleep(0.05)


def column(browser: Any, table: str, i: int) -> list[str]:
    """The values by which a table is sorted."""
    value = "c=>c.dataset.value??c.textContent.trim()"
    rows = "[...document.querySelector(arguments[0]).tBodies[0].rows]"
    return browser.execute_script(f"return {rows}.map(r=>r.cells[arguments[1]]).map({value})", f"table.{table}", i)


def click(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def visible(browser: Any, selector: str) -> int:
    script = (
        "return [...document.querySelectorAll(arguments[0])].filter(e=>getComputedStyle(e).display!=='none').length"
    )
    return browser.execute_script(script, selector)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ["red", "green", "<script>alert(1)</script>", "🐟", "x" * 200]
    return page.write(make(tmp_path_factory.mktemp("run"), names=names, images=40, masks=True), running=True)


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["desktop", "phone"])
def test_nothing_is_complained_about(browser: Any, report: Path, size: tuple[int, int]) -> None:
    opened(browser, report, size)
    assert browser.execute_script("return document.querySelectorAll('.chart .main-svg').length") > 8


def test_tables_are_sorted_by_a_click(browser: Any, report: Path) -> None:
    opened(browser, report)
    before = column(browser, "classes", 1)
    click(browser, "table.classes th:nth-child(2)")
    assert column(browser, "classes", 1) == sorted(before, key=float)
    click(browser, "table.classes th:nth-child(2)")
    assert column(browser, "classes", 1) == sorted(before, key=float, reverse=True)
    click(browser, "table.classes th:first-child")
    assert column(browser, "classes", 0)[0] != column(browser, "classes", 0)[-1]


def test_marks_are_switched_on_and_off(browser: Any, report: Path) -> None:
    opened(browser, report)
    for mark in ("found", "missed", "right", "wrong"):
        before = visible(browser, f".costly g.{mark}")
        assert before > 0
        click(browser, f"input[data-hides={mark}]")
        assert visible(browser, f".costly g.{mark}") == 0
        click(browser, f"input[data-hides={mark}]")
        assert visible(browser, f".costly g.{mark}") == before


def test_masks_take_the_place_of_boxes(browser: Any, report: Path) -> None:
    opened(browser, report)
    assert visible(browser, "section[data-kind=bbox]") == 2
    click(browser, "input[name=kind][value=segm]")
    assert visible(browser, "section[data-kind=bbox]") == 0
    assert visible(browser, "section[data-kind=segm] .costly g path") > 0
    through(browser)


def test_axes_and_variants_are_chosen_and_kept(browser: Any, report: Path) -> None:
    opened(browser, report)
    last = "return document.querySelector('[data-chart=run-scores]').data[0].x.at(-1)"
    assert browser.execute_script(last) == 199
    click(browser, "input[name=axis][value=hours]")
    assert browser.execute_script(last) == pytest.approx(199 / 360, rel=1e-5)
    names = "return document.querySelector('[data-chart=run-losses]').data.map(t=>t.name)"
    choice = "const choice=document.querySelector('select[data-variants=run-losses]');"
    browser.execute_script(f"{choice}choice.value='main: layers';choice.dispatchEvent(new Event('change'))")
    assert browser.execute_script(names) == ["0", "1", "encoder"]
    opened(browser, report)  # as a page does that loads itself again
    assert browser.execute_script(last) == pytest.approx(199 / 360, rel=1e-5)
    assert browser.execute_script(names) == ["0", "1", "encoder"]


def test_a_comparison_opens(browser: Any, tmp_path: Path) -> None:
    runs = [page.read(make(tmp_path / f"run {i}", noise=noise)) for i, noise in enumerate((5.0, 1.0))]
    comparison.write(tmp_path / "comparison.html", comparison.compare(runs, 20, lambda rounds: rounds))
    for size in (WIDE, PHONE):
        opened(browser, tmp_path / "comparison.html", size)


@pytest.mark.slow
def test_a_large_run_is_small_and_opens_at_once(browser: Any, tmp_path: Path) -> None:
    """80 classes, 5,000 images of 100 detections, a long log."""
    names = [f"class {i}" for i in range(80)]
    run = make(tmp_path / "run", names=names, images=5000, steps=4000, objects=14, found=130, pictures=True)
    path = page.write(run)
    assert path.stat().st_size < 10e6
    opened(browser, path)
    assert min(opened(browser, path) for _ in range(2)) < 2
