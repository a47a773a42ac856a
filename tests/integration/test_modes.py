"""The modes in which a detector trains: trainer configuration, precision, accumulation, clipping, average.

A covering array: every two values of two settings meet in a row (see `modes.py`). A row trains two steps, validates
three images, which no number of processes divides, after each, is resumed from its checkpoint, and takes a third step.
Its losses are those of float32 on one process, as far as the precision goes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from modes import (
    FACTORS,
    PROCESSES,
    STEPS,
    TRAIN,
    VAL,
    Row,
    evaluations,
    losses,
    off,
    rows,
    run,
    run_in_processes,
    run_reference,
    settings,
)

from codetr.application import compose
from codetr.errors import UserError
from codetr.training import fit
from toy import make_coco

ROWS = rows()
# Of one process, as many as `make test` has time for: both precisions below float32, with and without accumulation.
ALONE = [row for row in ROWS if PROCESSES[row.trainer] == 1]
TOGETHER = {name: [row for row in ROWS if row.trainer == name] for name in PROCESSES if PROCESSES[name] > 1}
FEW = 3
# The largest relative difference of three losses. float32 sums in another order. bfloat16 keeps 8 bits: a rounding is
# 2^-9 = 0.2 %, and where those of layers decide a match, an assignment or a top k, a loss jumps by more.
TOLERANCE = {"32-true": 1e-5, "bf16-mixed": 0.03, "bf16-true": 0.03}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modes") / "data"
    make_coco(folder, train=TRAIN, val=VAL)
    return folder


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row], list[float]]:
    folder = tmp_path_factory.mktemp("references")

    def of(row: Row) -> list[float]:
        directory = folder / str(row.reference)
        if not directory.exists():
            run_reference(row.reference, data, directory)
        return losses(row.reference, directory)

    return of


def holds(row: Row, directory: Path, reference: list[float]) -> None:
    found = losses(row, directory)
    assert len(found) == len(reference) == STEPS
    assert off(found, reference) < TOLERANCE[row.precision], f"{row}: {found}, float32 on one process {reference}"
    for evaluation in evaluations(row, directory):
        assert evaluation["images"] == VAL
        assert evaluation["numbers"] == evaluations(row, directory)[0]["numbers"]
    assert (directory / "checkpoints/last.ckpt").is_file()


def test_every_two_values_meet() -> None:
    met = {frozenset(pair) for row in ROWS for pair in combinations(vars(row).items(), 2)}
    for a, b in combinations(FACTORS, 2):
        assert all(frozenset({(a, x), (b, y)}) in met for x in FACTORS[a] for y in FACTORS[b])


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=str(row), marks=[pytest.mark.slow] if i >= FEW else []) for i, row in enumerate(ALONE)]
)
def test_one_process(row: Row, data: Path, tmp_path: Path, expected: Callable[[Row], list[float]]) -> None:
    run(row, data, tmp_path / "run")
    holds(row, tmp_path / "run", expected(row))


def together(chosen: list[Row], data: Path, folder: Path, expected: Callable[[Row], list[float]]) -> None:
    run_in_processes(chosen, data, folder)
    for row in chosen:
        holds(row, folder / str(row), expected(row))


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes(name: str, data: Path, tmp_path: Path, expected: Callable[[Row], list[float]]) -> None:
    together(TOGETHER[name][:1], data, tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_all_of_two_processes(name: str, data: Path, tmp_path: Path, expected: Callable[[Row], list[float]]) -> None:
    together(TOGETHER[name][1:], data, tmp_path, expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed does not run on cpu; set bf16-mixed"),
        (["trainer.precision=8-bit"], "trainer: .*8-bit"),
        (["trainer.accelerator=cuda"], "trainer: .*(CUDA|cuda)"),
    ],
    ids=" ".join,
)
def test_a_mode_that_the_machine_cannot_run_is_refused_before_data_is_read(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    given = [o for o in settings(ALONE[0], tmp_path / "nowhere", tmp_path / "run") if not o.startswith("trainer.acc")]
    with pytest.raises(UserError, match=message):
        fit(compose("train", [*given, "trainer=cpu", *overrides]))
