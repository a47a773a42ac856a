"""`codetr analyse`: every figure of a toy run, and what is written while it trains."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

import codetr
from codetr import analyse, application
from codetr.analyses.conflict import Conflict
from codetr.errors import UserError
from codetr.eval import evaluate
from codetr.training import fit
from toy import CLASSES, make_coco, overrides

MASKS = "figure.foreground=masks figure.pooled=true +data.val_masks=true"
FIGURES = {  # and the pictures of each
    f"discriminability {MASKS}": ["", "_maps"],
    "discriminability figure.of=decoder": ["", "_maps"],
    "discriminability figure.of=decoder figure.each_query=true": ["", "_maps"],
    "instability": [""],
    "conflict figure.top=3": ["", "_mean", "_maps"],
    "queries": ["", "_distances"],
    "groups": ["", "_points"],
    "every_group": [""],
}
Analyse = Callable[[str], tuple[list[dict[str, str]], dict]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that never was: random weights of two heads and two groups, which every snapshot moves."""
    folder = tmp_path_factory.mktemp("analyse")
    make_coco(folder / "data", train=1, val=3)
    given = [*overrides(folder / "data"), "model.query_groups=2", "model.num_classes=3", "run_dir=nowhere"]
    config = application.plain(application.compose("train", given))
    detector = instantiate(config["model"]["detector"], _convert_="all")
    for step in range(0, 6, 2):
        for parameter in detector.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.03)
        content = {
            "state_dict": {f"detector.{name}": value for name, value in detector.state_dict().items()},
            "codetr": {"config": config, "class_names": list(CLASSES)},
            "global_step": step,
        }
        for path in (f"snapshots/step_{step:08d}.ckpt", f"checkpoints/{'last' if step == 4 else 'best'}.ckpt"):
            (folder / "toy_seed0" / path).parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, folder / "toy_seed0" / path)
    return folder / "toy_seed0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of two steps, averaged snapshots at the end of each."""
    folder = tmp_path_factory.mktemp("trained")
    make_coco(folder / "data", train=4, val=3)
    given = [*overrides(folder / "data"), "callbacks=[default,snapshots,instability]", "trainer.max_epochs=3"]
    given += [
        "callbacks.snapshots.every_n_steps=2",
        "callbacks.snapshots.weights=ema",
        "callbacks.snapshots.half=false",
    ]
    given += ["trainer.check_val_every_n_epoch=1", "~callbacks.progress", f"run_dir={folder}/toy_seed0"]
    assert fit(application.compose("train", given)).best == folder / "toy_seed0/checkpoints/best.ckpt"
    return folder / "toy_seed0"


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds to compile."""
    monkeypatch.setenv("CODETR_MSDA", "reference")
    monkeypatch.setenv("CODETR_ROI_ALIGN", "reference")


@pytest.fixture
def figure(tmp_path: Path) -> Analyse:
    def make(run: Path, words: str) -> tuple[list[dict[str, str]], dict]:
        given = [f"figure={words.split()[0]}", *words.split()[1:], f"runs=[{run}]", f"out={tmp_path}/out"]
        assert analyse.main([*given, "device=cpu", "batch_size=2"]) == 0
        with (tmp_path / "out.csv").open(newline="") as file:
            return list(csv.DictReader(file)), json.loads((tmp_path / "out.json").read_text())

    return make


@pytest.mark.parametrize("words", FIGURES)
def test_every_figure(words: str, run: Path, figure: Analyse, tmp_path: Path) -> None:
    rows, numbers = figure(run, words)
    assert rows
    assert {row["run"] for row in rows} == {"toy_seed0"}
    assert {row["label"] for row in rows} == {"toy"}
    assert numbers["runs"] == {"toy_seed0": "toy"}
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(f"out{name}.png" for name in FIGURES[words])
    for path in tmp_path.glob("*.png"):
        assert len(np.unique(np.asarray(Image.open(path)))) > 20, path.name


@pytest.mark.slow
def test_the_logged_instability_is_that_of_the_snapshots(trained: Path, figure: Analyse) -> None:
    with (trained / "csv/metrics.csv").open(newline="") as file:
        logged = [float(row["val/instability"]) for row in csv.DictReader(file) if row.get("val/instability")]
    rows, _ = figure(trained, "instability")
    values = {int(row["step"]): float(row["instability"]) for row in rows}
    assert [values[4], values[6]] == pytest.approx(logged)  # the run validated behind steps 2, 4 and 6


@pytest.mark.slow
def test_snapshots_are_checkpoints(trained: Path) -> None:
    names = [f"step_{step:08d}.ckpt" for step in (0, 2, 4, 6)]
    assert sorted(path.name for path in (trained / "snapshots").iterdir()) == names
    last = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    model = codetr.load(trained / "snapshots" / names[-1], device="cpu")
    assert model.step == 6
    for name, value in model.detector.state_dict().items():
        assert torch.equal(value, last["ema"]["weights"].get(name, value)), name


def truth_of_group(run: Path, group: int, path: Path) -> None:
    """Annotations of the validation images: the three best detections of a group in each."""
    model = codetr.load(run / "checkpoints/best.ckpt", device="cpu")
    model.detector.keep_group(group)
    content = json.loads((run.parent / "data/val.json").read_text())
    images = [run.parent / "data/val" / image["file_name"] for image in content["images"]]
    content["annotations"] = []
    for image, found in zip(content["images"], model.predict(images, score_threshold=0), strict=True):
        for (x0, y0, x1, y1), label in zip(found.boxes_xyxy[:3].tolist(), found.labels[:3].tolist(), strict=True):
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            number = len(content["annotations"]) + 1
            content["annotations"].append({"id": number, "image_id": image["id"], "category_id": label + 1, **box})
    path.write_text(json.dumps(content))


@pytest.mark.slow
def test_every_group_is_what_an_evaluation_of_it_says(run: Path, figure: Analyse, tmp_path: Path) -> None:
    """Where the second finds its own detections."""
    truth_of_group(run, 2, tmp_path / "truth.json")
    rows, _ = figure(run, f"every_group +data.val_annotations={tmp_path}/truth.json")
    assert [row["name"] for row in rows] == ["main", "group_2"]
    assert float(rows[1]["map_50"]) > max(0.2, float(rows[0]["map_50"]))
    given = [f"checkpoint={run}/checkpoints/best.ckpt", f"+data.val_annotations={tmp_path}/truth.json", "trainer=cpu"]
    given += [f"run_dir={tmp_path}/eval", "callbacks=[report]", "callbacks.report.images=0"]
    for group, row in enumerate(rows, 1):
        found = evaluate(application.compose("eval", [*given, f"group={group}"]))
        assert float(row["map"]) == pytest.approx(found)


def test_scores_of_every_head_reach_the_memory(run: Path) -> None:
    """Along its gradient the score of ATSS grows as that says; the others' boxes, which move too, are constants."""
    config = application.compose("analyse", ["figure=conflict", f"runs=[{run}]", "device=cpu"])
    (subject,) = analyse.opened(config)
    opened, batch = subject.final(), next(iter(subject.batches()))
    names = {"decoder", *opened.detector.heads}
    memory, scores = Conflict(1, 0.01, 1)._scores(opened, batch)
    assert scores.keys() == names
    slopes = {name: torch.autograd.grad(one, memory.tokens, retain_graph=True)[0] for name, one in scores.items()}
    assert all(slope.norm().isfinite() and slope.norm() > 0 for slope in slopes.values())
    slope, shifted = slopes["atss"], []
    for sign in (1, -1):
        moved = replace(memory, tokens=memory.tokens.detach() + sign * 1e-2 * slope / slope.norm())
        with patch.object(opened.detector, "encode", lambda *_, moved=moved: moved):
            shifted.append(Conflict(1, 0.01, 1)._scores(opened, batch)[1]["atss"].detach().item())
    assert (shifted[0] - shifted[1]) / 2e-2 == pytest.approx(float(slope.norm()), rel=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["figure=conflict"], "runs is not given: add runs="),
        (["figure=conflict", "runs=[nowhere]"], "there is no nowhere; give directories of runs"),
        (["figure=conflicts", "runs=[x]"], "Did you mean conflict"),
        (["runs=[x]"], "figure"),
        (["figure=groups", "runs=[RUN]", "checkpoint=first"], "checkpoint=first: must be one of best, last"),
        (["figure=groups", "runs=[RUN]", "labels=[a,b]"], "give one for each of the 1 runs, toy_seed0"),
        (["figure=instability", "runs=[RUN/checkpoints/best.ckpt]"], "has 0 snapshots, and a change needs two"),
        (["figure=discriminability", "figure.foreground=masks", "runs=[RUN]"], "reads no masks"),
    ],
)
def test_what_cannot_be_drawn_is_refused(words: list[str], message: str, run: Path) -> None:
    with pytest.raises(UserError, match=message):
        analyse.main([word.replace("RUN", str(run)) for word in words])


def test_patterns_and_labels(run: Path) -> None:
    given = [f"runs=['{run.parent}/toy_*',{run}/snapshots/step_00000004.ckpt]", "figure=queries", "device=cpu"]
    first, second = analyse.opened(application.compose("analyse", given))
    assert (first.name, first.label, len(first.kept)) == ("toy_seed0", "toy", 3)
    assert (second.final().step, len(second.kept)) == (4, 0)
    assert first.final().step == 2
    first, second = analyse.opened(application.compose("analyse", [*given, "labels=[a,a]", "checkpoint=last"]))
    assert first.label == second.label == "a"
    assert first.final().step == 4
