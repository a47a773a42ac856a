"""What the compiler makes of the Triton kernels for three architectures, without a GPU."""

import json
import subprocess
import sys

import pytest

COMPILE = """
import dataclasses, json
from codetr.kernels.msda.ahead import all_cases, compiled, resources
print(json.dumps([{**dataclasses.asdict(case), **resources(compiled(case))} for case in all_cases(quick=True)]))
"""


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    """A process of its own: where the interpreter is on, nothing can be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILE], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def test_nothing_is_spilled(cases: list[dict]) -> None:
    assert {case["architecture"] for case in cases} == {80, 90, 100}
    assert [case for case in cases if case["stack"] > 0] == []


def test_four_channels_an_atomic_from_hopper_on(cases: list[dict]) -> None:
    """Scalar atomics are four times the instructions; Ampere has no others."""
    for case in cases:
        names = case["atomics"].keys()
        if case["kernel"] != "backward":
            assert not names
        else:
            assert names
            assert all(name.endswith(".v4.f32") == (case["architecture"] >= 90) for name in names)


def test_room_for_many_warps(cases: list[dict]) -> None:
    """Loads hide behind other warps: as many as a multiprocessor's 65536 registers hold."""
    for case in cases:
        assert 65536 // (32 * case["registers"]) >= (20 if case["kernel"] == "forward" else 12), case
