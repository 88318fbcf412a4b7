"""``--fast bfloat16`` from files to files: how far its labels are from stock's, when it is used, what is kept of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from factory import ModelSpec
from images import BUNDLED_MODEL, CT, DATA, read
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import make_predictor, predict_stock, read_voxels, recorded

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.network import choices
from nnunet_lowmem.network.trial import Trial
from nnunet_lowmem.predict import ways
from nnunet_lowmem.system import compiler

pytestmark = pytest.mark.timeout(240)

FASTER = Trial(2.0, 1.0, 0.01, 0.999)
SLOWER = Trial(1.0, 2.0, 0.01, 0.999)
MR = ModelSpec(labels=5, mirror_axes=(0, 1, 2))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A cache for choices alone: kernels, compiled anew, would take half a minute."""
    folder = tmp_path / "choices"
    monkeypatch.setattr(choices, "compiler", SimpleNamespace(cache_folder=lambda: folder, keep=compiler.keep))
    return folder


@pytest.fixture
def found(monkeypatch):
    """Let a trial find what is set here: what a machine would find depends on the machine."""
    held = {"trial": FASTER, "count": 0}

    def try_both(*_: Any, **__: Any) -> Trial:
        held["count"] += 1
        return held["trial"]

    monkeypatch.setattr(ways, "try_both", try_both)
    return held


def predict(predictor: Any, files: list[str], out: Path, **options: Any) -> np.ndarray:
    out.parent.mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files([files], [str(out)], **options)
    return read_voxels(out.with_name(out.name + ".nii.gz"))


def arithmetics(folder: Path) -> list[str]:
    return [record["arithmetic"] for record in recorded(folder)]


def dice(stock: np.ndarray, ours: np.ndarray, least_voxels: int) -> np.ndarray:
    sizes = [np.bincount(labels.ravel(), minlength=118) for labels in (stock, ours)]
    there = sizes[0] > least_voxels
    return 2 * np.bincount(stock[stock == ours], minlength=118)[there] / (sizes[0] + sizes[1])[there]


def folds_of_the_bundled_model(folder: Path) -> Path:
    shutil.copytree(BUNDLED_MODEL, folder)
    shutil.copytree(DATA / "ct118_fold_1", folder / "fold_1")
    return folder


@pytest.mark.parametrize(
    "part", [np.s_[20:100, 20:90, 40:90], pytest.param(np.s_[:], marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_labels_are_close_to_stocks_on_the_real_ct(part, tmp_path, found, caplog):
    SimpleITK.WriteImage(read(CT)[part], str(tmp_path / "ct_0000.nii.gz"))
    model, files = folds_of_the_bundled_model(tmp_path / "model"), [str(tmp_path / "ct_0000.nii.gz")]
    is_whole = part == np.s_[:]
    stock = make_predictor(nnUNetPredictor, str(model), (0, 1), use_mirroring=is_whole)
    ours = make_predictor(LowMemPredictor, str(model), (0, 1), fast="bfloat16", use_mirroring=is_whole)
    predict_stock(stock, [files], [str(tmp_path / "stock")])
    expected = read_voxels(tmp_path / "stock.nii.gz")
    with caplog.at_level(logging.INFO):
        labels = predict(ours, files, tmp_path / "ours")
    assert "fast bfloat16 chosen" in caplog.text
    assert arithmetics(tmp_path) == ["bfloat16"]
    scores = dice(expected, labels, 500)
    print(f"{np.count_nonzero(expected != labels)} of {labels.size} differ; {len(scores)} classes, {scores.min():.4f}")
    assert len(scores) > 20, "hardly a class is there to compare"
    assert 0 < np.mean(expected != labels) <= 0.001
    assert scores.mean() >= 0.998
    assert scores.min() >= 0.97


NETWORKS = {
    "plain": MR,
    "residual encoder": ModelSpec(labels=5, architecture="ResidualEncoderUNet", mirror_axes=(0,)),
    "two-dimensional": ModelSpec(labels=5, patch_size=(28, 20), spacing=(4.2, 4.3), mirror_axes=(0, 1)),
    "regions": ModelSpec(labels={"background": 0, "all": [1, 2], "one": [2]}, regions_class_order=(1, 2)),
    "two folds": ModelSpec(labels=5, folds=(0, 1)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds(name, models, images, tmp_path, found):
    files, folds = images("head"), (0, 1) if "folds" in name else (0,)
    model = models(NETWORKS[name], files)
    exact, half = (make_predictor(LowMemPredictor, model, folds, fast=fast) for fast in (False, "bfloat16"))
    maps = [predict(predictor, files, tmp_path / str(n)) for n, predictor in enumerate((exact, half))]
    assert arithmetics(tmp_path) == ["exact", "bfloat16"]
    assert len(np.unique(maps[0])) > 1
    assert np.mean(maps[0] == maps[1]) >= 0.98


def test_a_trial_decides_and_is_kept_for_other_processes(models, images, tmp_path, caplog, own_cache):
    """The only one here that is not told what to find."""
    files = images("head")
    model = models(MR, files)
    with caplog.at_level(logging.INFO):
        predict(make_predictor(LowMemPredictor, model, fast="bfloat16"), files, tmp_path / "first" / "a")
    (line,) = [text for text in caplog.messages if text.startswith("fast bfloat16")]
    chosen = "bfloat16" if " chosen" in line.replace("not chosen", "") else "float32"
    (file,) = own_cache.iterdir()
    assert Trial(**json.loads(file.read_text())).chooses == (chosen == "bfloat16")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        predict(make_predictor(LowMemPredictor, model, fast="bfloat16"), files, tmp_path / "second" / "a")
    assert [text for text in caplog.messages if text.startswith("fast bfloat16")] == [
        line.replace("fast bfloat16", "fast bfloat16 earlier")
    ]
    assert arithmetics(tmp_path / "first") == arithmetics(tmp_path / "second") == [chosen]


def test_a_slow_one_runs_in_float32(models, images, tmp_path, found):
    files, found["trial"] = images("head"), SLOWER
    model = models(MR, files)
    half, single = (make_predictor(LowMemPredictor, model, fast=fast) for fast in ("bfloat16", True))
    maps = [predict(half, files, tmp_path / "a" / "x"), predict(single, files, tmp_path / "b" / "x")]
    assert np.array_equal(*maps)
    assert arithmetics(tmp_path / "a") == ["float32"]
    predict(half, files, tmp_path / "a" / "y")
    assert found["count"] == 1, "the same network is tried once"


def test_a_continued_run_keeps_the_arithmetic_of_its_files(models, images, tmp_path, found, own_cache, caplog):
    files = images("head")
    model = models(MR, files)
    predict(make_predictor(LowMemPredictor, model, fast="bfloat16"), files, tmp_path / "out" / "a")
    shutil.rmtree(own_cache)  # another machine goes on, which would choose otherwise
    found["trial"], found["count"] = SLOWER, 0
    other = make_predictor(LowMemPredictor, model, fast="bfloat16")
    with caplog.at_level(logging.INFO):
        predict(other, files, tmp_path / "out" / "b", overwrite=False)
    assert arithmetics(tmp_path / "out") == ["bfloat16", "bfloat16"]
    assert found["count"] == 0
    assert "the network is run as for the files that are there: bfloat16" in caplog.text


def test_whoever_watches_has_stocks_network(models, images, tmp_path, found, caplog):
    files = images("head")
    model = models(MR, files)
    exact, half = (make_predictor(LowMemPredictor, model, fast=fast) for fast in (False, "bfloat16"))
    seen: list[Any] = []
    half.network.encoder.register_forward_hook(lambda *_: seen.append(1))
    maps = [predict(exact, files, tmp_path / "exact"), predict(half, files, tmp_path / "half")]
    assert np.array_equal(*maps)
    assert seen
    assert "fast bfloat16: the network runs as it does without: a hook is registered on encoder" in caplog.text
    assert arithmetics(tmp_path) == ["exact", "exact"]


def test_whoever_overrides_runs_the_network(models, images, tmp_path, found, caplog):
    class Overriding(LowMemPredictor):
        def _internal_maybe_mirror_and_predict(self, x):
            return super()._internal_maybe_mirror_and_predict(x)

    files = images("head")
    model = models(MR, files)
    maps = [
        predict(make_predictor(cls, model, fast=fast), files, tmp_path / cls.__name__)
        for cls, fast in ((LowMemPredictor, False), (Overriding, "bfloat16"))
    ]
    assert np.array_equal(*maps)
    assert "without --fast" in caplog.text


def test_one_predictor_may_change_its_arithmetic(models, images, tmp_path, found):
    """The weights' order in memory decides which sums oneDNN makes: it has to come back."""
    files = images("head")
    predictor = make_predictor(LowMemPredictor, models(MR, files))
    before = predict(predictor, files, tmp_path / "a")
    for number, fast in enumerate((True, "bfloat16")):
        predictor.fast = fast
        predict(predictor, files, tmp_path / f"b{number}")
        predictor.fast = False
        image = np.random.default_rng(0).standard_normal((1, 30, 40, 30), dtype=np.float32)
        fresh = make_predictor(LowMemPredictor, models(MR, files))
        logits = [p.predict_sliding_window_return_logits(torch.from_numpy(image)) for p in (predictor, fresh)]
        assert torch.equal(*logits)
        assert np.array_equal(predict(predictor, files, tmp_path / f"c{number}"), before)


def test_logits_of_an_array_are_close(models, images, found):
    model = models(MR, images("head"))
    image = torch.randn((1, 30, 40, 30), generator=torch.Generator().manual_seed(0))
    exact, half = (
        make_predictor(LowMemPredictor, model, fast=fast).predict_sliding_window_return_logits(image).float()
        for fast in (False, "bfloat16")
    )
    assert 0 < (half - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("wrong", ["float16", "", "yes please"])
def test_what_is_no_arithmetic_is_refused(wrong):
    with pytest.raises(UsageError, match="fast must be True, False or 'bfloat16'"):
        LowMemPredictor(device=torch.device("cpu"), fast=wrong)


def test_a_processor_without_bfloat16_is_found_out(models, images, tmp_path):
    """Real: oneDNN is told to use no more than AVX2, where torch's own bfloat16 convolutions run."""
    if "avx512" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no bfloat16 that could be taken away")
    files = images("head")
    model, out = models(ModelSpec(labels=5, features=(16, 32, 32), patch_size=(32, 32, 32)), files), tmp_path / "out"
    program = "import sys; from nnunet_lowmem.commands.cli import predict_entry_point as run; sys.exit(run())"
    flags = ["-f", "0", "-device", "cpu", "--disable_tta", "--fast", "bfloat16"]
    command = [sys.executable, "-c", program, "-i", str(Path(files[0]).parent), "-o", str(out), "-m", model, *flags]
    environ = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    kept = set(compiler.cache_folder().glob("arithmetic-*"))
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    for choice in set(compiler.cache_folder().glob("arithmetic-*")) - kept:
        choice.unlink()
    assert done.returncode == 0, done.stderr
    assert "fast bfloat16 not chosen, the network runs in float32: a tile takes" in done.stdout
    assert arithmetics(out) == ["float32"]
