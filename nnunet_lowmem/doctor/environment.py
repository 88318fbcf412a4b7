"""What of this Python environment decides: versions, variables, the start-up hook, tools that embed nnU-Net.

Loads neither torch nor nnU-Net.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from nnunet_lowmem import __version__
from nnunet_lowmem.doctor.findings import Finding, Verdict
from nnunet_lowmem.doctor.tools import TOOLS
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.names import shown
from nnunet_lowmem.nnunet import predictors, switching
from nnunet_lowmem.nnunet.installed import of_distribution, version_of
from nnunet_lowmem.options import OPTIONS, variable
from nnunet_lowmem.sizes import parse_size
from nnunet_lowmem.system.memory_limits import total_ram_bytes

#: Values of CUDA_VISIBLE_DEVICES with which no GPU is seen.
HIDING = ("", "-1", "NoDevFiles")
HOOK_FILE = "nnunet_lowmem_startup.pth"

_NNUNET, _TORCH = ((2, 5), (3,)), ((2, 1, 2), None)
_BESIDE = ("numpy", "SimpleITK", "nibabel", "numba")
_SAFE_CHECKPOINTS = (2, 6)
_OWN_PREFIX = variable("")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PROCESSES = ("nnUNet_npp", "nnUNet_nps")
# of stock: more threads than that are not used, nor workers of pools
_MOST_THREADS = "nnUNet_def_n_proc"


def findings(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look at the environment; `environ` holds its variables."""
    yield from _versions()
    yield from _variables(environ)
    yield from _switch(environ)


def _versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    others = ", ".join(f"{name} {version_of(name)}" for name in _BESIDE)
    yield Finding("this package", Verdict.FINE, f"nnunet_lowmem {__version__}, Python {python}, {others}")
    for package in _BESIDE:
        if find_spec(package) is None:
            yield Finding(package, Verdict.FAILS, "is not installed in this environment", f"pip install {package}")
    yield _judged("nnU-Net", "nnunetv2", *_NNUNET)
    found = _judged("torch", "torch", *_TORCH)
    if found.verdict is Verdict.FINE and _numbers(version_of("torch")) < _SAFE_CHECKPOINTS:
        advice = "checkpoints of strangers are read safely by torch 2.6 and newer; with this one give --trust_model"
        found = Finding("torch", Verdict.MIND, found.seen, advice)
    yield found


def _judged(about: str, package: str, least: tuple[int, ...], below: tuple[int, ...] | None) -> Finding:
    told = version_of(package)
    if find_spec(package) is None:
        return Finding(about, Verdict.FAILS, "is not installed in this environment", f"pip install {package}")
    numbers, needed = _numbers(told), ".".join(map(str, least))
    if not numbers:
        return Finding(about, Verdict.MIND, "does not tell its version", f"this package needs {needed} or newer")
    if numbers < least or (below is not None and numbers >= below):
        limit = "" if below is None else f", before {'.'.join(map(str, below))}"
        return Finding(
            about, Verdict.FAILS, told, f"this package needs {needed} or newer{limit}: pip install -U {package}"
        )
    return Finding(about, Verdict.FINE, told)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    yield from _results(environ.get("nnUNet_results"))
    yield from _threads_and_processes(environ)
    if environ.get("nnUNet_compile", "").lower() in ("true", "1", "t"):
        advice = "needs a C compiler where it runs, and minutes: unset nnUNet_compile"
        yield Finding("nnUNet_compile", Verdict.MIND, "torch compiles the network", advice)
    if environ.get("CUDA_VISIBLE_DEVICES") in HIDING:
        yield Finding("CUDA_VISIBLE_DEVICES", Verdict.MIND, "hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    yield from _own_variables(environ)
    if "utf" not in sys.getfilesystemencoding().lower():
        advice = "names that are not ASCII are refused, here and in stock: choose a UTF-8 locale, LC_ALL=C.UTF-8"
        yield Finding("encoding", Verdict.MIND, f"names of files are {sys.getfilesystemencoding()}", advice)


def _threads_and_processes(environ: Mapping[str, str]) -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    for name in _THREADS:
        threads = environ.get(name, "1000")
        if not threads.isdecimal() or int(threads) < 1:
            yield Finding(name, Verdict.MIND, f"{shown(threads)} is no number of threads", f"unset {name}")
        elif int(threads) < cores:
            advice = (
                "the commands take as many as the machine has cores, at most nnUNet_def_n_proc (8), all the same; "
                "inside other tools the network is slower, and a label here and there may be another than with other "
                "numbers of threads, as in stock"
            )
            yield Finding(name, Verdict.MIND, f"{threads}, of {cores} cores", advice)
    if not environ.get(_MOST_THREADS, "8").isdecimal():
        seen = f"{shown(environ[_MOST_THREADS])} is no number, which ends nnU-Net when it is imported"
        yield Finding(_MOST_THREADS, Verdict.FAILS, seen, f"unset {_MOST_THREADS}")
    elif _MOST_THREADS in environ:
        seen = f"at most {environ[_MOST_THREADS]} threads of torch; their number may decide about single labels"
        yield Finding(_MOST_THREADS, Verdict.FINE, seen)
    for name in _PROCESSES:
        if not environ.get(name, "3").isdecimal():
            yield Finding(name, Verdict.MIND, f"{shown(environ[name])} is no number: 3 are taken", f"unset {name}")
        elif name in environ:
            yield Finding(
                name, Verdict.FINE, f"{shown(environ[name])}: processes that stock starts, each with a scan of its own"
            )


def _own_variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    known = {option.name for option in OPTIONS}
    for name in sorted(name for name in environ if name.startswith(_OWN_PREFIX)):
        option = name.removeprefix(_OWN_PREFIX)
        if option in ("max_ram", "max_vram") and (wrong := _not_a_size(environ[name])):
            yield Finding(name, Verdict.FAILS, wrong, f"unset {name}, or set it to a size: 6G")
        elif option in known or option == "trace":
            yield Finding(name, Verdict.FINE, shown(environ[name]))
        else:
            yield Finding(name, Verdict.FAILS, "there is no such option", f"unset {name}")


def _not_a_size(text: str) -> str:
    try:
        parse_size(text, total_ram_bytes())
    except UsageError as error:
        return shown(str(error))
    return ""


def _results(folder: str | None) -> Iterator[Finding]:
    if not folder:
        yield Finding("nnUNet_results", Verdict.FINE, "not set: models are found by their folder, -m, and not by -d")
    elif not _holds_datasets(folder):
        advice = "set it to the folder that holds DatasetNNN_NAME folders, or give the model with -m"
        yield Finding("nnUNet_results", Verdict.MIND, f"{shown(folder)} is no folder of trained models", advice)
    else:
        yield Finding("nnUNet_results", Verdict.FINE, shown(folder))


def _holds_datasets(folder: str) -> bool:
    try:
        return any(name.startswith("Dataset") for name in os.listdir(folder))
    except OSError:
        return False


def _switch(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Tell whether tools that embed nnU-Net would use this package."""
    name, has_hook = environ.get(switching.VARIABLE), is_hook_installed()
    about, is_known = switching.VARIABLE, True
    if name:
        is_known = name == switching.BY_PLANS or predictors.entry_of(name) is not None
        if not is_known:
            yield Finding(about, Verdict.FAILS, f"there is no predictor {shown(name)!r}", f"export {about}=lowmem")
        elif not has_hook:
            advice = "pip install THIS_REPOSITORY again into this environment, or: nnunet-lowmem run -- COMMAND"
            yield Finding(about, Verdict.MIND, "is set, but the start-up hook is not installed here", advice)
        else:
            yield Finding(about, Verdict.FINE, f"{shown(name)}: nnU-Net's predictor is replaced in every program here")
    else:
        way = f"{about}=lowmem COMMAND" if has_hook else "nnunet-lowmem run -- COMMAND"
        hook = "is installed" if has_hook else "is not installed here"
        yield Finding("start-up hook", Verdict.FINE, f"{hook}; a tool uses this package with: {way}")
    is_on = bool(name) and has_hook and is_known
    for tool in TOOLS:
        if tool.distribution and (version := of_distribution(tool.distribution)):
            seen = f"{version}; its nnU-Net is {'this package' if is_on else 'stock'}"
            yield Finding(tool.name, Verdict.FINE, seen, "" if is_on else tool.command.text)


def is_hook_installed() -> bool:
    """Whether Python finds, when it starts, the file that looks at the variable."""
    return any(os.path.isfile(os.path.join(folder, HOOK_FILE)) for folder in sys.path if folder)
