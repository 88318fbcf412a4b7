"""A writer whose every system call can be made to fail, or to end the process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from nnunet_lowmem.volumes.verifying import DamagedFileError

OLD, NEW = b"old" * 1000, b"new" * 2000


def write(path: Path, content: bytes = NEW) -> None:
    """Write `content` in three pieces."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for start in range(0, len(content), 2000):
            os.write(descriptor, content[start : start + 2000])
    finally:
        os.close(descriptor)


def is_new(path: Path) -> None:
    if path.read_bytes() != NEW:
        raise DamagedFileError("not what was written")


class Fault:
    """Counts system calls and does something at the N-th: in place of it, or after it in case of ``close``."""

    CALLS = ("mkdir", "open", "write", "fsync", "replace", "close")

    def __init__(self, at: int, act: Callable) -> None:
        self.at, self.act, self.count = at, act, 0

    def install(self, patch: Callable = setattr) -> None:
        for name in self.CALLS:
            patch(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name: str, original: Callable) -> Callable:
        def call(*args, **kwargs):
            self.count += 1
            strikes = self.count == self.at
            if name == "close":
                original(*args)
            if strikes:
                self.act(name, args, original)
            return None if name == "close" else original(*args, **kwargs)

        return call
