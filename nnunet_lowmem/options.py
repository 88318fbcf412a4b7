"""What this package can be told beside what nnU-Net takes: each option once.

The constructor of `LowMemPredictor` and its signature, the flags of ``nnUNetv2_predict_lowmem`` with their help, the
variables ``nnUNet_lowmem_<argument>``, what plans may choose, and the table in docs/options.md come from the fields of
`Options`. To add one is to add a field, and its row to that table, which a test compares.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from nnunet_lowmem.errors import UsageError

if TYPE_CHECKING:  # what a mask may be; `--help` loads no numpy
    from numpy.typing import NDArray

Constructor = TypeVar("Constructor", bound=Callable[..., None])


class Arithmetic(Enum):
    """In which numbers, and in which order of sums, the network computes on the CPU; the value is kept in records."""

    EXACT = "exact"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


#: On which labels may be written: that of the file, or of the network.
GRIDS = ("file", "network")


def _option(default: Any, about: str, flag: str = "", *, for_models: bool = False, **words: Any) -> Any:
    """Tell of an option: what it does, for the docs and the help; its flag; whether a model may choose it in its plans.

    A bool is a switch and a sequence may be given several times; other `words` are argparse's.
    """
    return field(default=default, metadata={"about": about, "flag": flag, "for_models": for_models, "words": words})


@dataclass(init=False, repr=False, eq=False)
class Options:
    """Values of all options, where nobody sets them: programs derive classes whose ``__init__`` does not call ours."""

    max_ram: int | str | None = _option(
        None,
        "RAM budget, libraries and child processes included: `6G` or `6GiB` (2**30 bytes), `6GB` (10**9), `80%`; "
        "by default what the machine, cgroup, SLURM or `ulimit` leaves",
        "--max_ram",
        for_models=True,
        metavar="SIZE",
    )
    max_vram: int | str | None = _option(
        None,
        "VRAM budget, likewise, for what torch takes; CUDA's own context, some 0.6 GiB, comes on top",
        "--max_vram",
        for_models=True,
        metavar="SIZE",
    )
    tmp_dir: str | os.PathLike[str] | None = _option(
        None,
        "where arrays go that do not fit (default: the system's temporary folder; one in RAM is not used)",
        "--tmp_dir",
        metavar="DIR",
    )
    kernel_threads: int | None = _option(
        None, "threads of the compiled kernels, never the network's (default: all cores)", for_models=True
    )
    worker_timeout_s: float = _option(
        600.0,
        "time without progress after which a worker counts as stalled; 0: never (default: 600)",
        "--worker_timeout",
        for_models=True,
        type=float,
        metavar="SECONDS",
    )
    probabilities_dtype: str = _option(
        "float32",
        "of the `.npz` files; `float16` halves them but is not stock's file (default: `float32`)",
        "--probabilities_dtype",
        for_models=True,
        choices=("float32", "float16"),
    )
    prefetch: bool | None = _option(
        None, "preprocess the next case in a process meanwhile (default: only beside a GPU)", for_models=True
    )
    continue_on_error: bool = _option(
        True,
        "predict the others when a case fails, then raise one `CasesFailedError`; what the network, an override or "
        "a callback raises ends the run at once all the same",
        for_models=True,
    )
    accept_nan: bool = _option(
        False, "set NaN and infinite voxels to 0 and say how many, instead of failing the case", "--accept_nan"
    )
    trust: Sequence[str] = _option(
        (),
        "a package whose code the model may use, beside nnU-Net's and torch's; may be given several times",
        "--trust",
        metavar="PACKAGE",
    )
    trust_model: bool = _option(
        False, "run all code that the model's files hold or name, as stock does", "--trust_model"
    )
    fast: bool | str = _option(
        False,
        "on the CPU, sums in another order than stock's: less time and memory; a label here and there may differ. "
        "`bfloat16`: in numbers of half the size, if one tile shows that this is faster and right here",
        "--fast",
        nargs="?",
        const=True,
        choices=("bfloat16",),
    )
    bbox: str | Sequence[Any] | None = _option(
        None,
        "predict a box alone, in voxels along the axes of the file, slowest first: `10:50,0:128,:`; the file has its "
        "size and a moved origin, its labels are those of the whole run",
        "--bbox",
        metavar="Z0:Z1,Y0:Y1,X0:X1",
    )
    roi: str | os.PathLike[str] | NDArray[Any] | None = _option(
        None,
        "predict where a mask is not zero, and write 0 elsewhere: a file, or a folder with one of each case's name; "
        "for arrays also an array",
        "--roi",
        metavar="PATH",
    )
    output_grid: str = _option(
        "file",
        "`network`: write `CASE_network` instead of the label map: labels on the grid that the network works on, not "
        "resampled to that of the image; a quick look, and another file than stock's",
        "--output_grid",
        choices=GRIDS,
    )
    level: int = _option(
        0, "of an OME-Zarr, which of its scales (default: 0, the finest)", "--level", type=int, metavar="N"
    )
    key: str | None = _option(None, "of an HDF5 file, which of its data sets", "--key", metavar="PATH")
    planes: bool = _option(False, "the input is a folder of TIFF files, each a plane of one volume", "--planes")
    spacing: Sequence[float] | None = _option(
        None,
        "of the images, in mm, slowest axis of the file first, in the place of what the files say",
        "--spacing",
        nargs=3,
        type=float,
        metavar=("Z", "Y", "X"),
    )
    report: bool = _option(
        False, "write `lowmem_report.html` into the output folder: memory, times, plans, slices, failures", "--report"
    )
    scheduler: str | None = _option(
        None,
        "let a Dask cluster predict: `tcp://HOST:PORT`, or without a value what `DASK_SCHEDULER_ADDRESS` says",
        "--scheduler",
        nargs="?",
        const="",
        metavar="ADDRESS",
    )
    scheduler_file: str | os.PathLike[str] | None = _option(
        None, "likewise, by the file that `dask scheduler --scheduler-file` writes", "--scheduler-file", metavar="FILE"
    )
    workers: int | None = _option(
        None,
        "as many processes in this machine, each with its share of cores and memory",
        "--workers",
        type=int,
        metavar="N",
    )
    split: str | int = _option(
        "auto",
        "on a cluster, cut each case into `N` parts for several workers, `never`, or (`auto`) only long cases that are "
        "fewer than workers",
        "--split",
        metavar="auto|never|N",
    )
    client: Any = _option(None, "a `distributed.Client`, which stays open")
    allow_mixed: bool = _option(
        False, "accept workers with another processor or other versions, and labels that may differ", "--allow-mixed"
    )
    tls_ca_file: str | os.PathLike[str] | None = _option(
        None, "certificates of a cluster that speaks TLS, as Dask spells them", "--tls-ca-file", metavar="FILE"
    )
    tls_cert: str | os.PathLike[str] | None = _option(None, "this command's", "--tls-cert", metavar="FILE")
    tls_key: str | os.PathLike[str] | None = _option(None, "its key", "--tls-key", metavar="FILE")
    on_plan: Callable[[Any], None] | None = _option(
        None, "called with the `Plan` of each case when it is final: of the first after its first tile"
    )
    on_case: Callable[[Any], None] | None = _option(
        None, "called with the `CaseReport` of each case that is done: seconds, memory, labels with volumes"
    )
    on_progress: Callable[[Any], None] | None = _option(
        None,
        "called with the `Progress` of each case (stage, case, done, total, memory_bytes), in the thread that "
        "called the predictor; what it raises ends the run at once",
    )


#: Fields with ``name``, ``type`` as text, ``default``, and in ``metadata`` what `_option` takes.
OPTIONS: tuple[Field[Any], ...] = fields(Options)
WITH_FLAG = tuple(option for option in OPTIONS if option.metadata["flag"])
#: A model that could say whom to trust would say itself; it may choose sizes and numbers.
NOT_FOR_MODELS = frozenset(option.name for option in OPTIONS if not option.metadata["for_models"])

#: Which volume is meant, and how large its voxels are.
OF_VOLUMES = ("level", "key", "planes", "spacing")

#: How a cluster is reached.
OF_CONNECTIONS = ("scheduler", "scheduler_file", "workers", "tls_ca_file", "tls_cert", "tls_key")
#: What only the command has to know, and workers are not told.
OF_CLUSTERS = (*OF_CONNECTIONS, "split", "client", "allow_mixed")


def asks_for_cluster(options: Options) -> bool:
    """Whether cases go to the workers of a cluster.

    Raises
    ------
    UsageError
        If Dask is not installed.
    """
    ways = options.scheduler, options.scheduler_file, options.workers, options.client
    if all(way is None for way in ways):
        if options.split != Options.split:
            raise UsageError("--split is for clusters: give --scheduler, --scheduler-file or --workers, too")
        return False
    if find_spec("distributed") is None:
        raise UsageError("clusters need Dask: pip install 'nnunet_lowmem[dask]'")
    return True


def variable(name: str) -> str:
    """Return the environment variable that holds an option where no flag and no argument does."""
    return f"nnUNet_lowmem_{name}"


def arithmetic(fast: Any) -> Arithmetic:
    """Return what the option `fast` asks for.

    Raises
    ------
    UsageError
        If it is neither true, false nor the name of an arithmetic.
    """
    if isinstance(fast, str):
        if fast != Arithmetic.BFLOAT16.value:
            raise UsageError(f"fast must be True, False or {Arithmetic.BFLOAT16.value!r}, got {fast!r}")
        return Arithmetic.BFLOAT16
    return Arithmetic.FLOAT32 if fast else Arithmetic.EXACT


def on_network_grid(options: Options) -> bool:
    """Whether labels are wanted on the grid of the network.

    Raises
    ------
    UsageError
        If that is no grid, or what is asked for as well is told on the grid of the file.
    """
    if options.output_grid not in GRIDS:
        raise UsageError(f"output_grid must be one of {', '.join(GRIDS)}, got {options.output_grid!r}")
    is_wanted = options.output_grid != Options.output_grid
    if is_wanted and (options.bbox is not None or options.roi is not None):
        raise UsageError("output_grid network is of the whole scan: bbox and roi are told on the grid of the file")
    return is_wanted


def values_of(holder: Options) -> Options:
    """Return the options of `holder` as they are now."""
    values = Options()
    for option in OPTIONS:
        setattr(values, option.name, getattr(holder, option.name))
    return values


def chosen(**values: Any) -> Options:
    """Return options of which some have other values than where nobody sets them."""
    options = Options()
    vars(options).update(values)
    return options


def with_options(constructor: Constructor) -> Constructor:
    """Let the signature of a constructor that takes all options as keywords name each of them."""
    written = inspect.signature(constructor).parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [inspect.Parameter(option.name, kind, default=option.default, annotation=option.type) for option in OPTIONS]
    stock = [parameter for parameter in written if parameter.kind is not parameter.VAR_KEYWORD]
    constructor.__signature__ = inspect.Signature([*stock, *own])  # type: ignore[attr-defined]  # read by `inspect`
    return constructor


def add_flags(add: Callable[..., object], names: Collection[str] | None = None) -> None:
    """Add the flag of each option that has one, or of some of them.

    What is not given is None, and may come from variables and plans.
    """
    for option in WITH_FLAG:
        if names is not None and option.name not in names:
            continue
        told, words = option.metadata, dict(option.metadata["words"])
        if option.type == "bool":
            words["action"] = "store_true"
        if option.type == "Sequence[str]":
            words["action"] = "append"
        add(
            told["flag"],
            dest=option.name,
            default=None,
            help=told["about"].replace("`", "").replace("%", "%%"),
            **words,
        )


def table() -> list[str]:
    """Return the rows of the table in docs/options.md: flag, argument of `LowMemPredictor`, what it does."""
    rows = []
    for option in OPTIONS:
        told = option.metadata
        value = told["words"].get("metavar") or " or ".join(told["words"].get("choices", ()))
        value = value if isinstance(value, str) else " ".join(value)
        value = f"[{value}]" if told["words"].get("nargs") == "?" else value.replace("|", " or ")
        flag = f"`{' '.join(filter(None, (told['flag'], value)))}`" if told["flag"] else ""
        rows.append(f"| {flag} | `{option.name}` | {told['about']} |")
    return rows
