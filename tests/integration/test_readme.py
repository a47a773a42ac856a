"""Every command in README, docs, kernels and examples: composed, or run with a model of toy size."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import forked
from codetr import application
from codetr.data.commands.convert import main as convert
from codetr.data.commands.tile import main as tile
from codetr.papers import main as papers
from codetr.report import main as report
from codetr.training import fit
from made_run import make as make_run
from toy import as_lvis, data_overrides, environment, make_coco, overrides

if TYPE_CHECKING:
    from conftest import Trained

ROOT = Path(__file__).parents[2]
PLACES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "kernels/*/README.md", "examples/*/README.md")
DOCUMENTS = [path for place in PLACES for path in sorted(ROOT.glob(place))]
KNOWN = {
    "train",
    "eval",
    "predict",
    "serve",
    "export",
    "analyse",
    "report",
    "data",
    "convert",
    "papers",
    "benchmark",
    "estimate",
    "doctor",
}
OWN_DATA = r"## Train on your own data\n.*?```bash\n(.*?)```"
TAKEN = r"## Take it with you\n.*?```bash\n(.*?)```"
# What a command says about machines, data and files, which are others here.
ELSEWHERE = re.compile(r"(trainer(\.(devices|num_nodes|accelerator))?|data(\.\w+)?|run_dir|resume|initialise\.\w+)=")


def blocks() -> list[str]:
    text = "\n".join(re.sub(OWN_DATA, "", path.read_text(), flags=re.DOTALL) for path in DOCUMENTS)
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
    """Words of each that calls codetr, from the name of its module on: `codetr train x=1` and
    `python -m codetr.train x=1` are both ["codetr.train", "x=1"]. An indented line says more to the one above."""
    found: list[list[str]] = []
    for block in blocks():
        command: list[str] = []
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            if line.startswith(" ") and words:
                found.append([*command, *words])
            elif "codetr" in words:
                word, *given = words[words.index("codetr") + 1 :]
                command = [f"codetr.{word}", *given]
                found.append(command)
            elif "-m" in words and words[words.index("-m") + 1].startswith("codetr."):
                command = words[words.index("-m") + 1 :]
                found.append(command)
    return found


def settings(words: list[str]) -> tuple[str, list[str]]:
    """The configuration of a command's application, and its overrides."""
    module, *given = words
    if module == "codetr.data":
        return given[0], given[1:]
    if module == "codetr.benchmark":
        return {"step": "benchmark"}.get(given[0], given[0]), given[1:]
    return module.removeprefix("codetr."), given


COMMANDS = commands()
PAPERS = [words for words in COMMANDS if words[0] == "codetr.papers"]
CONVERTED = [words for words in COMMANDS if words[:2] == ["codetr.data", "convert"]]
TILED = [words for words in COMMANDS if words[:2] == ["codetr.data", "tile"]]
REPORTS = [words for words in COMMANDS if words[0] == "codetr.report"]
OTHERS = [*PAPERS, *CONVERTED, *TILED, *REPORTS, ["codetr.doctor"]]  # which compose no configuration
COMPOSED = [words for words in COMMANDS if words not in OTHERS and not {"-m", "--config-dir"} & set(words)]
TRAINED = [words for words in COMPOSED if words[0] == "codetr.train" and "official" not in " ".join(words)]


def test_the_documents_hold_commands() -> None:
    assert len(PAPERS) >= 5
    assert len(COMPOSED) >= 25
    assert {settings(words)[0] for words in COMPOSED} >= {
        "train",
        "eval",
        "predict",
        "export",
        "convert",
        "check",
        "benchmark",
        "latency",
        "estimate",
    }
    assert {words[0].removeprefix("codetr.") for words in COMMANDS} <= KNOWN


def test_both_forms_of_a_command_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "a.md"
    given = ["A=1 codetr train x=1  # b", "srun python -m codetr.train x=1", "  y=2", "make demo", "codetr data show z"]
    document.write_text("\n".join(["```bash", *given, "```"]))
    monkeypatch.setattr("test_readme.DOCUMENTS", [document])
    train = ["codetr.train", "x=1"]
    assert commands() == [train, train, [*train, "y=2"], ["codetr.data", "show", "z"]]


@pytest.mark.parametrize("words", COMPOSED, ids=" ".join)
def test_every_command_composes(words: list[str]) -> None:
    name, given = settings(words)
    application.compose(name, given)


@pytest.mark.parametrize("words", PAPERS, ids=" ".join)
def test_every_command_of_the_papers_prints(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = words[1 : words.index(">")] if ">" in words else words[1:]
    papers([word for word in given if word != "--run"])
    assert "co_detr_t7_k3" in capsys.readouterr().out


@pytest.mark.parametrize("words", CONVERTED, ids=" ".join)
def test_every_data_set_is_converted(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small set, first brought into the form and place that the command reads."""
    monkeypatch.chdir(tmp_path)
    make_coco(tmp_path / "coco", train=2, val=1)
    given = dict(word.split("=") for word in words[2:])
    made_of_coco(given)
    assert convert(words[2:]) == 0
    assert any(path.is_file() for path in (tmp_path / given["target"]).rglob("*"))


@pytest.mark.parametrize("words", TILED, ids=" ".join)
def test_every_data_set_is_tiled(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_coco(tmp_path / "coco", train=2, val=1)
    given = dict(word.split("=") for word in words[2:])
    made_of_coco(given)
    assert tile(words[2:]) == 0
    assert len(list((tmp_path / given["target"] / "train").iterdir())) == 2


@pytest.mark.parametrize("words", REPORTS, ids=" ".join)
def test_every_report_is_made(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs that lie where the command says."""
    monkeypatch.chdir(tmp_path)
    given = words[1:]
    out = given[given.index("--out") + 1] if "--out" in given else "comparison.html"
    runs = [word for word in given if not word.startswith("--") and word != out]
    for run in runs:
        make_run(Path(run.replace("*", "0")))
        make_run(Path(run.replace("*", "1")))
    spread = [str(path) for word in given for path in ([word] if "*" not in word else sorted(Path().glob(word)))]
    assert report([*spread, "--rounds", "5"]) == 0
    several = len(runs) > 1 or "*" in runs[0]
    assert "--text" in given or (Path(out) if several else Path(runs[0]) / "report.html").is_file()


def made_of_coco(given: dict[str, str]) -> None:
    """The set in `coco` in the form and place that a command reads."""
    data = [o for o in data_overrides(Path("coco")) if o.startswith(("data.train_", "data.val_"))]
    convert(["from=custom", f"to={given['from']}", "source=coco", f"target={given['source']}", *data])


@pytest.mark.slow
@pytest.mark.parametrize("words", TRAINED, ids=" ".join)
def test_every_training_takes_a_step(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model, queries, heads, losses and optimizer that it says, in toy size, on a small set."""
    make_coco(tmp_path / "data", train=2, val=1)
    if "metrics=lvis" in words:
        for split in ("train", "val"):
            as_lvis(tmp_path / "data" / f"{split}.json")
    given = [word for word in words[1:] if not ELSEWHERE.match(word)]
    left = ("model=", "name=", "~", "schedule", "optim", "callbacks.ema")  # of the command, or of the toy alone
    small = [o for o in overrides(tmp_path / "data") if not o.startswith(left)]
    if any("num_queries" in word for word in given):
        small = [o for o in small if "num_queries" not in o]
    trees = "experiment=trees" in words  # whose backbone is small as it is, and whose tiles are its augmentation's
    small += ["views.tiles.size=64" if trees else "model.detector.backbone.name=resnet10t", "trainer.precision=32-true"]
    small += ["~callbacks.progress", "trainer.max_epochs=1", "trainer.max_steps=1", "run_dir=run"]
    monkeypatch.chdir(tmp_path)
    fit(application.compose("train", [*given, *small]))
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()


def lines(section: str = OWN_DATA) -> list[str]:
    block = re.search(section, (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def script(given: list[str]) -> str:
    """The commands as their modules: the test of the wheel has the command itself."""
    function = f'codetr() {{ {sys.executable} {forked.__file__} {forked.server()} "codetr.$1" "${{@:2}}"; }}'
    return "\n".join(["set -e", function, *given])


def bash(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    variables = {**environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", text], cwd=folder, env=variables, capture_output=True, text=True, timeout=900)


def test_lines_for_ones_own_data(tmp_path: Path) -> None:
    """check, show, train, eval, predict: images and annotations lie where they say, every line ends well and leaves
    what it promises."""
    data = tmp_path / "mine"
    make_coco(data, train=4, val=2)
    for split in ("train", "val"):
        text = (data / f"{split}.json").read_text()
        (data / f"{split}.json").write_text(re.sub(r'"file_name": "', f'"file_name": "{split}/', text))
    (tmp_path / "photos").symlink_to(data / "val")
    toy = [o for o in overrides(data) if o not in data_overrides(data)]
    toy += ["augment@data=small", "data.num_workers=0", "trainer.max_epochs=1"]
    small = {"experiment=co_deformable_r50_12e": " ".join(toy), "output=grid.png": "output=grid.png augment@data=small"}
    text = script(lines())
    for given, instead in small.items():
        assert given in text
        text = text.replace(given, instead)
    done = bash(text, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "check.html").stat().st_size > 10_000
    assert (tmp_path / "grid.png").exists()
    assert (tmp_path / "outputs/mine/metrics.json").exists() or list((tmp_path / "outputs/mine").rglob("metrics.csv"))
    assert len(lines()) <= 10
    assert list(tmp_path.rglob("predictions.json"))


@pytest.mark.slow
def test_lines_that_take_a_detector_along(small: Trained, tmp_path: Path) -> None:
    """Each line leaves what it names, and the last ones run the files."""
    (tmp_path / "best.ckpt").symlink_to(small.checkpoint)
    (tmp_path / "photos").symlink_to(small.images)
    given = lines(TAKEN)
    assert len(given) == 6
    done = bash(script(given), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("model.onnx", "model.xml", "small.onnx", "repository/detector/config.pbtxt"):
        assert (tmp_path / name).is_file(), name
    assert re.search(r"^  int8 +AP", done.stdout, re.MULTILINE)
    assert "unused nodes" not in done.stdout  # what libraries say to their developers
    assert (tmp_path / "predictions" / "predictions.json").is_file()
    assert list(tmp_path.glob("outputs/eval/*/metrics.json"))
