"""Takes from Python what another platform does not have, then switches on by the hook and runs our commands.

Called with the platform and the arguments of a prediction. What other packages need stays, or is taken from ours alone.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import io
import json
import os
import signal
import sys
from importlib.metadata import MetadataPathFinder

import psutil  # noqa: F401
from nnunetv2.inference import predict_from_raw_data  # and all it needs, on the platform that there is

EVERYWHERE_BUT_LINUX = ["sched_getaffinity", "posix_fallocate", "pidfd_open", "memfd_create"]
NOT_ON_WINDOWS = ["fork", "killpg", "getpgid", "setsid", "getuid", "geteuid", "O_DIRECTORY", "nice"]
SIGNALS = ["SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "SIGPIPE", "SIGCHLD", "setitimer", "pthread_kill"]


def without_libc() -> None:
    """A library without a name: what ctypes raises on Windows."""
    load = ctypes.CDLL.__init__

    def refuse(self, name, *arguments, **keywords):
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        load(self, name, *arguments, **keywords)

    ctypes.CDLL.__init__ = refuse


def without_proc(owner: object, name: str) -> None:
    """No /proc and no /sys for our modules; psutil, which has other sources elsewhere, keeps them."""
    there = getattr(owner, name)

    def look(path, *arguments, **keywords):
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") in ("pathlib", "pathlib._local", "genericpath"):
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith("nnunet_lowmem") and str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return there(path, *arguments, **keywords)

    setattr(owner, name, look)


def without_metadata(*names: str) -> None:
    """As in a source tree or a frozen program: the packages are there, and nothing says what they are called."""
    find = MetadataPathFinder.find_distributions

    def find_others(*arguments, **keywords):
        return (found for found in find(*arguments, **keywords) if found.metadata["Name"] not in names)

    MetadataPathFinder.find_distributions = find_others


def run(platform: str, arguments: list[str]) -> int:
    if platform != "macos":  # on Windows as in a frozen program
        without_metadata("nnunetv2", "nnunet-lowmem", "torch", "dynamic_network_architectures")
    if platform == "source_tree":
        return start(arguments)
    for owner, name in ((builtins, "open"), (io, "open"), (os, "stat"), (os, "listdir"), (os, "open")):
        without_proc(owner, name)
    missing = [(os, name) for name in EVERYWHERE_BUT_LINUX]
    if platform == "windows":
        without_libc()
        missing += [(os, name) for name in NOT_ON_WINDOWS] + [(signal, name) for name in SIGNALS]
        sys.modules["fcntl"] = sys.modules["resource"] = None
    for owner, name in missing:
        with contextlib.suppress(AttributeError):
            delattr(owner, name)
    return start(arguments)


def start(arguments: list[str]) -> int:
    os.environ["nnUNet_predictor"] = "lowmem"  # noqa: SIM112  # nnU-Net's spelling
    import nnunet_lowmem.startup  # noqa: F401
    from nnunet_lowmem import LowMemPredictor
    from nnunet_lowmem.commands import cli
    from nnunet_lowmem.report import measured_command

    assert issubclass(predict_from_raw_data.nnUNetPredictor, LowMemPredictor)
    for command in ("demo", "compare", "ensemble", "run"):
        with contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
    print(json.dumps(measured_command.machine_facts()))
    return cli.predict_entry_point(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
