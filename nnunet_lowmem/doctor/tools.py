"""Programs that embed nnU-Net: how they are known, and how they are run with this package in nnU-Net's place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """What to type, which a format may give flags of nnU-Net: ``f"{command:--continue_prediction}"``.

    Attributes
    ----------
    text : str
    takes_flags : bool
        It takes nnU-Net's.
    """

    text: str
    takes_flags: bool = True

    def __format__(self, flags: str) -> str:
        if not flags:
            return self.text
        return f"{self.text} {flags}" if self.takes_flags else f"{self.text}, with what it has for nnU-Net's {flags}"


@dataclass(frozen=True)
class Tool:
    """One program.

    Attributes
    ----------
    name : str
    distribution : str
        That pip installs.
    signs : tuple of str
        In lower case; what only its logs hold.
    command : Command
        What to type in the place of a command of its; FLAGS stands for those of that command.
    """

    name: str
    distribution: str
    signs: tuple[str, ...]
    command: Command


NNUNET = Tool("nnU-Net", "nnunetv2", (), Command("nnUNetv2_predict_lowmem FLAGS"))
#: Those around others first.
TOOLS = (
    Tool(
        "3D Slicer",
        "",
        ("3d slicer", "slicer.app", "slicer.org", "pythonslicer", "slicertotalsegmentator", "slicer-5", "slicer 5"),
        Command(
            "PythonSlicer -m pip install THIS_REPOSITORY; then start it with: nnUNet_predictor=lowmem Slicer", False
        ),
    ),
    Tool(
        "TotalSegmentator",
        "TotalSegmentator",
        ("please cite: https://pubs.rsna", "/totalsegmentator/", "\\totalsegmentator\\", "totalsegmentator -i"),
        Command("nnunet-lowmem run -- TotalSegmentator FLAGS", False),
    ),
    Tool(
        "MOOSE",
        "moosez",
        ("moose-z v", "/moosez/", "\\moosez\\", "moosez -"),
        Command("nnunet-lowmem run -- moosez FLAGS", False),
    ),
    Tool(
        "MONAI",
        "monai",
        ("monai.bundle", "monai/bundle", "monai.apps", "monai/apps", "monai.inferers"),
        Command("nnunet-lowmem run -- COMMAND FLAGS", False),
    ),
    Tool(
        "nnunet_lowmem",
        "",
        ("nnu-net when you use it", "lowmem_failures", "nnunetv2_predict_lowmem"),
        NNUNET.command,
    ),
)
