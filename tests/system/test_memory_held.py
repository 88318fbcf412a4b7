"""Measuring: real allocations, real children, real threads."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory

import numpy as np
import psutil
import pytest

from nnunet_lowmem.system import memory_held
from nnunet_lowmem.system.memory_held import PeakSampler, process_tree_bytes

MIB = 2**20

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CHILD = (
    "import sys, time\n"
    "held = b'\\1' * ({mib} * 2**20)\n"
    "print('ready', flush=True)\n"
    "sys.stdin.read()"
)  # fmt: skip


@contextlib.contextmanager
def python_child(code: str):
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.communicate()


def wait_for_a_sample(sampler: PeakSampler, above_bytes: int) -> None:
    """On a busy machine a round costs more, and the sampler pauses longer: up to 1 % of a core is its promise."""
    deadline_s = time.monotonic() + 20
    while sampler.held_bytes < above_bytes and time.monotonic() < deadline_s:
        time.sleep(0.01)


def test_an_allocation_is_seen_and_seen_to_go() -> None:
    before_bytes = process_tree_bytes()
    held = np.ones(300 * MIB, np.uint8)
    with_bytes = process_tree_bytes()
    del held
    assert 299 * MIB < with_bytes - before_bytes < 310 * MIB
    assert process_tree_bytes() < before_bytes + 10 * MIB


def test_pages_that_were_never_touched_are_not_counted() -> None:
    before_bytes = process_tree_bytes()
    held = np.empty(300 * MIB, np.uint8)
    assert process_tree_bytes() - before_bytes < 10 * MIB
    del held


def test_a_child_and_its_child_are_counted() -> None:
    before_bytes = process_tree_bytes()
    grandchild = CHILD.format(mib=200)
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {grandchild!r}], stdin=-1, stdout=-1)\n"
        "print(child.stdout.readline().decode().strip(), flush=True)\n"
        "sys.stdin.read()\n"
        "child.communicate()"
    )
    with python_child(code) as child:
        grown_bytes = process_tree_bytes() - before_bytes
        of_child_bytes = process_tree_bytes(child.pid)
    assert 200 * MIB < grown_bytes < 240 * MIB
    assert 200 * MIB < of_child_bytes <= grown_bytes + 10 * MIB


@linux_only
def test_memory_shared_with_a_child_is_counted_once() -> None:
    before_bytes = process_tree_bytes()
    block = shared_memory.SharedMemory(create=True, size=200 * MIB)
    try:
        block.buf[:] = b"\1" * len(block.buf)
        code = (
            f"import sys\nfile = open('/dev/shm/{block.name.lstrip('/')}', 'rb')\n"
            "import mmap; view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
            "total = sum(view[::4096])\nprint('ready', flush=True)\nsys.stdin.read()"
        )
        with python_child(code) as child:
            assert memory_held._resident_bytes(child.pid) > 200 * MIB
            grown_bytes = process_tree_bytes() - before_bytes
    finally:
        block.close()
        block.unlink()
    assert 200 * MIB < grown_bytes < 240 * MIB


@linux_only
def test_a_child_between_vfork_and_exec_is_not_counted_again() -> None:
    held = np.ones(300 * MIB, np.uint8)
    seen: list[int] = []
    stop = threading.Event()

    def measure() -> None:
        while not stop.is_set():
            seen.append(process_tree_bytes())

    thread = threading.Thread(target=measure)
    thread.start()
    folder, name = os.path.split(sys.executable)
    # the child looks for its program in every folder before it leaves its parent's memory
    environ = os.environ | {"PATH": os.pathsep.join([f"/nowhere/{number}" for number in range(2000)] + [folder])}
    while len(seen) <= 100:
        subprocess.run([name, "-c", ""], check=True, env=environ)
    stop.set()
    thread.join()
    assert max(seen) < seen[0] + 100 * MIB
    del held


def test_a_process_that_does_not_exist_has_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert process_tree_bytes(child.pid) == 0


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Leaves of /proc the files of these endings, of ``status`` the lines of these names, of psutil what is told."""
    real = memory_held._read

    def leave(files: tuple[str, ...] = (), fields: tuple[bytes, ...] = (), psutil_tells: bool = True) -> None:
        def read(path: str) -> bytes:
            if not path.endswith(files):
                return b""
            lines = real(path).splitlines(keepends=True)
            return b"".join(line for line in lines if not fields or line.startswith(fields))

        monkeypatch.setattr(memory_held, "_read", read)
        if "/children" not in files:
            monkeypatch.setattr(memory_held, "_kernel_lists_children", lambda: False)
        if not psutil_tells:
            monkeypatch.setattr(memory_held, "by_psutil", lambda ask: None)
        forget()

    def forget() -> None:
        memory_held._way.cache_clear()
        memory_held._warn_once.cache_clear()

    yield leave
    monkeypatch.undo()
    forget()


@linux_only
def test_where_smaps_may_not_be_read_the_resident_size_stands_in(proc: Callable[..., None]) -> None:
    proc(("/status", "/statm", "/children"))
    held = np.ones(100 * MIB, np.uint8)
    assert process_tree_bytes() > 100 * MIB
    del held


#: what is left of /proc, and the way that is taken then
LACKING = {
    "gVisor": (
        {"files": ("/status",), "fields": (b"Name:", b"State:", b"VmSize:", b"VmRSS:", b"VmData:")},
        "_by_status",
    ),
    "Linux before 4.5": ({"files": ("/status", "/statm"), "fields": (b"VmHWM:", b"VmRSS:")}, "_by_status"),
    "Linux before 4.14": ({"files": ("/status", "/statm", "/children")}, "_by_status"),
    "Linux before 5.4": ({"files": ("/smaps_rollup", "/status"), "fields": (b"Pss:", b"RssAnon:")}, "_by_status"),
    "no fields": ({"files": ("/status",), "fields": (b"Name:",)}, "_by_psutil"),
    "no /proc for us": ({}, "_by_psutil"),
    "no /proc": ({"psutil_tells": False}, "_by_its_peak"),
}


@linux_only
@pytest.mark.parametrize("name", LACKING)
def test_what_is_not_told_is_asked_for_in_another_way(name: str, proc: Callable[..., None]) -> None:
    left, way = LACKING[name]
    held = np.ones(256 * MIB, np.uint8)
    exact_bytes = process_tree_bytes()
    proc(**left)
    told_bytes = process_tree_bytes()
    assert memory_held._way().__name__ == way
    # a process that has imported numpy and scipy maps libraries, which most ways count
    library_bytes = psutil.Process().memory_info().shared
    assert 0.98 * exact_bytes < told_bytes
    if way != "_by_its_peak":
        assert told_bytes < 1.2 * exact_bytes + library_bytes
    assert memory_held.process_bytes() > 256 * MIB
    with PeakSampler(0.01) as sampler:
        time.sleep(0.02)
    assert sampler.peak_bytes() > 256 * MIB
    del held


@linux_only
def test_as_in_gvisor_a_plain_process_is_told_within_a_fifth() -> None:
    code = (
        "import numpy as np\n"
        "from nnunet_lowmem.system import memory_held\n"
        "real, kept = memory_held._read, (b'State:', b'VmSize:', b'VmRSS:', b'VmData:')\n"
        "def read(path):\n"
        "    lines = real(path).splitlines(keepends=True) if path.endswith('/status') else []\n"
        "    return b''.join(line for line in lines if line.startswith(kept))\n"
        "memory_held._read, memory_held._kernel_lists_children = read, lambda: False\n"
        "held = np.ones(2**28, np.uint8)\n"
        "print(memory_held.process_tree_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**28 < int(done.stdout) < 1.2 * 2**28
    assert done.stderr == ""


@linux_only
def test_without_proc_a_warning_says_what_the_numbers_are(
    proc: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    proc(psutil_tells=False)
    for _ in range(3):
        assert process_tree_bytes() > 0
    assert [record.message[:54] for record in caplog.records] == [
        "how much memory is in use is not told here (no /proc),"
    ]


def test_where_nobody_tells_one_warning_says_that_no_budget_can_be_kept(
    proc: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proc(psutil_tells=False)
    monkeypatch.setattr(memory_held, "most_resident_bytes", lambda: None)
    for _ in range(3):
        assert process_tree_bytes() == 0
    with PeakSampler(0.01) as sampler:
        time.sleep(0.03)
    assert sampler.peak_bytes() == 0
    assert len(caplog.records) == 1
    assert "--max_ram cannot be kept" in caplog.text


@linux_only
def test_a_child_that_may_not_be_looked_into_is_told_of_and_one_that_has_ended_is_not(
    proc: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with hidepid and a child of another user."""
    proc(("/status", "/smaps_rollup", "/statm", "/children"))
    read = memory_held._read
    with python_child(CHILD.format(mib=10)) as child:
        monkeypatch.setattr(memory_held, "_read", lambda path: b"" if f"/{child.pid}/" in path else read(path))
        assert process_tree_bytes(child.pid) == 0
        assert "--max_ram cannot be kept" in caplog.text
    memory_held._warn_once.cache_clear()
    caplog.clear()
    assert process_tree_bytes(child.pid) == 0
    assert caplog.text == ""


def test_without_proc_psutil_stands_in(proc: Callable[..., None]) -> None:
    proc()
    before_bytes = process_tree_bytes()
    held = np.ones(100 * MIB, np.uint8)
    with python_child(CHILD.format(mib=100)), PeakSampler() as sampler:
        grown_bytes = process_tree_bytes() - before_bytes
    assert 200 * MIB < grown_bytes < 250 * MIB
    assert sampler.peak_bytes() > before_bytes + 200 * MIB
    assert process_tree_bytes(2**22 + 1) == 0
    del held


def test_the_sampler_sees_a_peak_that_is_gone_and_keeps_stages_apart() -> None:
    with PeakSampler(0.01) as sampler:
        sampler.mark("high")
        held = np.ones(300 * MIB, np.uint8)
        wait_for_a_sample(sampler, sampler.peaks_bytes()["start"] + 295 * MIB)
        del held
        sampler.mark("low")
        time.sleep(0.05)
    peaks = sampler.peaks_bytes()
    assert list(peaks) == ["start", "high", "low"]
    assert 295 * MIB < peaks["high"] - peaks["start"] < 320 * MIB
    assert peaks["low"] < peaks["high"] - 290 * MIB
    assert sampler.peak_bytes() == peaks["high"]
    assert max(held_bytes for _, held_bytes in sampler.timeline()) == peaks["high"]


def test_a_stage_shorter_than_the_interval_is_seen_at_its_end() -> None:
    with PeakSampler(60) as sampler:
        sampler.mark("blink")
        held = np.ones(100 * MIB, np.uint8)
        sampler.mark("after")
        del held
    assert sampler.peaks_bytes()["blink"] - sampler.peaks_bytes()["start"] > 95 * MIB


def test_a_stage_that_comes_back_keeps_its_higher_peak() -> None:
    with PeakSampler(60) as sampler:
        sampler.mark("tile")
        held = np.ones(100 * MIB, np.uint8)
        sampler.mark("export")
        del held
        sampler.mark("tile")
    assert sampler.peaks_bytes()["tile"] - sampler.peaks_bytes()["start"] > 95 * MIB


def test_the_sampler_sees_a_child() -> None:
    with PeakSampler(0.01) as sampler:
        sampler.mark("with child")
        with python_child(CHILD.format(mib=300)):
            wait_for_a_sample(sampler, sampler.peaks_bytes()["start"] + 301 * MIB)
        sampler.mark("without")
    assert sampler.peaks_bytes()["with child"] - sampler.peaks_bytes()["start"] > 300 * MIB
    assert sampler.peaks_bytes()["without"] < sampler.peaks_bytes()["with child"] - 280 * MIB


def test_the_sampler_watches_another_tree() -> None:
    held = np.ones(200 * MIB, np.uint8)
    with python_child(CHILD.format(mib=100)) as child, PeakSampler(0.01, pid=child.pid) as sampler:
        time.sleep(0.05)
    assert 100 * MIB < sampler.peak_bytes() < 150 * MIB
    del held


@linux_only
def test_pages_shared_with_a_burst_of_forked_children_are_counted_once() -> None:
    code = (
        "import os, sys, time\n"
        "held = b'\\1' * (300 * 2**20)\n"
        "print('ready', flush=True)\n"
        "for _ in range(10):\n"
        "    time.sleep(0.02)\n"
        "    child = os.fork()\n"
        "    if child == 0: time.sleep(0.3); os._exit(0)\n"
        "while True:\n"
        "    try: os.wait()\n"
        "    except ChildProcessError: break\n"
        "sys.stdin.read()"
    )
    with python_child(code) as child, PeakSampler(0.01, pid=child.pid) as sampler:
        most = 0
        for _ in range(20):
            time.sleep(0.02)
            most = max(most, len(memory_held._tree_pids(child.pid)))
    assert most > 5
    assert 300 * MIB < sampler.peak_bytes() < 400 * MIB


@linux_only
def test_an_unaffordable_exact_reading_does_not_count_shared_pages_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with PeakSampler(60) as sampler:
        monkeypatch.setattr(sampler, "_next_exact_s", float("inf"))
        monkeypatch.setattr(sampler, "_counted_twice_bytes", 30 * MIB)
        sampler.mark("estimated")
        exact_bytes = process_tree_bytes()
    assert abs(exact_bytes - 30 * MIB - sampler.peaks_bytes()["estimated"]) < 5 * MIB


def test_children_that_come_and_go_do_not_disturb_the_sampler() -> None:
    with PeakSampler(0.001) as sampler:
        for _ in range(30):
            subprocess.run([sys.executable, "-c", ""], check=True)
        assert sampler._thread.is_alive()
    assert sampler.peak_bytes() > 0


def test_the_sampler_may_leave_children_out() -> None:
    with PeakSampler(0.01, descendants=False) as sampler, python_child(CHILD.format(mib=300)):
        time.sleep(0.05)
    assert 0 < sampler.peak_bytes() < process_tree_bytes() + 100 * MIB


def test_the_thread_is_gone_after_the_block_even_after_an_error() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), PeakSampler(60) as sampler:
        1 / 0  # noqa: B018
    assert not sampler._thread.is_alive()
    assert threading.active_count() == before


@linux_only
def test_sampling_costs_less_than_two_percent_of_a_core_however_short_the_interval() -> None:
    idle = [
        threading.Thread(target=time.sleep, args=(2.5,)) for _ in range(40)
    ]  # every thread is one more file to read
    for thread in idle:
        thread.start()
    with PeakSampler(0.0001) as sampler:
        start_s, start_cpu_s = time.monotonic(), sampler.cpu_s
        held = []
        while time.monotonic() - start_s < 2:
            held.append(np.ones(MIB, np.uint8))  # grows, so that every round is a new peak
            time.sleep(0.01)
        share = (sampler.cpu_s - start_cpu_s) / (time.monotonic() - start_s)
    assert 0 < share < 0.02
    for thread in idle:
        thread.join()


def test_a_long_timeline_stays_short_and_keeps_the_peak_and_the_ends() -> None:
    timeline = memory_held.Timeline()
    for step in range(100_000):
        timeline.add(float(step), 7_000 if step == 33_333 else step % 1000)
    assert len(timeline.points) <= 2048
    assert (33_333.0, 7_000) in timeline.points
    assert timeline.points[-1][0] == 99_999.0
    assert timeline.points == sorted(timeline.points)


def test_measuring_this_very_process_is_the_default() -> None:
    assert abs(process_tree_bytes() - process_tree_bytes(os.getpid())) < 5 * MIB
