"""What needs no processes of a cluster, in one of its own: Dask changes how any that loads it pickles exceptions."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def test_workers_that_are_threads():
    if find_spec("distributed") is None:
        pytest.skip("needs Dask")
    file = Path(__file__).with_name("test_running.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "cluster and not slow", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
