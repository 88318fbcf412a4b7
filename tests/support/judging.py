"""What stock's reader and ours make of a file, found in a child process: ITK may crash, hang, or ask for all memory.

Whether a voxel that stock returns has really been in the file is found without knowing the format: the same file is
read with other bytes of voxels, and a voxel that is still the same was filled up.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE_S = 15
MEMORY_BYTES = 192 * 2**20
Files = dict[str, bytes]


@dataclass(frozen=True)
class Answer:
    """What one of the two says: an image, or an error."""

    error: str = ""
    kind: str = ""
    is_ours: bool = False
    step: str = ""

    def __str__(self) -> str:
        return f"{self.kind} by {self.step}: {self.error}" if self.kind else "an image"


@dataclass(frozen=True)
class Verdict:
    """Stock's answer and ours; where both are images, what differs. `crashed` names the one that did not return."""

    stock: Answer = Answer()
    ours: Answer = Answer()
    shape: tuple[int, ...] = ()
    axes: int = 3
    components: int = 1
    is_whole: bool = True
    is_finite: bool = True
    difference: str = ""
    crashed: str = ""
    peak_bytes: int = 0


@dataclass
class Judge:
    """Asks a child; where that died, another is asked about ours alone.

    Stock's libraries write beyond their memory at some files, and the child dies of it at a later one.
    """

    memory_bytes: int = MEMORY_BYTES
    patience_s: int = PATIENCE_S
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="judging")))
    _parent: Any = None
    _pipe: Any = None
    _asked: deque[tuple[str, Files, bool]] = field(default_factory=lambda: deque(maxlen=1000))  # of the present child

    def __call__(self, reader: str, files: Files, other: Files | None = None, stock: bool = True) -> Verdict:
        """Judge the first of `files`; `other` are the same with other voxels."""
        if self._parent is None:
            self._start()
        self._pipe.send((reader, files, other, stock))
        self._asked.append((reader, files, stock))
        step = "start"
        while True:
            kind, content = self._pipe.recv()
            if kind == "verdict":
                return content
            if kind == "step":
                step = content
            if kind == "died":
                break
        *earlier, _ = self._asked
        self._asked.clear()
        if step == "start" and any(with_stock for *_, with_stock in earlier):
            return self._once_more(earlier, reader, files, other, stock)
        if step == "stock":
            ours = self(reader, files, None, stock=False)
            return replace(ours, stock=Answer(f"{step} died: {content}", "Crash", step="stock"))
        return Verdict(crashed=f"{step} died: {content}")

    def _once_more(self, earlier: Sequence[tuple[str, Files, bool]], *question: Any) -> Verdict:
        """Ask of the earlier files what ours alone makes of them: if the child dies again, it is ours that hurts it."""
        for reader, files, _ in earlier:
            verdict = self(reader, files, stock=False)
            if verdict.crashed:
                return verdict
        return self(*question)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._parent = context.Process(
            target=serve, args=(theirs, self.folder, self.memory_bytes, self.patience_s), daemon=True
        )
        self._parent.start()
        theirs.close()

    def end(self) -> None:
        if self._parent is not None:
            self._parent.terminate()
            self._parent.join()
            self._pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def serve(pipe: Connection, folder: Path, memory_bytes: int, patience_s: int) -> None:
    """Import everything once, and keep one child that answers."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    import numpy as np
    import SimpleITK
    import skimage.io
    import tifffile
    import torch
    from preprocessing_oracle import Model

    import nnunet_lowmem.preprocessing.case

    torch.set_num_threads(1)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    Model().managers()
    skimage.io.imsave(folder / "a.png", np.zeros((2, 2), np.uint8), check_contrast=False)
    skimage.io.imread(folder / "a.png")
    assert nnunet_lowmem.preprocessing.case
    assert tifffile
    warnings.filterwarnings("error", module=r"nnunet_lowmem")
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    os.setpgid(0, 0)
    while True:
        child = os.fork()
        if child == 0:
            _answer_all(pipe, folder, memory_bytes, patience_s)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        by_itself = os.WIFEXITED(status)  # a library may end the process
        pipe.send(("died", f"exit {status >> 8}" if by_itself else signal.Signals(os.WTERMSIG(status)).name))


def _answer_all(pipe: Connection, folder: Path, memory_bytes: int, patience_s: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + memory_bytes,) * 2)
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        signal.alarm(patience_s)  # kills
        verdict = _verdict(folder, lambda step: pipe.send(("step", step)), *question)
        signal.alarm(0)
        pipe.send(("verdict", verdict))


def _data_bytes() -> int:
    return _status_bytes("VmData:")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def lay_out(folder: Path, files: Files) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder / next(iter(files)))


def _verdict(
    folder: Path, tell: Callable[[str], None], reader: str, files: Files, other: Files | None, ask_stock: bool
) -> Verdict:
    import numpy as np
    from preprocessing_oracle import ZSCORE, Model

    cls = Model(reader=reader).managers()[0].image_reader_writer_class
    found: dict[str, Any] = {}
    path = lay_out(folder, files)
    if ask_stock:
        tell("stock")
        stock, image = _answer("stock", lambda: cls().read_images([path]))
        found["stock"] = stock
        if image is not None:
            array, properties = image
            found |= {"shape": array.shape, "is_finite": bool(np.isfinite(array).all())}
            found["is_whole"] = other is None or _is_whole(cls, folder, files, other, array)
            path = lay_out(folder, files)
            found["axes"], found["components"] = _axes_and_components(path)
    channels = len(found["shape"]) and found["shape"][0] if "shape" in found else 1
    tell("ours")
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    plans = Model(reader=reader, schemes=ZSCORE * max(1, channels)).managers()
    ours, read = _ours(cls, path, plans)
    found |= {"ours": ours, "peak_bytes": _status_bytes("VmHWM") - before}
    if read is not None and "shape" in found:
        found["difference"] = _difference(read, array, properties)
    return Verdict(**found)


def _answer(step: str, read: Callable[[], Any]) -> tuple[Answer, Any]:
    from nnunet_lowmem.errors import LowMemError

    try:
        return Answer(), read()
    except Exception as error:
        text = str(error)
        if not isinstance(error, LowMemError) and step != "stock":
            text += " | " + " < ".join(f"{f.name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-3:])
        return Answer(text, type(error).__name__, isinstance(error, LowMemError), step), None


def _ours(cls: Any, path: str, plans: Any) -> tuple[Answer, Any]:
    from nnunet_lowmem.preprocessing.checks import check_headers
    from nnunet_lowmem.preprocessing.reading import read_channels

    check, _ = _answer("check_headers", lambda: check_headers([path], *plans))
    if check.kind:
        return check, None
    return _answer("read_channels", lambda: read_channels(cls, [path]))


def _is_whole(cls: Any, folder: Path, files: Files, other: Files, array: Any) -> bool:
    """Whether stock's voxels all follow those of the file, and stay the same if nothing has changed."""
    import numpy as np

    path = lay_out(folder, other)
    _, second = _answer("stock", lambda: cls().read_images([path]))
    path = lay_out(folder, files)
    _, third = _answer("stock", lambda: cls().read_images([path]))
    if second is None or third is None or second[0].shape != array.shape or third[0].shape != array.shape:
        return False
    finite = np.isfinite(array) & np.isfinite(second[0])
    return not np.any(finite & (second[0] == array)) and np.array_equal(third[0], array, equal_nan=True)


def _axes_and_components(path: str) -> tuple[int, int]:
    """By ITK; nibabel's readers know no other numbers than these."""
    import SimpleITK

    information = SimpleITK.ImageFileReader()
    information.SetFileName(path)
    try:
        information.ReadImageInformation()
    except RuntimeError:
        return 3, 1
    kind = SimpleITK.GetPixelIDValueAsString(information.GetPixelID())
    return information.GetDimension(), max(information.GetNumberOfComponents(), 2 if "complex" in kind else 1)


def _difference(read: Any, array: Any, properties: dict[str, Any]) -> str:
    """What of our image is not stock's; nothing if it is the same."""
    import numpy as np
    from preprocessing_oracle import assert_same_object

    channels, ours = read
    if [channel.shape for channel in channels] != [channel.shape for channel in array]:
        return f"shapes {[channel.shape for channel in channels]}, not {array.shape}"
    pairs = [pair for both in zip(channels, array, strict=True) for pair in zip(*both, strict=True)]
    for plane, wanted in pairs:  # large images fit as well
        single = plane.astype(np.float32)
        if not np.array_equal(single, wanted, equal_nan=True):
            wrong = np.argwhere(~np.isclose(single, wanted, 0, 0, equal_nan=True))
            first = tuple(wrong[0])
            return f"{len(wrong)} of {wanted.size} voxels of a plane, {single[first]!r} instead of {wanted[first]!r}"
    try:
        assert_same_object(without_nan(ours), without_nan(properties))
    except AssertionError:
        return f"properties {ours}, not {properties}"
    return ""


def without_nan(value: Any) -> Any:
    """The same with a number in place of every NaN, which would not even be equal to itself."""
    import numpy as np

    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_nan(one) for one in value)
    if isinstance(value, np.ndarray):
        return np.where(np.isnan(value), -1234.5, value)
    if isinstance(value, float) and value != value:
        return type(value)(-1234.5)
    return value
