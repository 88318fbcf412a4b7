"""``nnunet-lowmem compare``: stock's command and ours on the same model and images, each in processes of its own.

The two run in turn, never at once. What they write, temporary files of stock's processes included, lies in one folder
that is removed at the end, unless a folder to keep the results in was given.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from nnunet_lowmem.errors import BudgetError, UsageError
from nnunet_lowmem.report.label_differences import LabelDifference, compare_folders
from nnunet_lowmem.report.measured_command import MeasuredCommand, machine_facts, run_measured
from nnunet_lowmem.system.memory_limits import available_ram, less_headroom
from nnunet_lowmem.system.owned_folders import temporary_folder

SIDES = ("stock", "ours")
#: Flag of `commands.one_side`, which is started by its name.
DETERMINISTIC = "--deterministic"
#: Sockets of stock's manager lie in its temporary folder; their whole path may have so many characters.
_SOCKET_PATH_LIMIT = 103
_SOCKET_NAME = "/pymp-12345678/listener-12345678"
_LOG_LINES = 12


@dataclass(frozen=True)
class Request:
    """What is to be compared.

    Attributes
    ----------
    model_folder : str
    cases : tuple of str
        Names of the cases that both predict.
    file_ending : str
        Of the label maps.
    device : str
        As in ``-device``.
    flags, our_flags : tuple of str
        Of both commands, and of ours alone.
    repeat : int
        How often each side runs.
    stock_limit_bytes : int or None
        Memory beyond which stock is ended; what the machine has, less headroom, if not given.
    deterministic : bool
        Whether CUDA is kept from choosing other algorithms from run to run.
    keep : Path or None
        Folder for what both write; it must be empty.
    """

    model_folder: str
    cases: tuple[str, ...]
    file_ending: str
    device: str
    flags: tuple[str, ...]
    our_flags: tuple[str, ...] = ()
    repeat: int = 1
    stock_limit_bytes: int | None = None
    deterministic: bool = False
    keep: Path | None = None


@dataclass
class Comparison:
    """What both sides took and made.

    Attributes
    ----------
    runs : dict of list of MeasuredCommand
        By side; stock has fewer where it was ended.
    labels : list of LabelDifference
        Of the round in which most voxels differ; empty where stock was ended.
    logs : dict of str
        By side, the last lines that the last run has printed.
    """

    runs: dict[str, list[MeasuredCommand]] = field(default_factory=lambda: {side: [] for side in SIDES})
    labels: list[LabelDifference] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)

    @property
    def stopped(self) -> str:
        """Why stock was ended; empty if it was not."""
        return next((run.stopped for run in self.runs["stock"] if run.stopped), "")

    @property
    def differing(self) -> int:
        """Voxels that differ, over all cases."""
        return sum(case.differing for case in self.labels)

    @property
    def exit_code(self) -> int:
        """0: the same labels, 1: others, or a side failed, 3: stock was ended and nothing could be compared."""
        if self.stopped:
            return BudgetError.exit_code
        return 0 if not self.failed_side() and all(case.identical for case in self.labels) else 1

    def failed_side(self) -> str:
        """Return the side that did not finish although nobody ended it; empty if both did."""
        failed = (side for side, runs in self.runs.items() if any(run.exit_code and not run.stopped for run in runs))
        return next(failed, "")

    def median_of(self, side: str, value: Callable[[MeasuredCommand], float | None]) -> float | None:
        """Return the median over the runs of a side that have this value."""
        found = [number for number in map(value, self.runs[side]) if number is not None]
        return median(found) if found else None

    def mean_dice(self) -> float | None:
        """Return the mean over cases and labels; None where there is no label but background."""
        found = [dice for case in self.labels for dice in case.dice.values()]
        return fmean(found) if found else None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data, sizes in bytes."""
        return {
            "exit_code": self.exit_code,
            **{side: [run.as_dict() for run in runs] for side, runs in self.runs.items()},
            "labels": None if self.stopped else [asdict(case) for case in self.labels],
            "differing": None if self.stopped else self.differing,
            "mean_dice": self.mean_dice(),
            "machine": machine_facts(),
        }


def compare(request: Request, tell: Callable[[str], None]) -> Comparison:
    """Run both sides as often as asked, in turn, and compare their label maps after each round.

    Parameters
    ----------
    request : Request
    tell : callable
        Gets a line before each run.

    Raises
    ------
    UsageError
        If the folder to keep results in is not empty, or cannot be made.
    """
    comparison = Comparison()
    if request.keep is not None:
        _make_empty(request.keep)
    with temporary_folder() as folder:
        root = request.keep or folder
        for number in range(1, request.repeat + 1):
            for side in SIDES:
                if side == "stock" and comparison.stopped:
                    continue
                tell(f"{side}, run {number} of {request.repeat}")
                comparison.runs[side].append(_run(request, side, root, folder))
                comparison.logs[side] = _last_lines(root / f"{side}.log")
            if not comparison.stopped:
                found = compare_folders(root / "stock", root / "ours", request.cases, request.file_ending)
                comparison.labels = max(found, comparison.labels, key=_badness)
    if request.keep is not None:
        (request.keep / "compare.json").write_text(json.dumps(comparison.as_dict(), indent=1))
    return comparison


def _run(request: Request, side: str, root: Path, folder: Path) -> MeasuredCommand:
    limit_bytes = None
    if side == "stock":
        machine = available_ram()
        limit_bytes = request.stock_limit_bytes or (None if machine is None else less_headroom(machine.free_bytes))
    return run_measured(
        side_command(request, side, root / side),
        side_environment(request.device, folder, os.environ),
        folder / f"{side}.trace",
        limit_bytes,
        log=root / f"{side}.log",
    )


def side_command(request: Request, side: str, output: Path) -> list[str]:
    """Return the command line of one side; which of several GPUs it uses is told by the environment."""
    command = [sys.executable, "-m", "nnunet_lowmem.commands.one_side", side, request.model_folder, *request.flags]
    command += ["-o", str(output), "-device", request.device.partition(":")[0]]
    command += [DETERMINISTIC] if request.deterministic and request.device.startswith("cuda") else []
    return command + (list(request.our_flags) if side == "ours" else [])


def side_environment(device: str, folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of both sides: temporary files in `folder`, and the one GPU, if its number was given.

    What they print goes into a log of ours, so it need not be what this process's terminal can show.
    """
    changed = {**environment, "PYTHONIOENCODING": "utf-8:backslashreplace"}
    if len(str(folder) + _SOCKET_NAME) <= _SOCKET_PATH_LIMIT:
        changed["TMPDIR"] = str(folder)
    kind, _, number = device.partition(":")
    if kind == "cuda" and number:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        changed["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(number)] if visible else number
    return changed


def _badness(labels: Sequence[LabelDifference]) -> tuple[int, int]:
    return sum(bool(case.problem) for case in labels), sum(case.differing for case in labels)


def _last_lines(log: Path) -> str:
    lines = [line.rstrip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-_LOG_LINES:])


def _make_empty(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = next(folder.iterdir(), None)
    except OSError as error:
        raise UsageError(f"-o: {folder} cannot be made: {error.strerror}") from None
    if occupied is not None:
        raise UsageError(
            f"-o: {folder} must be empty, or label maps of other runs are compared; it holds {occupied.name}"
        )
