"""Names of files, as messages show them and as libraries take them: they may hold any byte but a slash and a zero."""

from __future__ import annotations

import os
import re

from nnunet_lowmem.errors import UsageError, twin

# control characters, ends of lines, what turns the direction of text around, and bytes that are no UTF-8
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """Return text in one line that any terminal and any encoding takes, with the rest escaped as Python writes it."""
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_utf8(path: str | os.PathLike[str]) -> bool:
    """Whether a path is text for a library in C++: one that is not ends the process in SimpleITK."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_utf8(path: str | os.PathLike[str]) -> None:
    """Refuse a path that must not get to SimpleITK.

    Raises
    ------
    UsageError
        If it is not UTF-8.
    """
    if not is_utf8(path):
        raise twin(UsageError, RuntimeError)(
            f"{shown(os.fspath(path))}: the name is not UTF-8, and SimpleITK takes no other; rename the file"
        )
