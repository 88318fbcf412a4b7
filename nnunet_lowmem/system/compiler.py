"""numba, which compiles the kernels of this package, and where what it has compiled is kept.

numba's own cache is an index and numbered data, believed as they are: a cut file ends every later run, and two
processes that fill it at once can leave the code of one signature under the number of another. Here a compiled kernel
is one file, named by everything that it was compiled from and renamed when it is whole. Its checksum is compared before
a byte of it is believed. A file that is damaged or cannot be read counts as absent: the kernel is compiled and written
again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import numba
from numba import config
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps

from nnunet_lowmem import __version__
from nnunet_lowmem.system import platform

_logger = logging.getLogger(__name__)
_CHECKSUM_BYTES = hashlib.sha256().digest_size

# numba tells types of some of its names, another version of others
_config: Any = config
_rebuild: Any = CompileResult._rebuild
_pickled: Any = dumps
_compile: Any = CPUDispatcher.compile

if _config.DISABLE_JIT:
    _logger.info("NUMBA_DISABLE_JIT is set; our kernels are compiled all the same: as Python they give other numbers")


def jit(function: Callable[..., object]) -> Any:
    """Compile `function` without the GIL, and keep it compiled in ``NUMBA_CACHE_DIR``, else in the user's cache folder.

    Nothing is kept where the home folder is unknown or the cache cannot be written. ``NUMBA_DISABLE_JIT`` does not
    count: kernels are written for the conversions between numbers that numba does, and are wrong with numpy's.
    """
    # what numba's decorator does, which gives the function back under NUMBA_DISABLE_JIT and knows no caches but its own
    kernel: Any = _Kernel(function, targetoptions={"nopython": True, "nogil": True, "boundscheck": None})
    kernel._cache = _KernelCache(function)
    return kernel


class _Kernel(CPUDispatcher):
    """A function of ours that numba compiles."""

    def compile(self, sig: Any) -> Any:
        """Compile for one signature with the JIT on, since numba makes parts of functions with its own decorator."""
        with global_compiler_lock:
            _config.reload_config()  # numba does if the environment has changed, and would in the midst of it
            stated, _config.DISABLE_JIT = _config.DISABLE_JIT, 0
            try:
                return _compile(self, sig)
            finally:
                _config.DISABLE_JIT = stated


class _KernelCache(NullCache):
    """What a dispatcher of numba asks before it compiles its function, and tells afterwards."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return what was compiled for this signature, or None."""
        target_context.refresh()  # numba's caches do: what rebuilding needs is registered then
        try:
            file, key = self._file_and_key(sig, target_context.codegen())
            payload = None if file is None else _read(file, key)
            return None if payload is None else _rebuild(target_context, *pickle.loads(payload))
        except FileNotFoundError:
            return None
        except Exception as error:  # what lies in a cache never ends a run
            _logger.debug("a cached kernel could not be loaded and is compiled again: %s", error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Do without the cache where the disk or the quota is full: the compiled function is there all the same."""
        try:
            file, key = self._file_and_key(sig, data.codegen)
            if file is not None and not data.library.has_dynamic_globals:  # those are addresses of this process
                _write(file, key, _pickled(data._reduce()))
        except Exception as error:
            _logger.debug("a compiled kernel could not be cached: %s", error)

    def _file_and_key(self, signature: Any, codegen: Any) -> tuple[Path | None, bytes]:
        """Give the file of one signature and all that decides about its content; no file where there is no folder."""
        parts = (numba.__version__, str(signature), codegen.magic_tuple(), tuple(_content(self._function, set())))
        key = repr(parts).encode()
        folder = cache_folder()
        name = f"{self._function.__module__.rpartition('.')[2]}.{self._function.__name__}"
        return folder and folder / f"{name}-{hashlib.sha256(key).hexdigest()[:32]}.nbc", key


def _content(function: Any, seen: set[str]) -> Iterator[str]:
    """Tell what `function` and the kernels that it calls, which become part of it, are compiled from.

    As it is in memory: the source may have been edited since it was imported, or be absent in a frozen program.
    """
    seen.add(f"{function.__module__}.{function.__qualname__}")
    yield f"{function.__module__}.{function.__qualname__}"
    yield from _code(function.__code__)
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, CPUDispatcher):
            called = value.py_func
            if f"{called.__module__}.{called.__qualname__}" not in seen:
                yield from _content(called, seen)
        elif not callable(value) and not isinstance(value, ModuleType):
            yield f"{name}={value!r}"


def _code(code: CodeType) -> Iterator[str]:
    yield from (code.co_code.hex(), repr(code.co_varnames), repr(code.co_names))
    for constant in code.co_consts:
        yield from _code(constant) if isinstance(constant, CodeType) else (repr(constant),)


def _read(file: Path, key: bytes) -> bytes | None:
    """Return the pickled kernel if every byte of `file` is as it was written, and for this key."""
    stored = file.read_bytes()
    checksum, payload = stored[:_CHECKSUM_BYTES], stored[_CHECKSUM_BYTES:]
    if hashlib.sha256(key + payload).digest() == checksum:
        return payload
    _logger.debug("the cached kernel %s is damaged and is compiled again", file)
    return None


def _write(file: Path, key: bytes, payload: bytes) -> None:
    keep(file, hashlib.sha256(key + payload).digest() + payload)


def keep(file: Path, content: bytes) -> None:
    """Put a file of the cache in its place at once, for whoever reads or writes beside us."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    try:
        partial.write_bytes(content)
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def cache_folder() -> Path | None:
    """Return the folder of this version and interpreter; None where the home folder is unknown."""
    try:
        root = Path(_config.CACHE_DIR or platform.users_cache()).expanduser()
    except RuntimeError:  # no home: as it stands, the path would make a folder named `~` in the current one
        return None
    interpreter = f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}"
    return root / "nnunet_lowmem" / f"{__version__}-{interpreter}"
