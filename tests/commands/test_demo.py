"""The README's first command, whole: what its table says is what its files hold."""

from __future__ import annotations

import re

import numpy as np
import SimpleITK
from images import CT, read

from nnunet_lowmem.commands import cli


def test_the_table_tells_what_is_in_the_files(tmp_path, capsys):
    assert cli.main(["demo", "-o", str(tmp_path), "-device", "cpu"]) == 0
    labels = SimpleITK.GetArrayFromImage(read(tmp_path / "ct_abdomen.nii.gz"))
    told = capsys.readouterr().out
    assert re.search(rf"classes +│ 118, of which {len(np.unique(labels))} appear ", told), told
    counts = np.bincount(labels.ravel())[1:]
    spacing = read(tmp_path / "ct_abdomen.nii.gz").GetSpacing()
    for place in np.argsort(counts)[-3:]:
        assert f"label_{place + 1}  {counts[place] * np.prod(spacing) / 1000:,.1f} ml" in told
    assert labels.shape == SimpleITK.GetArrayFromImage(read(CT)).shape
    assert (tmp_path / "lowmem_report.html").stat().st_size > 50_000
