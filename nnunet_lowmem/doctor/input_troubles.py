"""Troubles of images, models and environments, in logs. To add one is to add a row."""

from __future__ import annotations

from nnunet_lowmem.doctor import log_numbers
from nnunet_lowmem.doctor.trouble import COMMAND, NEEDS_NO_POOL, Trouble, row

TROUBLES: tuple[Trouble, ...] = (
    # -- images --------------------------------------------------------------------------------------------------------
    row(
        "an image that cannot be read",
        "imageio reader|imagefilereader|imagefileerror|badgzipfile|compressed file ended|zlib|headerdataerror",
        r"Unable to determine ImageIO reader|ImageFileReader_Execute|ImageFileError|BadGzipFile"
        r"|Compressed file ended before"
        r"|zlib\.error|HeaderDataError",
        "A file is empty, cut, or not of the format that its name says: an upload or a conversion that did not end. "
        "In stock one "
        'such file ends the run, as "Background workers died", and takes the cases beside it along.',
        "Replace the file; the others at once: " + COMMAND,
    ),
    row(
        "the channels of a case do not match",
        "same spacing|same shape|same geometry|share the same",
        r"Not all (?:input )?images have the same (?:spacing|shape)|not in the same geometry|do not share the same",
        "The channels of one case (CASE_0000, CASE_0001, ...) lie on different grids. They have to be registered, and "
        "resampled to one grid, first.",
        "Resample the channels to the first one (SimpleITK.Resample, antsApplyTransforms, 3D Slicer); then " + COMMAND,
    ),
    row(
        "channels that lie elsewhere in space",
        "same origin|same direction",
        r"Not all (?:input )?images have the same (?:origin|direction)",
        "The channels of one case have other origins or directions. Stock warns and takes those of the first; where "
        "they differ by more than rounding, the channels do not show the same place.",
        "Look at both channels in a viewer, one over the other; resample them to the first if they are apart",
        fails=False,
    ),
    row(
        "another number of channels than the model has",
        "channels, but got|normalization_schemes[|intensity_properties",
        r"to have (?P<due>\d+) channels, but got (?P<given>\d+) channels|normalization_schemes\[c\]"
        r"|foreground_intensity_properties",
        "The model was trained with another number of images per case than it was given.",
        "One file per channel, numbered as in the model's dataset.json under channel_names: CASE_0000, CASE_0001, ...; "
        "then " + COMMAND,
        numbers=log_numbers.of_channels,
        in_source=True,
    ),
    row(
        "no case was found",
        "there are 0 cases",
        r"There are 0 cases (?:in the source folder|that I would like to predict)",
        "The input folder holds nothing that is named as this model needs it, or everything was predicted before "
        "(--continue_prediction); stock then ends with exit code 0.",
        "Name the files CASE_0000 and the ending that the model's dataset.json gives as file_ending; then " + COMMAND,
        fails=False,
    ),
    # -- the model -----------------------------------------------------------------------------------------------------
    row(
        "a checkpoint is missing",
        "checkpoint_|fold_",
        r"(?:No such file|not found|does not exist).{0,400}(?:checkpoint_\w+\.pth|fold_\w+)"
        r"|checkpoint_\w+\.pth.{0,40}(?:not found|does not exist|No such file)",
        "The model folder has no such checkpoint in that fold: folds default to 0 1 2 3 4, and a training that did not "
        "end has checkpoint_best.pth alone.",
        "Give the folds there are, or another checkpoint with -chk: {command:-f 0}",
    ),
    row(
        "a file of the model is missing",
        "plans.json|dataset.json",
        r"(?:No such file|not found|does not exist).{0,400}?(?:plans|dataset)\.json",
        "The folder is not one of a trained model, which holds dataset.json, plans.json and fold_X with checkpoints.",
        "Give the folder TRAINER__PLANS__CONFIGURATION itself: {command:-m FOLDER}",
    ),
    row(
        "a checkpoint that is cut",
        "pytorchstreamreader|ran out of input|invalid load key",
        r"PytorchStreamReader failed|Ran out of input|invalid load key",
        "A checkpoint is empty, cut, or no checkpoint at all: a download or a copy that did not end.",
        "Get the model once more; then " + COMMAND,
    ),
    row(
        "the weights are of another network",
        "size mismatch|missing key|unexpected key",
        r"size mismatch for|Missing key\(s\) in state_dict|Unexpected key\(s\) in state_dict",
        "The checkpoint does not belong to the plans.json and dataset.json beside it: files of several trainings, or "
        "an edited number of channels or classes.",
        "Take all three from one training; then " + COMMAND,
    ),
    row(
        "a dataset that is not found",
        "could not find a dataset",
        r"Could not find a dataset with the ID \d*",
        "nnU-Net looks for models by number (-d) only below the folder that the variable nnUNet_results names.",
        "Set nnUNet_results to that folder, or give the model by its own: {command:-m FOLDER}",
    ),
    row(
        "nnUNet_results is not set",
        "is not defined|nonetype",
        r"Error: nnUNet_\w+ is not defined|Error: .{0,60}os\.PathLike object, not NoneType",
        "nnU-Net finds models by number (-d) only below the folder that nnUNet_results names.",
        "Set nnUNet_results to that folder, or give the model by its own: {command:-m FOLDER}",
    ),
    row(
        "nnU-Net's variables are not set",
        "nnunet_",
        r"nnUNet_(?:raw|preprocessed|results)\b.{0,60}(?:not (?:defined|set)|is missing|None)|(?:not (?:defined"
        r"|set)).{0,60}nnUNet_(?:raw|preprocessed|results)",
        "nnU-Net finds models by number (-d) only below the folder that nnUNet_results names. The warning about the "
        "two others does not matter for prediction.",
        "If models are to be found by number, set nnUNet_results; by their folder: {command:-m FOLDER}",
        fails=False,
    ),
    row(
        "a checkpoint that torch refuses to load",
        "weights only load failed|weights_only|weightsunpickler",
        r"Weights only load failed|WeightsUnpickler error|Unsupported (?:global|class).*weights",
        "torch 2.6 and newer load no checkpoints that hold more than tensors unless they are told to; nnU-Net before "
        "2.6 does not tell them. The checkpoint itself is fine.",
        "Which reads nnU-Net's checkpoints safely: " + COMMAND,
    ),
    row(
        "an unknown trainer",
        "trainer",
        r"Unable to locate trainer class|could not find requested nnunet trainer \w*",
        "The checkpoint was made by a trainer class that this nnU-Net does not have: it comes from another version, a "
        "fork, or a package of its author's.",
        "Put the author's trainer below the folder that nnUNet_extTrainer names (nnU-Net 2.8), or install the fork; "
        "then " + "{command:--trust PACKAGE}",
    ),
    row(
        "logits beyond float16",
        "encountered inf",
        r"Encountered inf in predicted array",
        "The network's sums left the range of half precision (65504): weights that have blown up, or voxels in other "
        "units than in training (HU shifted, not rescaled). Less memory has nothing to do with it, and the case fails "
        "here as well.",
        "Compare the image's intensities with those of a training case; try another checkpoint: -chk "
        "checkpoint_best.pth",
    ),
    # -- the environment -----------------------------------------------------------------------------------------------
    row(
        "a script without its main guard",
        "bootstrapping phase|freeze_support",
        r"before the\s+current process has finished its bootstrapping|bootstrapping phase|freeze_support\(\)",
        "Stock starts processes that import the script once more, which starts processes again. Everything that "
        "calls it must stand below "
        'if __name__ == "__main__":. ' + NEEDS_NO_POOL,
        "In the script: from nnunet_lowmem import LowMemPredictor, in the place of nnUNetPredictor; or: " + COMMAND,
    ),
    row(
        "torch sees no GPU",
        "cuda|nvidia",
        r"Error: .{0,80}?(?:not compiled with CUDA enabled|Found no NVIDIA driver|No CUDA GPUs are available"
        r"|driver version is insufficient|no kernel image is available|driver on your system is too old)",
        "torch was installed without CUDA, for another card, or the driver is too old for it.",
        "See what is here: nnunet-lowmem doctor; on the processor: {command:-device cpu}",
    ),
    row(
        "the GPU failed",
        "cuda error|cudnn|illegal memory access|device-side assert|cublas_status|nccl",
        r"CUDA error: (?!out of memory)|cuDNN error|CUDNN_STATUS_(?!ALLOC)|CUBLAS_STATUS_(?!ALLOC)"
        r"|illegal memory access|device-side assert",
        "The card or its driver reported an error that is not about memory, though stock calls it that. What it had in "
        "memory is lost.",
        "If it comes again, see whether the card is the cause: {command:-device cpu}",
    ),
    row(
        "torch.compile has no compiler",
        "compiler|triton|backendcompilerfailed|inductor",
        r"Failed to find C compiler|InvalidCxxCompiler|No working C\+\+ compiler|working triton|TritonMissing"
        r"|BackendCompilerFailed",
        "nnUNet_compile (or the default of old versions) has torch compile the network, which needs a C compiler and "
        "Triton.",
        "Set the variable nnUNet_compile=f; then " + COMMAND,
    ),
    row(
        "packages that do not go together",
        "numpy 1.x|_array_api|numpy.dtype size|importerror|modulenotfounderror|dll load failed",
        r"compiled using NumPy 1|_ARRAY_API not found|numpy\.dtype size changed|ImportError: |ModuleNotFoundError: "
        r"|DLL load failed",
        "A package is missing, or was built for another version of one beside it.",
        "In a fresh environment: python -m venv new && new/bin/pip install THIS_REPOSITORY; then see: nnunet-lowmem "
        "doctor",
    ),
    row(
        "a crash in compiled code",
        "segmentation fault|sigsegv|access violation|core dumped|0xc0000005|1073741819|3221225477|code 139|status 139",
        r"Segmentation fault|\bSIGSEGV\b|access violation|Aborted \(core dumped\)|0xC0000005|-1073741819|3221225477"
        r"|\b(?:code|status)\W{0,3}139\b",
        "A library crashed. Damaged images, and packages that were built for others, do that.",
        "Set the variable PYTHONFAULTHANDLER=1, which shows where; then " + COMMAND,
    ),
    row(
        "a command that cannot be carried out",
        "error: the following arguments|unrecognized arguments|command not found|is not recognized as",
        r"error: (?:the following arguments|unrecognized arguments|argument )|command not found"
        r"|is not recognized as an?",
        "The shell does not know the command, or the command its arguments: another environment than the one in which "
        "it is installed, or a flag of another version.",
        "Activate the environment; see the flags: nnUNetv2_predict_lowmem --help",
    ),
)
