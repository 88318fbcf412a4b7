"""Kernels that stay compiled: where, that damage is noticed, and what is done where nothing can be kept."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest

from nnunet_lowmem.labels import cells_cpu
from nnunet_lowmem.network import kernels as network_kernels
from nnunet_lowmem.preprocessing import spline
from nnunet_lowmem.system import compiler
from nnunet_lowmem.system.compiler import jit
from nnunet_lowmem.window import halves
from nnunet_lowmem.window import kernels as window_kernels

needs_users = pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX users")


def triple(value):
    return value * 3


def double(value):
    return value * 2


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """The folder that this test's kernels are kept in."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def no_asked_folder(monkeypatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def loaded(kernel) -> int:
    return sum(kernel.stats.cache_hits.values())


def run(function, value=14) -> tuple[float, bool]:
    """Result of a fresh kernel, as in another process, and whether it was loaded."""
    kernel = jit(function)
    return kernel(value), bool(loaded(kernel))


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_kernel_is_compiled_once_for_each_signature(kept):
    assert run(triple) == (42, False)
    assert run(triple) == (42, True)
    assert run(triple, 0.5) == (1.5, False)
    assert run(triple, 0.5) == (1.5, True)
    assert len(files_in(kept)) == 2


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _cut(file: Path) -> None:
    os.truncate(file, 2000)


def _cut_in_the_checksum(file: Path) -> None:
    os.truncate(file, 7)


def _zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _a_bit_turned(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_emptied, _cut, _cut_in_the_checksum, _zeros, _a_bit_turned])
def test_a_damaged_file_is_compiled_and_written_again(kept, damage):
    run(triple)
    (file,) = files_in(kept)
    damage(file)
    assert run(triple) == (42, False)
    assert run(triple) == (42, True)
    assert files_in(kept) == [file]


def test_a_file_that_cannot_be_read_or_replaced_costs_its_kernel_only(kept):
    run(triple)
    (file,) = files_in(kept)
    file.unlink()
    file.mkdir()
    assert run(triple) == (42, False)
    assert files_in(kept) == []  # nothing half written either


def test_the_file_of_another_kernel_is_not_believed(kept):
    run(triple)
    (of_triple,) = files_in(kept)
    run(double)
    (of_double,) = set(files_in(kept)) - {of_triple}
    shutil.copyfile(of_double, of_triple)
    assert run(triple) == (42, False)


@contextlib.contextmanager
def _bound_by_permissions() -> Iterator[None]:
    """Nobody in particular, since permissions do not bind root, who may run the tests."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(12345)
    try:
        yield
    finally:
        os.seteuid(0)


@needs_users
def test_a_cache_that_cannot_be_written_is_read(monkeypatch):
    with tempfile.TemporaryDirectory() as name:  # beside pytest's folders, which are for their owner only
        monkeypatch.setattr(numba.config, "CACHE_DIR", name)
        run(triple)
        files = files_in(Path(name))
        folders = [Path(name), *(path for path in Path(name).rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        with _bound_by_permissions():
            assert not os.access(folders[-1], os.W_OK, effective_ids=True)
            assert run(triple) == (42, True)
            assert run(triple, 0.5) == (1.5, False)
        assert files_in(Path(name)) == files
        for folder in folders:
            folder.chmod(0o755)


def _no_entry(uid):
    raise KeyError(uid)


@needs_users
@pytest.mark.parametrize("asked", ["", "~/kernels"])
def test_no_folder_is_made_where_the_home_folder_is_unknown(tmp_path, monkeypatch, no_asked_folder, asked):
    """``docker run -u 1234`` with an image that knows no such user."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", asked)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", _no_entry)
    monkeypatch.chdir(tmp_path)
    assert run(triple) == (42, False)
    assert run(triple) == (42, False)
    assert not list(tmp_path.iterdir())


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG is the standard of other platforms")
@pytest.mark.parametrize(
    "stated, where", [(None, "home/.cache"), ("", "home/.cache"), ("is/relative", "home/.cache"), ("{}/xdg", "xdg")]
)
def test_nothing_is_written_beside_the_source(tmp_path, monkeypatch, no_asked_folder, stated, where):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if stated is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", stated.format(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = tmp_path / "site" / "some_kernels.py"
    source.parent.mkdir()
    source.write_text("def triple(value):\n    return value * 3\n")
    assert run(_module(source).triple) == (42, False)
    assert files_in(source.parent) == [source]
    (file,) = (path for path in files_in(tmp_path) if path != source)
    assert file.is_relative_to(tmp_path / where / "nnunet_lowmem")


CALLER = """
from nnunet_lowmem.system.compiler import jit
{}
FACTOR = {}
@jit
def helper(value):
    return value * FACTOR {}
def caller(value):
    return helper(value)
"""


def test_a_kernel_is_compiled_again_where_one_that_it_calls_or_a_constant_was_edited(tmp_path, kept, monkeypatch):
    """The helper may lie in another file than the caller, which numba would not notice."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def edited(*texts: object) -> tuple[float, bool]:
        source = tmp_path / "edited_kernels.py"
        source.write_text(CALLER.format(*texts))
        return run(_module(source).caller)

    assert edited("", 3, "") == (42, False)
    assert edited("", 3, "+ 1") == (43, False)
    assert edited("", 2, "+ 1") == (29, False)
    assert edited("# a line that moves the others", 2, "+ 1") == (29, True)


def test_what_a_kernel_is_named_by_holds_in_every_process():
    """An address in it would make every run compile, and fill the folder."""
    modules = (cells_cpu, halves, network_kernels, window_kernels, spline)
    kernels = {value for module in modules for value in vars(module).values() if isinstance(value, compiler._Kernel)}
    assert len(kernels) > 20
    for kernel in kernels:
        assert " at 0x" not in " ".join(compiler._content(kernel.py_func, set())), kernel


def test_who_reads_while_others_write_sees_whole_files(tmp_path):
    file, payloads = tmp_path / "kernel.nbc", [bytes([number]) * 200_000 for number in range(3)]
    compiler._write(file, b"key", payloads[0])
    stop = threading.Event()

    def fill(payload: bytes) -> None:
        while not stop.is_set():
            compiler._write(file, b"key", payload)

    threads = [threading.Thread(target=fill, args=(payload,)) for payload in payloads]
    for thread in threads:
        thread.start()
    try:
        assert {compiler._read(file, b"key") for _ in range(100)} <= set(payloads)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert files_in(tmp_path) == [file]


DISABLED = """
import logging, numpy as np
logging.basicConfig(level=logging.INFO)
from nnunet_lowmem.window.halves import half_key, half_to_single, key_to_half, single_to_half
for bits in (0x0001, 0x3E00, 0x7BFF, 0x8001, 0xFBFF):
    assert single_to_half(half_to_single(np.uint16(bits))) == bits, hex(bits)
    assert key_to_half(half_key(np.uint16(bits))) == bits, hex(bits)
"""


def test_kernels_are_compiled_where_the_machine_switches_numba_off(tmp_path):
    """As plain Python, numpy's conversions make other halves of the same lines, or raise OverflowError."""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", DISABLED], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "NUMBA_DISABLE_JIT is set" in done.stderr
