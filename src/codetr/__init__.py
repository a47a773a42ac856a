"""codetr: Co-DETR and Group DETR.

`codetr.load(path)` opens a checkpoint, `codetr.train("experiment=demo")` makes one; docs/python.md shows more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codetr.inference import Model, Result, load
    from codetr.training import Run, train

__all__ = ["Model", "Result", "Run", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for only then: `import codetr` is quick, and needs neither torch nor Lightning."""
    if name in ("Model", "Result", "load"):
        from codetr import inference

        return getattr(inference, name)
    if name in ("Run", "train"):
        from codetr import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
