"""Sizes of memory as text: what a flag or a variable asks for, and what a message shows."""

from __future__ import annotations

import math
import os
import re
from fractions import Fraction

from nnunet_lowmem.errors import UsageError, twin
from nnunet_lowmem.options import variable

_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(%|[kmgt](?:ib|b)?|b)?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str, total_bytes: int | None) -> int:
    """Turn the text of a memory size into bytes.

    Parameters
    ----------
    text : str
        A number with a unit: ``6G`` and ``6GiB`` are 6 x 2^30, ``6GB`` is 6 x 10^9, the same for K, M and T; ``80%`` is
        a share of `total_bytes`; a whole number alone, or with ``B``, is bytes. Case does not matter, decimals may be
        used with a unit. More than `total_bytes` is accepted.
    total_bytes : int or None
        What 100 % means; None where that is not known.

    Returns
    -------
    int
        Bytes, rounded down, at least 1.

    Raises
    ------
    UsageError
        If the text is no such size, comes to less than one byte, or is a share of what is not known.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise _not_a_size(text)
    number, unit = Fraction(match[1]), (match[2] or "b").lower()
    if unit == "b" and number.denominator != 1:
        raise _not_a_size(text)
    size_bytes = int(number * _unit_bytes(unit, total_bytes))
    if size_bytes < 1:
        raise _not_a_size(text)
    return size_bytes


def asked_bytes(flag: str, size: int | str | None, total_bytes: int | None) -> int | None:
    """Return the size that a flag asks for, or without it the environment variable of its name; None if neither does.

    Parameters
    ----------
    flag : str
        Of an option.
    size : int or str, optional
        What was given with it.
    total_bytes : int or None
        What 100 % means; None where that is not known.

    Raises
    ------
    UsageError
        If it is no size above zero; the message begins with the flag, or the variable.
    """
    source = flag
    if size is None:
        source = variable(flag.strip("-"))
        size = os.environ.get(source) or None
    if size is None:
        return None
    try:
        return parse_size(str(size), total_bytes)
    except UsageError as error:
        raise twin(UsageError, ValueError)(f"{source}: {error}") from None


def _unit_bytes(unit: str, total_bytes: int | None) -> Fraction:
    if unit == "%":
        if total_bytes is None:
            message = "of how much memory this is a share is not told here; write a size instead, for example 6G"
            raise twin(UsageError, ValueError)(message)
        return Fraction(total_bytes, 100)
    if unit == "b":
        return Fraction(1)
    base = 1000 if unit[1:] == "b" else 1024
    return Fraction(base ** _POWERS[unit[0]])


def _not_a_size(text: str) -> UsageError:
    return twin(UsageError, ValueError)(
        f"{text!r} is not a memory size above zero; write for example 6G or 6GiB (6 x 2^30 bytes), 6GB (6 x 10^9), "
        "2.5G, 800M, 80% or a number of bytes"
    )


def format_gib(size_bytes: int) -> str:
    """Return bytes as text in GiB, with more digits below 0.1 GiB: ``7.80 GiB``, ``0.0039 GiB``."""
    size_gib = size_bytes / 2**30
    return f"{size_gib:.2f} GiB" if size_bytes == 0 or abs(size_gib) >= 0.1 else f"{size_gib:.4f} GiB"


def format_gib_up(size_bytes: int) -> str:
    """Return bytes as text in GiB, rounded up to 0.01 GiB: whoever gives as much has enough."""
    return f"{math.ceil(100 * size_bytes / 2**30) / 100:.2f} GiB"
