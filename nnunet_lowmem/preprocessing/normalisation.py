"""nnU-Net's normalisations: which a model asks for, and what is known of each."""

from __future__ import annotations

from pathlib import Path

import nnunetv2
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_lowmem.errors import ModelError, twin
from nnunet_lowmem.overrides import lookup
from nnunet_lowmem.overrides.bypassed import NORMALISATION, Step
from nnunet_lowmem.overrides.lookup import is_class

Normaliser = ImageNormalization
"""Of one channel; nnU-Net's."""

#: These look at one voxel at a time.
VOXELWISE = ("CTNormalization", "NoNormalization", "RGBTo01Normalization")
#: Of those: refuses values below 0 and above 255.
BOUNDED = ("RGBTo01Normalization",)
#: By mean and deviation of the channel, or of what a mask leaves of it.
ZSCORE = ("ZScoreNormalization",)
#: By the smallest and the largest value of the channel.
RESCALING = ("RescaleTo01Normalization",)
_WITHOUT_MASK = (*VOXELWISE, *RESCALING)


def normalisers(plans: PlansManager, configuration: ConfigurationManager) -> list[ImageNormalization]:
    """One normaliser per channel, found by name as ``DefaultPreprocessor`` finds it."""
    folder = str(Path(nnunetv2.__path__[0]) / "preprocessing" / "normalization")
    normalisers = []
    for c, name in enumerate(configuration.normalization_schemes):
        found = recursive_find_python_class(folder, name, "nnunetv2.preprocessing.normalization")
        if found is None:
            raise twin(ModelError, RuntimeError)(
                f"The model's plans ask for the normalisation {name}, which nnU-Net does not have."
            )
        properties = plans.foreground_intensity_properties_per_channel[str(c)]
        normalisers.append(found(use_mask_for_norm=configuration.use_mask_for_norm[c], intensityproperties=properties))
    return normalisers


def needs_mask(normaliser: ImageNormalization) -> bool:
    """Whether a normalisation looks at the segmentation beside the image."""
    if is_one_of(normaliser, ZSCORE):
        return bool(normaliser.use_mask_for_norm)
    return not is_one_of(normaliser, _WITHOUT_MASK)


def is_one_of(normaliser: ImageNormalization, known: tuple[str, ...]) -> bool:
    """Whether a normalisation is one of those, and does what nnU-Net's does."""
    own = any(is_class(type(normaliser), f"{NORMALISATION}:{name}") for name in known)
    return own and not lookup.found(Step.NORMALISATION, normaliser)
