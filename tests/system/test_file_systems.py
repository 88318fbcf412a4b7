"""File systems that lack an operation, simulated for one folder: what can be is written, what cannot is said first."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from children import names
from factory import ModelSpec
from faulty_calls import NEW, OLD, is_new
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import assert_same_segmentation, make_predictor, predict_stock

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import CasesFailedError, WriteError
from nnunet_lowmem.system.atomic_files import atomic_output, try_output
from nnunet_lowmem.volumes import mapped

LACKING = {
    "nothing": ((), 0),
    "rename": (("replace", "rename"), errno.ENOSYS),
    "folders": (("mkdir",), errno.EPERM),
    "listing": (("listdir", "scandir"), errno.EACCES),
    "fsync": (("fsync",), errno.EINVAL),
    "modes": (("chmod", "utime"), errno.EPERM),
}


@pytest.fixture
def lacking(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Make a folder in which calls of `os` fail; temporary files have another one, where they do not."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def make(calls: tuple[str, ...], number: int) -> Path:
        folder = tmp_path / "out"
        folder.mkdir()

        def fail_there(name: str) -> Callable:
            original = getattr(os, name)

            def call(path, *args, **kwargs):
                place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
                if place.startswith(str(folder)):
                    raise OSError(number, os.strerror(number), place)
                return original(path, *args, **kwargs)

            return call

        for name in calls:
            monkeypatch.setattr(os, name, fail_there(name))
        return folder

    return make


def contents(folder: Path) -> dict[str, bytes]:
    with os.scandir(os.open(folder, os.O_RDONLY)) as entries:  # which knows no path that could be refused
        return {entry.name: (folder / entry.name).read_bytes() for entry in entries}


@pytest.mark.skipif(os.name == "nt", reason="asks /proc for the place of open files")
@pytest.mark.parametrize("what", LACKING)
@pytest.mark.parametrize("older", [None, OLD], ids=["new_file", "older_file"])
def test_output_is_published_all_the_same(what, older, lacking, tmp_path, monkeypatch):
    folder = lacking(*LACKING[what])
    if older:
        (folder / "case.nii.gz").write_bytes(older)
    try_output(folder)
    with atomic_output(folder / "case.nii.gz", is_new) as partial:
        partial.write_bytes(NEW)
    monkeypatch.undo()
    assert contents(folder) == {"case.nii.gz": NEW}
    assert names(tmp_path / "tmp") == []


@pytest.mark.skipif(os.name == "nt", reason="asks /proc for the place of open files")
@pytest.mark.parametrize(
    ("calls", "number"), [(("replace",), errno.EIO), (("fsync",), errno.EIO), (("mkdir",), errno.ENOSPC)]
)
def test_what_makes_outputs_unsafe_is_refused_with_nothing_left(calls, number, lacking, tmp_path):
    folder = lacking(calls, number)
    with pytest.raises(WriteError, match=f"nothing was computed: .*{os.strerror(number)}"):
        try_output(folder)
    assert (names(folder), names(tmp_path / "tmp")) == ([], [])


def test_write_that_fails_without_the_name_of_a_file_is_refused_by_it(tmp_path, monkeypatch):
    """As the system tells it of an open file on a server that has gone."""

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(WriteError, match=f"{tmp_path}, nothing was computed: .*{os.strerror(errno.EIO)}"):
        try_output(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="asks /proc for the place of open files")
def test_file_that_cannot_be_removed_is_warned_of(lacking, caplog):
    folder = lacking(("unlink", "rmdir"), errno.EPERM)
    try_output(folder)
    assert "what is written there cannot be removed (Operation not permitted)" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="asks /proc for the place of open files")
def test_case_is_refused_before_it_is_computed_and_costs_only_itself(lacking, images, models, tmp_path):
    case, model = images("small"), models(ModelSpec(patch_size=(10, 12, 12)), images("small"))
    folder = lacking(("replace",), errno.EIO)
    (folder / "third.nii.gz").write_bytes(OLD)
    planned = []
    predictor = make_predictor(LowMemPredictor, model, on_plan=planned.append)
    (tmp_path / "good").mkdir()
    outputs = [str(tmp_path / "good" / "first"), str(folder / "second"), str(folder / "third")]
    with pytest.raises(CasesFailedError, match=r"2 of 3 cases failed: .*outputs cannot be written to .*computed"):
        predictor.predict_from_files([case] * 3, outputs)
    assert (tmp_path / "good" / "first.nii.gz").exists()
    assert len(planned) == 1
    assert contents(folder) == {"third.nii.gz": OLD}


@pytest.mark.skipif(os.name == "nt", reason="asks /proc for the place of open files")
def test_case_whose_file_may_be_written_to_where_no_other_can_be_made(lacking, images, models, tmp_path):
    """The trial cannot tell: the case is computed and its file becomes a verified copy."""
    case, model = images("small"), models(ModelSpec(patch_size=(10, 12, 12)), images("small"))
    predict_stock(make_predictor(nnUNetPredictor, model), [case], [str(tmp_path / "stock")])
    folder = lacking(("mkdir", "replace"), errno.EACCES)
    (folder / "case.nii.gz").write_bytes(OLD)
    make_predictor(LowMemPredictor, model).predict_from_files([case], [str(folder / "case")])
    assert_same_segmentation(tmp_path / "stock.nii.gz", folder / "case.nii.gz")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="has no such call")
def test_room_for_spilled_arrays_is_written_where_it_cannot_be_asked_for(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    array = mapped.spilled_array((3, 2**20), mapped.np.dtype(mapped.np.uint8), tmp_path)
    assert array.sum() == 0
    array[:] = 7
    assert array.sum() == 7 * 3 * 2**20
    assert mapped.why_unspillable(tmp_path) == ""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="has no such file")
def test_of_a_spilled_array_that_is_touched_here_and_there_only_that_is_resident(tmp_path):
    array = mapped.spilled_array((2**5, 2**23), mapped.np.dtype(mapped.np.uint8), tmp_path)
    mapped.touched_page_by_page(array)
    for plane in array:
        plane[:] = 0
        mapped.give_back(array)
    array[:, : 2**19] += 1
    with open("/proc/self/smaps") as file:
        sizes = [
            dict(re.findall(r"^(Size|Rss): +(\d+) kB", part, re.M)) for part in re.split(r"(?m)^(?=\w+-)", file.read())
        ]
    assert any(int(size["Size"]) == 2**18 and int(size["Rss"]) < 2**15 for size in sizes if size)
    mapped.give_back(array)
    assert array.sum() == 2**24


def test_folder_that_maps_no_files_is_no_place_to_spill(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mapped.np, "memmap", refuse)
    assert mapped.why_unspillable(tmp_path) == f"takes no mapped files ({os.strerror(errno.ENODEV)})"
    assert mapped.why_unspillable(tmp_path / "gone") == ""
