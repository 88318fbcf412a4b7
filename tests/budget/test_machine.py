"""The budget of a machine that does not tell everything, and where it comes from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nnunet_lowmem.budget import machine
from nnunet_lowmem.budget.machine import machine_budget
from nnunet_lowmem.system.memory_limits import RamLimit
from nnunet_lowmem.volumes import spilling

GIB = 2**30
CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux" or not Path("/dev/shm").exists(), reason="needs a tmpfs")
def test_file_system_is_told_by_the_kernel_where_there_is_no_list_of_mounts(monkeypatch):
    """/dev/shm is kept in RAM; nothing is spilled there."""
    listed = spilling.file_system(Path("/dev/shm/none"))
    monkeypatch.setattr(spilling, "by_psutil", lambda ask: None)
    assert spilling.file_system(Path("/dev/shm/none")) == listed == "tmpfs"
    assert spilling.file_system(Path("/sys")) == ""
    budget = machine_budget("4G", None, CPU, "/dev/shm")
    assert (budget.disk_bytes, budget.origins.folder, budget.origins.nothing_spilled_because) == (
        0,
        "/dev/shm",
        "is kept in RAM",
    )


def test_budget_knows_what_sets_it(monkeypatch, tmp_path):
    bound = RamLimit("SLURM_MEM_PER_NODE", 8 * GIB, GIB)
    monkeypatch.setattr(machine, "available_ram", lambda: bound)
    for asked in ("4G", None):
        budget = machine_budget(asked, None, CPU, tmp_path)
        origins = budget.origins
        assert (origins.ram_asked, origins.machine, origins.folder) == (asked is not None, bound, str(tmp_path))
        assert origins.in_use_bytes == budget.reserved_ram_bytes
        assert budget.with_in_use(5).origins == origins


@pytest.mark.parametrize("asked, limit", [("4G", 4 * GIB), (None, None)])
def test_machine_that_nobody_tells_of_sets_no_limit_and_a_warning_says_so(asked, limit, monkeypatch, caplog):
    monkeypatch.setattr(machine, "available_ram", lambda: None)
    monkeypatch.setattr(machine, "total_ram_bytes", lambda: None)
    machine._warn_once.cache_clear()
    for _ in range(2):
        assert machine_budget(asked, None, CPU).ram_bytes == limit
    assert len(caplog.records) == 1
    assert "not told here" in caplog.text
