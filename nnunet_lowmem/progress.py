"""What is seen of progress: bars where a terminal is there; what others print becomes messages of this package."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import TracebackType
from typing import Any

from tqdm import tqdm

from nnunet_lowmem.clock import Progress
from nnunet_lowmem.memory import format_gib

logger = logging.getLogger(__name__)

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def on_terminal() -> bool:
    """Tell whether bars would be seen: they go to stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


class ProgressBars:
    """One bar per stage of a case that has several steps; a context manager."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in self._bars.values():
            bar.close()

    def show(self, progress: Progress) -> None:
        """Move the bar of this stage."""
        if progress.total == 1:
            return
        if progress.stage not in self._bars:
            name = f"{progress.case} {progress.stage}"
            self._bars[progress.stage] = tqdm(total=progress.total, desc=name, bar_format=_FORMAT)
        bar = self._bars[progress.stage]
        if progress.memory_bytes:
            bar.set_postfix_str(format_gib(progress.memory_bytes), refresh=False)
        bar.update(progress.done - bar.n)


@contextmanager
def logging_prints(level: int = logging.INFO) -> Iterator[None]:
    """Log what nnU-Net prints in the block: who uses a library decides whether it is heard."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logger.log(level, "%s", line)
