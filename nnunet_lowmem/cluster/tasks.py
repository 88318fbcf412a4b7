"""What runs on a worker: paths and numbers come, files are left on storage that all see, a small report goes back."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from distributed import get_worker

from nnunet_lowmem.errors import LowMemError, ModelError
from nnunet_lowmem.names import shown
from nnunet_lowmem.network import choices
from nnunet_lowmem.nnunet import model_files
from nnunet_lowmem.nnunet.installed import version_of
from nnunet_lowmem.options import Arithmetic
from nnunet_lowmem.predict import runs
from nnunet_lowmem.predict.cases import Failing, Outcomes
from nnunet_lowmem.predict.jobs import Job
from nnunet_lowmem.predict.outcomes import FailedCase, RunReport
from nnunet_lowmem.predict.prepared import Cut, prepare
from nnunet_lowmem.predict.setup import Setup, checksum
from nnunet_lowmem.predict.ways import Ways
from nnunet_lowmem.report.following import following
from nnunet_lowmem.sizes import asked_bytes, format_gib
from nnunet_lowmem.system import allocator
from nnunet_lowmem.system.clock import Progress
from nnunet_lowmem.system.memory_limits import total_ram_bytes
from nnunet_lowmem.system.owned_folders import BEAT_S
from nnunet_lowmem.system.platform import usable_cores

#: What of a worker's resources is memory, in bytes, and what counts graphics cards.
MEMORY, GPU = "MEMORY", "GPU"
#: Name of the file by which a worker shows that it sees a folder.
TOKEN = "token"  # no secret
# what takes part in making labels
_PACKAGES = (
    *("nnunet-lowmem", "nnunetv2", "torch", "numpy", "scipy", "scikit-image", "SimpleITK", "nibabel"),
    *("batchgenerators", "acvl-utils", "dynamic-network-architectures"),
)
# between two words from a case
_TELL_S = 1.0
# without a sign of life from the command
_DEAD_S = 10 * BEAT_S
# of the libraries' own files, which count for whoever goes by the resident set
_LIBRARY_BYTES = 2**29


class CancelledError(BaseException):
    """Nobody waits for a task any more; only the task handles it."""


@dataclass(frozen=True)
class Sent:
    """A predictor as it goes to workers.

    Attributes
    ----------
    predictor_class : type
        By its name.
    model : tuple
        Arguments of ``initialize_from_trained_model_folder``.
    arguments : dict
        Of the constructor; the device by its name.
    threads : int
        torch's, whatever cores a worker has: sums depend on it.
    arithmetic : Arithmetic or None
        In which the network is run; None where what is asked for leaves no choice, or nobody has chosen yet.
    folder : Path
        Of the command, on storage that all see. Each attempt at a case has a file in it, which the command touches now
        and then; without that, it ends.
    """

    predictor_class: Any
    model: tuple[Any, ...]
    arguments: dict[str, Any]
    threads: int
    arithmetic: Arithmetic | None
    folder: Path

    def key(self) -> str:
        """Tell predictors apart that a worker may keep; other files of weights make another one."""
        files = model_files.checkpoint_files(*self.model)
        states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return repr((self.predictor_class, self.model, sorted(self.arguments.items()), states))


@dataclass(frozen=True)
class Described:
    """What a worker says of itself.

    Attributes
    ----------
    machine : dict
        On which labels may depend.
    unseen : list of str
        Folders of the command that it does not see.
    memory_bytes : int
        That a case may take; 0 where nothing limits it.
    """

    machine: dict[str, str]
    unseen: list[str]
    memory_bytes: int


def describe(folders: Sequence[Path], model_folder: Path) -> Described:
    """Tell what this worker is, and whether it sees what the command sees; its process has our allocator from now on.

    Parameters
    ----------
    folders : sequence of Path
        Of the command, one beside each output.
    model_folder : Path
    """
    if not get_worker().address.startswith("inproc"):  # a thread of the command's process
        allocator.own_process()  # before torch has allocated anything
    unseen = [str(folder.parent) for folder in folders if not _sees(folder)]
    if not model_folder.is_dir():
        unseen.append(str(model_folder))
    return Described(machine(), unseen, _memory_bytes())


def machine() -> dict[str, str]:
    """Return what the labels of this process may depend on beside model and threads."""
    known = choices.machine()
    digest = hashlib.blake2b(known["processor"].encode(), digest_size=3).hexdigest()
    return {
        **{package: version_of(package) for package in _PACKAGES},
        "processor": f"{known['capability']}, {known['processor'][:32].strip()}... {digest}",
        "oneDNN": ", ".join(filter(None, known["onednn"])) or "as it is",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _sees(folder: Path) -> bool:
    try:
        return (folder / TOKEN).read_text() == str(folder)
    except OSError:
        return False


def _memory_bytes() -> int:
    """Return what a case may take here, of what the worker states or is limited to.

    Dask pauses and ends workers at a share of their limit, by the resident set.
    """
    import dask

    worker = get_worker()
    limit = int(worker.memory_manager.memory_limit or 0)
    rules = [worker.memory_manager.memory_pause_fraction]
    if worker.nanny is not None:
        rules.append(dask.config.get("distributed.worker.memory.terminate", False))
    shares = [float(share) for share in rules if share]
    if limit and shares:
        limit = max(_LIBRARY_BYTES, int(limit * min(shares)) - _LIBRARY_BYTES)
    stated = int(worker.state.total_resources.get(MEMORY) or 0)
    return min(filter(None, (stated, limit)), default=0)


_one_at_a_time = threading.Lock()
# the predictor that was used last, by what it was made of
_kept: dict[str, Any] = {}


def forget() -> None:
    """Let go of the predictor, unless a case is predicted with it."""
    if _one_at_a_time.acquire(blocking=False):
        try:
            _kept.clear()
        finally:
            _one_at_a_time.release()


@dataclass(frozen=True)
class Cutting:
    """Into how many boxes a case may be cut; `is_asked_for` by the user, whatever it costs."""

    count: int
    is_asked_for: bool


def perform(
    sent: Sent, job: Job, probabilities: bool, cutting: Cutting | None, on_machine: int, topic: str, attempt: str
) -> RunReport | Cut:
    """Predict a case, or a piece of it, with the predictor of this process, which is made or kept; one at a time.

    Parameters
    ----------
    sent : Sent
    job : Job
    probabilities : bool
        Are written, too.
    cutting : Cutting or None
        The case is not predicted, but prepared for others.
    on_machine : int
        Workers that share the cores of this machine.
    topic : str
        Of the events that tell how far the case is.
    attempt : str
        Name of the file without which nobody waits for it any more.

    Returns
    -------
    RunReport or Cut
        With the case among those done or failed; neither, where nobody waits for it. Of one that is prepared how it is
        cut.

    Raises
    ------
    ModelError
        If the model is not the command's, or cannot be read here.
    """
    tell = _Teller(sent.folder, topic, attempt)
    try:
        with _one_at_a_time, _torch_threads(sent.threads):
            tell.check()
            predictor = _predictor(sent)
            predictor.on_progress = tell
            predictor.kernel_threads = sent.arguments["kernel_threads"] or max(1, usable_cores() // on_machine)
            try:
                given = sent, predictor.picture, job, probabilities
                report, cut = (_predict(*given), None) if cutting is None else _prepare(*given, cutting)
            finally:
                predictor.on_progress = None
    except CancelledError:
        return RunReport()
    except ModelError:
        raise
    except LowMemError as error:
        report, cut = RunReport(failed=[FailedCase.of(job.name, "start", error)]), None
    return cut or replace(report, failed=[_with_worker(case) for case in report.failed])


def _predictor(sent: Sent) -> Any:
    key = sent.key()
    if key not in _kept:
        _kept.clear()
        given = {"device": torch.device(sent.arguments["device"]), "max_ram": _ram(sent)}
        predictor = sent.predictor_class(**{**sent.arguments, **given})
        predictor.initialize_from_trained_model_folder(*sent.model)
        predictor.network_threads = sent.threads
        _kept[key] = predictor
    return _kept[key]


def _ram(sent: Sent) -> Any:
    """Return the budget of a task: what is asked for, if the worker has it."""
    asked, has = asked_bytes("--max_ram", sent.arguments.get("max_ram"), total_ram_bytes()), _memory_bytes()
    return min(filter(None, (asked, has)), default=None)


def _checked(sent: Sent, picture: Setup, job: Job, probabilities: bool) -> Setup:
    if job.recipe is not None and job.recipe.made_with != checksum(picture, probabilities):
        raise ModelError(
            f"the model or its options are not on worker {_name()} what they are where the command runs: all have to "
            "read the same files"
        )
    if sent.arithmetic is not None:
        Ways(picture).take(sent.arithmetic)
    return picture


def _predict(sent: Sent, setup: Callable[[], Setup], job: Job, probabilities: bool) -> RunReport:
    picture, report = _checked(sent, setup(), job, probabilities), RunReport()
    with following(picture, report) as listeners:
        outcomes = Outcomes(report, Failing(foreign_ends_run=False), listeners)
        runs.predict_cases([job], setup, probabilities, outcomes)
    return report


def _prepare(
    sent: Sent, setup: Callable[[], Setup], job: Job, probabilities: bool, cutting: Cutting
) -> tuple[RunReport, Cut | None]:
    picture, report = _checked(sent, setup(), job, probabilities), RunReport()
    with following(picture, report) as listeners:
        outcomes = Outcomes(report, Failing(foreign_ends_run=False), listeners)
        clock = runs.clock_of(job.name, listeners)
        try:
            with runs.followed(clock, listeners):
                made = prepare(
                    picture, job, probabilities, cutting.count, sent.folder, clock, listeners,
                    is_asked_for=cutting.is_asked_for,
                )  # fmt: skip
        except ModelError:
            raise
        except Exception as error:
            outcomes.failed(clock, error)
            return report, None
    return report, made


class _Teller:
    """Tells the command how far a case is, now and then, and ends it where nobody waits for it."""

    def __init__(self, folder: Path, topic: str, attempt: str) -> None:
        self._attempt, self._topic = folder / attempt, topic
        self._worker, self._last_s, self._stage = get_worker(), 0.0, ""
        self._beat, self._beat_s = 0, time.monotonic()

    def check(self) -> None:
        """Look whether somebody waits.

        Raises
        ------
        CancelledError
        """
        try:
            beat = self._attempt.stat().st_mtime_ns
        except OSError:
            raise CancelledError from None
        now_s = time.monotonic()
        if beat != self._beat:
            self._beat, self._beat_s = beat, now_s
        elif now_s > self._beat_s + _DEAD_S:
            raise CancelledError

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if now_s < self._last_s + _TELL_S and progress.stage == self._stage:
            return
        self._last_s, self._stage = now_s, progress.stage
        self.check()
        self._worker.log_event(self._topic, {"attempt": self._attempt.name, **vars(progress)})


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _name() -> str:
    return shown(str(get_worker().name))


def _with_worker(case: FailedCase) -> FailedCase:
    has = _memory_bytes()
    where = f"worker {_name()}, {format_gib(has)}" if has else f"worker {_name()}"
    return replace(case, error=None, reason=f"{case.reason} ({where})")
