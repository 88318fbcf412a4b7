"""Jobs for workers in tests: importable, so that a spawned process finds them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


class UnsendableError(Exception):
    def __init__(self, number, text):
        super().__init__(f"{number} {text}")


class Unloadable:
    def __reduce__(self):
        return _refuse, ()


def _refuse():
    if os.environ.get("THIS_IS_THE_PARENT") == str(os.getpid()):
        raise ImportError("no such class here")


def echo(argument, report):
    report("work")
    return argument


def pid(argument, report):
    return os.getpid()


def in_stage(argument, report):
    """Report each stage, then fail in the last as told."""
    stages, fault = argument
    for stage in stages:
        report(stage)
    FAULTS[fault]()
    return "done"


def fail(argument, report):
    report("work")
    raise ERRORS[argument]()


def allocate_under_limit(argument, report):
    """Take all memory the limit allows, so that telling the story must first give it back."""
    import resource

    with open("/proc/self/statm") as file:
        data_bytes = int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes + 64 * 2**20,) * 2)
    report("allocate")
    taken = []
    size = 2**24
    while True:
        try:
            taken.append(bytearray(size))
        except MemoryError:
            if size < 2**10:
                raise
            size //= 2


def busy(argument, report):
    report("work")
    stop = time.monotonic() + argument
    while time.monotonic() < stop:
        pass
    return "done"


def busy_after(argument, report):
    stages, seconds = argument
    for stage in stages:
        report(stage)
    return busy_stages([seconds], lambda stage: None)


def seldom_reports(argument, report):
    """Report each 0.4 s and use no CPU time in between."""
    stop = time.monotonic() + argument
    while time.monotonic() < stop:
        report("work")
        time.sleep(0.4)
    return "done"


def busy_in_a_grandchild(argument, report):
    report("work")
    subprocess.run([sys.executable, "-c", f"import time; e = time.time() + {argument}\nwhile time.time() < e: pass"])
    return "done"


def sleep_with_reports(argument, report):
    stop = time.monotonic() + argument
    while time.monotonic() < stop:
        report("work")
        time.sleep(0.05)
    return "done"


def sleep_with_beating_thread(argument, report):
    report("work")

    def beat():
        while True:
            time.sleep(0.05)

    threading.Thread(target=beat, daemon=True).start()
    time.sleep(argument)


def many_reports(argument, report):
    for _ in range(argument):
        report("work")
    return "done"


def close_all_files(argument, report):
    report("work")
    os.closerange(3, 1000)
    time.sleep(argument)


def leave_grandchild(argument, report):
    """Start a process that outlives this one, and say which."""
    report("work")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if argument == "stall":
        report(str(child.pid))
        time.sleep(60)
    return child.pid


def ignore_sigterm(argument, report):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report("deaf")
    time.sleep(60)


def slow_exit(argument, report):
    threading.Thread(target=time.sleep, args=(60,)).start()
    return "done"


def say(argument=None, report=None):
    print("out of the child")
    print("err of the child", file=sys.stderr)


def write_pid_and_wait(argument, report):
    """Note the process id in a file, then hang as told."""
    path, how = argument
    report("hang")
    Path(path).write_text(str(os.getpid()))
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hold the interpreter":
        import ctypes

        ctypes.PyDLL(None).sleep(60)
    time.sleep(60)


def nested_can_spawn(argument, report):
    from nnunet_lowmem.system.workers import can_spawn

    return can_spawn()


def segfault():
    import ctypes

    ctypes.string_at(0)


def return_unpicklable(argument, report):
    return lambda: None


def return_unloadable(argument, report):
    return Unloadable()


def busy_stages(argument, report):
    for i, seconds in enumerate(argument):
        report(f"stage {i}")
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            pass
    return "done"


def length(argument, report):
    return len(argument)


def survive_deathsig(argument, report):
    """Untie this process from its parent as far as Linux is concerned; the watching thread is left."""
    import ctypes

    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    Path(argument).write_text(str(os.getpid()))
    time.sleep(60)


def try_to_start():
    from nnunet_lowmem.system.workers import Worker, WorkerStartError, can_spawn

    try:
        Worker(echo, 1, case="a").close()
    except WorkerStartError as error:
        return can_spawn(), str(error)
    return can_spawn(), "started"


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": segfault,
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "exit 0": lambda: os._exit(0),
    "exit 3": lambda: os._exit(3),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(60),
}
ERRORS = {
    "value": lambda: ValueError("bad voxel"),
    "exit": lambda: SystemExit(0),
    "memory": lambda: MemoryError("2 GiB"),
    "torch memory": lambda: OutOfMemoryError("CUDA"),
    "torch cpu memory": lambda: RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    ),
    "errno memory": lambda: OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "unsendable": lambda: UnsendableError(3, "x"),
    "long": lambda: ValueError("x" * 100_000),
}
