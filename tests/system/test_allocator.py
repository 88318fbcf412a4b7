"""Memory in large pages, and back to the system when freed: in processes of their own, since the settings last."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CHILD = """
import json, sys
from pathlib import Path
from nnunet_lowmem.system import allocator

if sys.argv[1] == "own":
    allocator.own_process()
import torch

MIB = 2**20

def held(name):
    line = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 // MIB

before = held("Anonymous:")
large = torch.zeros(64 * MIB, dtype=torch.uint8)
huge = held("AnonHugePages:")
del large
for _ in range(2):  # freeing the first lets glibc keep the second
    blocks = [torch.zeros(24 * MIB, dtype=torch.uint8) for _ in range(8)]
    small = torch.zeros(8)
    del blocks[:-1]
print(json.dumps({"huge": huge, "kept": held("Anonymous:") - before}))
"""


def measured(settings: str) -> dict[str, int]:
    child = [sys.executable, "-c", CHILD, settings]
    # commands that other tests run in this process set it, and it would reach the child
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(child, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_blocks_are_huge_pages_and_go_back_when_freed():
    own, default = measured("own"), measured("default")
    # one block of 24 MiB is still there
    assert 22 <= own["kept"] <= 34
    assert own["huge"] >= 60 or huge_pages() == "never"
    assert default["kept"] > own["kept"]


def huge_pages() -> str:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return file.read().split("[")[1].split("]")[0]
    except OSError:
        return "never"
