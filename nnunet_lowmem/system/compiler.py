"""numba, which compiles the kernels of this package, and where it keeps what it has compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from numba import njit

_logger = logging.getLogger(__name__)


def jit(function: Callable[..., object]) -> Any:
    """Compile `function` without the GIL, cached on disk where any folder can be written.

    numba takes ``NUMBA_CACHE_DIR``, else the folder of the package, else the user's cache folder.
    """
    try:
        compiled: Any = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no writable cache folder
        return njit(nogil=True)(function)
    cache = compiled._cache  # numba offers no other way to it
    cache.save_overload = _where_there_is_room(cache.save_overload)
    return compiled


def _where_there_is_room(save: Callable[..., None]) -> Callable[..., None]:
    """Do without the cache where the disk or the quota is full: the compiled function is there all the same."""

    def save_overload(*arguments: Any) -> None:
        try:
            save(*arguments)
        except OSError as error:
            _logger.debug("a compiled kernel could not be cached: %s", error)

    return save_overload
