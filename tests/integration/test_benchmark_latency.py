"""`codetr benchmark latency`: all runtimes run the same detector, stages add up, the command writes what it says."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from codetr import application
from codetr.benchmark import graphs, latency
from codetr.benchmark.commands import latency as command
from codetr.errors import UserError
from toy import environment
from toy_model import TOY

CPU = torch.device("cpu")
SIZE = (96, 128)
RUNTIMES = ["eager", "onnxruntime", "openvino"]
ARGUMENTS = [*TOY, "data=shapes_tiny", "size=[96,128]", "classes=3", "repeats=2"]


@pytest.fixture(scope="module")
def drawn() -> graphs.Drawn:
    return graphs.ours(application.compose("latency", ARGUMENTS), SIZE)


@pytest.fixture(scope="module")
def file(drawn: graphs.Drawn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawn") / "own.onnx"
    drawn.write(path)
    return path


@pytest.mark.slow
def test_every_runtime_finds_the_same(drawn: graphs.Drawn, file: Path, tmp_path: Path) -> None:
    """The detector's own detections."""
    stages = latency.Stages(tmp_path, 2, SIZE)
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    found = [
        [np.asarray(one) for one in latency.opened(name, drawn, file, CPU)(images, stages.sizes)] for name in RUNTIMES
    ]
    for own in found[1:]:
        for one, eager in zip(own, found[0], strict=True):
            np.testing.assert_allclose(one, eager, rtol=1e-3, atol=1e-3)


def test_stages_and_percentiles(drawn: graphs.Drawn, tmp_path: Path) -> None:
    """Of runs whose times are known."""
    stages = latency.Stages(tmp_path, 2, SIZE)
    own = stages.run(drawn, latency.opened("eager", drawn, tmp_path, CPU))
    assert list(own) == list(latency.STAGES)
    assert all(seconds > 0 for seconds in own.values())
    runs = [dict.fromkeys(latency.STAGES, seconds) for seconds in (1.0, 2.0, 3.0, 4.0, 5.0)]
    found = latency.summary(runs, batch=6)
    assert (found["p50"], found["model"]) == (12, 3)
    assert found["p95"] == pytest.approx(4 * 4.8)
    assert found["images a second"] == 0.5


def test_memory_is_what_is_taken_at_the_highest_point() -> None:
    found = latency.memory(lambda: torch.ones(2**24))
    assert found is not None
    assert found == pytest.approx(2**26, rel=0.05)


@pytest.mark.slow
def test_operators_share_the_time(drawn: graphs.Drawn, file: Path) -> None:
    shares = latency.operators(file, *drawn.canvas.example())
    assert sum(shares.values()) == pytest.approx(1)
    assert {"Conv", "MatMul", "GridSample"} <= shares.keys()
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


@pytest.mark.parametrize("runtimes", [["eager"], pytest.param(RUNTIMES, marks=pytest.mark.slow)])
def test_the_command(runtimes: list[str], tmp_path: Path) -> None:
    chosen = f"runtimes=[{','.join(runtimes)}]"
    process = subprocess.run(
        [sys.executable, "-m", "codetr", "benchmark", "latency", *ARGUMENTS, chosen, f"out={tmp_path / 'new'}"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "new.json").read_text())
    assert [row["runtime"] for row in result["rows"]] == runtimes
    for row in result["rows"]:
        assert row["p50"] <= row["p95"] <= row["p99"]
        assert row["memory"] > 0
    page = (tmp_path / "new.md").read_text()
    assert page.rstrip() in process.stdout
    assert ("GridSample" in page) == ("onnxruntime" in runtimes)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("runtimes=[tvm]", "runtimes: tvm is none of eager, compile, onnxruntime, openvino"),
        ("against=[mmdet]", "against=mmdet: give some of"),
        ("size=[97,128]", "give multiples of"),
        ("checkpoint=none.ckpt", "none.ckpt"),
        *([] if importlib.util.find_spec("rfdetr") else [("against=[rfdetr/nano]", "rfdetr is not installed")]),
        *([] if torch.cuda.is_available() else [("trainer=gpu", "there is no CUDA device here")]),
    ],
)
def test_what_cannot_be_measured_is_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        command.main([*ARGUMENTS, override])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers/deformable_detr", "transformers/rt_detr"])
def test_other_libraries_are_exported_the_same_way(name: str, drawn: graphs.Drawn, tmp_path: Path) -> None:
    """Scores that ONNX Runtime finds are those of the model in float64, as near as those of PyTorch in float32: with
    random weights an RT-DETR magnifies rounding to some thousandths."""
    size = (128, 128)
    other = graphs.rival(name, 3, size, 1, drawn.postprocess)
    other.write(tmp_path / "other.onnx")
    generator = torch.Generator().manual_seed(0)
    images, sizes = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=generator), torch.tensor([size])
    eager, exported = (
        np.asarray(latency.opened(runtime, other, tmp_path / "other.onnx", CPU)(images, sizes)[1])
        for runtime in ("eager", "onnxruntime")
    )
    precise = copy.deepcopy(other.graph).double()
    precise.get_submodule("model").register_forward_pre_hook(lambda _, given: (given[0].double(), *given[1:]))
    with torch.no_grad():
        truth = precise(images, sizes)[1].numpy()
    assert np.abs(exported - truth).max() <= max(1e-4, np.abs(eager - truth).max())
