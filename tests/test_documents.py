"""What the documents say can be followed: links and anchors lead somewhere, commands parse, examples run."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import ModelSpec

import nnunet_lowmem
from nnunet_lowmem import CaseReport, Progress
from nnunet_lowmem.commands import cli

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
BESIDE = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "patches/README.md")]
PAGES = [README, *BESIDE, *sorted(DOCS.glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
# what `...` stands for in a command: that which it cannot do without
REST = {
    "nnUNetv2_predict_lowmem": ["-i", "IMAGES", "-o", "OUT", "-m", "MODEL"],
    "compare": ["-i", "IMAGES", "-m", "MODEL"],
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return what links to the headings of a page may say, as GitHub makes it of their text."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(prose(page)):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def links(page: Path) -> list[str]:
    return [target for target in LINK.findall(prose(page)) if not re.match(r"https?:", target)]


@each_page
def test_links_lead_to_files_and_headings(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        led_to = (page.parent / path).resolve() if path else page
        assert led_to.is_relative_to(ROOT), target
        assert led_to.exists(), target
        assert not anchor or anchor in anchors(led_to), f"{target}: there are {sorted(anchors(led_to))}"


def test_the_index_leads_to_every_page():
    named = {target.partition("#")[0] for target in links(DOCS / "README.md")}
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= named
    assert sum(len(links(page)) for page in PAGES) > 150  # they are found


def test_the_readme_is_short_and_begins_with_the_two_commands():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 140 and not line.startswith("|")] == []
    first_screen = "\n".join(lines[:32])
    for expected in ("pip install . && nnunet-lowmem demo", 'pip install ".[test]" && pytest', "docs/classes.svg"):
        assert f"\n{expected}\n" in first_screen or f"({expected})" in first_screen


# -- commands ----------------------------------------------------------------------------------------------------------


def commands_in(line: str) -> Iterator[list[str]]:
    """Split a line as a shell does into the words of its commands, without variables before them and redirections."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    words: list[str] = []
    for word in [*reader, "&&"]:
        if set(word) <= set("&|;"):
            redirected = next((at for at, other in enumerate(words) if set(other) <= set("<>&")), len(words))
            named = next((at for at, other in enumerate(words) if not re.match(r"\w+=", other)), len(words))
            yield words[named:redirected]
            words = []
        else:
            words.append(re.sub(r"\$\w+", "0", word))


def examples(page: Path) -> list[list[str]]:
    """Return the commands of ours in blocks and in running text; a name without arguments is no example there."""
    blocks = [text for kind, text in FENCED.findall(page.read_text()) if kind in ("", "sh", "bash")]
    lines = [line for text in blocks for line in text.replace("\\\n", " ").splitlines()]
    told = [words for line in lines if is_ours(line) for words in commands_in(line)]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    said = [words for span in spans if is_ours(span) for words in commands_in(span)]
    of_ours = [words for words in told if words[:1] in (["nnUNetv2_predict_lowmem"], ["nnunet-lowmem"])]
    return of_ours + [words for words in said if is_ours(" ".join(words[:1])) and len(words) > 2]


def is_ours(line: str) -> bool:
    return re.search(r"(^|\s)(nnUNetv2_predict_lowmem|nnunet-lowmem)(\s|$)", line) is not None


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr(cli, "guarded", lambda command, verbose: 0)


def exit_code_of(words: list[str]) -> Any:
    """Have the real commands parse words; `nothing_runs` behind that."""
    program, *arguments = words
    name = arguments[0] if program == "nnunet-lowmem" else program
    if name in REST and "..." in arguments:
        at = arguments.index("...")
        arguments[at : at + 1] = REST[name]
    try:
        return (cli.main if program == "nnunet-lowmem" else cli.predict_entry_point)(arguments)
    except SystemExit as end:
        return end.code


@each_page
def test_commands_are_understood(page, nothing_runs, capsys):
    for words in examples(page):
        assert exit_code_of(words) == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("wrong", ["nnUNetv2_predict_lowmem -i A -o B --max_rma 4G", "nnunet-lowmem docter A"])
def test_commands_are_found_and_wrong_ones_are_not_understood(wrong, nothing_runs):
    assert sum(len(examples(page)) for page in PAGES) > 60
    assert exit_code_of(wrong.split()) == 2


def test_a_line_is_split_as_a_shell_does():
    line = "A=1 nnunet-lowmem doctor - > log 2>&1 | cat && pytest -x $N  # why"
    assert list(commands_in(line)) == [["nnunet-lowmem", "doctor", "-"], ["cat"], ["pytest", "-x", "0"]]


# -- Python ------------------------------------------------------------------------------------------------------------


def python_blocks(page: Path) -> list[str]:
    return [text for kind, text in FENCED.findall(page.read_text()) if kind == "python"]


@each_page
def test_python_examples_compile(page):
    for number, text in enumerate(python_blocks(page)):
        compile(text, f"{page.name}, example {number}", "exec")


def test_python_examples_run_one_after_the_other(models, images, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="nnunet_lowmem")  # which is put back
    (tmp_path / "in").mkdir()
    (image,) = images("small")
    shutil.copy(image, tmp_path / "in" / "case_0000.nii.gz")
    places = {'"MODEL_FOLDER': models(ModelSpec(), [image]), '"IMAGES': tmp_path / "in", '"OUT': tmp_path / "out"}
    blocks = python_blocks(DOCS / "python.md")
    namespace: dict[str, Any] = {"__name__": "examples"}
    for number, text in enumerate(blocks):
        for name, place in places.items():
            text = text.replace(name, f'"{place}')
        exec(compile(text, f"python.md, example {number}", "exec"), namespace)
    assert len(blocks) > 8
    assert (tmp_path / "out" / "case.nii.gz").exists()
    assert list(namespace["seconds"]) == list(namespace["failed"]) == ["case"]
    assert "--max_ram" in namespace["failed"]["case"]
    assert namespace["probabilities"].shape[1:] == namespace["one"].shape == namespace["image"].shape[1:]
    assert np.array_equal(namespace["one"], namespace["other"])
    assert namespace["segmentation"].shape == namespace["array"].shape[1:]


def rows_of(page: Path) -> dict[str, list[str]]:
    """Return the rows of tables by what stands in their first cell."""
    rows = re.findall(r"^\| `([^`]+)` \|(.*)\|$", page.read_text(), re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


def test_every_error_is_told_with_its_exit_code():
    told = rows_of(DOCS / "python.md")
    for name in nnunet_lowmem.__all__:
        kind = getattr(nnunet_lowmem, name)
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert re.match(rf"{kind.exit_code}\b", told[name][-1]), name


@pytest.mark.parametrize("argument, told", [("on_progress", Progress), ("on_case", CaseReport)])
def test_every_field_that_a_callback_gets_is_told(argument, told):
    row = " ".join(rows_of(DOCS / "python.md")[argument])
    assert {field.name for field in fields(told)} <= set(re.findall(r"`(\w+)`", row))


# -- citation ----------------------------------------------------------------------------------------------------------


def test_the_citation_is_of_this_version():
    (version,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == nnunet_lowmem.__version__
