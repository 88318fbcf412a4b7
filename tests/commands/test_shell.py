"""What is said of errors that are not ours."""

from __future__ import annotations

import pytest

from nnunet_lowmem.commands import shell


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
    assert shell._limit_of_memory(error) == ("; memory could not be had: least is left by ulimit -v" if names else "")
