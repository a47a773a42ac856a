"""Pages of reports: what is read back from them, odd runs, hostile names, commands."""

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from codetr import report
from codetr.callbacks.report import write_metrics
from codetr.reporting import comparison, history, page, text
from codetr.types import Detections
from made_run import evaluated, make, scene, store

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "🐟 fish",
    "x" * 200,
    "\x1b[2J",
    "a\u202eb",
]


class Tables(HTMLParser):
    """Rows of cells, each with its text and its value, by the class of their table; and the charts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.charts: dict = {}
        self.scripts: list[str] = []
        self._table, self._cell, self._script = "", False, ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        if tag == "table":
            self._table = own.get("class") or ""
        elif tag == "tr":
            self.rows.setdefault(self._table, []).append([])
        elif tag == "td":
            self.rows[self._table][-1].append(("", own.get("data-value")))
            self._cell = True
        elif tag == "script":
            self._script = own.get("id") or "code"

    def handle_endtag(self, tag: str) -> None:
        self._cell &= tag != "td"
        if tag == "script":
            self._script = ""

    def handle_data(self, data: str) -> None:
        if self._script == "charts":
            self.charts = json.loads(data)
        elif self._script:
            self.scripts.append(data)
        elif self._cell:
            words, value = self.rows[self._table][-1][-1]
            self.rows[self._table][-1][-1] = (words + data, value)

    def column(self, table: str, i: int) -> dict[str, float]:
        return {row[0][0].strip(): float(row[i][1] or "nan") for row in self.rows[table] if row}


def test_every_number_is_that_of_metrics_json(tmp_path: Path) -> None:
    run = make(tmp_path / "run", masks=True, crowds=True)
    seen, metrics = Tables(page.write(run)), json.loads((run / "metrics.json").read_text())
    boxes = {k: v for k, v in metrics.items() if k.startswith(("map", "mar")) and isinstance(v, float)}
    masks = {k: v for k, v in metrics["segm"].items() if isinstance(v, float)}
    assert len(boxes) == len(masks) == 12
    rows = [row for row in seen.rows["numbers"] if row]
    assert [(row[0][0], float(row[1][1] or "nan")) for row in rows] == [*boxes.items(), *masks.items()]
    assert [row[1][0] for row in rows] == [f"{v:.3f}" if v != -1 else "–" for v in [*boxes.values(), *masks.values()]]
    rows = [row for row in seen.rows["classes"] if row]
    names = list(metrics["map_per_class"])
    expected = [*metrics["map_per_class"].items(), *metrics["segm"]["map_per_class"].items()]
    assert [(row[0][0].strip(), float(row[1][1] or "nan")) for row in rows] == expected
    assert seen.column("classes", 3) == metrics["objects_per_class"]
    ap50 = [float(row[5][1] or "nan") for row in rows[: len(names)]]
    assert np.mean(ap50) == pytest.approx(metrics["map_50"], abs=1e-12)
    curve = seen.charts["run-scores"]["variants"][""][0]
    assert curve["name"] == "AP"
    assert curve["y"][-1] == pytest.approx(metrics["map"], rel=1e-3)
    assert curve["xs"]["steps"] == [49, 99, 149, 199]
    assert curve["xs"]["images seen"] == [392, 792, 1192, 1592]
    confused = seen.charts["bbox-confusion"]["variants"][""][0]
    pairs = {(a, b): confused["text"][names.index(a)][names.index(b)] for a, b, _ in metrics["confused"]}
    assert [[a, b, n] for (a, b), n in pairs.items()] == metrics["confused"]


def test_changes_are_those_since_the_validation_before(tmp_path: Path) -> None:
    """The log of the made run ends with three quarters of the numbers, and the numbers."""
    run = make(tmp_path / "run")
    seen, metrics = Tables(page.write(run)), json.loads((run / "metrics.json").read_text())
    assert seen.column("numbers", 2)["map"] == pytest.approx(metrics["map"] / 4)
    changes = seen.column("classes", 2)
    assert changes == pytest.approx({name: ap / 4 for name, ap in metrics["map_per_class"].items()})


def test_only_a_run_that_goes_on_loads_itself_again(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert "location.reload" in page.write(run, running=True).read_text()
    assert "location.reload" not in page.write(run).read_text()


def test_losses_are_summed_by_group_layer_and_term(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    variants = Tables(page.write(run)).charts["run-losses"]["variants"]
    first = {name: {t["name"]: t["y"][0] for t in traces} for name, traces in variants.items()}
    assert first["groups"] == {"all together": 18, "main": 12, "denoising": 6}
    assert first["main: layers"] == {"0": 4, "1": 4, "encoder": 4}
    assert first["denoising: terms"] == {"class": 3, "l1": 3}


def test_thinned_lines_keep_their_mean() -> None:
    steps, values = np.arange(1000.0), np.random.default_rng(0).random(1000)
    at, means = history.thinned(steps, values, 100)
    assert len(at) == 100
    assert means.mean() == pytest.approx(values.mean())
    values[5] = np.nan
    assert np.isfinite(history.thinned(steps, values, 100)[1]).all()


@pytest.mark.parametrize("case", ["one class", "many classes", "nothing found", "no objects", "nan", "no photos"])
def test_odd_runs(case: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if case == "one class":
        make(run, names=["only"])
    elif case == "many classes":
        make(run, names=[f"class {i}" for i in range(1203)], images=60)
    elif case == "nan":
        make(run, bad=True)
    elif case == "no photos":
        make(run)
        for photo in (run / "photos").iterdir():
            photo.unlink()
    else:
        make(run)
        found, truth = scene(8, 3, seed=1)
        none = Detections(*(t[:0] for t in (found[0].scores, found[0].labels, found[0].boxes_xyxy)))
        empty = {k: v[:0] for k, v in truth[0].items()}
        images = ([none] * 8, truth) if case == "nothing found" else (found, [empty] * 8)
        metric = evaluated(["red", "green", "blue"], *images)
        store(metric, run)
        write_metrics(run / "metrics.json", metric.evaluations["bbox"], {"step": 1})
    path = page.write(run)
    assert path.stat().st_size < 10e6
    seen = Tables(path)
    rows = [row for row in seen.rows["classes"] if row]
    assert len(rows) == {"one class": 1, "many classes": 1203}.get(case, 3)
    values = json.loads((run / "metrics.json").read_text())
    assert seen.column("numbers", 1)["map"] == values["map"]
    if case == "no objects":
        assert values["map"] == -1
    console = Console(file=io.StringIO(), width=100)
    console.print(text.of_run(page.read(run)))
    assert "AP50 lost" in console.file.getvalue()  # type: ignore[attr-defined]


def test_names_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    run = make(tmp_path / "run", names=HOSTILE, images=30)
    seen = Tables(page.write(run))
    shown = [row[0][0].strip() for row in seen.rows["classes"] if row]
    assert shown == [*HOSTILE[:4], "\\x1b[2J", "a\\u202eb"]
    assert not any(f"alert({i})" in script for script in seen.scripts for i in (1, 2))
    assert "\x1b" not in (run / "report.html").read_text()


def test_a_run_without_a_validation_has_its_curves(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for name in ("metrics.json", "evaluation_bbox.npz"):
        (run / name).unlink()
    seen = Tables(page.write(run))
    assert "numbers" not in seen.rows
    assert seen.charts["run-losses"]["variants"]


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    """No element of it loads anything; addresses inside of plotly's code are of maps that nobody draws."""

    found: list[str] = []

    class Sources(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(v or "" for k, v in attrs if k in ("src", "href"))

    Sources().feed(page.write(make(tmp_path / "run")).read_text())
    assert found
    assert all(source.startswith("data:image/jpeg;base64,") for source in found)


def test_runs_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds of each of two settings, of which one finds better."""
    runs = []
    for lr, noise in ((0.1, 6.0), (0.2, 1.0)):
        for seed in (0, 1):
            config = {"seed": seed, "optimizer": {"lr": lr}, "name": "x"}
            runs.append(str(make(tmp_path / f"{lr}_{seed}", images=40, noise=noise, config=config)))
    out = tmp_path / "comparison.html"
    assert report.main([*runs, "--out", str(out), "--rounds", "40"]) == 0
    seen = Tables(out)
    maps = [json.loads((Path(run) / "metrics.json").read_text())["map"] for run in runs]
    assert list(seen.column("numbers", 1).values()) == maps
    noise_rows = [row for row in seen.rows["noise"] if row]
    assert [row[0][0] for row in noise_rows] == ["0.1_1", "0.2_0", "0.2_1"]
    assert all("other objects" not in row[1][0] for row in noise_rows[:1])
    groups = {row[0][0]: row[2][0] for row in seen.rows["groups"] if row}
    assert list(groups) == ["optimizer.lr=0.1", "optimizer.lr=0.2"]
    assert groups["optimizer.lr=0.1"] == f"{np.mean(maps[:2]):.3f} ± {np.std(maps[:2], ddof=1):.3f}"
    settings = {row[0][0]: [cell[0] for cell in row[1:]] for row in seen.rows["settings"] if row}
    assert settings == {"seed": ["0", "1", "0", "1"], "optimizer.lr": ["0.1", "0.1", "0.2", "0.2"]}
    assert len(seen.charts["convergence"]["variants"]["map"]) == 4
    capsys.readouterr()
    assert report.main([*runs[:2], "--text", "--rounds", "10"]) == 0
    assert "draws" in capsys.readouterr().out


def test_one_run_by_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run")
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert report.main([str(run), "--text"]) == 0
    told = capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"{metrics['map']:.3f}" in told
    assert "classes that cost the most" in told


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "is no run"),
        ({"metrics.json": "{"}, "metrics.json is no JSON"),
        ({"metrics.json": "{}", ".hydra/config.yaml": "a: [1"}, "config.yaml is no YAML"),
        ({"metrics.json": '{"map": 0.5}', "evaluation_bbox.npz": "x"}, "no evaluation that codetr stored"),
    ],
)
def test_mistakes_are_explained(
    files: dict[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert report.main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert str(tmp_path) in told


def test_names_of_runs_are_as_long_as_it_takes(tmp_path: Path) -> None:
    ends = ["a/one", "b/one", "b/two"]
    assert comparison.unlike([tmp_path / end for end in ends]) == ends
    assert comparison.unlike([tmp_path / "a/one", tmp_path / "two"]) == ["one", "two"]
