"""The main process under the clock."""

from __future__ import annotations

import re
import threading
import time

from nnunet_lowmem.system.clock import Progress
from nnunet_lowmem.system.stalls import WorkerLimits
from nnunet_lowmem.system.watchdog import StallWatch


def idle(seconds: float) -> None:
    time.sleep(seconds)


def test_idle_stage_is_told_with_case_stage_stack_and_memory(caplog):
    with StallWatch(WorkerLimits(stall_s=0.3), "cpu") as watch:
        watch.note(Progress("writing", "scan", 0, 1))
        idle(1.2)
    assert "case scan, writing: the main process made no progress for" in caplog.text
    assert "GiB" in caplog.text
    assert "time.sleep(seconds)" in caplog.text, "the stack of the main thread"
    assert 1 <= caplog.text.count("It goes on waiting") <= 4


def test_busy_stage_is_left_alone(caplog):
    with StallWatch(WorkerLimits(stall_s=1.0), "cpu") as watch:
        watch.note(Progress("prediction", "scan", 3, 8))
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            sum(range(1000))
    assert caplog.text == ""


def test_plain_lines_say_how_far_the_case_is_even_while_nothing_moves(caplog):
    caplog.set_level("INFO", "nnunet_lowmem")
    with StallWatch(WorkerLimits(stall_s=0), "cpu", line_s=0.2) as watch:
        watch.note(Progress("prediction", "scan", 3, 8))
        idle(1.1)
    lines = [record.getMessage() for record in caplog.records]
    assert 3 <= len(lines) <= 5
    assert all(re.fullmatch(r"case scan: prediction, 3 of 8, \d+\.\d\d GiB", line) for line in lines)


def test_no_thread_where_it_is_off_and_none_afterwards():
    before = threading.active_count()
    with StallWatch(WorkerLimits(stall_s=0), "cpu"):
        assert threading.active_count() == before
    with StallWatch(WorkerLimits(stall_s=9), "cpu"):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
