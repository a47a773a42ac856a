"""Numba's compiler, with its cache on disk where there is a folder for it."""

import logging
from collections.abc import Callable
from typing import Any

from numba import njit

log = logging.getLogger(__name__)


def compiled(function: Callable[..., Any], *signature: Any, **options: Any) -> Callable[..., Any]:
    """`function`, compiled with Numba's `options`: now for `signature`, or at its first call.

    On a read-only installation without a home Numba has no folder to write to: then nothing is cached, which is said.
    """
    try:
        return njit(*signature, cache=True, **options)(function)
    except RuntimeError as error:
        log.warning("compiling %s without a cache (%s); set NUMBA_CACHE_DIR", function.__name__, error)
        return njit(*signature, **options)(function)
