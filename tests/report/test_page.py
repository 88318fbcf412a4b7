"""`lowmem_report.html`: it says what was measured, strangers' names stay text, and it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import SimpleITK
from factory import ModelSpec
from images import broken
from images import read as read_image
from oracle import make_predictor, outputs
from PIL import Image

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.commands import cli
from nnunet_lowmem.errors import CasesFailedError
from nnunet_lowmem.predict.outcomes import CaseReport, LabelVolume, RunReport
from nnunet_lowmem.report.memory_chart import Limits, MemoryStory, memory_chart
from nnunet_lowmem.report.page import REPORT_FILE, HtmlReport, duration, millilitres
from nnunet_lowmem.report.slices import LONGEST_PIXELS, colour
from nnunet_lowmem.types import Place

HOSTILE = "<script>alert(1)<b onload='x'>&{{ 7 * 7 }}"
HOSTILE_LABEL = '"></style></p><script src=http://example.org/x.js></script>'
VOID = {"col", "meta", "img", "source", "br", "wbr", "link", "input", "hr"}


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
        plan = article.one("details", **{"class": "plan"})
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
    for place in ("li", "td"):
        assert any(HOSTILE_LABEL in item.text for item in page.all(place))
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


def rows_of(table: Node) -> list[list[str]]:
    return [[cell.text for cell in row.all("td")] for row in table.one("tbody").all("tr")]


def test_labels_are_told_with_the_volumes_that_the_file_has(run):
    predictor, _, page = run
    assert len(page.all("details", **{"class": "labels"})) == len(predictor.run_report.done), "none of what failed"
    for case in predictor.run_report.done:
        written = read_image(case.output)
        values, voxels = np.unique(SimpleITK.GetArrayFromImage(written), return_counts=True)
        voxel_ml = np.prod(written.GetSpacing()) / 1000
        names = {1: HOSTILE_LABEL, 2: "b", 3: "c", 4: "d"}
        told = {
            int(v): [names[v], f"{n:,}", millilitres(n * voxel_ml)] for v, n in zip(values, voxels, strict=True) if v
        }
        article = page.one("article", data_case=case.case)
        table = article.one("details", **{"class": "labels"})
        assert rows_of(table.one("table")) == [[str(value), *row] for value, row in told.items()]
        assert f"{len(told)} label" in table.one("summary").text
        assert table.one("summary").text.endswith(f", {millilitres(voxels[values > 0].sum() * voxel_ml)} ml")
        legend = [item.text for item in article.one("ul", **{"class": "legend"}).all("li")]
        assert legend
        assert set(legend) <= {f"{name} {ml} ml" for name, _, ml in told.values()}


def page_of(case: CaseReport, labels: list[LabelVolume], folder: Path) -> Node:
    """The page of a case that a worker elsewhere has done: its labels come with its report, and no picture."""
    with HtmlReport(folder, folder, {}, RunReport(done=[replace(case, labels=tuple(labels))])):
        pass
    return read(folder)


def test_many_labels_wait_to_be_opened_in_order_and_as_text(run, tmp_path):
    hostile = "<img src=x onerror=alert(1)>"
    labels = [LabelVolume(value, f"{hostile}{value}", 10**value, value / 200) for value in (7, 13, *range(1, 7), 900)]
    labels += [LabelVolume(value, f"{hostile}{value}", 1_234_567, 4321.04) for value in range(20, 25)]
    page = page_of(run[0].run_report.done[0], labels, tmp_path)
    details = page.one("details", **{"class": "labels"})
    assert "open" not in details.attributes
    tables = details.all("table")
    rows = [row for table in tables for row in rows_of(table)]
    assert [int(value) for value, *_ in rows] == sorted(label.value for label in labels)
    assert rows[0] == ["1", f"{hostile}1", "10", "< 0.01"]
    assert ["24", f"{hostile}24", "1,234,567", "4,321.0"] in rows
    assert not details.all("img")
    swatches = [cell.attributes["style"] for table in tables for cell in table.all("i")]
    assert swatches == [f"background:{colour(int(value))}" for value, *_ in rows]
    first, second = ([col.attributes for col in table.all("col")] for table in tables)
    assert first == second, "both are one to the eye"


def test_few_labels_are_open_and_what_has_no_spacing_has_no_volume(run, tmp_path):
    labels = [LabelVolume(2, "b", 1000, None), LabelVolume(1, "a", 5, None)]
    details = page_of(run[0].run_report.done[0], labels, tmp_path).one("details", **{"class": "labels"})
    assert "open" in details.attributes
    assert details.one("summary").text == "2 labels"
    assert rows_of(details.one("table")) == [["1", "a", "5"], ["2", "b", "1,000"]]
    assert [head.text for head in details.all("th")] == ["value", "label", "voxels"]


def test_case_without_labels_has_no_table(run, tmp_path):
    page = page_of(run[0].run_report.done[0], [], tmp_path)
    assert page.one("article")
    assert not page.all("details", **{"class": "labels"})


@pytest.mark.parametrize(
    "ml, text",
    [(0, "< 0.01"), (0.0099, "< 0.01"), (0.01, "0.01"), (3.14159, "3.14"), (9.996, "10.0"), (4321.04, "4,321.0")],
)
def test_volumes_in_words(ml, text):
    assert millilitres(ml) == text


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
    article = read(tmp_path).one("article")
    assert len(article.all("img")) == slices
    has_ml = "ml" in [head.text for head in article.one("details", **{"class": "labels"}).all("th")]
    assert has_ml == any(" ml" in item.text for item in article.all("li")) == (spec is not PICTURES)
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
