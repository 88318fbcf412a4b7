"""How far the runs of a log came, by what nnU-Net, this package and tools say on their way."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field

#: In lower case; each line that tells of the way holds one.
SIGNS = (
    *("predict", "sending off", "segmentation export", "non-multiprocessing", "cite", "source folder", "saved in"),
    *(": done in ", ": failed in ", "cases done"),
)

_BEGINNING = re.compile(r"^Please cite (?:the following paper|nnU-Net) when|^There are \d+ cases in the source folder")
_TO_PREDICT = re.compile(r"^There are (\d+) cases that I would like to predict")
_CASE = re.compile(r"^\s*Predicting (?!part \d).+:\s*$|^case .+: prediction, \d+ of \d+")
_SENT, _WAITING = "sending off prediction", "Waiting for remaining segmentation exports"
_DONE, _FAILED = re.compile(r"^case .+: done in \d"), re.compile(r"^case .+: failed in \w")
# the last line of stock, of ours, and of TotalSegmentator, which hides what nnU-Net says
_COMPLETE = re.compile(r"Segmentation export complete|^\d+ of \d+ cases done|^\s*Saved in [\d.]+")
_IN_ONE_PROCESS = "Running in non-multiprocessing mode"


@dataclass
class Run:
    """One run in a log.

    Attributes
    ----------
    first_line : int
    cases, begun, predicted, failed : int
        How many cases there are to predict, how many tells that it is begun, has been through the network, has failed.
    last : str
        The last thing that it said of its way: a key of `process_troubles.ENDINGS`, "complete", or empty where its
        messages do not tell.
    complete_line : int
        Where it said that it was complete.
    """

    first_line: int = 0
    cases: int = 0
    begun: int = 0
    predicted: int = 0
    failed: int = 0
    last: str = ""
    complete_line: int = 0
    _is_silent: bool = False

    def follow(self, number: int, line: str) -> None:
        """Note what a line tells."""
        if found := _TO_PREDICT.match(line):
            self.cases = int(found[1])
            self._say("preprocessing" if self.cases else "")
        elif _CASE.match(line):
            self.begun += line.lstrip().startswith("Predicting")
            self._say("predicting")
        elif _SENT in line:
            self.predicted += 1
            self._say("sent")
        elif _WAITING in line:
            self._say("waiting")
        elif _DONE.match(line):
            self.predicted += 1
            self._say("sent")
        elif _FAILED.match(line):
            self.failed += 1
        elif _COMPLETE.search(line):
            self.last, self.complete_line = "complete", number
        elif _IN_ONE_PROCESS in line:  # it says nothing more, even at its end
            self._is_silent, self.last = True, ""

    def _say(self, last: str) -> None:
        self.last = "" if self._is_silent else last

    @property
    def is_complete(self) -> bool:
        """Whether it ended as a run does in which nothing is missing."""
        return self.last == "complete" and not self.failed

    def has_overcome(self, number: int) -> bool:
        """Whether it went on to its end behind a line."""
        return self.is_complete and number <= self.complete_line

    def in_words(self) -> str:
        """Say how many cases were predicted; nothing where it does not tell."""
        cases = max(self.cases, self.begun)
        return f"{self.predicted} of {cases} cases went through the network" if self.last and cases else ""


@dataclass
class Way:
    """All runs of a log.

    Attributes
    ----------
    runs : list of Run
        In their order; the first begins with the log.
    """

    runs: list[Run] = field(default_factory=lambda: [Run()])

    def follow(self, number: int, line: str) -> None:
        """Note what a line tells; a run begins where one says so that comes behind another."""
        if _BEGINNING.match(line) and self.runs[-1].last:
            self.runs.append(Run(number))
        self.runs[-1].follow(number, line)

    def run_of(self, number: int) -> int:
        """Return which run a line belongs to."""
        return bisect_right([run.first_line for run in self.runs], number) - 1
