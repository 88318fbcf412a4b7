"""What a trouble is that a log may show: how it is known, what really happened, what to type."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nnunet_lowmem.doctor import log_numbers

#: In advice, of which a command is always the end: that in the place of the one that failed, the same with
#: ``--continue_prediction``, and the one that tells what it takes.
COMMAND, CONTINUE, ESTIMATE = "{command}", "{command:--continue_prediction}", "{estimate}"


@dataclass(frozen=True)
class Trouble:
    """What a line tells.

    Attributes
    ----------
    name : str
    happened : str
        What really happened, in a paragraph.
    advice : tuple of str
        What to type now, or to do; with `COMMAND` and others in it.
    signs : tuple of str
        In lower case; each line of it holds one, so that others need not be looked at.
    pattern : Pattern
        Which decides.
    numbers : callable
        Says what the numbers of the match are; empty where they say nothing.
    is_consequence : bool
        Of something else, which the log may show, too.
    in_source : bool
        The lines of source that a traceback shows tell of it, which are passed over else.
    is_end : bool
        The run was ended from outside, which does not say what it was doing.
    fails : bool
        False of what may have been meant, or of what stock goes on behind.
    """

    name: str
    happened: str
    advice: tuple[str, ...]
    signs: tuple[str, ...] = ()
    pattern: re.Pattern[str] = re.compile(r"(?!)")
    numbers: Callable[[re.Match[str]], str] = log_numbers.nothing
    is_consequence: bool = False
    in_source: bool = False
    is_end: bool = False
    fails: bool = True


def row(name: str, signs: str, pattern: str, happened: str, *advice: str, **words: Any) -> Trouble:
    """Make a row of a table: `signs` between bars; without advice, the command."""
    decides = re.compile(pattern, re.IGNORECASE)
    return Trouble(name, happened, advice or (COMMAND,), tuple(signs.split("|")), decides, **words)


# -- sentences that stand in several rows ------------------------------------------------------------------------------

EXPORT = (
    "Stock nnU-Net resamples the scores (logits) of every class to the size of the scan at once, in float64 and in a "
    "second process: memory grows with classes x voxels, whatever the GPU has."
)
NEEDS_NO_POOL = "nnunet_lowmem works in one process and keeps a few planes of the classes at a time."
ASK = "To see beforehand what a case takes: " + ESTIMATE
