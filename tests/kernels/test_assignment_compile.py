"""What the compiler makes of the assignment kernel, without a GPU."""

import json
import subprocess
import sys

import pytest

COMPILE = """
import json
from codetr.kernels.msda.ahead import resources
from codetr.kernels.assignment.ahead import ARCHITECTURES, BLOCKS, compiled
print(json.dumps([
    {"architecture": a, "block": b, **resources(compiled(a, b))} for a in ARCHITECTURES for b in BLOCKS
]))
"""


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    """A process of its own: where the interpreter is on, nothing can be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILE], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def test_what_is_known_of_places_stays_in_registers(cases: list[dict]) -> None:
    """Four places a thread are 28 numbers and more; what little ptxas may lay aside is less than one place's."""
    assert {case["architecture"] for case in cases} == {80, 90, 100}
    assert [case for case in cases if case["stack"] > 16] == []


def test_problems_need_no_atomics(cases: list[dict]) -> None:
    assert not any(case["atomics"] for case in cases)
