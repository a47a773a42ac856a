"""In which form operations enter a graph that is exported, where runtimes differ."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_GATHERS = ContextVar("gathers", default=False)


@contextmanager
def with_gathers() -> Iterator[None]:
    """Deformable attention that is exported in this context has gathers instead of `grid_sample`."""
    token = _GATHERS.set(True)
    try:
        yield
    finally:
        _GATHERS.reset(token)


def gathers() -> bool:
    return _GATHERS.get()
