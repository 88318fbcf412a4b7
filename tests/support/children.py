"""Other processes, and what they leave in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def python(text: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a program that may import what this process may."""
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=50)


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
