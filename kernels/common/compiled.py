"""Numba's compiler, with its cache on disk where there is a folder for it."""

import inspect
import logging
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from numba import njit

from . import vector

log = logging.getLogger(__name__)
STAMP = sha256(inspect.getsource(vector).encode()).hexdigest()[:8]


def compiled(function: Callable[..., Any], *signature: Any, **options: Any) -> Callable[..., Any]:
    """`function`, compiled with Numba's `options`: now for `signature`, or at its first call.

    The cache looks at the time of the function's own file and at its name, which therefore says what vector.py was.
    On a read-only installation without a home Numba has no folder to write to: then nothing is cached, which is said.
    """
    function.__qualname__ = f"{function.__qualname__}_{STAMP}"
    try:
        return njit(*signature, cache=True, **options)(function)
    except RuntimeError as error:
        log.warning("compiling %s without a cache (%s); set NUMBA_CACHE_DIR", function.__name__, error)
        return njit(*signature, **options)(function)
