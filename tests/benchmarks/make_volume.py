"""Write a volume that is larger than RAM, uint8 and uncompressed, plane by plane: the bundled CT, enlarged, with noise.

    python make_volume.py volumes --shape 2000 2000 2000 --spacing 1.5

Shape in the order x, y, z; spacing (mm) of all axes: that of the model, so that nothing is resampled.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813

import nnunet_lowmem

CT = Path(nnunet_lowmem.__file__).parent / "data" / "ct_abdomen_3mm.nii.gz"
ENLARGED = 4
NOISE = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", type=int, nargs=3, default=[2000, 2000, 2000], metavar=("X", "Y", "Z"))
    parser.add_argument("--spacing", type=float, default=1.5)
    args = parser.parse_args()
    columns, rows, planes = args.shape
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / f"volume_{columns}x{rows}x{planes}_0000.nii"
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(args.shape)
    header.set_zooms([args.spacing] * 3)
    header.set_sform(np.diag([args.spacing] * 3 + [1.0]), 1)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    source = sitk.GetArrayFromImage(sitk.ReadImage(str(CT)))
    source = np.clip((source + 200.0) / 2, NOISE, 255 - NOISE)
    noise = np.random.default_rng(0).integers(-NOISE, NOISE, (rows, columns), np.int16)
    at = [np.arange(size) // ENLARGED for size in (planes, rows, columns)]
    z, y, x = (np.abs((index + n) % (2 * n) - n) % n for index, n in zip(at, source.shape, strict=True))
    with path.open("wb") as file:
        file.write(header.binaryblock + bytes(4))
        for plane in range(planes):
            values = source[z[plane]][np.ix_(y, x)] + np.roll(noise, 17 * plane, axis=1)
            file.write(values.astype(np.uint8).tobytes())
    print(path)


if __name__ == "__main__":
    main()
