"""Small images cut from the real ones, and where those are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import SimpleITK
import tifffile
from batchgenerators.utilities.file_and_folder_operations import save_json
from numpy.typing import NDArray
from skimage import io

import nnunet_lowmem

SUPPORT = Path(__file__).parent
DATA = SUPPORT.parent / "data"
HEAD = DATA / "t1_head_1mm.nii.gz"
ANISO = DATA / "t1_aniso_6p5mm.nii.gz"
FAKE_PREDICTORS = DATA / "fake_predictors"
BUNDLED_MODEL = Path(nnunet_lowmem.__file__).parent / "data" / "ct118"
CT = Path(nnunet_lowmem.__file__).parent / "data" / "ct_abdomen_3mm.nii.gz"


@cache
def read(path: Path) -> SimpleITK.Image:
    return SimpleITK.ReadImage(str(path))


def head() -> SimpleITK.Image:
    """The whole head at 5 mm, (37, 44, 37) voxels with zeros around it."""
    return read(HEAD)[::5, ::5, ::5]


def aniso() -> SimpleITK.Image:
    """The middle of the 6.5 mm T1, 1.56 mm in plane, 14 slices of (70, 64)."""
    return read(ANISO)[40:180:2, 60:188:2, 5:19]


def ct() -> SimpleITK.Image:
    return read(CT)[30:90, 25:75, 40:88]


def second_channel(image: SimpleITK.Image) -> SimpleITK.Image:
    """Another contrast of the same anatomy: edges."""
    return SimpleITK.Cast(SimpleITK.GradientMagnitude(image), SimpleITK.sitkFloat32)


def edited(image: SimpleITK.Image, edit: Callable[[NDArray], NDArray]) -> SimpleITK.Image:
    """`image` with its voxels, z y x, passed through `edit`; geometry kept."""
    out = SimpleITK.GetImageFromArray(edit(SimpleITK.GetArrayFromImage(image)))
    out.SetSpacing(image.GetSpacing())
    out.SetDirection(image.GetDirection())
    out.SetOrigin(image.GetOrigin())
    return out


def with_margin(image: SimpleITK.Image) -> SimpleITK.Image:
    return edited(image, lambda a: np.pad(a, [(3, 9), (0, 5), (11, 2)]))


def with_holes(image: SimpleITK.Image) -> SimpleITK.Image:
    """Zeros within the head, one pocket closed in 3D and one channel open to the top."""

    def drill(a: NDArray) -> NDArray:
        a = a.copy()
        a[14:20, 16:22, 13:19] = 0
        a[24:, 24:28, 22:26] = 0
        return a

    return edited(image, drill)


def oblique(image: SimpleITK.Image) -> SimpleITK.Image:
    """Axes permuted and flipped, then tilted: no file axis is a patient axis."""
    image = SimpleITK.DICOMOrient(image, "PIR")
    tilt = SimpleITK.VersorTransform((0.2, 0.6, 0.3), 0.3).GetMatrix()
    image.SetDirection((np.reshape(tilt, (3, 3)) @ np.reshape(image.GetDirection(), (3, 3))).ravel())
    image.SetOrigin((-71.25, 33.5, 12.0))
    return image


def isotropic_slice() -> SimpleITK.Image:
    return read(ANISO)[40:190, 50:200, 12]


def grey_picture() -> NDArray[np.uint8]:
    a = SimpleITK.GetArrayFromImage(read(ANISO))[12].astype(np.float32)
    return np.clip(a / 8, 0, 255).astype(np.uint8)


def rgb_picture(alpha: int = 0) -> NDArray[np.uint8]:
    grey = grey_picture()[40:150, 50:210]
    return np.stack([grey, np.roll(grey, 5, 0), 255 - grey, *[grey // 2] * alpha], axis=-1)


IMAGES: dict[str, Callable[[], Sequence[SimpleITK.Image | NDArray]]] = {
    "head": lambda: [head()],
    "head_two_channels": lambda: [head(), second_channel(head())],
    "head_margin": lambda: [with_margin(head())],
    "head_holes": lambda: [with_holes(head()), with_holes(second_channel(head()))],
    "head_oblique": lambda: [oblique(head())],
    "head_4d": lambda: [SimpleITK.JoinSeries([SimpleITK.Cast(head(), SimpleITK.sitkFloat32), second_channel(head())])],
    "head_voxels": lambda: [SimpleITK.GetArrayFromImage(head())],
    "small": lambda: [head()[14:24, 16:31, 12:21]],
    "one_voxel": lambda: [head()[16:17, 16:17, 16:17]],
    "one_slice": lambda: [head()[:, :, 16:17]],
    "one_row": lambda: [head()[16:17, 16:17, :]],
    "two_columns": lambda: [head()[16:18, :, :]],
    "zeros": lambda: [edited(head()[:20, :24, :22], np.zeros_like)],
    "aniso": lambda: [aniso()],
    "aniso_sagittal": lambda: [SimpleITK.PermuteAxes(aniso(), (2, 0, 1))],
    "ct": lambda: [ct()],
    "slice": lambda: [isotropic_slice()],
    "picture": lambda: [grey_picture()],
    "picture_rgb": lambda: [rgb_picture()],
    "picture_rgba": lambda: [rgb_picture(alpha=1)],
}


def write_image(image: SimpleITK.Image | NDArray, path: Path) -> None:
    if isinstance(image, SimpleITK.Image):
        SimpleITK.WriteImage(image, str(path))
    elif image.ndim == 3 and image.shape[-1] > 4:
        tifffile.imwrite(path, image)
        save_json({"spacing": [5.0, 5.0, 5.0]}, str(path.with_name(path.name.replace("_0000.tif", ".json"))))
    else:
        io.imsave(path, image, check_contrast=False)


def balls(image: str, file: Path, *centres: float) -> str:
    """Write a mask of an image whose planes hold voxels outside of it, between these shares of its diagonal."""
    like = read(Path(image))
    z, y, x = np.indices(like.GetSize()[::-1])
    balls = (sum(((at - n * c) / n) ** 2 for at, n in zip((z, y, x), z.shape, strict=True)) < 0.04 for c in centres)
    inside = np.any(list(balls), 0)
    mask = SimpleITK.GetImageFromArray(inside.astype(np.uint8))
    mask.CopyInformation(like)
    SimpleITK.WriteImage(mask, str(file))
    return str(file)


def broken(folder: Path, name: str = "broken") -> list[str]:
    path = folder / f"{name}_0000.nii.gz"
    path.write_bytes(b"this is no image")
    return [str(path)]
