"""Takes from Python what another platform does not have, then switches on by the hook and runs our commands.

Called with the platform, the exit code that is expected, and a command with its arguments. What other packages need
stays, or is taken from ours alone; worker processes run on the platform that there is. What is said at the end, as a
line of JSON: facts of the machine, and files that Windows would not have let go.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import fcntl
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import MetadataPathFinder
from types import ModuleType, SimpleNamespace

import psutil  # noqa: F401
from nnunetv2.inference import predict_from_raw_data  # and all it needs, on the platform that there is

EVERYWHERE_BUT_LINUX = ["sched_getaffinity", "posix_fallocate", "pidfd_open", "memfd_create"]
NOT_ON_WINDOWS = ["fork", "killpg", "getpgid", "setsid", "getuid", "geteuid", "O_DIRECTORY", "nice", "chown"]
# SIGKILL stays: Python's own way to end a process asks for it, which is another one on Windows
SIGNALS = ["SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "SIGCHLD", "SIGXCPU", "setitimer"]
FINDERS = ("pathlib", "pathlib._local", "genericpath", "shutil", "contextlib")

held: list[str] = []


def without_libc() -> None:
    """A library without a name: what ctypes raises on Windows."""
    load = ctypes.CDLL.__init__

    def refuse(self, name, *arguments, **keywords):
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        load(self, name, *arguments, **keywords)

    ctypes.CDLL.__init__ = refuse


def asked_by_us() -> bool:
    """Whether a function that stands in for one of the system was called by our modules, be it through `pathlib`."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") in FINDERS:
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").startswith("nnunet_lowmem")


def without_proc(owner: object, name: str) -> None:
    """No /proc and no /sys for our modules; psutil, which has other sources elsewhere, keeps them."""
    there = getattr(owner, name)

    def look(path, *arguments, **keywords):
        if str(path).startswith(("/proc", "/sys")) and asked_by_us():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return there(path, *arguments, **keywords)

    setattr(owner, name, look)


def is_held(path: str) -> bool:
    """Whether this process has a file open or mapped."""
    path = os.path.realpath(path)
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        if any(line.rstrip().endswith(path) for line in maps):
            return True
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}") == path:
                return True
    return False


def locking(name: str, of: Callable) -> None:
    """A file that is open or mapped can be neither removed nor renamed nor replaced, as on Windows."""

    def act(path, *arguments, **keywords):
        paths = [path, *arguments[:1]] if name in ("replace", "rename") else [path]
        for each in map(os.fspath, paths):
            if asked_by_us() and "dir_fd" not in keywords and os.path.isfile(each) and is_held(each):
                held.append(f"{name} {each}")
                error = PermissionError(errno.EACCES, "The process cannot access the file", each)
                error.winerror = 32
                raise error
        return of(path, *arguments, **keywords)

    setattr(os, name, act)


def locks_of_windows() -> ModuleType:
    flock, exclusive = fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB

    def locking(descriptor, mode, size):
        try:
            flock(descriptor, exclusive)
        except OSError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    return SimpleNamespace(LK_NBLCK=2, locking=locking)


def without_metadata(*names: str) -> None:
    """As in a source tree or a frozen program: the packages are there, and nothing says what they are called."""
    find = MetadataPathFinder.find_distributions

    def find_others(*arguments, **keywords):
        return (found for found in find(*arguments, **keywords) if found.metadata["Name"] not in names)

    MetadataPathFinder.find_distributions = find_others


def take_away(platform: str) -> None:
    if platform != "macos":  # on Windows as in a frozen program
        without_metadata("nnunetv2", "nnunet-lowmem", "torch", "dynamic_network_architectures")
    if platform == "source_tree":
        return
    # the one module that asks is told before it is imported; everything else goes on where it is
    sys.platform, real = {"windows": "win32", "macos": "darwin"}[platform], sys.platform
    missing = [(os, name) for name in EVERYWHERE_BUT_LINUX]
    if platform == "windows":
        without_libc()
        missing += [(os, name) for name in NOT_ON_WINDOWS] + [(signal, name) for name in SIGNALS]
        sys.modules["msvcrt"], sys.modules["fcntl"], sys.modules["resource"] = locks_of_windows(), None, None
        # by name there, not by a descriptor of the folder
        sys.modules["shutil"]._use_fd_functions = False
        for name in ("replace", "rename", "unlink", "remove"):
            locking(name, getattr(os, name))
    for owner, name in missing:
        with contextlib.suppress(AttributeError):
            delattr(owner, name)
    import nnunet_lowmem.system.platform  # noqa: F401

    sys.platform = real
    for owner, name in ((builtins, "open"), (io, "open"), (os, "stat"), (os, "listdir"), (os, "open")):
        without_proc(owner, name)


def run(platform: str, command: str, arguments: list[str]) -> int:
    take_away(platform)
    os.environ["nnUNet_predictor"] = "lowmem"  # noqa: SIM112  # nnU-Net's spelling
    import nnunet_lowmem.startup  # noqa: F401
    from nnunet_lowmem import LowMemPredictor
    from nnunet_lowmem.commands import cli
    from nnunet_lowmem.report import measured_command

    assert issubclass(predict_from_raw_data.nnUNetPredictor, LowMemPredictor)
    for each in ("demo", "compare", "ensemble", "run"):
        with contextlib.suppress(SystemExit):
            cli.main([each, "--help"])
    code = cli.predict_entry_point(arguments) if command == "predict" else cli.main([command, *arguments])
    print(json.dumps(measured_command.machine_facts() | {"held": held}))
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], sys.argv[3:]))
