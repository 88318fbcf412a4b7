"""Other processes where the system does not tell of them: nobody who works is taken for gone, or for idle."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from nnunet_lowmem.system.owned_folders import _is_running
from nnunet_lowmem.system.process_tree import ProcessTree
from nnunet_lowmem.system.stalls import ProgressClock, WorkerLimits


@pytest.fixture
def without_proc(monkeypatch):
    """psutil, asked without /proc, takes every process for gone."""

    def gone(self, pid=None):
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(psutil.Process, "__init__", gone)


def test_process_of_which_nothing_is_told_is_alive_until_it_has_ended(without_proc):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tree = ProcessTree(child.pid)
    assert tree.alive()
    assert _is_running(child.pid)
    assert (tree.cpu_s(), tree.holds()) == (None, "memory that is not told")
    child.communicate()
    assert not tree.alive()
    assert not _is_running(child.pid)
    assert (tree.state(), tree.holds()) == ("gone", "0.00 GiB")
    assert not ProcessTree(child.pid).alive()


def test_this_process_knows_its_own_time(without_proc):
    assert ProcessTree(os.getpid()).cpu_s() > 0


def test_whom_nobody_can_tell_from_one_that_waits_is_not_overdue_but_for_its_stage():
    clock = ProgressClock(WorkerLimits(stall_s=10, stage_s=100), 0.0)
    for second in range(1, 200):
        clock.look(float(second), None)
        assert ("without an end" in clock.overdue()) == (second > 100)
        assert "no progress" not in clock.overdue()
