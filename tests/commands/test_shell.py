"""What a command prints where the terminal, or the file, has not every character, and of errors that are not ours."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

import pytest

from nnunet_lowmem.commands import console, shell
from nnunet_lowmem.commands.compare_table import print_comparison
from nnunet_lowmem.commands.shell import guarded
from nnunet_lowmem.predict.outcomes import FailedCase, RunReport
from nnunet_lowmem.report.compare import Comparison
from nnunet_lowmem.report.measured_command import MeasuredCommand

_NAME = "läber_肝_\udcff"


def printed(encoding: str, command: Callable[[], object], monkeypatch) -> str:
    """What guarded commands print, on both streams; no stream replaces what it lacks by itself."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        assert guarded(lambda: bool(command()), verbose=False) == 0
    return "".join(stream.buffer.getvalue().decode(encoding) for stream in streams)


def as_shown(text: str, encoding: str) -> str:
    return text.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp932", "utf-8"])
def test_what_an_encoding_lacks_is_escaped_and_costs_nothing(encoding, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    # pytest keeps what is logged, and processes of tests cannot send such a name to each other
    monkeypatch.setattr(logging.getLogger("nnunet_lowmem"), "propagate", False)

    def command() -> None:
        print(f"printed {_NAME}")
        sys.stdout.writelines([f"lines {_NAME}\n", "end\n"])
        logging.getLogger("nnunet_lowmem").warning("logged %s", _NAME)
        console.print_run(RunReport(failed=[FailedCase(_NAME, "export", "why", "", 1)]), _NAME)

    text = printed(encoding, command, monkeypatch)
    name = as_shown(_NAME, encoding)
    for line in (
        f"printed {name}\n",
        f"lines {name}\nend\n",
        f"warning: logged {name}\n",
        f"cases done, 1 failed: {name}",
    ):
        assert line in text
    assert text.count(name) == 5


def test_table_of_a_comparison_is_whole_in_every_encoding(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    sides = {"stock": [_measured(-9, "took more than 4 GiB")], "ours": [_measured(0, "")]}
    texts = {
        encoding: printed(encoding, lambda: print_comparison(Comparison(sides), {}, False), monkeypatch)
        for encoding in ("ascii", "cp932", "utf-8")
    }
    assert "  >= 10.0 s |" in texts["ascii"]
    assert len(set(texts.values())) == 1


def _measured(exit_code: int, stopped: str) -> MeasuredCommand:
    return MeasuredCommand(exit_code, stopped, 10.0, 3.0, 2**30, None, {}, [], 0.1)


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (ImportError("libx.so: failed to map segment from shared object"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (ImportError("No module named x"), False),
    ],
)
def test_memory_that_could_not_be_had_names_the_limit_that_binds(error, names, monkeypatch):
    monkeypatch.setattr("nnunet_lowmem.system.memory_limits.binding_now", lambda: "least is left by ulimit -v")
    assert shell.limit_of_memory(error) == ("; memory could not be had: least is left by ulimit -v" if names else "")
