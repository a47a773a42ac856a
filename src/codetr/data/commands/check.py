"""Find what is wrong with a data set before training on it.

  python -m codetr.data check data=custom data.train_annotations=...
"""

from __future__ import annotations


def main(overrides: list[str]) -> int:
    raise NotImplementedError
