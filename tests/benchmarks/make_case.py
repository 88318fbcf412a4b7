"""Write a large CT for the benchmarks: the bundled one, mirrored until it fills the field of view, on a finer grid.

    python make_case.py images --shape 512 512 250 --spacing 0.8 0.8 2 [--masked 0.6]

Shape and spacing (mm) are in the order x, y, z. The file is called ``ct_512x512x250_0000.nii.gz``, or
``ct_512x512x250_masked60_0000.nii.gz``: with `--masked` this share of the volume, all beyond some x, is air of one
value, as outside of a mask, so that there are tiles of nothing else.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

import nnunet_lowmem

CT = Path(nnunet_lowmem.__file__).parent / "data" / "ct_abdomen_3mm.nii.gz"
AIR = -1024.0


def mirrored(image: sitk.Image, extent_mm: list[float]) -> sitk.Image:
    """Repeat the image, every second time mirrored, until it covers `extent_mm` and one voxel more."""
    voxels = [math.ceil(extent / spacing) + 1 for extent, spacing in zip(extent_mm, image.GetSpacing(), strict=True)]
    array = sitk.GetArrayFromImage(image)
    missing = [max(0, wanted - size) for wanted, size in zip(reversed(voxels), array.shape, strict=True)]
    padded = sitk.GetImageFromArray(np.pad(array, [(0, amount) for amount in missing], mode="symmetric"))
    padded.SetSpacing(image.GetSpacing())
    padded.SetDirection(image.GetDirection())
    return padded


def make_case(shape: list[int], spacing: list[float], source: Path = CT) -> sitk.Image:
    image = sitk.ReadImage(str(source))
    extent_mm = [size * step for size, step in zip(shape, spacing, strict=True)]
    filled = mirrored(image, extent_mm)
    return sitk.Resample(
        filled, shape, sitk.Transform(), sitk.sitkLinear, filled.GetOrigin(), spacing, filled.GetDirection(), AIR
    )


def masked(image: sitk.Image, share: float) -> sitk.Image:
    """Fill the far end of x with air; what is kept is the whole of y and z, so that few tiles lie across the border."""
    kept = round(image.GetSize()[0] * (1 - share))
    array = sitk.GetArrayFromImage(image)
    array[:, :, kept:] = AIR
    filled = sitk.GetImageFromArray(array)
    filled.CopyInformation(image)
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 250], metavar=("X", "Y", "Z"))
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.8, 0.8, 2.0], metavar=("X", "Y", "Z"))
    parser.add_argument("--masked", type=float, default=0.0, metavar="SHARE", help="of the volume that is one value")
    args = parser.parse_args()
    if not 0 <= args.masked < 1:
        parser.error(f"--masked {args.masked}: at least 0 and below 1")
    args.folder.mkdir(parents=True, exist_ok=True)
    name = f"ct_{'x'.join(map(str, args.shape))}" + (f"_masked{100 * args.masked:.0f}" if args.masked else "")
    file = args.folder / f"{name}_0000.nii.gz"
    image = make_case(args.shape, args.spacing)
    sitk.WriteImage(masked(image, args.masked) if args.masked else image, str(file))
    print(file)


if __name__ == "__main__":
    main()
