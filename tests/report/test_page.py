"""`lowmem_report.html`: it says what was measured, strangers' names stay text, and it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import SimpleITK
from factory import ModelSpec
from images import broken
from oracle import make_predictor, outputs
from PIL import Image

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.commands import cli
from nnunet_lowmem.errors import CasesFailedError
from nnunet_lowmem.report.memory_chart import Limits, MemoryStory, memory_chart
from nnunet_lowmem.report.page import REPORT_FILE, duration
from nnunet_lowmem.report.slices import LONGEST_PIXELS
from nnunet_lowmem.types import Place

HOSTILE = "<script>alert(1)<b onload='x'>&{{ 7 * 7 }}"
HOSTILE_LABEL = '"></style></p><script src=http://example.org/x.js></script>'
VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Node:
    """An element of a page."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Node | str] = []

    def all(self, tag: str | None = None, **wanted: str) -> list[Node]:
        wanted = {name.replace("_", "-"): value for name, value in wanted.items()}
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if tag in (None, child.tag) and wanted.items() <= child.attributes.items():
                    found.append(child)
                found += child.all(tag, **{name.replace("-", "_"): value for name, value in wanted.items()})
        return found

    def one(self, tag: str | None = None, **wanted: str) -> Node:
        (found,) = self.all(tag, **wanted)
        return found

    @property
    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join("".join(parts).split())

    @property
    def value(self) -> float:
        return float(self.one("data").attributes["value"])


class Parser(HTMLParser):
    """Builds the tree of a page, and refuses one whose tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = [Node("", {})]

    def handle_starttag(self, tag, attrs):
        node = Node(tag, dict(attrs))
        self.stack[-1].children.append(node)
        if tag not in VOID:
            self.stack.append(node)

    def handle_endtag(self, tag):
        assert self.stack.pop().tag == tag

    def handle_data(self, data):
        self.stack[-1].children.append(data)


def read(folder: Path) -> Node:
    parser = Parser()
    parser.feed((folder / REPORT_FILE).read_text(encoding="utf-8"))
    parser.close()
    assert len(parser.stack) == 1
    return parser.stack[0]


@pytest.fixture(scope="module")
def model(models, images) -> str:
    labels = {"background": 0, HOSTILE_LABEL: 1, "b": 2, "c": 3, "d": 4}
    return models(ModelSpec(labels=labels), images("head"))


@pytest.fixture(scope="module")
def run(model, images, tmp_path_factory):
    """Three cases and one that fails: the predictor, the folder and the page."""
    root = tmp_path_factory.mktemp("report")
    hostile = root / f"{HOSTILE}_0000.nii.gz"
    os.link(images("head_oblique")[0], hostile)
    cases = [images("head"), [str(hostile)], broken(root), images("small")]
    predictor = make_predictor(LowMemPredictor, model, (0,), report=True, max_ram="80%")
    predictor.tmp_dir = root / "tmp"
    predictor.tmp_dir.mkdir()
    with pytest.raises(CasesFailedError):
        predictor.predict_from_files(cases, outputs(cases, root / "out"))
    return predictor, root, read(root / "out")


def test_numbers_are_those_of_the_run(run):
    predictor, _, page = run
    report = predictor.run_report
    assert page.one(id="done").text == "3 of 4"
    assert page.one(id="failed").text == "1"
    assert page.one(id="skipped").text == "0"
    fullest = max(report.done, key=lambda case: case.peak_bytes)
    assert page.one(id="measured").value == fullest.peak_bytes > 50e6
    assert page.one(id="projected").value == fullest.plan.projected_bytes(Place.RAM)
    assert page.one(id="budget").value == fullest.plan.budget.ram_bytes
    assert [article.attributes["data-case"] for article in page.all("article")] == ["head", HOSTILE, "small"]
    for case in report.done:
        article = page.one("article", data_case=case.case)
        table = article.one("table", **{"class": "memory"})
        for stage, held in case.measured_bytes.items():
            assert table.one("tr", data_stage=stage).value == held
        highest = [float(entry.attributes["value"]) for entry in table.one("tr", **{"class": "total"}).all("data")]
        assert highest == [case.peak_bytes, case.plan.projected_bytes(Place.RAM), case.plan.budget.ram_bytes]
        times = page.one("div", data_case=case.case)
        assert {s.attributes["data-stage"]: s.value for s in times.all("span") if "data-stage" in s.attributes} == (
            case.seconds
        )
        plan = article.one("details")
        sizes = [row.value for row in plan.one("tbody").all("tr")]
        assert sizes == [allocation.size_bytes for allocation in case.plan.allocations]
        assert case.plan.placement.in_words() in plan.text


def test_measured_stays_within_projected(run):
    predictor, _, _ = run
    for case in predictor.run_report.done:
        assert "report" in case.measured_bytes, "drawing is measured, too"
        assert case.peak_bytes <= case.plan.projected_bytes(Place.RAM)


def test_failed_case_is_told_with_its_reason(run):
    predictor, _, page = run
    (failed,) = predictor.run_report.failed
    section = page.one("section", id="failures")
    assert failed.in_words() in section.text
    assert "broken_0000.nii.gz" in section.text
    assert "Traceback" in section.one("pre").text


def test_strangers_names_stay_text(run):
    _, _, page = run
    assert not page.all("script")
    assert not page.all("b", onload="x")
    assert page.one("article", data_case=HOSTILE).one("h3").text == HOSTILE
    assert any(HOSTILE_LABEL in item.text for item in page.all("li"))
    for node in page.all():
        assert not any(name.startswith("on") for name in node.attributes)
    assert "49" not in page.one("article", data_case=HOSTILE).one("h3").text


def test_page_needs_nothing_but_itself(run):
    _, root, page = run
    for node in page.all():
        for name in ("src", "srcset", "href", "data", "action", "poster"):
            assert node.attributes.get(name, "data:").startswith("data:")
    assert not page.all("link")
    assert "url(" not in page.one("style").text
    assert "default-src 'none'" in page.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    for chart in (
        page.one("source").attributes["srcset"],
        page.one("section", id="memory").one("img").attributes["src"],
    ):
        tree = ElementTree.fromstring(decoded(chart, "image/svg+xml"))
        for element in tree.iter():
            assert element.tag.rpartition("}")[2] not in ("script", "image", "foreignObject")
            assert all(v.startswith("#") for k, v in element.attrib.items() if k.endswith("href"))
    assert not list((root / "tmp").iterdir())
    assert sorted(path.name for path in (root / "out").glob(".partial*")) == []


def decoded(uri: str, kind: str) -> bytes:
    head, _, content = uri.partition(",")
    assert head == f"data:{kind};base64"
    return base64.b64decode(content, validate=True)


def test_three_slices_for_each_case(run):
    _, _, page = run
    for article in page.all("article"):
        pictures = article.all("img")
        assert [re.sub(r", slice \d+ of \d+", "", f.text) for f in article.all("figcaption")] == [
            "axial",
            "coronal",
            "sagittal",
        ]
        for picture in pictures:
            shown = Image.open(io.BytesIO(decoded(picture.attributes["src"], "image/jpeg")))
            assert max(shown.size) == LONGEST_PIXELS
            assert np.asarray(shown).std(axis=(0, 1)).max() > 10, "there is something to see"
        assert len(pictures) == 3


def test_chart_shows_curve_projection_budget_and_stages(run):
    _, _, page = run
    text = decoded(page.one("source").attributes["srcset"], "image/svg+xml").decode()
    for word in ("measured", "projected", "budget", "preprocessing", "prediction", "export", "writing", "GiB"):
        assert word in text


def test_command_writes_it_and_without_the_flag_does_not(model, images, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    os.link(images("small")[0], tmp_path / "in" / "small_0000.nii.gz")
    flags = ["-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "-f", "0", "-device", "cpu"]
    flags = [*map(str, flags), "--disable_progress_bar"]
    assert cli.predict_entry_point(flags) == 0
    assert not (tmp_path / "out" / REPORT_FILE).exists()
    assert cli.predict_entry_point([*flags, "--report", "--continue_prediction"]) == 0
    page = read(tmp_path / "out")
    assert page.one(id="done").text == "0 of 0"
    assert "small" in page.one("section", id="left").text


def test_run_that_is_ended_says_so(model, images, tmp_path):
    def cancel(progress) -> None:
        if progress.case == "small":
            raise RuntimeError("the user <pressed> cancel")

    cases = [images("head"), images("small")]
    predictor = make_predictor(LowMemPredictor, model, (0,), report=True, on_progress=cancel)
    with pytest.raises(RuntimeError, match="cancel"):
        predictor.predict_from_files(cases, outputs(cases, tmp_path))
    page = read(tmp_path)
    assert "did not come to its end: RuntimeError: the user <pressed> cancel" in page.text
    assert [article.attributes["data-case"] for article in page.all("article")] == ["head"]


def test_warnings_are_told_once(model, images, tmp_path):
    image = SimpleITK.Cast(SimpleITK.ReadImage(images("small")[0]), SimpleITK.sitkFloat32)
    array = SimpleITK.GetArrayFromImage(image)
    array[2, 3, 4] = np.nan
    holed = SimpleITK.GetImageFromArray(array)
    holed.CopyInformation(image)
    SimpleITK.WriteImage(holed, str(tmp_path / "holed_0000.nii.gz"))
    cases = [[str(tmp_path / "holed_0000.nii.gz")]]
    make_predictor(LowMemPredictor, model, (0,), report=True, accept_nan=True).predict_from_files(
        cases, outputs(cases, tmp_path)
    )
    (entry,) = read(tmp_path).one("section", id="warnings").all("li")
    assert "NaN" in entry.text


def test_slices_that_cannot_be_drawn_do_not_cost_the_case(model, images, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("nnunet_lowmem.report.page.overlays", lambda volume: 1 / 0)
    cases = [images("small")]
    make_predictor(LowMemPredictor, model, (0,), report=True).predict_from_files(cases, outputs(cases, tmp_path))
    assert (tmp_path / "small.nii.gz").exists()
    assert "no slices for the report: ZeroDivisionError" in caplog.text
    assert "no slices for the report" in read(tmp_path).one("section", id="warnings").text


PICTURES = ModelSpec(patch_size=(64, 64), spacing=(1.0, 1.0), reader="NaturalImage2DIO", file_ending=".png")
REGIONS = ModelSpec(labels={"background": 0, "a": [1, 2], "b": 2}, regions_class_order=(1, 2))


@pytest.mark.parametrize(
    "spec, image, ending, slices",
    [
        (ModelSpec(patch_size=(24, 28), spacing=(4.0, 4.0)), "head", ".nii.gz", 3),
        (PICTURES, "picture", ".png", 1),
        (ModelSpec(transpose_forward=(2, 0, 1), reader="NibabelIOWithReorient"), "head_oblique", ".nii.gz", 3),
        (REGIONS, "head_margin", ".nii.gz", 3),
    ],
)
def test_other_kinds_of_models(models, images, tmp_path, spec, image, ending, slices, caplog):
    cases = [images(image, ending)]
    predictor = make_predictor(LowMemPredictor, models(spec, cases[0]), (0,), report=True)
    predictor.predict_from_files(cases, [str(tmp_path / "case")])
    assert len(read(tmp_path).one("article").all("img")) == slices
    assert "no slices" not in caplog.text


# -- the chart and its numbers -----------------------------------------------------------------------------------------


def test_chart_of_a_budget_far_above_and_of_names_that_look_like_formulas():
    story = MemoryStory(
        points=[(0.0, 2**29), (500.0, 2**30), (900.0, 2**29)],
        stages=[(0.0, "preprocessing"), (200.0, "prediction"), (890.0, "")],
        cases=[(0.0, r"$\frac{1}$ <&>")],
        limits=[Limits(200.0, 2**30, 64 * 2**30)],
        end_s=900.0,
    )
    text = memory_chart(story, 10, 4).decode()
    assert "budget 64.00 GiB: far above this chart" in text
    assert "run (min)" in text
    assert "$\\frac{1}$ &lt;&amp;&gt;" in text
    ElementTree.fromstring(text)


def test_chart_of_a_run_without_a_plan():
    ElementTree.fromstring(memory_chart(MemoryStory(points=[(0.0, 5)], cases=[(0.0, "broken")], end_s=0.01), 4, 4))


@pytest.mark.parametrize(
    "seconds, text",
    [(0.044, "0.04 s"), (4.21, "4.2 s"), (9.97, "10 s"), (83.4, "83 s"), (119.7, "2 min 00 s"), (725, "12 min 05 s")],
)
def test_duration_in_words(seconds, text):
    assert duration(seconds) == text
