"""Flags of the commands. Those of nnU-Net's may be shortened as there; ours match when they are written out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

from nnunet_lowmem import options

#: Long flags of nnU-Net's commands, which scripts shorten. Not to be shortened is the rule for all others, so that
#: whatever is added here later, each prefix goes on meaning what it means to nnU-Net.
SHORTENED = frozenset(
    {
        *("--help", "--verbose", "--save_probabilities", "--continue_prediction", "--disable_tta"),
        *("--disable_progress_bar", "--not_on_device", "--save_npz"),
    }
)


class Flags(argparse.ArgumentParser):
    """A parser that takes prefixes of nnU-Net's flags alone, and names the flag for a prefix of another.

    Attributes
    ----------
    written_out : set of str
        Flags with one dash that nnU-Net's command does not have.
    """

    def __init__(self, *arguments: Any, **words: Any) -> None:
        self.written_out: set[str] = set()
        super().__init__(*arguments, **words)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        # argparse has no other way to leave single flags out of prefix matching
        return [found for found in super()._get_option_tuples(option_string) if self._may_be_shortened(found[1])]

    def _may_be_shortened(self, flag: str) -> bool:
        return flag in SHORTENED or not (flag.startswith("--") or flag in self.written_out)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; a flag that is not known but begins one of ours ends the program with its name."""
        given, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            name = word.partition("=")[0]
            meant = [flag for flag in self._option_string_actions if name.strip("-") and flag.startswith(name)]
            if meant and not any(map(self._may_be_shortened, meant)):
                self.error(f"{name} is not a flag; did you mean {' or '.join(meant)}?")
        return given, unknown


def predict_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of ``nnUNetv2_predict_lowmem``."""
    return predict_parser(is_by_folder(arguments)).parse_args(arguments)


def is_by_folder(arguments: Sequence[str]) -> bool:
    """Whether the model is given by its folder: then flags are those of ``nnUNetv2_predict_from_modelfolder``."""
    return any(word.startswith("-m") for word in arguments)


def predict_parser(by_folder: bool = False) -> Flags:
    """Build the parser of ``nnUNetv2_predict`` 2.8.1 with a few flags more.

    Parameters
    ----------
    by_folder : bool
        Whether the model is given by its folder, as to ``nnUNetv2_predict_from_modelfolder``, which has no flags for
        datasets, so that ``-d`` is short for ``-device`` there.
    """
    parser = Flags(
        prog="nnUNetv2_predict_lowmem",
        description="nnUNetv2_predict in bounded memory: the same flags and the same labels.",
    )
    more = add_predict_flags(parser, by_folder)
    more.add_argument("--estimate", action="store_true", help="print what every case will take, by headers, and stop")
    more.add_argument("--json", action="store_true", help="with --estimate: as JSON, sizes in bytes")
    return parser


def add_predict_flags(parser: Flags, by_folder: bool = False, required: bool = True) -> Any:
    """Add all that ``nnUNetv2_predict_lowmem`` takes but ``--estimate``; return the group of what is beyond stock's.

    Without `required` a command takes all of them and needs none.
    """
    add = parser.add_argument
    add_model_flags(add, by_folder, required)
    if by_folder:
        parser.written_out |= {"-num_parts", "-part_id"}
        parser.set_defaults(d=None, p="nnUNetPlans", tr="nnUNetTrainer", c=None)
    add(
        "-o",
        required=required,
        metavar="FOLDER",
        help="output folder; made if it does not exist. Of a single volume also a file, or a store: x.ome.zarr, "
        "x.tif, x.h5, x.nii.gz",
    )
    add("--verbose", action="store_true", help="print the plan, the measured peak, and tracebacks")
    add("--save_probabilities", action="store_true", help="write the probabilities of all classes, too")
    also = ["--c"] if by_folder else []
    add("--continue_prediction", *also, action="store_true", help="skip cases that have been predicted")
    add("-num_parts", type=int, default=1, metavar="N", help="number of calls that share the work (default: 1)")
    add("-part_id", type=int, default=0, metavar="K", help="which of them this one is, from 0 (default: 0)")
    add("--disable_progress_bar", action="store_true", help="no progress bar")
    more = parser.add_argument_group("bounded memory")
    options.add_flags(more.add_argument)
    return more


def add_model_flags(add: Callable[..., object], by_folder: bool = False, required: bool = True) -> None:
    """Add the flags that say what is predicted, and how; stock's, but for -m and the default of -device."""
    add(
        "-i",
        required=required,
        metavar="FOLDER",
        help="input folder; files end in _0000 etc. as in training. Or a volume, or a folder of volumes: OME-Zarr, "
        "zarr, TIFF, HDF5, NIfTI, NRRD, MHA",
    )
    add("-m", metavar="FOLDER", help="trained model folder (holds fold_X); instead of -d, -p, -tr and -c")
    if not by_folder:
        add("-d", metavar="DATASET", help="dataset name or id of the model")
        add("-p", default="nnUNetPlans", metavar="PLANS", help="plans identifier (default: %(default)s)")
        add("-tr", default="nnUNetTrainer", metavar="TRAINER", help="trainer class (default: %(default)s)")
        add("-c", metavar="CONFIG", help="nnU-Net configuration, such as 3d_fullres")
    add("-f", nargs="+", default=[0, 1, 2, 3, 4], type=_fold, metavar="FOLD", help="folds (default: 0 1 2 3 4)")
    add("-step_size", type=float, default=0.5, help="tile step over patch size, in (0, 1] (default: %(default)s)")
    add("--disable_tta", action="store_true", help="no mirroring: faster, less accurate")
    add("-chk", default="checkpoint_final.pth", metavar="NAME", help="checkpoint name (default: %(default)s)")
    for flag, variable, what in (("-npp", "nnUNet_npp", "preprocessing"), ("-nps", "nnUNet_nps", "export")):
        add(flag, type=int, default=_from_environment(variable, 3), metavar="N", help=f"at most N {what} processes")
    add("-prev_stage_predictions", metavar="FOLDER", help="predictions of the previous stage of a cascade")
    add("-device", metavar="DEVICE", help="cuda, cuda:N, mps or cpu (default: the first of these there is)")
    add("--not_on_device", action="store_true", help="keep the logits in RAM instead of on the device")


def asked_bytes(flag: str, text: str | None) -> int | None:
    """Return the RAM, or what may be VRAM, that a flag or the variable of its name asks for; None if neither does."""
    from nnunet_lowmem import sizes
    from nnunet_lowmem.system.memory_limits import total_ram_bytes

    # without torch the size of the VRAM is not known; any total serves to see whether the text is a size
    return sizes.asked_bytes(flag, text, total_ram_bytes())


def _fold(text: str) -> int | str:
    return text if text == "all" else int(text)


def _from_environment(variable: str, default: int) -> int:
    """Read a number as nnU-Net does: whatever is no number gives the default."""
    try:
        return int(os.environ.get(variable) or default)
    except ValueError:
        return default
