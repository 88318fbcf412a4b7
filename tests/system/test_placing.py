"""Outputs that are links, have a mode or an owner, or lie on file systems without rename, beside stock's writers."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from faulty_calls import NEW, OLD, is_new
from forked import forked
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_lowmem.errors import WriteError
from nnunet_lowmem.nnunet.label_writing import write_segmentation
from nnunet_lowmem.system.atomic_files import atomic_output
from nnunet_lowmem.volumes.verifying import DamagedFileError, verify_whole

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs links, modes and signals")

PROPERTIES = {
    "sitk_stuff": {"spacing": (1.0, 2.0, 3.0), "origin": (0.0, 0.0, 0.0), "direction": np.eye(3).ravel().tolist()},
    "spacing": [3.0, 2.0, 1.0],
}
NOBODY = 65534
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")


def write(final: Path, content: bytes = NEW) -> None:
    with atomic_output(final, is_new) as partial:
        partial.write_bytes(content)


def as_nobody(act: Callable[[], None]) -> str:
    """Act in a process of a user who is not root; the last line of what went wrong."""

    def work() -> str:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        act()
        return ""

    return "".join(forked(work).strip().splitlines()[-1:])


# -- beside stock ------------------------------------------------------------------------------------------------------


def with_mode(mode: int) -> Callable[[Path, Path], None]:
    def prepare(final: Path, other: Path) -> None:
        final.write_bytes(OLD)
        final.chmod(mode)

    return prepare


def link(final: Path, other: Path) -> None:
    other.write_bytes(OLD)
    other.chmod(0o640)
    final.symlink_to(other.name)


def link_to_link(final: Path, other: Path) -> None:
    link(final.with_name("between"), other)
    final.symlink_to(final.with_name("between"))


def link_to_other_disk(final: Path, other: Path) -> None:
    """With a sidecar, which has to come to this disk from there."""
    final.symlink_to(Path("/dev/shm", f"{os.getpid()}-{final.parent.parent.name}-{final.parent.name}.tif"))
    final.write_bytes(OLD)


def hard_link(final: Path, other: Path) -> None:
    with_mode(0o664)(final, other)
    os.link(final, other)


def link_to_hard_link(final: Path, other: Path) -> None:
    hard_link(final.with_name("between"), other)
    final.symlink_to(final.with_name("between"))


def given_away(final: Path, other: Path) -> None:
    with_mode(0o2660)(final, other)
    os.chown(final, 12345, 4444)
    final.chmod(0o660)


def folder_of_a_group(final: Path, other: Path) -> None:
    os.chown(final.parent, -1, 4444)
    final.parent.chmod(0o2775)


PLACES = [
    *(with_mode(mode) for mode in (0o444, 0o600, 0o640, 0o666, 0o755)),
    *(link, link_to_link, link_to_other_disk, hard_link, link_to_hard_link),
    lambda final, other: final.symlink_to(other),
    lambda final, other: final.symlink_to(final),
    lambda final, other: final.symlink_to(final.with_name("gone") / "case.tif"),
    lambda final, other: final.symlink_to(final.parent),
    lambda final, other: final.mkdir(),
    *(pytest.param(each, marks=needs_root) for each in (given_away, folder_of_a_group)),
]


def listing(folder: Path) -> list[tuple]:
    """Everything that can be seen of a folder, and of what its links lead to."""
    seen = []
    for path in sorted(folder.iterdir()):
        of_link, there = path.lstat(), path.exists()
        status = path.stat() if there else of_link
        state = status.st_mode, status.st_uid, status.st_gid, status.st_nlink
        seen.append((path.name, of_link.st_mode, *state, path.read_bytes() if there and path.is_file() else b""))
    return seen


@pytest.mark.parametrize("writer, ending", [(SimpleITKIO, ".nii"), (Tiff3DIO, ".tif")])
@pytest.mark.parametrize("prepare", PLACES)
def test_is_as_if_stocks_writer_had_written_there(prepare, writer, ending, tmp_path):
    if prepare is link_to_other_disk and not os.access("/dev/shm", os.W_OK):
        pytest.skip("has no other disk")
    outcomes = []
    for name in ("stock", "ours"):
        final = tmp_path / name / f"case{ending}"
        final.parent.mkdir()
        prepare(final, final.with_name("other"))
        array = np.arange(5 * 6 * 7, dtype=np.uint8).reshape(5, 6, 7)
        failed = False
        try:
            if name == "ours":
                plans = SimpleNamespace(image_reader_writer_class=writer)
                write_segmentation(array, PROPERTIES, str(final), plans)
            else:
                writer().write_seg(array, str(final), dict(PROPERTIES))
        except (OSError, RuntimeError):
            failed = True
        outcomes.append((failed, listing(final.parent)))
        if prepare is link_to_other_disk:
            final.resolve().unlink()
    assert outcomes[0] == outcomes[1]


@pytest.fixture
def open_folder():
    """A folder that other users can reach."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@needs_root
@pytest.mark.parametrize("mode, told", [(0o444, "may not be written to, its mode is 0444"), (0o666, "")])
def test_file_of_another_user(mode, told, open_folder):
    """What counts is whether the file may be written to, as with any writer, even where only its owner may rename."""
    final = open_folder / "out" / "case"
    final.parent.mkdir()
    final.parent.chmod(0o777 | stat.S_ISVTX)
    with_mode(mode)(final, final)
    failed = as_nobody(lambda: write(final))
    assert told in failed
    assert bool(told) == bool(failed)
    status = final.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (mode, 0)
    assert final.read_bytes() == (OLD if told else NEW)
    assert os.listdir(final.parent) == ["case"]


@needs_root
def test_link_into_a_folder_where_no_file_may_be_made(open_folder):
    data, final = open_folder / "data", open_folder / "out" / "case"
    with_mode(0o666)(data, data)
    final.parent.mkdir()
    final.parent.chmod(0o777)
    final.symlink_to(data)
    assert as_nobody(lambda: write(final)) == ""
    assert data.read_bytes() == NEW
    assert os.listdir(final.parent) == ["case"]


@needs_root
def test_folder_that_may_be_written_to_and_not_read(open_folder):
    (open_folder / "out").mkdir()
    (open_folder / "out").chmod(0o333)
    assert as_nobody(lambda: write(open_folder / "out" / "case")) == ""
    assert (open_folder / "out" / "case").read_bytes() == NEW
    assert os.listdir(open_folder / "out") == ["case"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL])
def test_file_systems_without_names_that_begin_with_a_dot(number, tmp_path, monkeypatch):
    make = os.mkdir

    def refuse(path, *args):
        if os.path.basename(path).startswith("."):
            raise OSError(number, os.strerror(number))
        make(path, *args)

    monkeypatch.setattr(os, "mkdir", refuse)
    write(tmp_path / "case")
    assert os.listdir(tmp_path) == ["case"]


@pytest.mark.parametrize(
    "prepare, told",
    [
        (
            lambda final: final.symlink_to("gone/x"),
            "symbolic link to .*gone/x, which lies in no folder; make .*gone or",
        ),
        (lambda final: final.symlink_to(final), "symbolic link to .* cannot be reached: Too many levels"),
        (lambda final: final.symlink_to("/dev/null"), "symbolic link to /dev/null, which is a device or pipe"),
        (lambda final: final.mkdir(), "case: is a directory and no file"),
        (os.mkfifo, "case: is a device or pipe and no file"),
    ],
)
def test_what_is_no_file_is_refused_before_it_is_written(prepare, told, tmp_path):
    prepare(tmp_path / "case")
    before = (tmp_path / "case").lstat().st_ino
    with pytest.raises(WriteError, match=told), atomic_output(tmp_path / "case"):
        raise AssertionError("must not be entered")
    assert (tmp_path / "case").lstat().st_ino == before
    assert os.listdir(tmp_path) == ["case"]


# -- copies in place ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EXDEV, errno.EBUSY, errno.EINVAL])
@pytest.mark.parametrize("old", [None, OLD, OLD * 9])
def test_file_systems_without_rename(number, old, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    final = tmp_path / "case"
    if old:
        final.write_bytes(old)
    write(final)
    assert final.read_bytes() == NEW
    assert os.listdir(tmp_path) == ["case"]


@needs_root
def test_file_that_is_mounted(tmp_path):
    final, other = tmp_path / "case", tmp_path / "other"
    with_mode(0o640)(final, other)
    with_mode(0o640)(other, final)
    if subprocess.run(["mount", "--bind", str(other), str(final)], capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        write(final)
        assert final.read_bytes() == NEW
    finally:
        subprocess.run(["umount", str(final)], check=True)
    assert other.read_bytes() == NEW


def half(act: Callable[[], object]) -> Callable:
    def copy(source, target, length):
        content = source.read()
        target.write(content[: len(content) // 2])
        target.flush()
        act()

    return copy


def raises(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize(
    "act, error, told",
    [
        (raises(OSError(errno.ENOSPC, "No space left")), WriteError, "lost.*No space left"),
        (raises(KeyboardInterrupt()), KeyboardInterrupt, None),
        (lambda: None, WriteError, "lost.*reads otherwise"),
    ],
)
def test_copy_that_fails_leaves_no_part(act, error, told, linked, tmp_path, monkeypatch):
    final, other = tmp_path / "case", tmp_path / "other"
    final.write_bytes(OLD)
    if linked:
        os.link(final, other)
    else:
        monkeypatch.setattr(os, "replace", lambda *_: raises(OSError(errno.ENOSYS, "Function not implemented"))())
    monkeypatch.setattr(shutil, "copyfileobj", half(act))
    with pytest.raises(error, match=told):
        write(final)
    assert sorted(os.listdir(tmp_path)) == (["case", "other"] if linked else [])
    assert not linked or final.read_bytes() == other.read_bytes() == b""


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".tif"])
def test_copy_that_a_killed_process_leaves_is_no_whole_file(ending, tmp_path, monkeypatch):
    """Even if it replaces a file of its own length: a part of it is never completed by the old one."""
    final = tmp_path / f"case{ending}"
    plans = SimpleNamespace(image_reader_writer_class=Tiff3DIO if ending == ".tif" else SimpleITKIO)
    array = np.random.default_rng(0).integers(0, 9, (40, 50, 60), np.uint8)
    write_segmentation(array, PROPERTIES, str(final), plans)
    os.link(final, tmp_path / "other")
    verify_whole(final)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(shutil, "copyfileobj", half(lambda: os.kill(os.getpid(), signal.SIGKILL)))
        write_segmentation(array[::-1], PROPERTIES, str(final), plans)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with pytest.raises(DamagedFileError):
        verify_whole(final)


@needs_root
def test_disk_that_is_too_full_for_a_copy_keeps_the_old_file(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("may not mount a file system here")
    try:
        final = tmp_path / "case"
        final.write_bytes(OLD)
        os.link(final, tmp_path / "other")
        with pytest.raises(WriteError, match="No space left"), atomic_output(final) as partial:
            partial.write_bytes(bytes(36 * 1024))
        assert final.read_bytes() == OLD
        assert sorted(os.listdir(tmp_path)) == ["case", "other"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
