"""Labels that go straight to their file: those of a map that is kept, in whatever boxes they come."""

from __future__ import annotations

import gzip
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import ModelSpec
from hypothesis import given
from hypothesis import strategies as st
from oracle import make_predictor, predict_ours, read_voxels
from placing import straight_to_file

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.budget import planner
from nnunet_lowmem.nnunet import label_writing
from nnunet_lowmem.predict.outcomes import CaseReport
from nnunet_lowmem.types import Box, Place
from nnunet_lowmem.volumes import voxel_files
from nnunet_lowmem.volumes.stored_parts import Encoding
from nnunet_lowmem.volumes.streamed import Frame

SHAPE = (7, 6, 5)


def spans(size: int) -> st.SearchStrategy[slice]:
    ends = st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)
    return ends.map(lambda pair: slice(*sorted(pair)))


BOXES = st.tuples(*map(spans, SHAPE))


@st.composite
def in_order(draw: st.DrawFn) -> list[Box]:
    """Planes of a crop, some at a time."""
    cuts = sorted(draw(st.sets(st.integers(0, SHAPE[0]), min_size=2)))
    y, x = draw(spans(SHAPE[1])), draw(spans(SHAPE[2]))
    return [(slice(*ends), y, x) for ends in pairwise(cuts)]


def unpacked(stored: bytes, encoding: Encoding) -> bytes:
    return {Encoding.RAW: bytes, Encoding.GZIP: gzip.decompress, Encoding.DEFLATE: zlib.decompress}[encoding](stored)


@given(st.data(), st.sampled_from([Encoding.RAW, Encoding.GZIP, Encoding.DEFLATE]), st.integers(1, 200))
def test_a_file_holds_what_is_put_into_it_and_gives_it_back(tmp_path_factory, data, encoding, block_bytes):
    dtype, is_encoded = np.dtype(data.draw(st.sampled_from(["<u1", ">u2"]))), data.draw(st.booleans())
    frame = Frame(b"header", is_encoded, encoding, 1, dtype)
    boxes = data.draw(in_order() if frame.in_order else st.lists(BOXES, max_size=4))
    expected, rng = np.zeros(SHAPE, np.uint16), np.random.default_rng(0)
    path = tmp_path_factory.mktemp("voxels") / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voxel_files, "BLOCK_BYTES", block_bytes)
        with frame.opened(path, SHAPE) as voxels:
            for box in boxes:
                expected[box] = rng.integers(1, 200, expected[box].shape)
                voxels.put(box, expected[box])
                z, y, x = data.draw(BOXES)
                before = slice(min(z.start, box[0].stop - 1), min(z.stop, box[0].stop))
                for asked in (box, (before, y, x)):
                    np.testing.assert_array_equal(voxels.read(asked), expected[asked])
    stored = path.read_bytes()
    held = unpacked(stored, encoding) if is_encoded else stored[:6] + unpacked(stored[6:], encoding)
    assert held == b"header" + expected.astype(dtype).tobytes()


@pytest.fixture
def _straight(monkeypatch) -> None:
    monkeypatch.setattr(label_writing, "STREAMED_FROM_BYTES", 0)
    monkeypatch.setattr(planner, "placements", straight_to_file)


def predict(model: str, cases: list[list[str]], folder: Path, **options: Any) -> list[CaseReport]:
    reports: list[CaseReport] = []
    folder.mkdir()
    predictor = make_predictor(LowMemPredictor, model, on_case=reports.append, **options)
    predict_ours(predictor, cases, [str(folder / str(number)) for number in range(len(cases))])
    return reports


@pytest.mark.parametrize("ending", [".mha", *(pytest.param(e, marks=pytest.mark.slow) for e in (".nrrd", ".gipl"))])
@pytest.mark.usefixtures("_straight")
def test_cases_in_a_row_in_other_formats(ending, images, models, tmp_path, monkeypatch):
    """The file of one is verified and named beside the next one."""
    cases = [images("head"), images("small")]
    model = models(ModelSpec(file_ending=ending), cases[0])
    reports = predict(model, cases, tmp_path / "straight")
    assert [report.plan.placement.label_map for report in reports] == [None, None]
    assert not any(allocated.place is Place.DISK for report in reports for allocated in report.plan.allocations)
    monkeypatch.undo()
    (report, _) = predict(model, cases, tmp_path / "kept")
    assert report.plan.placement.label_map is Place.RAM
    for kept in (tmp_path / "kept").glob(f"*{ending}"):
        np.testing.assert_array_equal(read_voxels(tmp_path / "straight" / kept.name), read_voxels(kept))
    assert sorted(file.name for file in (tmp_path / "straight").iterdir()) == sorted(
        file.name for file in (tmp_path / "kept").iterdir()
    )


@pytest.mark.usefixtures("_straight")
def test_a_map_that_somebody_looks_at_or_whose_type_its_labels_decide_is_kept(images, models, tmp_path):
    files = images("small")
    seen = {
        name: predict(models(spec, images("head")), [files], tmp_path / name, **options)[0].plan.placement.label_map
        for name, spec, options in [
            ("plain", ModelSpec(), {}),
            ("report", ModelSpec(), {"report": True}),
            ("300 classes", ModelSpec(labels=300), {}),
            ("somebody's reader", ModelSpec(reader="NibabelIO"), {}),
        ]
    }
    assert seen == {"plain": None, "report": Place.RAM, "300 classes": Place.RAM, "somebody's reader": Place.RAM}
