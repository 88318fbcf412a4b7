from __future__ import annotations

import errno
import gc
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK
from batchgenerators.utilities.file_and_folder_operations import subfiles
from children import names, python
from faulty_calls import NEW, OLD, Fault, is_new, write
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from oracle import INSTALLED, own_lines

from nnunet_lowmem.errors import WriteError
from nnunet_lowmem.system import atomic_files
from nnunet_lowmem.system.atomic_files import atomic_output, require_free_bytes
from nnunet_lowmem.system.owned_folders import remove_stale
from nnunet_lowmem.volumes.stored_parts import Encoding, Part
from nnunet_lowmem.volumes.verifying import DamagedFileError, verify_label_file

pytestmark = pytest.mark.timeout(60)

SHAPE = (40, 48, 56)
COUNT = int(np.prod(SHAPE))
ITK_ENDINGS = [".nii.gz", ".nrrd", ".mha", ".gipl"]


def labels(shape=SHAPE, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


PROPERTIES = {
    "sitk_stuff": {"spacing": (1.0, 2.0, 3.0), "origin": (0.0, 0.0, 0.0), "direction": np.eye(3).ravel().tolist()},
    "nibabel_stuff": {"original_affine": np.eye(4)},
    "spacing": [3.0, 2.0, 1.0],
}
PAGE_BYTES = 4096


def fill(folder: Path, pages: int) -> None:
    """Leave so many pages of a small file system."""
    with (folder / "ballast").open("wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - pages * PAGE_BYTES))
    assert shutil.disk_usage(folder).free == pages * PAGE_BYTES


def write_itk(array: np.ndarray, path: Path, *, compress=True) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path), compress)


def fail_after_writing(path: Path, error: BaseException, content: bytes = NEW) -> None:
    path.write_bytes(content)
    raise error


def state(final: Path) -> str:
    if not final.exists():
        return "nothing"
    return {OLD: "old", NEW: "new"}.get(final.read_bytes(), "broken")


@pytest.fixture
def final(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "case.nii.gz"


class TestAtomicOutput:
    def test_appears_under_its_name(self, final):
        with atomic_output(final, is_new) as partial:
            write(partial)
            assert not final.exists()
        assert state(final) == "new"
        assert names(final.parent) == ["case.nii.gz"]

    def test_replaces_an_older_file(self, final):
        final.write_bytes(OLD)
        with atomic_output(final, is_new) as partial:
            write(partial)
            assert state(final) == "old"
        assert state(final) == "new"

    def test_unfinished_file_keeps_its_name_and_is_not_listed_as_a_case(self, final):
        with atomic_output(final) as partial:
            write(partial)
            assert partial.name == final.name
            assert partial.stat().st_dev == final.parent.stat().st_dev
            assert subfiles(str(final.parent), suffix=".nii.gz") == []

    def test_has_the_permissions_of_an_ordinary_file(self, final):
        (final.parent / "other").write_bytes(b"")
        with atomic_output(final) as partial:
            partial.write_bytes(NEW)
        assert final.stat().st_mode == (final.parent / "other").stat().st_mode

    def test_two_outputs_in_one_folder_at_once(self, final):
        other = final.with_name("other.nii.gz")
        with atomic_output(final, is_new) as first, atomic_output(other, is_new) as second:
            write(first)
            write(second)
        assert (state(final), state(other)) == ("new", "new")

    def test_sidecars_come_along(self, final):
        tif = final.with_name("case.tif")
        with atomic_output(tif) as partial:
            Tiff3DIO().write_seg(labels(), str(partial), {"spacing": [1.0, 1.0, 1.0]})
        assert names(tif.parent) == ["case.json", "case.tif"]

    @pytest.mark.parametrize("old", [None, OLD])
    @pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(143), GeneratorExit()])
    def test_error_in_the_block_leaves_what_was(self, final, old, error):
        if old:
            final.write_bytes(old)
        with pytest.raises(type(error)), atomic_output(final) as partial:
            fail_after_writing(partial, error)
        assert state(final) == ("old" if old else "nothing")
        assert names(final.parent) == ([final.name] if old else [])

    def test_failed_verification_leaves_what_was(self, final):
        final.write_bytes(OLD)
        told = r"case\.nii\.gz: could not be written whole: not what was written"
        with pytest.raises(WriteError, match=told), atomic_output(final, is_new) as partial:
            write(partial, NEW[:-1])
        assert state(final) == "old"
        assert names(final.parent) == [final.name]

    def test_writer_that_writes_nothing(self, final):
        with pytest.raises(WriteError, match="the writer left no such file"), atomic_output(final):
            pass
        assert names(final.parent) == []

    def test_missing_folder_is_named(self, tmp_path):
        with pytest.raises(WriteError, match=r"gone.*No such file"), atomic_output(tmp_path / "gone" / "a.nii.gz"):
            raise AssertionError("must not be entered")

    def test_folder_in_the_way(self, final):
        final.mkdir()
        with pytest.raises(WriteError, match="directory"), atomic_output(final) as partial:
            write(partial)
        assert names(final.parent) == [final.name]

    @pytest.mark.parametrize("number", [errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG])
    def test_full_disk_tells_bytes_written_needed_and_free(self, final, number):
        with pytest.raises(WriteError) as caught, atomic_output(final, needed_bytes=2**30) as partial:
            fail_after_writing(partial, OSError(number, os.strerror(number)), bytes(2**28))
        assert caught.value.errno == number
        told = str(caught.value)
        assert told.startswith(
            f"{final}: could not be written whole: {os.strerror(number)}; 0.25 GiB of 1.00 GiB written"
        )
        assert "GiB free in" in told

    def test_other_system_errors_of_the_block_keep_their_meaning(self, final):
        with pytest.raises(FileNotFoundError), atomic_output(final):
            (final.parent / "no such input").read_bytes()

    def test_short_write_that_numpy_noticed(self, final, monkeypatch):
        monkeypatch.setattr(atomic_files, "_free_bytes", lambda folder: 4096)
        with pytest.raises(WriteError, match="requested and"), atomic_output(final):
            raise OSError("1000 requested and 996 written")

    def test_is_refused_before_it_is_tried_where_the_disk_is_too_small(self, final):
        told = r"needs 1048576\.00 GiB, but .* has only"
        with pytest.raises(WriteError, match=told), atomic_output(final, needed_bytes=2**50):
            raise AssertionError("must not be entered")

    def test_require_free_bytes_passes_where_there_is_room(self, final):
        require_free_bytes(final, 1)
        require_free_bytes(final.parent, 1)

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
    def test_file_systems_that_cannot_flush_folders_are_accepted(self, final, monkeypatch, number):
        flush = os.fsync

        def only_files(descriptor):
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(number, os.strerror(number))
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", only_files)
        with atomic_output(final, is_new) as partial:
            write(partial)
        assert state(final) == "new"

    def test_file_and_folder_are_flushed_in_this_order(self, final, monkeypatch):
        calls = []
        for name in ("fsync", "replace"):
            original = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (calls.append(name), original(*a)))
        with atomic_output(final) as partial:
            write(partial)
        assert calls == ["fsync", "replace", "fsync"]


def half_of_a_write(name, args, original):
    if name == "write":
        original(args[0], args[1][: len(args[1]) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raises(error):
    def act(name, args, original):
        raise error

    return act


ACTS = {
    "disk full": raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "short write": half_of_a_write,
    "input/output error": raises(OSError(errno.EIO, os.strerror(errno.EIO))),
    "Ctrl-C": raises(KeyboardInterrupt()),
}
# mkdir, and open of the sign of life; open, write, write, write, close; open, fsync, close; then the rename, and open,
# fsync, close of the folder; what comes later removes the private folder
SIGN, RENAME, LAST = 2, 11, 14


def write_with_fault(final: Path, fault: Fault) -> str:
    """Write `final`; the outcome in a word."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            fault.install(patch.setattr)
            with atomic_output(final, is_new) as partial:
                write(partial)
    except (OSError, KeyboardInterrupt) as error:
        return type(error).__name__
    return "done"


class TestFaultAtEachCall:
    @pytest.fixture(autouse=True)
    def _no_garbage_collection(self):
        """What other tests have left must not close its files while calls are counted."""
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    @pytest.mark.parametrize("old", [OLD, pytest.param(None, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("kind", ACTS)
    def test_leaves_nothing_the_old_or_the_new_file(self, final, kind, old):
        before = "old" if old else "nothing"
        for at in range(1, 100):
            final.unlink(missing_ok=True)
            if old:
                final.write_bytes(old)
            fault = Fault(at, ACTS[kind])
            outcome = write_with_fault(final, fault)
            is_left_out = at == SIGN and kind != "Ctrl-C"
            assert state(final) == (before if at <= RENAME and not is_left_out else "new")
            assert at > LAST or outcome == ("KeyboardInterrupt" if kind == "Ctrl-C" else outcome_of(kind, at))
            if at > LAST:
                remove_stale(final.parent)
            assert names(final.parent) == ([] if state(final) == "nothing" else [final.name])
            if fault.count < at:
                assert outcome == "done"
                break
        assert at > LAST

    @pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
    def test_sigkill_leaves_nothing_the_old_or_the_new_file(self, final):
        for at in range(1, 100):
            final.write_bytes(OLD)
            done = python(KILLED_WRITER, at, final)
            assert state(final) == ("old" if at <= RENAME else "new")
            left = [name for name in names(final.parent) if name != final.name]
            assert at > LAST or len(left) == (at > 1)
            assert [path.name for path in remove_stale(final.parent)] == left
            assert names(final.parent) == [final.name]
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
        assert at > LAST


def outcome_of(kind: str, at: int) -> str:
    if at == SIGN:
        return "done"
    # an input/output error while data is written is the business of the writer
    return "OSError" if kind == "input/output error" and SIGN < at < 8 else "WriteError"


KILLED_WRITER = """
    import os, signal, sys
    from pathlib import Path
    from faulty_calls import Fault, is_new, write
    from nnunet_lowmem.system.atomic_files import atomic_output
    Fault(int(sys.argv[1]), lambda *_: os.kill(os.getpid(), signal.SIGKILL)).install()
    with atomic_output(Path(sys.argv[2]), is_new) as partial:
        write(partial)
"""


class TestFullDisk:
    """Real writers of nnU-Net on a disk that is really full."""

    @pytest.fixture
    def small_disk(self, tmp_path):
        """Mount a file system of the given size, if that is allowed here."""
        mounted = []

        def mount(size_bytes: int) -> Path:
            folder = tmp_path / f"disk_{size_bytes}"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
            if os.name != "posix" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("may not mount a file system here")
            mounted.append(folder)
            return folder

        yield mount
        for folder in mounted:
            subprocess.run(["umount", str(folder)], check=True)

    @pytest.mark.parametrize("ending", ITK_ENDINGS)
    def test_of_rising_size_until_it_fits(self, small_disk, ending):
        array = labels()
        outcomes = []
        for size_kib in range(16, 400, 24):
            folder = small_disk(size_kib * 1024)
            final = folder / f"case{ending}"
            try:
                with atomic_output(final, lambda path: verify_label_file(path, SHAPE, np.uint8)) as partial:
                    write_itk(array, partial)
                outcomes.append("whole")
                np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(final))), array)
            except WriteError:
                outcomes.append("refused")
                assert names(folder) == []
        assert outcomes == sorted(outcomes)
        assert set(outcomes) == {"refused", "whole"}

    # imageio closes its file once more when it is forgotten
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.parametrize("old", [None, OLD])
    @pytest.mark.parametrize(
        ("writer", "ending"),
        [
            *((SimpleITKIO, ending) for ending in (".nii", ".nii.gz", ".gipl", ".nrrd", ".mha", ".mhd", ".gipl.gz")),
            (NibabelIO, ".nii"),
            (NibabelIO, ".nii.gz"),
            (Tiff3DIO, ".tif"),
            (NaturalImage2DIO, ".png"),
            (NaturalImage2DIO, ".bmp"),
            (NaturalImage2DIO, ".tif"),
        ],
    )
    def test_that_fills_while_a_label_map_is_written(self, small_disk, tmp_path, writer, ending, old):
        """Until the writer begins there is room enough; then others take all but a part of what it needs."""
        from nnunet_lowmem.nnunet.label_writing import (
            write_segmentation,
        )  # torch, which the children of others need not import

        array = labels((1, 250, 200) if writer is NaturalImage2DIO else SHAPE)
        folder = small_disk(2**20)
        for place in (tmp_path, folder):
            write_segmentation(
                array, PROPERTIES, str(place / f"whole{ending}"), SimpleNamespace(image_reader_writer_class=writer)
            )
        needed = sum(-(-path.stat().st_size // PAGE_BYTES) for path in tmp_path.glob("whole.*"))
        final = folder / f"case{ending}"
        for pages in sorted({0, 1, needed // 3, needed // 2, needed - 1}):
            if old:
                final.write_bytes(old)
            before = names(folder)
            plans = SimpleNamespace(image_reader_writer_class=lambda pages=pages: (fill(folder, pages), writer())[1])
            with pytest.raises(WriteError, match=re.escape(f"{final}: could not be written whole")):
                write_segmentation(array, PROPERTIES, str(final), plans)
            (folder / "ballast").unlink()
            assert names(folder) == before
            assert state(final) == ("old" if old else "nothing")
        write_segmentation(array, PROPERTIES, str(final), SimpleNamespace(image_reader_writer_class=writer))
        verify_label_file(final, array.shape, np.uint8)

    @pytest.mark.parametrize("ending", ITK_ENDINGS)
    @pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
    def test_limit_on_file_size(self, final, ending):
        final = final.with_name(f"case{ending}")
        done = python(LIMITED_WRITER, final)
        assert own_lines(done.stdout)[0].startswith(f"WriteError {final}: could not be written whole"), done
        assert names(final.parent) == []

    @pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
    def test_python_writer_meets_the_limit_with_an_error(self, final):
        final = final.with_name("case.npz")
        done = python(LIMITED_WRITER, final)
        assert "File too large" in done.stdout or "requested and" in done.stdout
        assert names(final.parent) == []


LIMITED_WRITER = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    from test_atomic_files import SHAPE, atomic_output, labels, verify_label_file, write_itk
    final = Path(sys.argv[1])
    array = labels()
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    try:
        with atomic_output(final, lambda path: verify_label_file(path, SHAPE, np.uint8)) as partial:
            np.savez(partial, array) if final.suffix == ".npz" else write_itk(array, partial)
    except OSError as error:
        print(type(error).__name__, error)
"""


def verify_gzip(path: Path, needed_bytes: int = COUNT) -> None:
    Part(path, 0, needed_bytes, Encoding.GZIP).verify()


class TestVerifyGzip:
    @pytest.fixture
    def path(self, tmp_path) -> Path:
        path = tmp_path / "a.gz"
        path.write_bytes(gzip.compress(labels().tobytes()))
        return path

    def test_whole_file_passes(self, path):
        verify_gzip(path)

    def test_reads_all_members(self, path):
        path.write_bytes(path.read_bytes() * 3)
        verify_gzip(path, 3 * COUNT)
        with pytest.raises(DamagedFileError, match=rf"a\.gz ends after {3 * COUNT:,} of"):
            verify_gzip(path, 3 * COUNT + 1)

    @pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
    def test_cut(self, path, share):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DamagedFileError, match=r"a\.gz"):
            verify_gzip(path)

    @pytest.mark.parametrize("missing", [1, 4, 8])
    def test_cut_within_checksum_and_length(self, path, missing):
        path.write_bytes(path.read_bytes()[:-missing])
        with pytest.raises(DamagedFileError):
            verify_gzip(path)

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_one_bit_flipped(self, path, share):
        content = bytearray(path.read_bytes())
        content[min(int(len(content) * share), len(content) - 1)] ^= 4
        path.write_bytes(content)
        with pytest.raises(DamagedFileError):
            verify_gzip(path)

    @pytest.mark.parametrize("content", [b"", gzip.compress(b"", mtime=0), b"no gzip at all"])
    def test_empty_or_something_else(self, path, content):
        path.write_bytes(content)
        with pytest.raises(DamagedFileError):
            verify_gzip(path)

    @pytest.mark.parametrize("garbage", [b"garbage", b"\x1f\x8bgarbage", bytes(512), b"\x1f"])
    def test_what_follows_is_nobodys(self, path, garbage):
        path.write_bytes(path.read_bytes() + garbage)
        verify_gzip(path)

    def test_missing(self, path):
        with pytest.raises(DamagedFileError, match=r"in b\.gz, which is not there"):
            verify_gzip(path.with_name("b.gz"))

    @pytest.mark.parametrize("verify", ["gzip", "mha"])
    def test_memory_is_bounded_however_much_the_file_unfolds_to(self, tmp_path, verify):
        shape = (256, 512, 512)
        path = tmp_path / f"zeros.{'nii.gz' if verify == 'gzip' else 'mha'}"
        write_itk(np.zeros(shape, np.uint8), path)
        assert path.stat().st_size < 2**20
        tracemalloc.start()
        try:
            verify_label_file(path, shape, np.uint8)
            assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        finally:
            tracemalloc.stop()


class TestVerifyLabelFile:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    @pytest.mark.parametrize("compress", [True, False])
    @pytest.mark.parametrize("ending", [*ITK_ENDINGS, ".nii"])
    def test_whole_file_passes(self, tmp_path, ending, dtype, compress):
        path = tmp_path / f"a{ending}"
        write_itk(labels(dtype=dtype), path, compress=compress)
        verify_label_file(path, SHAPE, dtype)

    @pytest.mark.parametrize("compress", [True, False])
    @pytest.mark.parametrize("ending", [*ITK_ENDINGS, ".nii"])
    @pytest.mark.parametrize("share", [0.0, 0.0005, 0.1, 0.5, 0.99])
    def test_cut_file_is_found(self, tmp_path, ending, compress, share):
        path = tmp_path / f"a{ending}"
        write_itk(labels(), path, compress=compress)
        os.truncate(path, int(path.stat().st_size * share))
        with pytest.raises(DamagedFileError, match=rf"a\{ending}"):
            verify_label_file(path, SHAPE, np.uint8)

    @pytest.mark.parametrize("ending", [*ITK_ENDINGS, ".nii"])
    def test_last_byte_missing_is_found(self, tmp_path, ending):
        path = tmp_path / f"a{ending}"
        write_itk(labels(), path)
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(DamagedFileError):
            verify_label_file(path, SHAPE, np.uint8)

    @pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
    def test_flipped_bit_is_found_where_there_is_a_checksum(self, tmp_path, ending):
        path = tmp_path / f"a{ending}"
        write_itk(labels(), path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(DamagedFileError):
            verify_label_file(path, SHAPE, np.uint8)

    @pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
    def test_wrong_shape_or_type_is_named(self, tmp_path, ending):
        path = tmp_path / f"a{ending}"
        write_itk(labels(), path)
        with pytest.raises(DamagedFileError, match=r"shape \(40, 48, 56\), not \(41, 48, 56\)"):
            verify_label_file(path, (41, 48, 56), np.uint8)
        with pytest.raises(DamagedFileError, match="type uint8, not uint16"):
            verify_label_file(path, SHAPE, np.uint16)

    @pytest.mark.parametrize("ending", [*ITK_ENDINGS, ".nii"])
    def test_fewer_voxels_than_expected_are_found(self, tmp_path, ending):
        path = tmp_path / f"a{ending}"
        write_itk(labels(), path)
        with pytest.raises(DamagedFileError):
            verify_label_file(path, (400, 48, 56), np.uint8)

    @pytest.mark.parametrize("ending", [*ITK_ENDINGS, ".nii", ".png", ".tif"])
    def test_empty_file_is_found(self, tmp_path, ending):
        path = tmp_path / f"a{ending}"
        path.touch()
        with pytest.raises(DamagedFileError, match="is empty"):
            verify_label_file(path, SHAPE, np.uint8)

    @pytest.mark.parametrize("ending", [*ITK_ENDINGS, ".nii"])
    def test_text_is_found(self, tmp_path, ending):
        path = tmp_path / f"a{ending}"
        path.write_text("not an image\n" * 10)
        with pytest.raises(DamagedFileError):
            verify_label_file(path, SHAPE, np.uint8)

    def test_digits_are_left_to_the_library(self, tmp_path):
        path = tmp_path / "a.nrrd"
        path.write_text("NRRD0004\ntype: uchar\ndimension: 2\nsizes: 3 1\nencoding: ascii\n\n1 2 3\n")
        verify_label_file(path, (3,), np.uint8)

    def test_nifti_of_another_byte_order_passes(self, tmp_path):
        path = tmp_path / "a.nii.gz"
        header = nibabel.Nifti1Header(endianness=">")
        header.set_data_dtype(">u2")
        nibabel.save(nibabel.Nifti1Image(labels(dtype=">u2"), np.eye(4), header), path)
        verify_label_file(path, SHAPE, np.uint16)

    @pytest.mark.parametrize("top", [1, 254, 255, 300])
    @pytest.mark.parametrize("writer", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
    def test_what_the_writers_of_nnunet_write_passes(self, tmp_path, writer, top):
        array = labels(dtype=np.uint16) % 2
        array[0, 0, 0] = top
        path = tmp_path / "a.nii.gz"
        # axes permuted, so that reorienting changes the shape
        affine = np.array([[0, 0, 1, 0], [2, 0, 0, 0], [0, -3, 0, 0], [0, 0, 0, 1]], float)
        properties = {
            "sitk_stuff": {"spacing": (1, 2, 3), "origin": (0, 0, 0), "direction": np.eye(3).ravel()},
            "nibabel_stuff": {"original_affine": affine, "reoriented_affine": affine},
        }
        if writer == "NibabelIOWithReorient":
            ras = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), affine))
            properties["nibabel_stuff"]["reoriented_affine"] = ras.affine
        writers = {c.__name__: c for c in (SimpleITKIO, NibabelIO, NibabelIOWithReorient)}
        writers[writer]().write_seg(array, str(path), properties)
        # nnU-Net 2.5 wraps what does not fit
        verify_label_file(path, SHAPE, np.uint8 if top < 255 or INSTALLED < (2, 6) else np.uint16)

    @pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
    def test_two_dimensions_pass(self, tmp_path, ending):
        path = tmp_path / f"a{ending}"
        properties = {"sitk_stuff": {"spacing": (1, 2), "origin": (0, 0), "direction": np.eye(2).ravel()}}
        SimpleITKIO().write_seg(labels((1, 40, 50)), str(path), properties)
        verify_label_file(path, (1, 40, 50), np.uint8)

    @pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
    def test_picture_that_is_cut_is_found(self, tmp_path, ending, share):
        path = tmp_path / f"a{ending}"
        NaturalImage2DIO().write_seg(labels((1, 40, 50)), str(path), {})
        os.truncate(path, int(path.stat().st_size * share))
        with pytest.raises(DamagedFileError, match=rf"a\{ending}"):
            verify_label_file(path, (1, 40, 50), np.uint8)

    def test_pictures_pass(self, tmp_path):
        NaturalImage2DIO().write_seg(labels((1, 40, 50)), str(tmp_path / "a.png"), {})
        verify_label_file(tmp_path / "a.png", (1, 40, 50), np.uint8)
