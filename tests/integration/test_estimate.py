"""`codetr estimate`: the command, what it refuses, and its figures beside measured memory."""

import json
from pathlib import Path

import pytest

import forked
from codetr import application, estimate
from codetr.errors import UserError
from codetr.training import fit
from toy import environment
from toy_model import TOY

ARGUMENTS = [*TOY, "sizes=[[256,192]]", "batches=[1]", "cards=[0.5,1]", "classes=3", "objects=4"]
ROOT = Path(__file__).parents[2]


def test_the_command(tmp_path: Path) -> None:
    command = ["codetr.estimate", *ARGUMENTS, f"out={tmp_path / 'cost.json'}"]
    process = forked.run(*command, cwd=tmp_path, env=environment())
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "cost.json").read_text())
    assert [(one["batch"], one["size"]) for one in result["costs"]] == [(1, [256, 192])]
    (fits,) = result["fits"]
    for what in ("training", "inference"):
        assert 0 < fits[what][0] < fits[what][1]
    shown = process.stdout
    assert f"{result['weights']['parameters'] / 1e6:.1f} M" in shown
    assert all(str(number) in shown for number in fits["training"])
    assert "256 x 192, inference" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]  # no run directory


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cards=[0]", r"cards=\[0\]: give at least one number, all above 0"),
        ("batches=[]", r"batches=\[\]: give at least one"),
        ("sizes=[[0,5]]", "give heights and widths in pixels"),
        ("reserve=1", "reserve=1: give a share"),
        ("trainer.precision=64-true", "trainer.precision=64-true: give one of 32-true, bf16-mixed, 16-mixed"),
        ("size=3", "Could not override 'size'"),
    ],
)
def test_what_cannot_be_estimated_is_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        estimate.main([*ARGUMENTS, override])


def test_an_automatic_batch_is_refused_without_a_gpu(tmp_path: Path) -> None:
    given = ["experiment=demo", "trainer=cpu", "data.batch_size=auto", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="asks a GPU for its memory, and there is none"):
        fit(application.compose("train", given))


@pytest.mark.slow
def test_estimates_are_within_ten_per_cent_of_measured_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All models of the benchmark, each measured in a process of its own."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.training import memory

    assert len(memory.CASES) >= 6
    from benchmarks.report import alone

    for name, case in memory.CASES.items():
        found = alone(memory.estimated, *case)
        measured = {
            "training": alone(memory.training, *case, memory.STATIC),
            "inference": alone(memory.inference, *case),
        }
        for what in memory.PHASES:
            assert found[what] == pytest.approx(measured[what], rel=0.1), f"{name}, {what}"
