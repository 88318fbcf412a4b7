"""What a log shows: known troubles by their lines, how far the run came, and how it ended."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunet_lowmem.doctor import input_troubles, process_troubles
from nnunet_lowmem.doctor.hiding import CASE_NAMES, Hider
from nnunet_lowmem.doctor.log_text import Block
from nnunet_lowmem.doctor.tools import NNUNET, TOOLS, Tool
from nnunet_lowmem.doctor.trouble import Trouble
from nnunet_lowmem.doctor.way import SIGNS, Way

TROUBLES = (*process_troubles.TROUBLES, *input_troubles.TROUBLES, process_troubles.UNKNOWN)

_LAST_LINES = 8
_LONGEST_SHOWN = 300
# of more cases names are not kept
_MOST_NAMES = 10_000
# of a traceback: a line of source follows
_FRAME = re.compile(r"^\s*File \".*\", line \d+")
_ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*_?[A-Z]\w*(?:Error|Exception|Warning): ")
# marks below lines of source, rulers, rows of tables, which may cut names in two
_UNTELLING = re.compile(r"^\s*(?:\^+|~*\^+~*|[#=*-]{5,}|[│┃┏┡└])")


@dataclass(frozen=True)
class Symptom:
    """A known trouble that the log shows.

    Attributes
    ----------
    trouble : Trouble
    line_number : int
        Of the first line that shows it; 0 where the end of the log does.
    line : str
        Without names of persons, places and machines.
    count : int
        How many lines show it.
    numbers : str
        What the numbers in the line are.
    is_overcome : bool
        Every run that shows it went on to its end.
    """

    trouble: Trouble
    line_number: int = 0
    line: str = ""
    count: int = 0
    numbers: str = ""
    is_overcome: bool = False

    @property
    def fails(self) -> bool:
        """Whether it will come again."""
        return self.trouble.fails and not self.is_overcome

    def as_json(self) -> dict[str, Any]:
        """Return plain data for scripts."""
        told = {"name": self.trouble.name, "happened": self.trouble.happened, "fails": self.fails}
        told |= {"is_consequence": self.trouble.is_consequence, "line_number": self.line_number, "line": self.line}
        return told | {"count": self.count, "numbers": self.numbers, "is_overcome": self.is_overcome}


@dataclass(frozen=True)
class Diagnosis:
    """What a log shows.

    Attributes
    ----------
    tool : Tool
        Whose log it is.
    symptoms : tuple of Symptom
        Causes first, then what follows from them, then what was overcome.
    is_complete : bool
        The last run ends as one does in which nothing is missing.
    last_lines : tuple of str
        That may matter where nothing is known; without names.
    way : str
        How far the last run came; empty where it does not tell.
    """

    tool: Tool
    symptoms: tuple[Symptom, ...]
    is_complete: bool
    last_lines: tuple[str, ...]
    way: str

    @property
    def causes(self) -> list[Symptom]:
        """Return what does not follow from something else in the log."""
        found = [told for told in self.symptoms if not told.is_overcome]
        return [told for told in found if not told.trouble.is_consequence] or found

    @property
    def fails(self) -> bool:
        """Whether it will fail again."""
        return any(told.fails for told in self.symptoms)

    def as_json(self) -> dict[str, Any]:
        """Return plain data for scripts."""
        found = [symptom.as_json() for symptom in self.symptoms]
        told = {"tool": self.tool.name, "troubles": found, "way": self.way, "is_complete": self.is_complete}
        return told | {"last_lines": self.last_lines}


def diagnose(blocks: Iterable[Block], troubles: Sequence[Trouble] = TROUBLES) -> Diagnosis:
    """Read a log to its end."""
    reading = _Reading(troubles)
    for block in blocks:
        reading.take(block)
    return reading.diagnosis()


@dataclass
class _Shown:
    """Lines of one run that show a trouble: the first of them, or the error itself rather than what raised it."""

    trouble: Trouble
    number: int
    line: str
    numbers: str
    last_number: int
    count: int = 1

    def add(self, other: _Shown) -> None:
        if self.line[:1] == " " != other.line[:1]:
            self.number, self.line = other.number, other.line
        self.numbers = self.numbers or other.numbers
        self.last_number, self.count = other.last_number, self.count + 1


@dataclass
class _Reading:
    troubles: Sequence[Trouble]
    found: dict[tuple[str, int], _Shown] = field(default_factory=dict)
    tools: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    way: Way = field(default_factory=Way)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))

    def take(self, block: Block) -> None:
        """Look for signs in the whole block, and only where there are any at its lines."""
        whole = "\n".join(line for _, line in block.lines).lower()
        self.tools |= {tool.name for tool in TOOLS if any(sign in whole for sign in tool.signs)}
        for number, line in block.lines if any(sign in whole for sign in SIGNS) else ():
            self.way.follow(number, line)
        if "case" in whole or "predicting" in whole or "done" in whole:
            self._note_names(block)
        plain, source = _without_source(block.lines) if 'file "' in whole else (block.lines, [])
        for trouble in self.troubles:
            if any(sign in whole for sign in trouble.signs):
                plain = self._without_those_of(trouble, plain)
                if trouble.in_source:
                    source = self._without_those_of(trouble, source)
        told = [line for _, line in block.lines[-20 * _LAST_LINES :] if line.strip()]
        self.tail.extend(line for line in told if not _UNTELLING.match(line) and not _FRAME.match(line))

    def _note_names(self, block: Block) -> None:
        for _, line in block.lines:
            if len(self.names) < _MOST_NAMES and (named := CASE_NAMES.search(line)):
                self.names.add(named[named.lastgroup or 0])

    def _without_those_of(self, trouble: Trouble, lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """Note lines that show a trouble, and return the others: of two that a line shows, the first counts."""
        others = []
        for number, line in lines:
            lower = line.lower()
            match = trouble.pattern.search(line) if any(sign in lower for sign in trouble.signs) else None
            if match is None:
                others.append((number, line))
                continue
            text = line if trouble is process_troubles.UNKNOWN else _telling(line, match)
            shown = _Shown(trouble, number, text, trouble.numbers(match), number)
            key = trouble.name, self.way.run_of(number)
            if key in self.found:
                self.found[key].add(shown)
            else:
                self.found[key] = shown
        return others

    def diagnosis(self) -> Diagnosis:
        hider, last = Hider(self.names), self.way.runs[-1]
        symptoms = [told for trouble in self.troubles if (told := self._symptom(trouble, hider)) is not None]
        return Diagnosis(
            tool=next((tool for tool in TOOLS if tool.name in self.tools), NNUNET),
            symptoms=tuple(_explained(symptoms, last.last)),
            is_complete=last.is_complete,
            last_lines=tuple(hider.hidden(line, with_quoted=True)[:_LONGEST_SHOWN] for line in self.tail),
            way=last.in_words(),
        )

    def _symptom(self, trouble: Trouble, hider: Hider) -> Symptom | None:
        """Tell of a trouble as the last run shows it that did not go on to its end, or else the last."""
        runs = {run: shown for (name, run), shown in self.found.items() if name == trouble.name}
        if not runs:
            return None
        ended = {run: shown for run, shown in runs.items() if not self.way.runs[run].has_overcome(shown.last_number)}
        shown = (ended or runs)[max(ended or runs)]
        line = hider.hidden(shown.line.strip(), with_quoted=trouble is process_troubles.UNKNOWN)[:_LONGEST_SHOWN]
        count = sum(each.count for each in runs.values())
        return Symptom(trouble, shown.number, line, count, shown.numbers, is_overcome=not ended)


def _without_source(lines: list[tuple[int, str]]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Return the lines, and by themselves those of source that a traceback shows: they tell of what might happen."""
    plain: list[tuple[int, str]] = []
    source: list[tuple[int, str]] = []
    follows = False
    for number, line in lines:
        (source if follows else plain).append((number, line))
        follows = _FRAME.match(line) is not None
    return plain, source


def _telling(line: str, match: re.Match[str]) -> str:
    """Return of a line the error's name and what tells of the trouble: the rest may name anything."""
    start = line[: match.start()]
    blanks = start[: len(start) - len(start.lstrip())]
    error = _ERROR.match(start.lstrip())
    return f"{blanks}{error[0] if error else ''}{match[0].strip(': ')}"


def _explained(symptoms: list[Symptom], last: str) -> list[Symptom]:
    """Put causes first, leave out what is not known where something is, and add how the run ended if nothing tells."""
    unknown, endings = process_troubles.UNKNOWN, process_troubles.ENDINGS
    order = sorted(symptoms, key=lambda told: (told.is_overcome, told.trouble.is_consequence, not told.fails))
    if any(told.trouble is not unknown and not told.trouble.is_consequence and told.fails for told in order):
        order = [told for told in order if told.trouble is not unknown]
    failures = [told.trouble for told in order if told.fails]
    if last in endings and not failures:
        return [Symptom(endings[last]), *order]
    if last in ("preprocessing", "sent", "waiting") and all(trouble.is_end for trouble in failures):
        # whoever ended it may have waited for what never came
        ending = [Symptom(endings[last])]
        return order + ending if last == "preprocessing" else ending + order
    return order
