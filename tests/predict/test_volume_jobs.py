"""Which volumes a call is about, where their label maps go, and what these say of themselves."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from functools import partialmethod
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
import zarr
from factory import ModelSpec
from images import CT, read
from numpy.typing import NDArray
from ome_zarr_models.v04.image_label import ImageLabel as ImageLabel04
from ome_zarr_models.v05.image_label import ImageLabel as ImageLabel05
from oracle import make_predictor
from volume_files import WRITERS, ome_zarr, read_labels

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import CasesFailedError, UsageError, WriteError
from nnunet_lowmem.nnunet import label_writing, predictors
from nnunet_lowmem.nnunet.read_by import PlansReadBy
from nnunet_lowmem.preprocessing.volume_io import VolumeIO
from nnunet_lowmem.volumes.verifying import verify_whole

SPACING = (3.0, 3.0, 3.0)
VOXELS = SimpleITK.GetArrayFromImage(read(CT)[30:62, 25:57, 40:72])


@pytest.fixture(scope="module")
def model(images, models) -> str:
    return models(ModelSpec(normalisation=("CTNormalization",), patch_size=(24, 24, 24), spacing=SPACING), images("ct"))


@pytest.fixture(scope="module")
def labels(model, tmp_path_factory) -> NDArray[Any]:
    folder = tmp_path_factory.mktemp("labels")
    nibabel.save(nibabel.Nifti1Image(VOXELS.T, np.diag([*SPACING, 1.0])), folder / "case_0000.nii.gz")
    make_predictor(LowMemPredictor, model).predict_from_files(str(folder), str(folder / "out"))
    return read_labels(folder / "out" / "case.nii.gz")


def predict(model: str, source: Any, target: Any, overwrite: bool = True, **options: Any) -> LowMemPredictor:
    predictor = make_predictor(LowMemPredictor, model, **options)
    predictor.predict_from_files(source, None if target is None else str(target), overwrite=overwrite)
    return predictor


def store(folder: Path, name: str = "a.ome.zarr", version: str = "0.5", **options: Any) -> Path:
    return ome_zarr(folder / name, VOXELS, version, spacing=SPACING, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("lowmem_run"))


def test_each_volume_of_a_folder_is_a_case_and_leaves_as_it_came(model, labels, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, write in WRITERS.items():
        write(source / name, VOXELS, SPACING)
    (source / "notes.txt").write_text("none of them")
    predict(model, str(source), target)
    assert names(target) == sorted([*WRITERS, "dataset.json", "plans.json", "predict_from_raw_data_args.json"])
    for name in WRITERS:
        assert np.array_equal(read_labels(target / name), labels)
    with pytest.raises(UsageError, match=r"y\.h5 is the name of one file, and there are 6 cases: give a folder"):
        predict(model, str(source), tmp_path / "y.h5")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_what_a_label_image_says_of_itself(version, model, labels, tmp_path):
    source = store(tmp_path, version=version)
    predict(model, source, tmp_path / "y.ome.zarr")
    group = zarr.open_group(str(tmp_path / "y.ome.zarr"), mode="r")
    is_4 = version == "0.4"
    attributes = (ImageLabel04 if is_4 else ImageLabel05).from_zarr(group).attributes
    told = attributes if is_4 else attributes.ome
    (image,) = told.multiscales
    assert [(axis.name, axis.type, axis.unit) for axis in image.axes] == [
        (axis, "space", "micrometer") for axis in "zyx"
    ]
    for number, dataset in enumerate(image.datasets):
        scale, translation = dataset.coordinateTransformations
        assert (dataset.path, scale.scale) == (str(number), [3000.0 * 2**number] * 3)
        assert translation.translation == [10000.0, -4000.0, 3500.0]
        assert np.array_equal(group[str(number)], labels[:: 2**number, :: 2**number, :: 2**number])
    assert group["0"].dtype == np.uint8
    raw = dict(group.attrs) if is_4 else group.attrs["ome"]
    classes = {entry["label-value"]: entry["class"] for entry in raw["image-label"]["properties"]}
    assert classes == {0: "background", 1: "class_1", 2: "class_2", 3: "class_3"}
    made = group.attrs["nnunet_lowmem"]
    told = made["settings"]
    assert (made["case"], told["folds"], told["tile_step_size"]) == ("a", 1, 0.5)
    assert names(tmp_path) == ["a.ome.zarr", "y.ome.zarr"]


def test_other_formats_keep_the_geometry(model, labels, tmp_path):
    source = store(tmp_path)
    for name in ("y.nii.gz", "y.tif", "y.h5", "y.mha"):
        predict(model, str(source), tmp_path / name)
        assert np.array_equal(read_labels(tmp_path / name), labels)
    image = SimpleITK.ReadImage(str(tmp_path / "y.mha"))
    assert (image.GetSpacing(), image.GetOrigin()) == (SPACING, (3.5, -4.0, 10.0))
    with tifffile.TiffFile(tmp_path / "y.tif") as file:
        assert file.series[0].axes == "ZYX"
        assert 'PhysicalSizeX="3000.0"' in file.ome_metadata
        assert "class_2" in file.ome_metadata
    with h5py.File(tmp_path / "y.h5") as file:
        assert file["labels"].attrs["element_size_um"].tolist() == [3000.0] * 3
        assert json.loads(file["labels"].attrs["labels"])["1"] == "class_1"


def test_from_python_by_paths_and_by_what_is_open(model, labels, tmp_path):
    path = store(tmp_path)
    group = zarr.open_group(str(path), mode="r")
    for number, source in enumerate((path, [[group]])):
        target = tmp_path / f"{number}.ome.zarr"
        predictor = make_predictor(LowMemPredictor, model)
        predictor.predict_from_files(source, [str(target)] if number else str(target))
        assert np.array_equal(read_labels(target), labels)
    (found,) = make_predictor(LowMemPredictor, model).predict_from_files([[str(path)]], None)
    assert np.array_equal(found, labels)
    inside = predict(model, zarr.open_array(str(path / "0"), mode="r"), tmp_path / "in.tif", spacing=SPACING)
    assert np.array_equal(read_labels(tmp_path / "in.tif"), labels)
    assert [case.case for case in inside.run_report.done] == ["a_0"]
    with pytest.raises(UsageError, match="lies in no store that has a path: give its voxels as an array"):
        predict(model, zarr.zeros((4, 5, 6)), tmp_path / "out")


def test_levels_spacing_and_units(model, tmp_path):
    source = store(tmp_path, levels=2)
    predict(model, source, tmp_path / "coarse.ome.zarr", level=1)
    assert read_labels(tmp_path / "coarse.ome.zarr").shape == VOXELS[::2, ::2, ::2].shape
    micro = ome_zarr(tmp_path / "micro.ome.zarr", VOXELS, "0.4", spacing=(0.003, 0.003, 0.003))
    words = r"its voxels are 0.003 x 0.003 x 0.003 mm large, the model's 3 x 3 x 3: .*--spacing Z Y X"
    with pytest.raises(CasesFailedError, match=words):
        predict(model, micro, tmp_path / "no.ome.zarr")
    predict(model, micro, tmp_path / "yes.nii.gz", spacing="3 3 3")
    assert SimpleITK.ReadImage(str(tmp_path / "yes.nii.gz")).GetSpacing() == SPACING
    assert names(tmp_path) == ["a.ome.zarr", "coarse.ome.zarr", "micro.ome.zarr", "yes.nii.gz"]


def test_boxes_and_masks_of_stores(model, labels, tmp_path):
    source, box = store(tmp_path), (slice(4, 30), slice(0, 29), slice(7, 32))
    predict(model, source, tmp_path / "box.ome.zarr", bbox="4:30,0:29,7:")
    assert np.array_equal(read_labels(tmp_path / "box.ome.zarr"), labels[box])
    image = zarr.open_group(str(tmp_path / "box.ome.zarr")).attrs["ome"]["multiscales"][0]
    shift = image["datasets"][0]["coordinateTransformations"][1]["translation"]
    assert shift == [10000.0 + 4 * 3000, -4000.0, 3500.0 + 7 * 3000]
    inside = np.zeros(VOXELS.shape, np.uint8)
    inside[5:20, 6:28, 9:30] = 1
    mask = ome_zarr(tmp_path / "mask.ome.zarr", inside, "0.4", spacing=SPACING)
    read = tmp_path / "in.h5"
    with h5py.File(read, "w") as file:
        file["raw"], file["other"] = VOXELS, VOXELS
        file["raw"].attrs["element_size_um"] = [3000.0] * 3
    predict(model, read, tmp_path / "roi.h5", roi=str(mask), key="raw")  # which is none of the mask's
    assert np.array_equal(read_labels(tmp_path / "roi.h5"), np.where(inside, labels, 0))


def test_a_store_that_is_there_is_refused_and_continued(model, labels, tmp_path):
    source, target = store(tmp_path), tmp_path / "y.ome.zarr"
    predict(model, source, target)
    with pytest.raises(
        CasesFailedError, match=r"y\.ome\.zarr is there: remove it, .* go on with --continue_prediction"
    ):
        predict(model, source, target)
    again = predict(model, source, target, overwrite=False)
    assert [(case.case, case.reason) for case in again.run_report.skipped] == [("a", "done before")]
    next(target.joinpath("0").rglob("c/*/*/*")).write_bytes(b"cut")
    with pytest.raises(CasesFailedError, match=r"y\.ome\.zarr is there, but its output is damaged: remove it"):
        predict(model, source, target, overwrite=False)


def test_a_damaged_chunk_fails_its_case_alone(model, labels, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    store(source, "a.ome.zarr")
    (source / "a.ome.zarr" / "0" / "c" / "2" / "1" / "3").write_bytes(b"cut")
    store(source, "b.ome.zarr")
    words = r"a, preprocessing: .*a\.ome\.zarr/0: chunk 2/1/3 cannot be decoded"
    with pytest.raises(CasesFailedError, match=words):
        predict(model, str(source), tmp_path / "out")
    assert [name for name in names(tmp_path / "out") if "zarr" in name] == ["b.ome.zarr"]


def test_what_is_read_is_not_written_to(model, tmp_path):
    tiff, source = tmp_path / "a.tif", store(tmp_path, "b.ome.zarr")
    tifffile.imwrite(tiff, VOXELS)
    whole = tiff.read_bytes()
    for image, target, words in (
        (tiff, tmp_path, r"a\.tif is read, and would be overwritten: give another name with -o"),
        (tiff, tiff, r"a\.tif is read, and would be overwritten"),
        (
            source,
            source / "labels.ome.zarr",
            r"labels\.ome\.zarr lies within what is read, .*b\.ome\.zarr: put it elsewhere",
        ),
    ):
        with pytest.raises(CasesFailedError, match=words):
            predict(model, str(image), target, spacing=SPACING)
    assert tiff.read_bytes() == whole
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tif").write_bytes(whole)
    with pytest.raises(UsageError, match=r"x/a\.tif and .*y/a\.tif would both be written as .*out/a\.tif"):
        predict(model, [[str(tmp_path / name / "a.tif")] for name in ("x", "y")], tmp_path / "out")


def test_numbers_that_do_not_run_from_0_are_cases(model, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("e.h5", "e_0001.h5", "e_0002.h5", "f_0000.h5"):
        WRITERS["chunks.h5"](source / name, VOXELS, SPACING)
    predict(model, str(source), tmp_path / "out")
    assert [name for name in names(tmp_path / "out") if ".h5" in name] == ["e.h5", "e_0001.h5", "e_0002.h5", "f.h5"]


def test_spacing_of_nnunets_own_files(model, labels, tmp_path, monkeypatch):
    """The labels of the right header; the file has that of the image, as ever."""
    source = tmp_path / "in"
    source.mkdir()
    image = SimpleITK.GetImageFromArray(VOXELS)
    image.SetSpacing((0.003, 0.003, 0.003))
    SimpleITK.WriteImage(image, str(source / "case_0000.nii.gz"))
    monkeypatch.setenv("nnUNet_lowmem_spacing", "3 3 3")
    options = predictors.options("lowmem", LowMemPredictor)
    predict(model, str(source), tmp_path / "out", **options)
    assert np.array_equal(read_labels(tmp_path / "out" / "case.nii.gz"), labels)
    written = SimpleITK.ReadImage(str(tmp_path / "out" / "case.nii.gz"))
    assert written.GetSpacing() == pytest.approx(image.GetSpacing())
    predict(model, str(source), tmp_path / "one.h5", **options)
    assert np.array_equal(read_labels(tmp_path / "one.h5"), labels)
    (estimate,) = make_predictor(LowMemPredictor, model, **options).estimate(source)
    assert estimate.facts.grid.image_shape == VOXELS.shape


def test_readers_that_turn_images_read_their_own_files_alone(images, models, tmp_path):
    model = models(ModelSpec(reader="NibabelIOWithReorient"), images("head"))
    for target, options, words in (
        ("y.ome.zarr", {}, r"NibabelIOWithReorient, turns images: its labels are written as \.nii\.gz"),
        ("out", {"spacing": SPACING}, r"NibabelIOWithReorient, turns images: mend the spacing in their headers"),
    ):
        with pytest.raises((UsageError, CasesFailedError), match=words):
            predict(model, images("head")[0], tmp_path / target, **options)
    SimpleITK.WriteImage(read(CT), str(tmp_path / "a.nrrd"))
    with pytest.raises(
        UsageError, match=r"a\.nrrd: the model's reader, NibabelIOWithReorient, turns images: give \.nii\.gz"
    ):
        predict(model, str(tmp_path / "a.nrrd"), tmp_path / "out")


class _Full:
    """A disk that is full from the n-th file of a store on."""

    def __init__(self, number: int) -> None:
        self.left = number

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_at_any_shard(tmp_path, monkeypatch):
    """Not a full disk but what one says, so that it is every write of the store in turn."""
    values = np.random.default_rng(0).integers(0, 4, (70, 300, 30)).astype(np.uint8)
    plans, properties = PlansReadBy(None, VolumeIO, VolumeIO()), {"spacing": [1.0, 1.0, 1.0]}
    write, words = zarr.storage.LocalStore.set, r"y\.ome\.zarr: could not be written whole: No space left on device"
    counted = _Full(2**30)

    async def counting(self: Any, key: str, value: Any, *rest: Any, disk: _Full = counted) -> None:
        disk.take()
        await write(self, key, value, *rest)

    monkeypatch.setattr(zarr.storage.LocalStore, "set", counting)
    label_writing.write_segmentation(values, properties, str(tmp_path / "whole.ome.zarr"), plans)
    files = 2**30 - counted.left
    assert files > 8
    for number in range(files):
        monkeypatch.setattr(zarr.storage.LocalStore, "set", partialmethod(counting, disk=_Full(number)))
        with pytest.raises(WriteError, match=words):
            label_writing.write_segmentation(values, properties, str(tmp_path / "y.ome.zarr"), plans)
        assert [path.name for path in tmp_path.iterdir()] == ["whole.ome.zarr"], number
    assert np.array_equal(read_labels(tmp_path / "whole.ome.zarr"), values)
    verify_whole(tmp_path / "whole.ome.zarr")


KILLED = """
import os, signal, sys
import zarr
from nnunet_lowmem.commands import cli

write, done = zarr.storage.LocalStore.set, []

async def killing(self, key, value, *rest):
    await write(self, key, value, *rest)
    done.append(key)
    if sum("c/" in key for key in done) == 1:
        os.kill(os.getpid(), signal.SIGKILL)

zarr.storage.LocalStore.set = killing
cli.predict_entry_point(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_between_two_shards_and_continued(model, labels, tmp_path):
    source, target = store(tmp_path), tmp_path / "y.ome.zarr"
    arguments = ["-i", source, "-o", target, "-m", model, "-f", "0", "-device", "cpu"]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == -9
    assert not target.exists()
    predict(model, source, target, overwrite=False, use_mirroring=False)
    assert np.array_equal(read_labels(target), labels)
    assert names(tmp_path) == ["a.ome.zarr", "y.ome.zarr"]


def test_two_channels_by_number(images, models, tmp_path):
    spec = ModelSpec(
        channels=("CT", "MR"),
        normalisation=("CTNormalization",) * 2,
        use_mask_for_norm=(False, False),
        patch_size=(24, 24, 24),
        spacing=SPACING,
    )
    model = models(spec, [*images("ct"), *images("ct")])
    for case, number in (("a", 0), ("a", 1), ("b", 0), ("b", 1)):
        store(tmp_path, f"{case}_{number:04d}.ome.zarr")
    both = np.stack([VOXELS, VOXELS])
    ome_zarr(tmp_path / "c.ome.zarr", both, "0.5", spacing=SPACING, axes="czyx")
    predict(model, str(tmp_path), tmp_path / "out")
    found = [read_labels(tmp_path / "out" / f"{case}.ome.zarr") for case in "abc"]
    assert len({each.tobytes() for each in found}) == 1
    assert len(Counter(found[0].ravel().tolist())) > 2
