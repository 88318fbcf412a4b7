"""Laws for files that are not as their writers make them; stock's readers are the oracle.

Two laws, each for every format that is read here by rules of its own (NIfTI in one file or two, MetaImage, NRRD, GIPL,
and TIFF and pictures for the second):

*Headers edited with sense* (`mutations`): where stock's reader returns an image whose voxels are all in the file, ours
returns the same voxels and properties, or refuses it for one of the reasons in `permitted`. Where stock's reader
raises, so does ours, and names the file. Where it fills up what is missing, ours refuses. Neither by its look at the
headers (`check_headers`) nor while reading is anything else refused.

*Bytes of strangers*: whatever is flipped, cut, grown, overwritten or repeated, ours refuses the file in one line that
names it, or gives exactly what stock gives; it raises nothing else, does not hang, and takes no memory that the size
of the file does not account for.

By default a part of the edits and few of the combinations run; the others, and ten thousand damaged files, with
``pytest -m slow tests/volumes/test_mutated_files.py``, which takes half an hour.

Both are judged in a child (`judging`), since ITK crashes on some of these files; there, ours must refuse. Examples are
drawn anew by nobody (``derandomize``), so that a run says the same everywhere: few by default, many under
``pytest -m slow``.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judging import Files, Judge, Verdict
from mutations import (
    DAMAGING,
    GIPL_EDITS,
    INF,
    META_EDITS,
    NAN,
    NIFTI_EDITS,
    NRRD_EDITS,
    PACKS,
    Edit,
    Recipe,
    edit,
    voxels,
)
from oracle import INSTALLED
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")

# the second is new in nnU-Net 2.6
ITK, NIBABEL = (
    ("SimpleITKIO", "SimpleITKIOWithReorient")[: 1 if INSTALLED < (2, 6) else 2],
    ("NibabelIO", "NibabelIOWithReorient"),
)
TARGET_VOLUME = 4.4 * 3.7 * 3.9
MOST_VOXELS = 2**40
GZIPPED = {"ending": ".nii.gz", "pack": PACKS["gzip"]}
EDITS = {"nifti": NIFTI_EDITS, "meta": META_EDITS, "nrrd": NRRD_EDITS, "gipl": GIPL_EDITS}
PACKED_EDITS = [
    *(edit(name, pack=pack) for name, pack in PACKS.items()),
    *(edit(name, pack=pack, damaged=True) for name, pack in DAMAGING.items()),
    edit("not packed", pack=bytes),
]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    judge = Judge()
    yield judge
    judge.end()


# -- the laws


def permitted(recipe: Recipe, verdict: Verdict) -> bool:
    """Whether a refusal is one of ours on purpose, and says so."""
    text, axes = verdict.ours.error, min(3, verdict.axes)
    steps = [abs(step) for step in recipe.spacing[:axes]]
    reasons = {
        "spacing in its header": any(not 0 < step < INF for step in steps),
        "NaN or infinite": not verdict.is_finite,
        "values per voxel": verdict.components > 1,
        # more voxels at the model's spacing than any machine can predict
        "cannot be right": math.prod(steps) * math.prod(verdict.shape[1:]) / TARGET_VOLUME > MOST_VOXELS,
    }
    return recipe.is_damaged or any(words in text and holds for words, holds in reasons.items())


def in_words(verdict: Verdict, name: str) -> str:
    """What is wrong with how ours refuses."""
    ours = verdict.ours
    if verdict.crashed:
        return f"crash in {verdict.crashed}"
    if not ours.kind:
        return ""
    if not ours.is_ours:
        return f"foreign error, {ours}; stock: {verdict.stock}"
    if name not in ours.error or "\n" in ours.error or "RAM" in ours.error:
        return f"unfit words, {ours}"
    return ""


def deviation(recipe: Recipe, verdict: Verdict, name: str) -> str:
    """What breaks the first law."""
    ours, stock = verdict.ours, verdict.stock
    if wrong := in_words(verdict, name):
        return wrong
    if stock.kind:
        return "" if ours.kind else f"ours reads, stock does not: {stock.error.strip().splitlines()[-1:]}"
    if recipe.is_cut and not ours.kind:
        # of a voxel cut in two, what is left still follows the file; and where voxels are said to begin within the
        # header, as many bytes more are there
        begins_early = not recipe.merged.get("vox_offset", 352) >= 352
        is_whole = (verdict.is_whole or begins_early) and not verdict.difference
        return "" if is_whole else f"ours reads what is cut: {verdict.difference}"
    if recipe.is_cut:
        return ""
    if 0 in verdict.shape:  # nibabel's image of no voxels; there is nothing to predict
        return "" if ours.kind else "ours reads an image of no voxels"
    if ours.kind:
        # voxels made of the header's bytes, or not made of the file at all, are nobody's image
        return (
            ""
            if not verdict.is_whole or permitted(recipe, verdict)
            else f"stock reads {verdict.shape}, refused by {ours}"
        )
    return f"different: {verdict.difference}" if verdict.difference else ""


def deviations(judge: Judge, reader: str, recipes: Iterable[Recipe]) -> list[str]:
    found = []
    for recipe in recipes:
        files = recipe.files()
        verdict = judge(reader, files, recipe.files(other=True))
        if wrong := deviation(recipe, verdict, next(iter(files))):
            found.append(f"{reader}, {recipe}: {wrong}".replace(str(judge.folder), ""))
    return found


def report(found: list[str]) -> str:
    return "\n".join(["", f"{len(found)} deviations", *found])


# -- headers edited with sense

GROUPS = [
    pytest.param("SimpleITKIO", "nifti", {}, id="nifti, ITK"),
    pytest.param("NibabelIO", "nifti", {}, id="nifti, nibabel"),
    pytest.param("SimpleITKIO", "meta", {}, id="meta"),
    pytest.param("SimpleITKIO", "nrrd", {}, id="nrrd"),
    pytest.param("SimpleITKIO", "gipl", {}, id="gipl"),
    *(
        pytest.param(reader, "nifti", options, id=f"nifti {number}, {reader}", marks=slow)
        for reader in (*ITK, *NIBABEL)
        for number, options in enumerate(
            [
                {"order": ">"},
                {"version": 2},
                {"version": 2, "order": ">"},
                GZIPPED,
                {"pair": True},
                {"pair": True, "by_image": True},
                {"pair": True, "packed": ".gz", "pack": PACKS["gzip"]},
                {"pair": True, "order": ">"},
                {"pair": True, "version": 2},
                *([{}] if reader.endswith("Reorient") else []),
            ]
        )
    ),
    *(
        pytest.param(reader, name, {}, id=f"{name}, reoriented", marks=slow)
        for reader in ITK[1:]
        for name in ("meta", "nrrd", "gipl")
    ),
]


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=slow)])
@pytest.mark.parametrize("reader, format, options", GROUPS)
def test_every_edit_alone(reader: str, format: str, options: Edit, half: int, judge: Judge) -> None:
    """By default every second one: neighbours in the lists are of one kind."""
    edits = EDITS[format][half::2]
    found = deviations(
        judge, reader, [Recipe(format, (), options), *(Recipe(format, (one,), options) for one in edits)]
    )
    assert not found, report(found)


@pytest.mark.parametrize(
    "reader", [ITK[0], NIBABEL[0], *(pytest.param(name, marks=slow) for name in (*ITK[1:], NIBABEL[1]))]
)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", pytest.param(".NII.GZ", marks=slow)])
def test_every_way_to_pack(reader: str, ending: str, judge: Judge) -> None:
    found = deviations(judge, reader, (Recipe("nifti", (one,), {"ending": ending}) for one in PACKED_EDITS))
    assert not found, report(found)


# fewer numbers than MetaIO reads, and what it then takes them from
TOO_FEW = {
    "CenterOfRotation": "1", "Color": "1 1 1", "ElementMax": "", "ElementMin": "", "ElementSize": "4",
    "ElementSpacing": "1.5 2", "ElementToIntensityFunctionOffset": "", "ElementToIntensityFunctionSlope": "",
    "Offset": "1 2", "Position": "", "TransformMatrix": "1 0 0",
}  # fmt: skip
EATEN = {
    "CompressedData": dict(META_EDITS)["CompressedData=True"],
    "CompressedDataSize": dict(META_EDITS)["CompressedData=True"],
    "ElementByteOrderMSB": dict(META_EDITS)["ElementByteOrderMSB=True"],
    "HeaderSize": dict(META_EDITS)["HeaderSize and a gap"],
}


@slow
@pytest.mark.parametrize("below", EATEN)
def test_too_few_numbers_above_what_says_where_voxels_are(below: str, judge: Judge) -> None:
    def directly_above(key: str, lines: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        (moved,) = (line for line in lines if line[0] == key)
        others = [line for line in lines if line is not moved]
        place = [name for name, _ in others].index(below)
        return [*others[:place], moved, *others[place:]]

    recipes = (
        Recipe("meta", ((key, {key: few, "order": partial(directly_above, key)}), (below, EATEN[below])), {})
        for key, few in TOO_FEW.items()
    )
    found = deviations(judge, "SimpleITKIO", recipes)
    assert not found, report(found)


FORMS: list[tuple[str, Edit]] = [
    ("nifti", {}),
    ("nifti", GZIPPED),
    ("nifti", {"order": ">"}),
    ("nifti", {"version": 2}),
    ("nifti", {"pair": True}),
    ("nifti", {"pair": True, "version": 2, "order": ">"}),
    ("meta", {}),
    ("nrrd", {}),
    ("gipl", {}),
]


@st.composite
def recipes(draw: st.DrawFn) -> tuple[str, Recipe]:
    """A few edits at once, of any format, and a reader that knows it."""
    format, options = draw(st.sampled_from(FORMS))
    edits = draw(st.lists(st.sampled_from(EDITS[format]), min_size=2, max_size=3, unique_by=lambda one: one[0]))
    reader = draw(st.sampled_from((*ITK, *NIBABEL) if format == "nifti" else ITK))
    return reader, Recipe(format, tuple(edits), options)


def check(judge: Judge, drawn: tuple[str, Recipe]) -> None:
    found = deviations(judge, drawn[0], [drawn[1]])
    assert not found, report(found)


def drawn(examples: int) -> Any:
    return settings(
        deadline=None,
        derandomize=True,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


@given(drawn=recipes())
@drawn(150)
def test_edits_together(judge: Judge, drawn: tuple[str, Recipe]) -> None:
    check(judge, drawn)


@slow
@given(drawn=recipes())
@drawn(6000)
def test_many_edits_together(judge: Judge, drawn: tuple[str, Recipe]) -> None:
    check(judge, drawn)


# -- bytes of strangers


def picture(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.frombuffer(voxels(20 * 24), np.uint8).reshape(20, 24)).save(stream, kind, **options)
    return stream.getvalue()


def tiff(**options: Any) -> bytes:
    stream = io.BytesIO()
    planes = np.frombuffer(voxels(2 * 6 * 20 * 24), "<i2").reshape(6, 20, 24)
    tifffile.imwrite(stream, planes, photometric="minisblack", **options)
    return stream.getvalue()


def pages(**options: Any) -> bytes:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream, **options) as writer:
        for plane in np.frombuffer(voxels(2 * 6 * 20 * 24), "<i2").reshape(6, 20, 24):
            writer.write(plane, contiguous=False, metadata=None, photometric="minisblack")
    return stream.getvalue()


def recipe_files(format: str, *edits: tuple[str, Edit], **options: Any) -> Files:
    return Recipe(format, edits, options).files()


TIFF_READERS = ("Tiff3DIO", "SimpleITKIO")
PICTURE_READERS = ("NaturalImage2DIO", "SimpleITKIO")
#: Readers and files; where there is `True`, the first is packed by gzip after it was changed.
BASES: dict[str, tuple[tuple[str, ...], Files, bool]] = {
    "nii": ((*ITK, *NIBABEL), recipe_files("nifti"), False),
    "nii big": ((ITK[0], NIBABEL[0]), recipe_files("nifti", order=">"), False),
    "nii 2": ((ITK[0], NIBABEL[0]), recipe_files("nifti", version=2), False),
    "nii extended": (
        (ITK[0], NIBABEL[0]),
        recipe_files("nifti", edit("", extension=(32, 6, b"comment"), vox_offset__more=32)),
        False,
    ),
    "nii floats": ((ITK[0], NIBABEL[0]), recipe_files("nifti", edit("", datatype=16, bitpix=32, scl_slope=0.5)), False),
    "nii.gz outside": ((*ITK, *NIBABEL), recipe_files("nifti", **GZIPPED), False),
    "nii.gz inside": ((ITK[0], NIBABEL[0]), recipe_files("nifti", ending=".nii.gz"), True),
    "hdr": ((ITK[0], NIBABEL[0]), recipe_files("nifti", pair=True), False),
    "img": ((ITK[0], NIBABEL[0]), recipe_files("nifti", pair=True, by_image=True), False),
    "mha": (ITK, recipe_files("meta"), False),
    "mha packed": (ITK, recipe_files("meta", CompressedData="True", pack=zlib.compress, sized=0), False),
    "mha digits": (ITK[:1], recipe_files("meta", BinaryData="False"), False),
    "mhd": (ITK[:1], recipe_files("meta", where="v.raw", ElementDataFile="v.raw", name="case_0000.mhd"), False),
    "nrrd": (ITK, recipe_files("nrrd"), False),
    "nrrd packed": (ITK, recipe_files("nrrd", encoding="gzip"), False),
    "nrrd digits": (ITK[:1], recipe_files("nrrd", encoding="ascii"), False),
    "nrrd hex": (ITK[:1], recipe_files("nrrd", encoding="hex"), False),
    "nhdr": (ITK[:1], recipe_files("nrrd", where="v.raw", name="case_0000.nhdr", **{"data file": "v.raw"}), False),
    "gipl": (ITK, recipe_files("gipl"), False),
    "gipl.gz outside": (ITK[:1], recipe_files("gipl", name="case_0000.gipl.gz", pack=PACKS["gzip"]), False),
    "gipl.gz inside": (ITK[:1], recipe_files("gipl", name="case_0000.gipl.gz"), True),
    "tif": (TIFF_READERS, {"case_0000.tif": tiff()}, False),
    "tif pages": (TIFF_READERS, {"case_0000.tif": pages()}, False),
    "tif big": (TIFF_READERS, {"case_0000.tif": pages(bigtiff=True)}, False),
    "tif packed": (TIFF_READERS, {"case_0000.tif": tiff(compression="zlib")}, False),
    "tif tiles": (TIFF_READERS, {"case_0000.tif": tiff(tile=(16, 16))}, False),
    "tif imagej": (TIFF_READERS, {"case_0000.tif": tiff(imagej=True, byteorder=">")}, False),
    "tif ome": (TIFF_READERS, {"case_0000.tif": tiff(ome=True)}, False),
    "tif flat": (PICTURE_READERS, {"case_0000.tif": picture("tiff")}, False),
    "png": (PICTURE_READERS, {"case_0000.png": picture("png")}, False),
    "bmp": (PICTURE_READERS, {"case_0000.bmp": picture("bmp")}, False),
    "jpg": (("SimpleITKIO",), {"case_0000.jpg": picture("jpeg")}, False),
}
NUMBERS = [
    b"0",
    b"-1",
    b"1",
    b"2",
    b"7",
    b"32767",
    b"65536",
    b"4294967297",
    b"1099511627776",
    b"1e9",
    b"nan",
    b"inf",
    b"-",
    b"x",
    b"",
    b"99999999999999999999",
]
WORDS = [
    struct.pack(form, value)
    for form, values in {
        "<h": (0, -1, 1, 2, 7, 255, 32767, -32768), ">h": (1, 2, 255, 32767), "<i": (0, -1, 1, 2**31 - 1, -(2**31),
        65536, 348),
        ">i": (1, 2**31 - 1, 65536), "<q": (-1, 2**40, 2**63 - 1), "<f": (NAN, INF, -1, 1e30), ">f": (NAN, 1.0),
    }.items()
    for value in values
]  # fmt: skip
PLACE = st.one_of(st.integers(0, 120), st.integers(0, 700), st.integers(0, 10**6))
CHANGES = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("overwrite"), PLACE, st.sampled_from(WORDS)),
    st.tuples(st.just("overwrite"), PLACE, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("delete"), PLACE, st.integers(1, 60)),
    st.tuples(st.just("repeat"), PLACE, st.integers(1, 400)),
    st.tuples(st.just("cut"), PLACE, st.none()),
    st.tuples(st.just("grow"), st.integers(1, 3000), st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("number"), st.integers(0, 40), st.sampled_from(NUMBERS)),
)


def changed(content: bytes, change: tuple[str, int, Any]) -> bytes:
    kind, place, what = change
    at = place % max(1, len(content))
    before, after = content[:at], content[at:]
    if kind == "flip":
        return before + bytes(byte ^ 1 << what for byte in after[:1]) + after[1:]
    if kind == "overwrite":
        return before + what + after[len(what) :]
    if kind == "insert":
        return before + what + after
    if kind == "delete":
        return before + after[what:]
    if kind == "repeat":
        return before + after[:what] + after
    if kind == "cut":
        return before
    if kind == "grow":
        return content + what * place
    words = content[:600].replace(b"(", b" ").replace(b",", b" ").split()
    numbers = [word for word in words if word.strip(b"()-.,").isdigit()]
    return content.replace(numbers[place % len(numbers)], what, 1) if numbers else content


@st.composite
def strangers(draw: st.DrawFn) -> tuple[str, Files]:
    name = draw(st.sampled_from(sorted(BASES)))
    readers, files, is_packed = BASES[name]
    reader = draw(st.sampled_from(readers))
    which = draw(st.sampled_from(sorted(files)))
    content = files[which]
    for change in draw(st.lists(CHANGES, min_size=1, max_size=3)):
        content = changed(content, change)
    if is_packed:
        content = gzip.compress(content, mtime=0)
    return reader, {**files, which: content}


def strange(verdict: Verdict, files: Files, most_bytes: int) -> str:
    """What breaks the second law."""
    if wrong := in_words(verdict, next(iter(files))):
        return wrong
    if verdict.peak_bytes > most_bytes:
        return f"{verdict.peak_bytes:,} bytes of memory"
    if verdict.ours.kind:
        return ""
    if verdict.stock.kind:
        return f"ours reads, stock does not: {verdict.stock.error.strip().splitlines()[-1:]}"
    return verdict.difference


def check_strange(judge: Judge, drawn: tuple[str, Files]) -> None:
    reader, files = drawn
    wrong = strange(judge(reader, files), files, 48 * 2**20)
    assert not wrong, f"{reader}, {files}: {wrong}"


@given(drawn=strangers())
@drawn(250)
def test_bytes_of_strangers(judge: Judge, drawn: tuple[str, Files]) -> None:
    check_strange(judge, drawn)


@slow
@given(drawn=strangers())
@drawn(10_000)
def test_many_bytes_of_strangers(judge: Judge, drawn: tuple[str, Files]) -> None:
    check_strange(judge, drawn)


# -- headers that promise what no file of their size holds, and streams that never end

MEGABYTE = 2**20
NOISE = np.random.default_rng(1).bytes(100_000)


def promise(format: str, *edits: tuple[str, Edit], **options: Any) -> Files:
    """The header, and noise for voxels, packed or not."""
    recipe = Recipe(format, edits, {"share": 0, **options})
    pack = options.get("pack")
    files = Recipe(format, edits, {**recipe.options, "pack": bytes}).files()
    first = next(iter(files))
    last = list(files)[-1]
    if format == "nrrd":
        return {**files, last: files[last] + (pack(NOISE) if pack else NOISE)}
    grown = {**files, last: files[last] + NOISE}
    return (
        {name: pack(content) for name, content in grown.items()}
        if pack and format != "meta"
        else {first: grown.pop(first), **grown}
    )


LARGE = {
    "nii": (promise("nifti", edit("", dim=(3, 32767, 32767, 32767, 1, 1, 1, 1))), ("SimpleITKIO", "NibabelIO")),
    "nii.gz": (
        promise("nifti", edit("", dim=(3, 32767, 32767, 32767, 1, 1, 1, 1)), ending=".nii.gz", pack=PACKS["gzip"]),
        ("SimpleITKIO", "NibabelIO"),
    ),
    "nii 2": (promise("nifti", edit("", dim=(3, 2**40, 2**40, 2**40, 1, 1, 1, 1)), version=2), ("SimpleITKIO",
      "NibabelIO")),
    "nii 2 beyond": (promise("nifti", edit("", dim=(3, 2**62, 4, 1, 1, 1, 1, 1)), version=2), ("NibabelIO",)),
    "hdr": (promise("nifti", edit("", dim=(3, 32767, 32767, 32767, 1, 1, 1, 1)), pair=True), ("SimpleITKIO",
      "NibabelIO")),
    "seven axes": (promise("nifti", edit("", dim=(7, *[32767] * 7))), ("SimpleITKIO", "NibabelIO")),
    "mha": (promise("meta", edit("", DimSize="100000 100000 100000")), ("SimpleITKIO",)),
    "mha beyond": (promise("meta", edit("", DimSize="4294967296 4294967296 4294967296")), ("SimpleITKIO",)),
    "mha packed": (
        promise("meta", edit("", DimSize="100000 100000 100000", CompressedData="True", CompressedDataSize="100000")),
        ("SimpleITKIO",),
    ),
    "mha values": (promise("meta", edit("", ElementNumberOfChannels="1000000000")), ("SimpleITKIO",)),
    "mha digits": (promise("meta", edit("", DimSize="10000 10000 10000", BinaryData="False")), ("SimpleITKIO",)),
    "mha axes": (promise("meta", edit("", NDims="1e9")), ("SimpleITKIO",)),
    "nrrd": (promise("nrrd", edit("", sizes="1099511627776 1099511627776 1099511627776")), ("SimpleITKIO",)),
    "nrrd thousands": (promise("nrrd", edit("", sizes="100000 100000 100000")), ("SimpleITKIO",)),
    "nrrd packed": (promise("nrrd", edit("", sizes="100000 100000 100000", encoding="gzip"), pack=PACKS["gzip"]),
      ("SimpleITKIO",)),
    "nrrd digits": (promise("nrrd", edit("", sizes="10000 10000 10000", encoding="ascii")), ("SimpleITKIO",)),
    "nrrd hex": (promise("nrrd", edit("", sizes="10000 10000 10000", encoding="hex")), ("SimpleITKIO",)),
    "nrrd bzip2": (promise("nrrd", edit("", sizes="10000 10000 10000", encoding="bzip2")), ("SimpleITKIO",)),
    "nrrd skip": (promise("nrrd", edit("", **{"byte skip": "99999999999"})), ("SimpleITKIO",)),
    "nrrd lines": (promise("nrrd", edit("", **{"line skip": "99999999999"})), ("SimpleITKIO",)),
    "nrrd long line": (promise("nrrd", edit("", type="x" * 5000)), ("SimpleITKIO",)),
    "gipl": (promise("gipl", edit("", dim=(65535, 65535, 65535, 1))), ("SimpleITKIO",)),
    "gipl.gz": (promise("gipl", edit("", dim=(65535, 65535, 65535, 1)), name="case_0000.gipl.gz", pack=PACKS["gzip"]),
      ("SimpleITKIO",)),
}  # fmt: skip


@pytest.mark.parametrize("name, reader", [(name, reader) for name, (_, readers) in LARGE.items() for reader in readers])
def test_promises_take_no_memory(name: str, reader: str, judge: Judge) -> None:
    """Stock is not asked: some of these would take all memory, or crash."""
    files, _ = LARGE[name]
    # pages of libraries that a child touches for the first time are no memory of a file
    judge(reader, files, stock=False)
    verdict = judge(reader, files, stock=False)
    assert not in_words(verdict, next(iter(files)))
    assert verdict.ours.kind
    assert verdict.peak_bytes < 8 * MEGABYTE


def endless(start: bytes, megabytes: int) -> bytes:
    """Members of gzip: what is given, and then zeros, a thousand times as many as the file has bytes."""
    return gzip.compress(start, mtime=0) + gzip.compress(bytes(MEGABYTE), mtime=0) * megabytes


def deflated(start: bytes, megabytes: int, bits: int = zlib.MAX_WBITS) -> bytes:
    """The same as one stream."""
    stream = zlib.compressobj(1, zlib.DEFLATED, bits)
    parts = [stream.compress(start), *(stream.compress(bytes(MEGABYTE)) for _ in range(megabytes))]
    return b"".join(parts) + stream.flush()


def bomb(kind: str, megabytes: int) -> Files:
    def pack(whole: bytes) -> bytes:
        return endless(whole, megabytes)

    def stream(whole: bytes) -> bytes:
        return deflated(whole, megabytes, zlib.MAX_WBITS | 16)

    packed = {"CompressedData": "True", "sized": 0, "pack": lambda whole: deflated(whole, megabytes)}
    made = {
        "nii.gz": lambda: recipe_files("nifti", ending=".nii.gz", pack=pack),
        "nii.gz, one stream": lambda: recipe_files("nifti", ending=".nii.gz", pack=stream),
        "hdr.gz": lambda: recipe_files("nifti", pair=True, packed=".gz", pack=pack),
        "nrrd": lambda: recipe_files("nrrd", encoding="gzip", pack=pack),
        "mha": lambda: recipe_files("meta", **packed),
        "gipl.gz": lambda: recipe_files("gipl", name="case_0000.gipl.gz", pack=stream),
    }
    return made[kind]()


BOMBS = ["nii.gz", "nii.gz, one stream", "hdr.gz", "nrrd", "mha", "gipl.gz"]


@pytest.mark.parametrize("megabytes", [200, pytest.param(2000, marks=slow)])
@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_streams_without_an_end_take_no_memory(kind: str, reader: str, megabytes: int, judge: Judge) -> None:
    if reader == "NibabelIO" and "nii" not in kind and "hdr" not in kind:
        pytest.skip("not a format of nibabel's")
    files = bomb(kind, megabytes)
    verdict = judge(reader, files)
    assert not strange(verdict, files, 16 * MEGABYTE)
