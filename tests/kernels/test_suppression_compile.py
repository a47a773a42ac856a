"""What the compiler makes of the suppression kernels, without a GPU."""

import json
import subprocess
import sys

COMPILE = """
import json
from codetr.kernels.msda.ahead import resources
from codetr.kernels.suppression.ahead import ARCHITECTURES, WORDS, overlap, walk
print(json.dumps([resources(one) for a in ARCHITECTURES for one in (overlap(a), *(walk(a, w) for w in WORDS))]))
"""


def test_nothing_is_spilled() -> None:
    """A process of its own: where the interpreter is on, nothing can be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILE], check=True, stdout=subprocess.PIPE, text=True)
    cases = json.loads(done.stdout)
    assert len(cases) == 18
    assert [case for case in cases if case["stack"] > 0] == []
