"""Folders of ended processes are removed, and those of living ones never are, on whatever machine they live."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from children import ended_pid, names, python
from faulty_calls import NEW, is_new, write

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.system import owned_folders, platform
from nnunet_lowmem.system.atomic_files import atomic_output
from nnunet_lowmem.system.owned_folders import SIGN_FILE, remove_stale, temporary_folder

pytestmark = pytest.mark.timeout(60)


class TestRemoveStale:
    def leftover(self, folder: Path, name: str, age_s: float = 0) -> Path:
        path = folder / name
        path.mkdir()
        (path / "case.nii.gz").write_bytes(NEW)
        for each in (path / "case.nii.gz", path):
            os.utime(each, (time.time() - age_s,) * 2)
        return path

    @pytest.mark.parametrize("kind", [".partial", "lowmem_partial", "nnunet_lowmem"])
    def test_of_an_ended_process_is_removed(self, tmp_path, kind):
        path = self.leftover(tmp_path, f"{kind}-{owned_folders._host()}-{ended_pid()}-0123abcd")
        assert remove_stale(tmp_path) == [path]
        assert names(tmp_path) == []

    def test_of_a_living_process_is_kept(self, tmp_path):
        self.leftover(tmp_path, f".partial-{owned_folders._host()}-{os.getppid()}-0123abcd")
        assert remove_stale(tmp_path) == []
        assert len(names(tmp_path)) == 1

    def test_of_this_very_process_is_kept_while_it_is_in_use(self, tmp_path):
        final = tmp_path / "case.nii.gz"
        with atomic_output(final, is_new) as partial:
            write(partial)
            assert remove_stale(tmp_path) == []
        assert final.read_bytes() == NEW

    def test_of_a_predecessor_with_this_process_id_is_removed(self, tmp_path):
        self.leftover(tmp_path, f".partial-{owned_folders._host()}-{os.getpid()}-0123abcd")
        assert len(remove_stale(tmp_path)) == 1

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a zombie")
    def test_of_a_zombie_is_removed(self, tmp_path):
        with subprocess.Popen([sys.executable, "-c", ""]) as process:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            self.leftover(tmp_path, f".partial-{owned_folders._host()}-{process.pid}-0123abcd")
            assert len(remove_stale(tmp_path)) == 1

    @pytest.mark.parametrize("age_s, removed", [(3600, 0), (25 * 3600, 1)])
    def test_of_another_machine_is_removed_after_a_day(self, tmp_path, age_s, removed):
        self.leftover(tmp_path, f".partial-{'0' * 8}-{ended_pid()}-0123abcd", age_s)
        assert len(remove_stale(tmp_path)) == removed

    def test_of_another_machine_is_kept_while_its_file_grows(self, tmp_path):
        path = self.leftover(tmp_path, f".partial-{'0' * 8}-1-0123abcd", 25 * 3600)
        os.utime(path / "case.nii.gz")
        assert remove_stale(tmp_path) == []

    def test_of_another_machine_with_another_clock_is_kept(self, tmp_path, monkeypatch):
        self.leftover(tmp_path, f".partial-{'0' * 8}-1-0123abcd")
        now_s = time.time()
        monkeypatch.setattr(time, "time", lambda: now_s + 2 * 24 * 3600)
        assert remove_stale(tmp_path) == []
        assert len(names(tmp_path)) == 1

    @pytest.mark.parametrize(
        "name", ["case.nii.gz", ".partial", ".partial-1", "nnunet_lowmem-backup", ".partial-1-2-3.old"]
    )
    def test_anything_else_is_kept(self, tmp_path, name):
        self.leftover(tmp_path, name, 100 * 24 * 3600)
        assert remove_stale(tmp_path) == []

    def test_links_are_kept(self, tmp_path):
        target = tmp_path / "precious"
        target.mkdir()
        link = tmp_path / f".partial-{owned_folders._host()}-{ended_pid()}-0123abcd"
        link.symlink_to(target)
        assert remove_stale(tmp_path) == []
        assert target.exists()

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")
    def test_of_another_user_is_kept(self, tmp_path):
        path = self.leftover(tmp_path, f".partial-{owned_folders._host()}-{ended_pid()}-0123abcd")
        os.chown(path, 12345, 12345)
        assert remove_stale(tmp_path) == []

    def test_missing_folder_holds_nothing(self, tmp_path):
        assert remove_stale(tmp_path / "gone") == []

    def test_host_differs_between_containers(self, monkeypatch):
        here = owned_folders._host()
        monkeypatch.setattr(owned_folders.machine, "node", lambda: "another")
        assert owned_folders._host.__wrapped__() != here


OWNER_ON_ANOTHER_MACHINE = """
    import sys
    from pathlib import Path
    from nnunet_lowmem.system import owned_folders, platform
    owned_folders._host = lambda: "0" * 8
    if sys.argv[2] == "its beats":
        owned_folders.BEAT_S = 0.05
        platform.lock = lambda descriptor: None
    with owned_folders.temporary_folder(Path(sys.argv[1])) as folder:
        print(folder, flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("kept_by", ["its lock", "its beats"])
def test_of_a_living_process_of_another_machine_is_kept_however_old(kept_by, tmp_path, monkeypatch):
    """Simulated are the name of a machine, and for the beats a file system that gives no locks."""
    command = [sys.executable, "-c", textwrap.dedent(OWNER_ON_ANOTHER_MACHINE), str(tmp_path), kept_by]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        folder = Path(owner.stdout.readline().strip())
        make_old(folder)
        if kept_by == "its beats":
            monkeypatch.setattr(platform, "lock", lambda descriptor: None)
            wait_until(lambda: time.time() - (folder / SIGN_FILE).stat().st_mtime < 60)
        assert remove_stale(tmp_path) == []
        owner.kill()
        owner.wait()
    make_old(folder)
    assert remove_stale(tmp_path) == [folder]


def make_old(folder: Path) -> None:
    for path in (folder, *folder.iterdir()):
        os.utime(path, (time.time() - 25 * 3600,) * 2)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


class TestTemporaryFolder:
    def test_is_private_and_removed(self, tmp_path):
        with temporary_folder(tmp_path) as folder:
            assert folder.parent == tmp_path
            assert folder.name.startswith("nnunet_lowmem-")
            assert f"-{os.getpid()}-" in folder.name
            assert os.name == "nt" or folder.stat().st_mode & 0o777 == 0o700
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_bytes(NEW)
        assert names(tmp_path) == []

    def test_is_in_the_systems_folder_by_default(self, tmp_path, monkeypatch):
        monkeypatch.setattr(owned_folders.tempfile, "tempdir", str(tmp_path))
        with temporary_folder() as folder:
            assert folder.parent == tmp_path

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_is_removed_after_an_error(self, tmp_path, error):
        with pytest.raises(error), temporary_folder(tmp_path):
            raise error
        assert names(tmp_path) == []

    def test_leaves_the_error_of_the_block_alone(self, tmp_path):
        with pytest.raises(OSError, match="mine"), temporary_folder(tmp_path):
            raise OSError("mine")

    @pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
    def test_left_by_a_killed_process_is_removed_at_the_next_start(self, tmp_path):
        done = python(
            """
            import os, signal, sys
            from pathlib import Path
            from nnunet_lowmem.system.owned_folders import temporary_folder
            with temporary_folder(Path(sys.argv[1])) as folder:
                (folder / "spill").write_bytes(bytes(1000))
                os.kill(os.getpid(), signal.SIGKILL)
            """,
            tmp_path,
        )
        assert done.returncode == -signal.SIGKILL
        (left,) = names(tmp_path)
        with temporary_folder(tmp_path) as folder:
            assert names(tmp_path) == [folder.name] != [left]

    def test_of_others_that_run_at_the_same_time_is_kept(self, tmp_path):
        with temporary_folder(tmp_path) as first:
            with temporary_folder(tmp_path) as second:
                assert names(tmp_path) == sorted([first.name, second.name])
            assert first.exists()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_is_not_removed_by_a_forked_child(self, tmp_path):
        with temporary_folder(tmp_path) as folder:
            child = multiprocessing.get_context("fork").Process(target=remove_stale, args=(tmp_path,))
            child.start()
            child.join()
            assert folder.exists()

    def test_missing(self, tmp_path):
        told = r"--tmp_dir .*gone: .*No such file"
        with pytest.raises(UsageError, match=told), temporary_folder(tmp_path / "gone"):
            pass

    def test_that_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        told = r"--tmp_dir .*file: .*[Nn]ot a directory"
        with pytest.raises(UsageError, match=told), temporary_folder(tmp_path / "file"):
            pass

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
    def test_that_cannot_be_written_to(self, tmp_path, monkeypatch, number):
        def refuse(*args, **kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "mkdir", refuse)
        with pytest.raises(UsageError) as caught, temporary_folder(tmp_path):
            pass
        assert os.strerror(number) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert owned_folders._live == {}

    def test_of_a_system_without_one(self, monkeypatch):
        def none():
            raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

        monkeypatch.setattr(owned_folders.tempfile, "gettempdir", none)
        with pytest.raises(UsageError, match="No usable temporary directory"), temporary_folder():
            pass

    @pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
    def test_on_a_file_system_mounted_read_only(self, tmp_path):
        if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]).returncode:
            pytest.skip("may not mount a file system here")
        try:
            with pytest.raises(UsageError, match="Read-only file system"), temporary_folder(tmp_path):
                pass
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)


def test_server_that_does_not_answer_holds_nobody_up_and_counts_as_alive(tmp_path, monkeypatch):
    """As lockd behind a firewall: the call does not come back, for who makes a folder and for who looks at one."""
    answered = threading.Event()
    monkeypatch.setattr(platform, "lock", lambda descriptor: answered.wait(30))
    monkeypatch.setattr(owned_folders, "_PATIENCE_S", 0.05)
    left = tmp_path / f".partial-{owned_folders._host()}-{ended_pid()}-0123abcd"
    left.mkdir()
    (left / SIGN_FILE).touch()
    start_s = time.monotonic()
    try:
        with temporary_folder(tmp_path) as folder:
            assert folder.exists()
        assert names(tmp_path) == [left.name]
        assert time.monotonic() - start_s < 10
    finally:
        answered.set()


def test_beats_of_a_disk_that_takes_no_writes_are_the_folders_own(tmp_path, monkeypatch):
    monkeypatch.setattr(owned_folders, "BEAT_S", 0.01)
    with temporary_folder(tmp_path) as folder:
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        make_old(folder)
        wait_until(lambda: time.time() - folder.stat().st_mtime < 60)
