"""The commands. Nothing heavy is imported before the arguments are known to make sense."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_lowmem import __version__
from nnunet_lowmem.commands import compare, doctor, flags, run, verify
from nnunet_lowmem.commands.flags import predict_parser
from nnunet_lowmem.commands.shell import guarded
from nnunet_lowmem.errors import CasesFailedError, UsageError, because
from nnunet_lowmem.names import shown
from nnunet_lowmem.nnunet import model_files
from nnunet_lowmem.options import OF_CONNECTIONS, WITH_FLAG, add_flags, chosen, on_network_grid
from nnunet_lowmem.system import allocator
from nnunet_lowmem.volumes.selection import PICTURES, ending_of, is_output_file, is_volume, volumes_in

__all__ = ["main", "predict_entry_point", "predict_parser"]

if TYPE_CHECKING:
    import torch

    from nnunet_lowmem.predictor import LowMemPredictor

CITATION = (
    "Please cite nnU-Net when you use it: Isensee, F., Jaeger, P. F., Kohl, S. A., Petersen, J., & Maier-Hein, K. H. "
    "(2021). nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation. Nature Methods, "
    "18(2), 203-211."
)


def predict_entry_point(arguments: Sequence[str] | None = None) -> int:
    """Run ``nnUNetv2_predict_lowmem``."""
    options = flags.predict_options(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _predict(options), options.verbose)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``nnunet-lowmem``."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = flags.Flags(prog="nnunet-lowmem", description="nnU-Net v2 prediction in bounded memory.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="predict the bundled CT with the bundled 118-class model")
    demo.add_argument("-o", default="nnunet_lowmem_demo", metavar="DIR", help="output folder (default: %(default)s)")
    demo.add_argument("-device", default=None, help="cuda, cuda:N, mps or cpu (default: the best there is)")
    demo.add_argument("--verbose", action="store_true", help="say more, and show tracebacks")
    demo.set_defaults(run=_demo)
    ensemble = commands.add_parser("ensemble", help="nnUNetv2_ensemble in memory that does not grow with the classes")
    ensemble.add_argument("-i", nargs="+", required=True, metavar="FOLDER", help="folders with .npz and .pkl")
    ensemble.add_argument("-o", required=True, metavar="FOLDER", help="output folder")
    ensemble.add_argument("-np", type=int, default=1, metavar="N", help="accepted; one process is used")
    ensemble.add_argument("--save_npz", action="store_true", help="write the averaged probabilities, too")
    ensemble.add_argument("--verbose", action="store_true", help="show tracebacks")
    add_flags(ensemble.add_argument, OF_CONNECTIONS)
    ensemble.set_defaults(run=_ensemble)
    tool = commands.add_parser(
        "run", help="run a tool that uses nnU-Net, with this package in its place: run -- COMMAND"
    )
    tool.add_argument("--predictor", default="lowmem", metavar="NAME", help="or plans: what the model's plans name")
    tool.add_argument("--verbose", action="store_true", help="show tracebacks")
    tool.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="the command and its arguments")
    tool.set_defaults(run=run.run)
    sides = commands.add_parser("compare", help="stock nnU-Net and this package side by side, on your own images")
    flags.add_model_flags(sides.add_argument)
    compare.add_flags(sides.add_argument)
    sides.set_defaults(run=lambda options: compare.run(options, _checked_model))
    examination = commands.add_parser(
        "doctor", help="what is wrong: on this machine, in a log, with a model and images"
    )
    doctor.add_flags(examination, flags.is_by_folder(words))
    examination.set_defaults(run=lambda options: doctor.run(options, words[1:], _examined, _described))
    verification = commands.add_parser("verify", help="whether label maps are still what was written, and with what")
    verify.add_flags(verification.add_argument)
    verification.set_defaults(run=verify.run)
    options = parser.parse_args(words)
    return guarded(lambda: int(options.run(options)), options.verbose)


def _predict(options: argparse.Namespace) -> int:
    model_folder = _check(options)
    allocator.own_process()
    with redirect_stdout(sys.stderr) if options.json else nullcontext():  # nnU-Net prints, older ones at import
        from nnunet_lowmem.commands import console

        device = console.choose_device(options.device)
        print(f"{CITATION}\ndevice: {device}")
        _check_cases(options, Path(model_folder))
        console.set_torch_threads(device)
        predictor = _predictor(options, device, model_folder)
        if options.estimate:
            predictor.describe_trained_model_folder(model_folder, options.f, options.chk)
            found = list(predictor.estimate(options.i, options.save_probabilities))
        else:
            predictor.initialize_from_trained_model_folder(model_folder, options.f, options.chk)
    if options.estimate:
        return console.print_estimates(found, options.json, options.verbose)
    with suppress(CasesFailedError):  # the report tells which, and the exit code
        predictor.predict_from_files(
            options.i,
            options.o,
            save_probabilities=options.save_probabilities,
            overwrite=not options.continue_prediction,
            num_processes_preprocessing=options.npp,
            num_processes_segmentation_export=options.nps,
            folder_with_segs_from_prev_stage=options.prev_stage_predictions,
            num_parts=options.num_parts,
            part_id=options.part_id,
        )
    console.print_run(predictor.run_report, options.o)
    return predictor.run_report.exit_code


def _predictor(options: argparse.Namespace, device: torch.device, model_folder: str) -> LowMemPredictor:
    from nnunet_lowmem.commands import console
    from nnunet_lowmem.nnunet import predictors
    from nnunet_lowmem.predictor import LowMemPredictor

    given = {own.name: value for own in WITH_FLAG if (value := getattr(options, own.name)) is not None}
    plans = model_files.read_json(Path(model_folder) / "plans.json")
    predictor = LowMemPredictor(
        tile_step_size=options.step_size,
        use_mirroring=not options.disable_tta,
        perform_everything_on_device=not options.not_on_device,
        device=device,
        verbose=options.verbose,
        verbose_preprocessing=options.verbose,
        allow_tqdm=not options.disable_progress_bar,
        on_plan=console.print_plan if options.verbose else None,
        on_case=console.print_report if options.verbose else console.print_case,
        **{**predictors.options("lowmem", LowMemPredictor, plans), **given},
    )
    predictor.foreign_ends_run = False
    return predictor


def _demo(options: argparse.Namespace) -> int:
    allocator.own_process()
    _check_device(options.device)
    from nnunet_lowmem.commands.demo import run_demo

    run_demo(Path(options.o), options.device)
    return 0


def _ensemble(options: argparse.Namespace) -> int:
    for folder in options.i:
        _check_folder("-i", folder)
    _check_writable(Path(options.o))
    from nnunet_lowmem.commands.ensemble import ensemble_folders

    given = {name: value for name in OF_CONNECTIONS if (value := getattr(options, name)) is not None}
    folders = [Path(folder) for folder in options.i]
    for path in ensemble_folders(folders, Path(options.o), options.save_npz, chosen(**given)):
        print(shown(str(path)))
    return 0


def _checked_model(arguments: Sequence[str]) -> tuple[str, str]:
    """Check a command before it runs; return its model folder and the ending of its files."""
    options = flags.predict_options(arguments)
    model_folder = _check(options)
    file_ending = _check_cases(options, Path(model_folder))
    if not os.path.isdir(options.i) or not model_files.list_cases(options.i, file_ending):
        raise UsageError(f"-i: stock reads no {options.i}; to compare with it, give a folder of NAME_0000{file_ending}")
    return model_folder, file_ending


def _check(options: argparse.Namespace) -> str:
    """Refuse what cannot work, by looking at arguments and folders only; return the model folder."""
    if options.json and not options.estimate:
        raise UsageError("--json goes with --estimate")
    _check_values(options)
    _check_folders(options)
    model_folder = _model_folder(options)
    model_files.checkpoint_files(model_folder, options.f, options.chk)
    if not options.estimate:
        _check_writable(Path(options.o).parent if is_output_file(options.o) else Path(options.o))
    return model_folder


def _check_values(options: argparse.Namespace, with_variables: bool = True) -> None:
    """Refuse values of flags, and of variables in the place of flags, that no case could have."""
    if not 0 < options.step_size <= 1:
        raise UsageError(f"-step_size must be larger than 0 and at most 1, got {options.step_size}")
    if not 0 <= options.part_id < options.num_parts:
        raise UsageError(f"-part_id counts from 0 and must be below -num_parts {options.num_parts}: {options.part_id}")
    for flag, number in (
        ("-npp", options.npp),
        ("-nps", options.nps),
        ("--worker_timeout", options.worker_timeout_s or 0),
    ):
        if not 0 <= number < math.inf:
            raise UsageError(f"{flag} must be a number that is not negative, got {number}")
    for flag, text in (("--max_ram", options.max_ram), ("--max_vram", options.max_vram)):
        if with_variables or text is not None:
            flags.asked_bytes(flag, text)
    given = {name: getattr(options, name) for name in ("output_grid", "bbox", "roi") if getattr(options, name)}
    on_network_grid(chosen(**given))
    _check_device(options.device)


def _check_folders(options: argparse.Namespace) -> None:
    if not is_volume(options.i) and not (os.path.isfile(options.i) and ending_of(options.i, PICTURES)):
        _check_folder("-i", options.i)
    if options.prev_stage_predictions is not None:
        _check_folder("-prev_stage_predictions", options.prev_stage_predictions)
    if options.tmp_dir is not None:
        _check_tmp_dir(options.tmp_dir)


def _check_cases(options: argparse.Namespace, model_folder: Path) -> str:
    """Refuse a folder without cases; return the ending of its files."""
    model_files.read_json(model_folder / "plans.json")
    dataset_json = model_folder / "dataset.json"
    file_ending = model_files.check_file_ending(model_files.read_json(dataset_json), dataset_json)
    folder = options.i
    is_one = is_volume(folder) or options.planes or (os.path.isfile(folder) and folder.endswith(file_ending))
    if os.path.isfile(folder) and not is_one:
        raise UsageError(f"-i: {folder} is no volume that is known, by its ending, and not one of {file_ending}")
    if not (is_one or volumes_in(folder) or model_files.list_cases(folder, file_ending)):
        raise UsageError(f"-i: {folder} holds no file that ends in {file_ending}, as this model needs, and no volume")
    return file_ending


def _check_tmp_dir(folder: str) -> None:
    """Write a little, since a full or read-only disk shows no other way."""
    _check_folder("--tmp_dir", folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
    except OSError as error:
        raise UsageError(f"--tmp_dir: nothing can be written to {folder}: {error.strerror or error}") from None


def _check_device(name: str | None) -> None:
    if name is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UsageError(f"-device must be cpu, mps, cuda or cuda:N, got {name!r}")


def _check_folder(flag: str, folder: str) -> None:
    if not os.path.isdir(folder):
        reason = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise UsageError(f"{flag}: {folder} {reason}")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"-o: {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"-o: {folder} is not writable")


def _examined(options: argparse.Namespace) -> tuple[Path, list[int | str]] | None:
    """Check what the doctor is given; return the model's folder and folds, None without a model."""
    has_model = any(value is not None for value in (options.m, options.d, options.c, options.i))
    _check_values(options, with_variables=has_model)  # else what variables hold is among what is told
    if not has_model:
        return None
    model_folder = Path(_model_folder(options))
    try:
        folds = options.f or model_files.folds_in(model_folder, options.chk) or [0]
        model_files.checkpoint_files(str(model_folder), folds, options.chk)
        if options.i is not None:
            _check_folders(options)
            _check_cases(options, model_folder)
    except PermissionError as error:
        raise because(UsageError, f"{error.filename} cannot be read: {error.strerror}", error) from error
    return model_folder, folds


def _described(options: argparse.Namespace, model_folder: Path, folds: Sequence[int | str]) -> LowMemPredictor:
    """Return a predictor that knows its model, but for the weights."""
    allocator.own_process()
    from nnunet_lowmem.commands import console

    predictor = _predictor(options, console.choose_device(options.device), str(model_folder))
    predictor.describe_trained_model_folder(str(model_folder), folds, options.chk)
    return predictor


def _model_folder(options: argparse.Namespace) -> str:
    return str(options.m or _model_of_dataset(options))


def _model_of_dataset(options: argparse.Namespace) -> str:
    """Find the model folder of -d, -p, -tr and -c below nnUNet_results."""
    if options.d is None or options.c is None:
        raise UsageError("say which model: either -m FOLDER, or -d DATASET and -c CONFIG")
    if not os.environ.get("nnUNet_results"):  # noqa: SIM112  # nnU-Net's spelling
        raise UsageError("-d needs the environment variable nnUNet_results; or give the model's folder with -m")
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    try:
        return str(get_output_folder(options.d, options.tr, options.p, options.c))
    except (RuntimeError, ValueError) as error:
        first_sentence = str(error).split(". ")[0]
        raise UsageError(f"-d {options.d}: {first_sentence}") from None
