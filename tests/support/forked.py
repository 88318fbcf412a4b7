"""Work in a child of this process, where it may import, become another user, or fail without any trace here."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def forked(work: Callable[[], str]) -> str:
    """Run `work` in a child and return what it returns, or the traceback of what it raised."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            answer = work()
        except BaseException:
            answer = traceback.format_exc()
        with os.fdopen(writing, "w") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer
